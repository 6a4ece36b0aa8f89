"""Takes away what a job wrote when it can't have a result."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from service.contract import artifacts
from service.contract.parts import Claim
from service.contract.plan import Plan
from service.contract.stages import Stage
from service.stores.objects import Objects, StoreError, Unfinished
from workers.work import plan_address, read_plan

logger = logging.getLogger(__name__)


def remove_scratch(objects: Objects, workspace: str, job_id: str) -> None:
    """Delete what only later stages needed, best effort: the service sweeps what a job that has ended leaves there."""
    try:
        for info in list(objects.list(artifacts.scratch(workspace, job_id))):
            objects.delete(info.address)
    except StoreError:
        logger.exception("Could not remove what %s left in scratch", job_id)


def drop_begun(objects: Objects, begun: Sequence[Unfinished]) -> None:
    """Drop what nobody goes on with, best effort: the service sweeps what is half written."""
    for found in begun:
        try:
            objects.abandon(found)
        except StoreError:
            logger.exception("Could not drop what was written of %s", found.address)


def remove_outputs(objects: Objects, claim: Claim, workspace: str) -> None:
    """Delete what a failed job wrote under its prefix, best effort: without a manifest nothing there is a result.

    Only what its plan names: a recipe that may overwrite can point at a folder with other people's files in it.
    """
    try:
        # A job that failed at planning has written nothing, and an earlier result there is still whole.
        if claim.stage is not Stage.PLAN:
            plan = read_plan(objects, claim, workspace)
            objects.delete(claim.prefix + artifacts.MANIFEST)  # of a worker that wrote it and could not say so
            objects.delete(plan_address(claim, workspace))  # next: without it, no other part can go on by mistake
            objects.delete(claim.prefix + artifacts.PLAN)  # after a search, the plan of what was chosen
            for name in _names(plan):
                objects.delete(claim.prefix + name)
    except Exception:  # the job has failed already; what is left is no result, and goes with its record
        logger.exception("Could not remove what %s left under %s", claim.job_id, claim.prefix)
    remove_scratch(objects, workspace, claim.job_id)


def _names(plan: Plan) -> Iterator[str]:
    """Everything that a job with this plan may have written beside it."""
    for index, shard in enumerate(plan.shards):
        yield from (shard.file, artifacts.removed(index))
    for head in plan.heads:
        yield from (artifacts.head(head.task), artifacts.head_config(head.task))
    yield from (file.address.rpartition("/")[2] for file in plan.side_files)
    yield from (artifacts.INDEX, artifacts.MODEL_CARD, artifacts.TRIM_LOG)
    yield from (artifacts.REPORT_JSON, artifacts.REPORT_HTML, artifacts.RECIPE)
