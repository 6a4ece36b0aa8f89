"""Jobs moved on by hand, as workers would: real rows, no workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from service.contract.job import Job, Status
from service.contract.parts import Claim, Counters, Done
from service.contract.recipe import Recipe
from service.contract.stages import NewPart, PartMessage, Stage
from service.stores.jobs import IdempotencyKey, JobStore, KeptAnswer, Submission
from service.stores.parts import PartStore

Result = TypeVar("Result")


def recipe_of(**changes: Any) -> Recipe:
    tasks = [{"name": "cars", "checkpoint": "s3://models/cars/"}]
    return Recipe.model_validate({"base": "s3://models/base/", "tasks": tasks, **changes})


def submit(jobs: JobStore, *, caller: str = "anonymous", prefix: str | None = None, **changes: Any) -> Job:
    stored = submit_with_key(jobs, None, caller=caller, prefix=prefix, **changes)
    assert isinstance(stored, Job)
    return stored


def submit_with_key(
    jobs: JobStore, key: IdempotencyKey | None, *, caller: str = "anonymous", prefix: str | None = None, **changes: Any
) -> Job | KeptAnswer:
    submission = Submission(caller, recipe_of(**changes), lambda job_id: prefix or f"s3://merged/{job_id}/")
    return jobs.submit(submission, key, lambda job: KeptAnswer(202, {"id": job.id}))


def claim(parts: PartStore, job_id: str, stage: Stage = Stage.PLAN, part: int = 0, owner: str = "worker") -> Claim:
    claimed = parts.claim(PartMessage(stage, job_id, part), owner)
    assert claimed is not None
    return claimed


def plan(parts: PartStore, job_id: str, *new: NewPart) -> list[PartMessage] | None:
    """Do the job's planning, which asks for ``new`` parts."""
    return parts.complete(claim(parts, job_id), Done(parts=new), Counters())


def finish(
    parts: PartStore, job_id: str, status: Status = Status.SUCCEEDED, result: Mapping[str, Any] | None = None
) -> None:
    """Bring a queued job to its end by its only part."""
    done = parts.complete(claim(parts, job_id), Done(status=status, result=result or {}), Counters())
    assert done == []


def merges(count: int) -> Sequence[NewPart]:
    return [NewPart(Stage.MERGE, i, f"shard {i}", weight=1.0, tensors_total=10) for i in range(count)]


def at_once(count: int, act: Callable[[int], Result]) -> list[Result]:
    """Do the same in many threads."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(act, range(count)))
