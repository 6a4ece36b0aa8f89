"""Removes what a merge wrote, and nothing else that lies in its folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from service.api.deps import House
from service.contract import artifacts
from service.contract.errors import JobNotTerminal, OutputExists
from service.contract.job import Job
from service.contract.stages import Stage
from service.stores.objects import ObjectMissing, Objects

MANIFEST_LIMIT_BYTES = 256 << 20
# What a merge writes beside its weights, known by name: a job without a result has no list of what it wrote.
OURS = re.compile(
    r"merge/(recipe\.json|plan\.json|report\.json|report\.html|analysis\.json|trim-log\.jsonl|removed-\d+\.safetensors)"
)


def wipe(job: Job, doors: House) -> None:
    """Remove the artifacts of a job that has ended, the manifest first: half a result must not look whole.

    Raises:
        JobNotTerminal: the job may still be writing.
        OutputExists: another job was put in the same folder, so what lies there may be its own.
    """
    if not job.status.is_terminal:
        raise JobNotTerminal(f"Job {job.id} is {job.status.value}; cancel it first, or wait.")
    other = doors.jobs.successor(job) or _owner(job, doors.objects)
    if other is not None:
        raise OutputExists(
            f"What lies in {job.prefix}, above it or below it, may be by another job ({other}); "
            "delete this job without artifacts=true."
        )
    names = list(_written(job, doors))
    doors.objects.delete(job.prefix + artifacts.MANIFEST)
    for name in names:
        doors.objects.delete(job.prefix + name)
    for info in list(doors.objects.list(artifacts.scratch(doors.connections.workspace, job.id))):
        doors.objects.delete(info.address)  # what a job that failed or was cancelled kept, in case it is retried


def _owner(job: Job, objects: Objects) -> str | None:
    """Whose result lies in the job's folder, where it is not its own."""
    try:
        manifest = json.loads(objects.read_all(job.prefix + artifacts.MANIFEST, MANIFEST_LIMIT_BYTES))
    except ObjectMissing:
        return None
    except ValueError:
        return "unknown"
    owner = manifest.get("job") if isinstance(manifest, dict) else None
    return None if owner == job.id else str(owner)


def _written(job: Job, doors: House) -> Iterator[str]:
    yield from (str(row["name"]) for row in (job.result or {}).get("artifacts", []))
    for output in doors.parts.outputs(job.id, Stage.MERGE):
        yield from (str(row["name"]) for row in output.get("files", []))
    found = list(doors.objects.list(f"{job.prefix}merge/"))
    yield from (name for name in (info.address.removeprefix(job.prefix) for info in found) if OURS.fullmatch(name))
