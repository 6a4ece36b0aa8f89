"""What a result says of itself: every file and every input with its SHA-256, and what it was made on and by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from service.contract import artifacts
from service.contract.asked import AnyRecipe
from service.contract.job import Artifact
from service.contract.plan import Pinned, Plan
from service.stores.objects import failures
from workers.tensors import chunks
from workers.version import ENGINE, library_versions
from workers.work import Work
from workers.writing import write_artifact

FILE_LIMIT_BYTES = 4 << 30
HASHERS = 4


def write(work: Work, name: str, text: str) -> Artifact:
    """Write an artifact of the job. Raises StorageFailure."""
    artifact = write_artifact(work.objects, work.claim.prefix, name, text.encode())
    work.watch.step(bytes_written=artifact.size)
    return artifact


def digested(work: Work, prefix: str, name: str) -> Artifact:
    """An artifact that an earlier stage wrote, digested as it lies."""
    with failures():
        data = work.objects.read_all(prefix + name, FILE_LIMIT_BYTES)
    return Artifact(
        name=name,
        role=artifacts.role(name),
        media_type=artifacts.media_type(name),
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def digests(work: Work, plan: Plan) -> list[dict[str, Any]]:
    """Every input with its SHA-256, so that anyone can tell what this result was made from."""
    names: dict[str, Pinned] = {f"{role}:{file.address}": file for role, pins in plan.inputs.items() for file in pins}

    def digest(file: Pinned) -> str:
        sha256 = hashlib.sha256()
        for piece in chunks(work.objects, file):
            sha256.update(piece)
            work.watch.step(bytes_read=len(piece))
        return sha256.hexdigest()

    with ThreadPoolExecutor(HASHERS) as pool:
        digests = list(pool.map(digest, names.values()))
    return [
        {"role": role.removesuffix(f":{file.address}"), **file.model_dump(), "sha256": sha256}
        for (role, file), sha256 in zip(names.items(), digests, strict=True)
    ]


def told(inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each input what a report says."""
    return [{name: file[name] for name in ("role", "address", "size", "sha256")} for file in inputs]


def made_by(work: Work) -> dict[str, Any]:
    """On what a result was made: device, engine, versions of libraries."""
    return {"device": work.device, "engine": ENGINE, "versions": library_versions()}


def manifest_of(
    work: Work,
    asked: AnyRecipe,
    inputs: Sequence[Mapping[str, Any]],
    files: Sequence[Artifact],
    more: Mapping[str, Any],
) -> bytes:
    """The manifest: when it is there, the result is whole."""
    manifest = {
        "job": work.claim.job_id,
        "recipe_sha256": asked.sha256,
        **more,
        "seed": asked.seed,
        **made_by(work),
        "inputs": list(inputs),
        "files": [file.model_dump() for file in files],
    }
    return json.dumps(manifest, indent=2).encode()
