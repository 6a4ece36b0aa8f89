"""Merges one shard: reads base and tasks in large spans, trims and merges tensor by tensor, and streams the result."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from service.contract import artifacts
from service.contract.checkpoint import Checkpoint
from service.contract.parts import Done
from service.contract.plan import Plan, ShardPlan, TensorPlan
from service.contract.stages import Stage
from service.stores.objects import failures
from workers.magnitudes import Cut
from workers.merging import Merged, merge_tensor
from workers.statistics import Statistic
from workers.statistics_file import StatisticsFile, StatisticsReading
from workers.survey import WholeCut, from_json
from workers.tensors import NAMES, Reading, TensorReader, TensorWriter, batches, write_artifact
from workers.work import Work

BATCH_BYTES = 64 << 20  # read while the batch before is merged
SURVEY_LIMIT_BYTES = 256 << 20


def run(work: Work) -> Done:
    """Write one output shard, its removed components and its part of the trim log.

    Raises:
        BadTensor, BadInput: an input is not what it should be; the tensor is named.
        InputChanged, StorageFailure.
    """
    plan = work.plan()
    shard = plan.shards[work.part]
    rows: list[dict[str, Any]] = []
    removed: dict[str, Tensor] = {}
    header = {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard.tensors}
    with TensorReader(work.objects) as reader, TensorWriter(work.objects, plan.prefix, shard.file, header) as writer:
        sources = _Sources.open(work, plan, reader)
        for tensor, merged in _merged(work, shard, sources):
            writer.add(tensor.name, merged.tensor)
            rows += merged.rows
            removed |= merged.removed
            work.watch.step(tensors=1, bytes_read=sources.bytes_of(tensor), bytes_written=merged.tensor.nbytes)
        weights = writer.commit()
    files = [weights, *_write_removed(work, plan, removed)]
    log = "".join(json.dumps(row) + "\n" for row in rows).encode()
    write_artifact(work.objects, "", artifacts.trim_log_part(work.workspace, work.claim.job_id, work.part), log)
    return Done(output={"files": [file.model_dump() for file in files], "trimmed": totals(rows)}, warnings=_kept(rows))


@dataclass(frozen=True)
class _Batch:
    """The tensors of one batch, being read from everywhere at once."""

    base: Reading
    tasks: tuple[Reading, ...]
    statistics: tuple[StatisticsReading, ...]


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

    def start(self, tensors: Sequence[TensorPlan]) -> _Batch:
        merged = [tensor.name for tensor in tensors if tensor.source == "merged"]
        return _Batch(
            base=self.reader.start(self.base, [tensor.name for tensor in tensors]),
            tasks=tuple(self.reader.start(task, merged) for task in self.tasks),
            statistics=tuple(file.start(merged) for file in self.statistics),
        )

    def bytes_of(self, tensor: TensorPlan) -> int:
        """Bytes that were read for one tensor."""
        return tensor.nbytes_in * (len(self.tasks) + 1 if tensor.source == "merged" else 1)


def _merged(work: Work, shard: ShardPlan, sources: _Sources) -> Iterator[tuple[TensorPlan, Merged]]:
    """The shard's tensors, merged one by one, while the next batch is read."""
    by_name = {tensor.name: tensor for tensor in shard.tensors}
    sized = [(tensor.name, sources.bytes_of(tensor)) for tensor in shard.tensors]
    groups = [[by_name[name] for name in names] for names in batches(sized, BATCH_BYTES)]
    upcoming = sources.start(groups[0]) if groups else None
    for index, group in enumerate(groups):
        batch = upcoming
        upcoming = sources.start(groups[index + 1]) if index + 1 < len(groups) else None
        if batch is not None:
            yield from _merge_batch(work, group, batch, sources)


def _surveys(work: Work, calibrated: Sequence[Mapping[str, Any]]) -> tuple[list[WholeCut], ...]:
    addresses = [output["survey"] for output in calibrated if "survey" in output]
    with failures():
        return tuple(from_json(work.objects.read_all(address, SURVEY_LIMIT_BYTES)) for address in addresses)


def _merge_batch(
    work: Work, group: Sequence[TensorPlan], batch: _Batch, sources: _Sources
) -> Iterator[tuple[TensorPlan, Merged]]:
    base = batch.base.wait()
    tasks = [reading.wait() for reading in batch.tasks]
    statistics = [reading.wait() for reading in batch.statistics]
    for tensor in group:
        if tensor.source == "base":
            yield tensor, Merged(base.pop(tensor.name), [], {})
            continue
        experts = [task.pop(tensor.name) for task in tasks]
        known = _statistics_of(tensor.name, statistics, len(tasks))
        yield (
            tensor,
            merge_tensor(tensor, work.recipe, base.pop(tensor.name), experts, known, work.device, sources.cuts(tensor)),
        )


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
