"""Removes what a merge wrote, and nothing else that lies in its folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

from service.contract import artifacts
from service.contract.errors import JobNotTerminal, OutputExists
from service.contract.job import Job
from service.contract.stages import Stage
from service.stores.jobs import JobStore
from service.stores.objects import ObjectMissing, Objects
from service.stores.parts import PartStore

MANIFEST_LIMIT_BYTES = 256 << 20


def wipe(job: Job, jobs: JobStore, parts: PartStore, objects: Objects, workspace: str) -> None:
    """Remove the artifacts of a job that has ended, the manifest first: half a result must not look whole.

    Raises:
        JobNotTerminal: the job may still be writing.
        OutputExists: another job was put in the same folder, so what lies there may be its own.
    """
    if not job.status.is_terminal:
        raise JobNotTerminal(f"Job {job.id} is {job.status.value}; cancel it first, or wait.")
    other = jobs.successor(job) or owner(job.prefix, objects, job.id)
    if other is not None:
        raise OutputExists(
            f"What lies in {job.prefix}, above it or below it, may be by another job ({other}); "
            "delete this job without artifacts=true."
        )
    names = list(_written(job, parts, objects))
    objects.delete(job.prefix + artifacts.MANIFEST)
    for name in names:
        objects.delete(job.prefix + name)
    wipe_scratch(job.id, objects, workspace)


def wipe_scratch(job_id: str, objects: Objects, workspace: str) -> None:
    """Remove what a job kept for its later stages; one that failed or was cancelled does, in case it is retried."""
    for info in list(objects.list(artifacts.scratch(workspace, job_id))):
        objects.delete(info.address)


def wipe_unfinished(
    prefix: str, objects: Objects, *, at_least_seconds: float, at_most_seconds: float, name: Callable[[str], bool]
) -> int:
    """Drop what was left half written in a folder, of that age and under such names; returns how many."""
    found = [
        each
        for each in objects.unfinished(prefix)
        if at_least_seconds <= each.age_seconds <= at_most_seconds and name(each.address.removeprefix(prefix))
    ]
    for each in found:
        objects.abandon(each)
    return len(found)


def owner(prefix: str, objects: Objects, job_id: str) -> str | None:
    """Whose result lies in a folder, where it is not that job's own."""
    try:
        manifest = json.loads(objects.read_all(prefix + artifacts.MANIFEST, MANIFEST_LIMIT_BYTES))
    except ObjectMissing:
        return None
    except ValueError:
        return "unknown"
    found = manifest.get("job") if isinstance(manifest, dict) else None
    return None if found == job_id else str(found)


def _written(job: Job, parts: PartStore, objects: Objects) -> Iterator[str]:
    yield from (str(row["name"]) for row in (job.result or {}).get("artifacts", []))
    for output in parts.outputs(job.id, Stage.MERGE):
        yield from (str(row["name"]) for row in output.get("files", []))
    found = list(objects.list(f"{job.prefix}merge/"))
    yield from (
        name
        for name in (info.address.removeprefix(job.prefix) for info in found)
        if artifacts.BESIDE_WEIGHTS.fullmatch(name)
    )
