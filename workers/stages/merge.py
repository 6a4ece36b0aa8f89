"""Merges one shard: reads base and tasks in large spans, trims and merges tensor by tensor, and streams the result."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

from torch import Tensor

from service.contract import artifacts
from service.contract.notices import Notice
from service.contract.parts import Done
from service.contract.plan import Plan, ShardPlan, TensorPlan
from service.stores.objects import failures
from workers.abreast import tensors_abreast
from workers.baselines import as_asked
from workers.chosen import as_chosen
from workers.conflict import Conflict
from workers.machine import allow_tf32
from workers.merging import Merged, merge_tensor, merge_unread
from workers.sources import Found, Group, Sources
from workers.tensors import NAMES, TensorReader
from workers.work import Work
from workers.writing import TensorWriter, write_artifact


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
    conflict = Conflict.none(len(work.recipe.tasks))
    header = {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard.tensors}
    with (
        TensorReader(work.objects) as reader,
        TensorWriter(work.objects, plan.prefix, shard.file, header) as writer,
        closing(_merged(work, plan, shard, reader)) as merging,
    ):
        for group, tensor, merged, bytes_read in merging:
            if group.entries is None:
                writer.add(tensor.name, merged.tensor)
            else:
                writer.add_entries(tensor.name, merged.tensor)
            rows += merged.rows
            removed |= merged.removed
            conflict = conflict if merged.conflict is None else conflict + merged.conflict
            work.watch.step(tensors=int(group.is_last), bytes_read=bytes_read, bytes_written=merged.tensor.nbytes)
        weights = writer.commit()
    files = [weights, *_write_removed(work, plan, removed)]
    log = "".join(json.dumps(row) + "\n" for row in rows).encode()
    write_artifact(work.objects, "", artifacts.trim_log_part(work.workspace, work.claim.job_id, work.part), log)
    output = {"files": [file.model_dump() for file in files], "trimmed": totals(rows)}
    if conflict.measured:
        output["conflict"] = conflict.as_dict()
    return Done(output=output, warnings=kept(rows))


def _merged(
    work: Work, plan: Plan, shard: ShardPlan, reader: TensorReader
) -> Generator[tuple[Group, TensorPlan, Merged, int], None, None]:
    """The shard's tensors, or some of their entries, in order, and the bytes that were read for each."""
    sources = Sources.open(work, plan, reader)
    found = sources.read(work, shard)
    for group, tensor, merged in tensors_abreast(work, shard, partial(_merge, work, sources), found):
        yield group, tensor, merged, sources.bytes_of(tensor, merged.tensor.numel())


def _merge(work: Work, sources: Sources, found: Found) -> tuple[Group, TensorPlan, Merged]:
    """A tensor, or some of its entries, merged or copied."""
    tensor, group = found.plan, found.group
    if tensor.source == "base":
        return group, tensor, Merged(found.base.cpu(), [], {})
    cuts, first = sources.cuts(tensor), group.first
    if found.unread:
        with failures():
            return group, tensor, merge_unread(tensor, work.recipe, found.unread, cuts, first)
    merged = merge_tensor(
        tensor, work.recipe, found.base, found.experts, found.statistics, work.device, cuts, first=first
    )
    return group, tensor, merged


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


def kept(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """A sentence for each parameter that was not trimmed though it should have been, the first 20."""
    reasons = {row["parameter"]: row["reason"] for row in rows if row["reason"]}
    first = list(reasons.items())[:20]
    return tuple(Notice("kept_untrimmed", parameter=parameter, **reason.values) for parameter, reason in first)
