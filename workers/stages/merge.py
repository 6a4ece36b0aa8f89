"""Merges one shard: reads base and tasks in large spans, trims and merges tensor by tensor, and streams the result."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from service.contract import artifacts
from service.contract.checkpoint import DTYPE_BYTES, Checkpoint, LowRank, TensorInfo
from service.contract.parts import Done
from service.contract.plan import Plan, ShardPlan, TensorPlan
from service.contract.recipe import Recipe
from service.contract.stages import Stage
from service.stores.objects import failures
from workers.baselines import as_asked
from workers.chosen import as_chosen
from workers.low_rank import LowRankVector
from workers.machine import allow_tf32
from workers.magnitudes import Cut
from workers.merging import Merged, is_entrywise, merge_tensor
from workers.statistics import Statistic
from workers.statistics_file import StatisticsFile, StatisticsReading
from workers.survey import WholeCut, from_json
from workers.tensors import (
    NAMES,
    FactorsReading,
    Reading,
    TensorReader,
    TensorWriter,
    batches,
    read_ahead,
    write_artifact,
)
from workers.upload import Uploader
from workers.work import Work

GROUP_BYTES = 16 << 20  # read and merged at once, from all checkpoints together
READ_AHEAD_BYTES = 48 << 20  # read while a group is merged
ALIGNED = 1 << 16  # entries: where tensors may be cut
SURVEY_LIMIT_BYTES = 256 << 20


def run(work: Work) -> Done:
    """Write one output shard, its removed components and its part of the trim log.

    Raises:
        BadTensor, BadInput: an input is not what it should be; the tensor is named.
        InputChanged, StorageFailure.
    """
    allow_tf32(work.recipe.allow_tf32)
    work = as_chosen(work)
    return merge_shard(*as_asked(work, work.plan()))


def merge_shard(work: Work, plan: Plan) -> Done:
    """As ``run``, of the shard that ``work.part`` counts in ``plan``."""
    shard = plan.shards[work.part]
    rows: list[dict[str, Any]] = []
    removed: dict[str, Tensor] = {}
    header = {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard.tensors}
    with TensorReader(work.objects) as reader, TensorWriter(work.objects, plan.prefix, shard.file, header) as writer:
        sources = _Sources.open(work, plan, reader)
        for group, tensor, merged in _merged(work, shard, sources):
            if group.entries is None:
                writer.add(tensor.name, merged.tensor)
            else:
                writer.add_entries(tensor.name, merged.tensor)
            rows += merged.rows
            removed |= merged.removed
            work.watch.step(
                tensors=int(group.is_last),
                bytes_read=sources.bytes_of(tensor, merged.tensor.numel()),
                bytes_written=merged.tensor.nbytes,
            )
        weights = writer.commit()
    files = [weights, *_write_removed(work, plan, removed)]
    log = "".join(json.dumps(row) + "\n" for row in rows).encode()
    write_artifact(work.objects, "", artifacts.trim_log_part(work.workspace, work.claim.job_id, work.part), log)
    return Done(output={"files": [file.model_dump() for file in files], "trimmed": totals(rows)}, warnings=_kept(rows))


@dataclass(frozen=True)
class _Group:
    """What is read and merged at once: some whole tensors, or some entries of one."""

    tensors: tuple[TensorPlan, ...]
    entries: slice | None
    nbytes: int

    @property
    def is_last(self) -> bool:
        """Whether nothing of its tensors is left to do afterwards."""
        return self.entries is None or self.entries.stop == math.prod(self.tensors[0].shape)

    @property
    def first(self) -> int:
        """How many entries of its tensor come before."""
        return 0 if self.entries is None else int(self.entries.start)


@dataclass(frozen=True)
class _Reading:
    """A group that is being read from everywhere at once."""

    base: Reading
    tasks: tuple[Reading, ...]
    factors: tuple[FactorsReading, ...]
    statistics: tuple[StatisticsReading, ...]

    def tensors(self) -> list[dict[str, Tensor]]:
        """The base's tensors and every task's own, once they are there."""
        return [reading.wait() for reading in (self.base, *self.tasks)]


@dataclass(frozen=True)
class _Sources:
    """What a shard is made from, opened and pinned."""

    reader: TensorReader
    base: Checkpoint
    tasks: tuple[Checkpoint, ...]
    statistics: tuple[StatisticsFile, ...]
    surveys: tuple[list[WholeCut], ...]

    @classmethod
    def open(cls, work: Work, plan: Plan, reader: TensorReader) -> _Sources:
        recipe = work.recipe
        base = reader.open(recipe.base, plan.inputs["base"])
        tasks = tuple(reader.open(task.checkpoint, plan.inputs[f"task:{task.name}"], base) for task in recipe.tasks)
        calibrated = work.outputs(Stage.CALIBRATE)
        statistics = tuple(
            StatisticsFile(reader, output["statistics"], plan.inputs.get(f"statistics:{task.name}", ()))
            for task, output in zip(recipe.tasks, calibrated, strict=False)
            if "statistics" in output
        )
        return cls(reader, base, tasks, statistics, _surveys(work, calibrated))

    def cuts(self, tensor: TensorPlan) -> list[list[Cut]]:
        """Where each task's largest entries end in one tensor, where the method has asked for it."""
        return [[cut.of(tensor.name) for cut in cuts] for cuts in self.surveys]

    def start(self, group: _Group) -> _Reading:
        merged = [tensor.name for tensor in group.tensors if tensor.source == "merged"]
        return _Reading(
            base=self.reader.start(self.base, [tensor.name for tensor in group.tensors], group.entries),
            tasks=tuple(self.reader.start(task, _own(task, merged), group.entries) for task in self.tasks),
            factors=tuple(self.reader.start_factors(task, merged) for task in self.tasks),
            statistics=() if group.entries else tuple(file.start(merged) for file in self.statistics),
        )

    def bytes_of(self, tensor: TensorPlan, entries: int) -> int:
        """Bytes to read for so many entries of a tensor, or for all of them where an adapter adds to it."""
        own = DTYPE_BYTES[tensor.base_dtype] * entries
        tasks = self.tasks if tensor.source == "merged" else ()
        changes = [task.changes.get(tensor.name) for task in tasks]
        added = sum(change.down.nbytes + change.up.nbytes for change in changes if isinstance(change, LowRank))
        return own * (1 + sum(len(_own(task, [tensor.name])) for task in tasks)) + added

    def are_in_one_piece(self, name: str) -> bool:
        """Whether a tensor lies in every checkpoint as it is to be merged, so that some of its entries can be read."""
        return not any(isinstance(task.changes.get(name), LowRank) for task in self.tasks)

    def groups(self, recipe: Recipe, shard: ShardPlan) -> Iterator[_Group]:
        """Whole tensors up to GROUP_BYTES together; larger ones in parts, if their entries are merged one by one."""
        by_name = {tensor.name: tensor for tensor in shard.tensors}
        sizes = [(tensor.name, self.bytes_of(tensor, math.prod(tensor.shape))) for tensor in shard.tensors]
        for names in batches(sizes, GROUP_BYTES):
            group = tuple(by_name[name] for name in names)
            nbytes = sum(self.bytes_of(tensor, math.prod(tensor.shape)) for tensor in group)
            if nbytes > GROUP_BYTES and is_entrywise(group[0], recipe) and self.are_in_one_piece(group[0].name):
                yield from self._parts(group[0])
            else:
                yield _Group(group, None, nbytes)

    def _parts(self, tensor: TensorPlan) -> Iterator[_Group]:
        """Parts of much the same size."""
        total = math.prod(tensor.shape)
        parts = -(-self.bytes_of(tensor, total) // GROUP_BYTES)
        each = -(-total // (parts * ALIGNED)) * ALIGNED
        for first in range(0, total, each):
            entries = slice(first, min(first + each, total))
            yield _Group((tensor,), entries, self.bytes_of(tensor, entries.stop - first))


def _own(task: Checkpoint, names: Sequence[str]) -> list[str]:
    """The tensors of which a task has its own; an adapter leaves most as the base has them, or adds to them."""
    if task.adapter is None:
        return list(names)
    return [name for name in names if isinstance(task.changes.get(name), TensorInfo)]


def _merged(work: Work, shard: ShardPlan, sources: _Sources) -> Iterator[tuple[_Group, TensorPlan, Merged]]:
    """The shard's tensors, merged one by one or part by part, while what follows is read."""
    groups = list(sources.groups(work.recipe, shard))
    readings = read_ahead(groups, sources.start, lambda group: group.nbytes, READ_AHEAD_BYTES)
    for (group, reading), tensors in Uploader(work.device).ahead(readings, lambda item: item[1].tensors()):
        yield from _merge_group(work, group, reading, tensors, sources)


def _surveys(work: Work, calibrated: Sequence[Mapping[str, Any]]) -> tuple[list[WholeCut], ...]:
    addresses = [output["survey"] for output in calibrated if "survey" in output]
    with failures():
        return tuple(from_json(work.objects.read_all(address, SURVEY_LIMIT_BYTES)) for address in addresses)


def _merge_group(
    work: Work, group: _Group, reading: _Reading, tensors: Sequence[dict[str, Tensor]], sources: _Sources
) -> Iterator[tuple[_Group, TensorPlan, Merged]]:
    base, *tasks = tensors
    factors = [adapter.wait() for adapter in reading.factors]
    statistics = [file.wait() for file in reading.statistics]
    for tensor in group.tensors:
        start = base.pop(tensor.name)
        if tensor.source == "base":
            yield group, tensor, Merged(start.cpu(), [], {})
            continue
        experts = [
            _expert(checkpoint, tensor.name, start, own, added)
            for checkpoint, own, added in zip(sources.tasks, tasks, factors, strict=True)
        ]
        known = _statistics_of(tensor.name, statistics, len(tasks))
        cuts = sources.cuts(tensor)
        yield (
            group,
            tensor,
            merge_tensor(tensor, work.recipe, start, experts, known, work.device, cuts, first=group.first),
        )


def _expert(
    task: Checkpoint, name: str, base: Tensor, own: dict[str, Tensor], added: dict[str, LowRankVector]
) -> Tensor | LowRankVector:
    """A task's own tensor, what its adapter adds to the base's, or the base's where the adapter leaves it alone."""
    if name in added:
        return added.pop(name)
    return base if task.adapter is not None and name not in task.changes else own.pop(name)


def _statistics_of(name: str, statistics: Sequence[Mapping[str, Statistic]], tasks: int) -> list[Statistic | None]:
    if not statistics:
        return [None] * tasks
    return [known.get(name) for known in statistics]


def _write_removed(work: Work, plan: Plan, removed: Mapping[str, Tensor]) -> list[Any]:
    """The removed components beside the shard: with them anyone can merge again, or put back what was cut."""
    if not removed:
        return []
    # Indices are wider than bases: first, so that every tensor can be viewed in place.
    ordered = sorted(removed.items(), key=lambda item: -item[1].element_size())
    header = {name: (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in ordered}
    with TensorWriter(work.objects, plan.prefix, artifacts.removed(work.part), header) as writer:
        for name, tensor in ordered:
            writer.add(name, tensor)
        file = writer.commit()
    work.watch.step(bytes_written=file.size)
    return [file]


def totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """What trimming did by role: task vectors' energy, what was removed of it, and the conflict before and after."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        sums = found.setdefault(row["role"], dict.fromkeys(TOTALS, 0.0))
        sums["vectors"] += 1
        sums["trimmed"] += row["removed"] > 0
        sums["energy"] += row["energy"]
        sums["energy_removed"] += row["energy"] * row["energy_removed"]
        sums["measured"] += row["conflict_before"] is not None
        sums["conflict_before"] += row["conflict_before"] or 0.0
        sums["conflict_after"] += row["conflict_after"] or 0.0
    return found


TOTALS = ("vectors", "trimmed", "energy", "energy_removed", "measured", "conflict_before", "conflict_after")


def _kept(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    reasons = {row["parameter"]: row["reason"] for row in rows if row["reason"]}
    return tuple(f"{parameter}: kept untrimmed, {reason}" for parameter, reason in list(reasons.items())[:20])
