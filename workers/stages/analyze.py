"""Analyzes one shard of what a merge would write: trims in memory, measures conflict, and writes no weights."""

from __future__ import annotations

import json
import math
from collections.abc import Generator
from contextlib import closing
from functools import partial
from typing import Any

from service.contract import artifacts
from service.contract.parts import Done
from service.contract.plan import Plan, ShardPlan, TensorPlan
from workers.abreast import tensors_abreast
from workers.conflict import Conflict
from workers.machine import allow_tf32
from workers.merging import Analyzed, analyze_tensor
from workers.sources import Found, Sources
from workers.stages.merge import kept, totals
from workers.tensors import TensorReader
from workers.trim_log import layer_of
from workers.work import Work
from workers.writing import write_artifact


def run(work: Work) -> Done:
    """Leave a shard's part of the trim log, and what its task vectors do to each other by layer and role.

    Raises:
        BadTensor, BadInput: an input is not what it should be; the tensor is named.
        InputChanged, StorageFailure.
    """
    allow_tf32(work.recipe.allow_tf32)
    plan = work.plan()
    shard = plan.shards[work.part]
    rows: list[dict[str, Any]] = []
    found: dict[tuple[str, str], Conflict] = {}
    with TensorReader(work.objects) as reader, closing(_analyzed(work, plan, shard, reader)) as analyzing:
        for tensor, analyzed, bytes_read in analyzing:
            if analyzed is not None:
                rows += analyzed.rows
                place = (layer_of(tensor.name), tensor.role.value)
                found[place] = found[place] + analyzed.conflict if place in found else analyzed.conflict
            work.watch.step(tensors=1, bytes_read=bytes_read)
    _leave(work, rows, found)
    return Done(output={"trimmed": totals(rows)}, warnings=kept(rows))


def _analyzed(
    work: Work, plan: Plan, shard: ShardPlan, reader: TensorReader
) -> Generator[tuple[TensorPlan, Analyzed | None, int], None, None]:
    """The shard's tensors in order, what was found out about each that is merged, and the bytes that were read."""
    sources = Sources.open(work, plan, reader)
    analyze = partial(_analyze, work)
    for tensor, analyzed in tensors_abreast(work, shard, analyze, sources.read(work, shard)):
        yield tensor, analyzed, sources.bytes_of(tensor, math.prod(tensor.shape))


def _analyze(work: Work, found: Found) -> tuple[TensorPlan, Analyzed | None]:
    if found.plan.source != "merged":
        return found.plan, None
    known = (found.base, found.experts, found.statistics)
    return found.plan, analyze_tensor(found.plan, work.recipe, *known, work.device)


def _leave(work: Work, rows: list[dict[str, Any]], found: dict[tuple[str, str], Conflict]) -> None:
    """Both files lie in the job's scratch until the report is made."""
    log = "".join(json.dumps(row) + "\n" for row in rows)
    sums = [{"layer": layer, "role": role, **conflict.as_dict()} for (layer, role), conflict in found.items()]
    job = work.claim.job_id
    write_artifact(work.objects, "", artifacts.trim_log_part(work.workspace, job, work.part), log.encode())
    write_artifact(work.objects, "", artifacts.analysis_part(work.workspace, job, work.part), json.dumps(sums).encode())
