"""Removes what a merge wrote, and nothing else that lies in its folder."""

from __future__ import annotations

import re
from collections.abc import Iterator

from service.api.deps import House
from service.contract import artifacts
from service.contract.errors import JobNotTerminal, OutputExists
from service.contract.job import Job

# What a merge writes beside its weights, known by name: a job without a result has no list of what it wrote.
OURS = re.compile(r"merge/(recipe\.json|plan\.json|report\.json|report\.html|trim-log\.jsonl|removed-\d+\.safetensors)")


def wipe(job: Job, doors: House) -> None:
    """Remove the artifacts of a job that has ended, the manifest first: half a result must not look whole.

    Raises:
        JobNotTerminal: the job may still be writing.
        OutputExists: another job was put in the same folder later, so what lies there is its own.
    """
    if not job.status.is_terminal:
        raise JobNotTerminal(f"Job {job.id} is {job.status.value}; cancel it first, or wait.")
    successor = doors.jobs.successor(job)
    if successor is not None:
        raise OutputExists(
            f"Job {successor} was put in {job.prefix} later, above it or below it, and may have replaced these files; "
            "delete this job without artifacts=true."
        )
    doors.objects.delete(job.prefix + artifacts.MANIFEST)
    for name in _written(job, doors):
        doors.objects.delete(job.prefix + name)


def _written(job: Job, doors: House) -> Iterator[str]:
    yield from (row["name"] for row in (job.result or {}).get("artifacts", []))
    found = list(doors.objects.list(f"{job.prefix}merge/"))
    yield from (name for name in (info.address.removeprefix(job.prefix) for info in found) if OURS.fullmatch(name))
