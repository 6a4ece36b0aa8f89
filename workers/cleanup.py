"""Takes away what a job wrote when it can't have a result."""

from __future__ import annotations

import logging

from service.contract import artifacts
from service.contract.parts import Claim
from service.stores.objects import Objects

logger = logging.getLogger(__name__)


def remove_scratch(objects: Objects, workspace: str, job_id: str) -> None:
    """Delete what only later stages needed."""
    for info in list(objects.list(artifacts.scratch(workspace, job_id))):
        objects.delete(info.address)


def remove_outputs(objects: Objects, claim: Claim, workspace: str) -> None:
    """Delete what a failed job left under its prefix, best effort: without a manifest nothing there is a result.

    Admission saw the prefix empty, or the recipe said to overwrite, so all of it is the job's own.
    """
    try:
        for info in list(objects.list(claim.prefix)):
            objects.delete(info.address)
        remove_scratch(objects, workspace, claim.job_id)
    except Exception:  # the job has failed already; what is left is swept with its record
        logger.exception("Could not remove what %s left under %s", claim.job_id, claim.prefix)
