"""Reads what a shard is made from: base, tasks and statistics, in large spans, while what came before is worked on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from service.contract.checkpoint import DTYPE_BYTES, Checkpoint, LowRank, TensorInfo
from service.contract.plan import Plan, ShardPlan, TensorPlan
from service.contract.recipe import Recipe
from service.contract.stages import Stage
from service.stores.objects import failures
from workers.low_rank import LowRankVector
from workers.magnitudes import Cut
from workers.merging import is_entrywise
from workers.statistics import Statistic
from workers.statistics_file import StatisticsFile, StatisticsReading
from workers.survey import WholeCut, from_json
from workers.tensors import FactorsReading, Reading, TensorReader, batches, read_ahead
from workers.unread import Unread
from workers.upload import Uploader
from workers.work import Work

GROUP_BYTES = 16 << 20  # read and merged at once from all checkpoints together, or
REQUEST_BYTES = 10 << 20  # from each of them, where every read is a request to a server, whose price is in its number
GROUP_LIMIT_BYTES = 96 << 20
SMALL_BYTES = 2 << 20  # of all checkpoints together: what is less is read in spans also where files are near
UNREAD_BYTES = 32 << 20  # merged at once where nothing is read beforehand: the result alone takes memory
READ_AHEAD_BYTES = 48 << 20  # read while a group is merged, or one group where that is more
ALIGNED = 1 << 16  # entries: where tensors may be cut
SURVEY_LIMIT_BYTES = 256 << 20


@dataclass(frozen=True)
class Group:
    """What is read and merged at once: some whole tensors, or some entries of one, which may stay unread until then."""

    tensors: tuple[TensorPlan, ...]
    entries: slice | None
    nbytes: int
    is_unread: bool = False

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


@dataclass(frozen=True, eq=False)
class Found:
    """One tensor of the base, every task's, and what is known of its inputs; of tasks nothing where it is copied.

    What is ``unread``, the base's entries and every task's, is there in place of the tensors.
    """

    group: Group
    plan: TensorPlan
    base: Tensor
    experts: Sequence[Tensor | LowRankVector] = ()
    statistics: Sequence[Statistic | None] = ()
    unread: Sequence[Unread] = ()


@dataclass(frozen=True)
class Sources:
    """What a shard is made from, opened and pinned."""

    reader: TensorReader
    base: Checkpoint
    tasks: tuple[Checkpoint, ...]
    statistics: tuple[StatisticsFile, ...]
    surveys: tuple[list[WholeCut], ...]
    are_near: bool = False

    @classmethod
    def open(cls, work: Work, plan: Plan, reader: TensorReader) -> Sources:
        recipe = work.recipe
        base = reader.open(recipe.base, plan.inputs["base"])
        tasks = tuple(reader.open(task.checkpoint, plan.inputs[f"task:{task.name}"], base) for task in recipe.tasks)
        calibrated = work.outputs(Stage.CALIBRATE)
        statistics = tuple(
            StatisticsFile(reader, output["statistics"], plan.inputs.get(f"statistics:{task.name}", ()))
            for task, output in zip(recipe.tasks, calibrated, strict=False)
            if "statistics" in output
        )
        are_near = work.device == "cpu" and reader.are_near((base, *tasks))
        return cls(reader, base, tasks, statistics, _surveys(work, calibrated), are_near)

    @property
    def group_bytes(self) -> int:
        """How much is read and merged at once."""
        if self.are_near:
            return GROUP_BYTES
        return max(GROUP_BYTES, min(REQUEST_BYTES * (len(self.tasks) + 1), GROUP_LIMIT_BYTES))

    def cuts(self, tensor: TensorPlan) -> list[list[Cut]]:
        """Where each task's largest entries end in one tensor, where the method has asked for it."""
        return [[cut.of(tensor.name) for cut in cuts] for cuts in self.surveys]

    def start(self, group: Group) -> _Reading:
        merged = [tensor.name for tensor in group.tensors if tensor.source == "merged"]
        return _Reading(
            base=self.reader.start(self.base, [tensor.name for tensor in group.tensors], group.entries),
            tasks=tuple(self.reader.start(task, _own(task, merged), group.entries) for task in self.tasks),
            factors=tuple(self.reader.start_factors(task, merged) for task in self.tasks),
            statistics=() if group.entries else tuple(file.start(merged) for file in self.statistics),
        )

    def read(self, work: Work, shard: ShardPlan) -> Iterator[Found]:
        """What was found of each of the shard's tensors, or of some of its entries, while what follows is read."""
        groups = list(self.groups(work.recipe, shard))
        read = self._read(work, [group for group in groups if not group.is_unread])
        for group in groups:
            if group.is_unread:
                yield self._unread(group)
            else:
                yield from islice(read, len(group.tensors))

    def _unread(self, group: Group) -> Found:
        (tensor,), entries = group.tensors, group.entries or slice(0, 0)
        unread = self.reader.unread((self.base, *self.tasks), tensor.name, entries)
        return Found(group, tensor, torch.empty(0), unread=unread)

    def _read(self, work: Work, groups: Sequence[Group]) -> Iterator[Found]:
        ahead = max(READ_AHEAD_BYTES, self.group_bytes)
        readings = read_ahead(groups, self.start, lambda group: group.nbytes, ahead)
        for (group, reading), tensors in Uploader(work.device).ahead(readings, lambda item: item[1].tensors()):
            yield from self._found(group, reading, tensors)

    def _found(self, group: Group, reading: _Reading, tensors: Sequence[dict[str, Tensor]]) -> Iterator[Found]:
        base, *tasks = tensors
        factors = [adapter.wait() for adapter in reading.factors]
        statistics = [file.wait() for file in reading.statistics]
        for tensor in group.tensors:
            start = base.pop(tensor.name)
            if tensor.source == "base":
                yield Found(group, tensor, start)
                continue
            experts = [
                _expert(checkpoint, tensor.name, start, own, added)
                for checkpoint, own, added in zip(self.tasks, tasks, factors, strict=True)
            ]
            yield Found(group, tensor, start, experts, _statistics_of(tensor.name, statistics, len(tasks)))

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

    def groups(self, recipe: Recipe, shard: ShardPlan) -> Iterator[Group]:
        """Whole tensors up to a limit together; larger ones in parts, if their entries are merged one by one."""
        by_name = {tensor.name: tensor for tensor in shard.tensors}
        sizes = [(tensor.name, self.bytes_of(tensor, math.prod(tensor.shape))) for tensor in shard.tensors]
        are_unread = self.are_near and recipe.method.entrywise and not recipe.method.trims
        limit = SMALL_BYTES if are_unread else self.group_bytes
        for names in batches(sizes, limit):
            group = tuple(by_name[name] for name in names)
            nbytes = sum(self.bytes_of(tensor, math.prod(tensor.shape)) for tensor in group)
            may_be_cut = is_entrywise(group[0], recipe) and self.are_in_one_piece(group[0].name)
            if nbytes > limit and may_be_cut:
                yield from self._parts(group[0], are_unread and group[0].source == "merged")
            else:
                yield Group(group, None, nbytes)

    def _parts(self, tensor: TensorPlan, is_unread: bool) -> Iterator[Group]:
        """Parts of much the same size."""
        total = math.prod(tensor.shape)
        parts = -(-self.bytes_of(tensor, total) // (UNREAD_BYTES if is_unread else self.group_bytes))
        each = -(-total // (parts * ALIGNED)) * ALIGNED
        for first in range(0, total, each):
            entries = slice(first, min(first + each, total))
            yield Group((tensor,), entries, self.bytes_of(tensor, entries.stop - first), is_unread)


def _own(task: Checkpoint, names: Sequence[str]) -> list[str]:
    """The tensors of which a task has its own; an adapter leaves most as the base has them, or adds to them."""
    if task.adapter is None:
        return list(names)
    return [name for name in names if isinstance(task.changes.get(name), TensorInfo)]


def _surveys(work: Work, calibrated: Sequence[Mapping[str, Any]]) -> tuple[list[WholeCut], ...]:
    addresses = [output["survey"] for output in calibrated if "survey" in output]
    with failures():
        return tuple(from_json(work.objects.read_all(address, SURVEY_LIMIT_BYTES)) for address in addresses)


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
