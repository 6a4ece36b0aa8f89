"""What a stage is given: the recipe, the part, the stores, and what earlier stages left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from service.contract import artifacts
from service.contract.errors import WorkerError
from service.contract.evaluating import EvaluationRecipe
from service.contract.parts import Claim, SoFar
from service.contract.plan import Plan
from service.contract.recipe import Recipe
from service.contract.stages import Stage
from service.contract.trials import Study
from service.stores.objects import Bookmark, Objects, failures
from workers.watch import Watch

PLAN_LIMIT_BYTES = 1 << 30


@dataclass(frozen=True)
class Work:
    """One part of one job, with everything it may touch.

    ``outputs`` gives what the parts of an earlier stage left, in their order; ``so_far`` what the job has cost until
    now; ``device`` is torch's name of the device to compute on, ``calibration_bytes`` what a model's weights may take
    there while it is calibrated, if there is a limit. ``study`` holds the trials of a search; ``planned`` is a plan
    that stands for the first stage's. ``bytes_found`` tells how much this process has read from its machine's disk in
    place of a store. ``bookmarks`` gives the bookmark of an address that only this part writes to.
    """

    claim: Claim
    objects: Objects
    watch: Watch
    workspace: str
    device: str
    outputs: Callable[[Stage], list[dict[str, Any]]]
    so_far: Callable[[], SoFar]
    calibration_bytes: int | None = None
    study: Study | None = None
    planned: Plan | None = None
    bytes_found: Callable[[], int] = lambda: 0
    bookmarks: Callable[[str], Bookmark] | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe of a merge, or of its analysis. Raises WorkerError: the stage was given another kind of job."""
        if not isinstance(self.claim.recipe, Recipe):
            raise WorkerError(f"{self.claim.stage} of {self.claim.job_id} is asked to merge, but the job is none")
        return self.claim.recipe

    @property
    def evaluation_recipe(self) -> EvaluationRecipe:
        """The recipe of an evaluation by itself. Raises WorkerError: the stage was given another kind of job."""
        if not isinstance(self.claim.recipe, EvaluationRecipe):
            raise WorkerError(f"{self.claim.stage} of {self.claim.job_id} is asked to evaluate, but the job is a merge")
        return self.claim.recipe

    @property
    def part(self) -> int:
        return self.claim.part

    def address(self, name: str) -> str:
        """Where an artifact of the job lies."""
        return self.claim.prefix + name

    def bookmark(self, address: str) -> Bookmark | None:
        """Where it is kept how far the part's attempts have come with an object, if it is kept."""
        return None if self.bookmarks is None else self.bookmarks(address)

    def plan(self) -> Plan:
        """The plan that the first stage wrote, or what stands for it. Raises StorageFailure, InputMissing."""
        if self.planned is not None:
            return self.planned
        return read_plan(self.objects, self.claim, self.workspace)


def plan_address(claim: Claim, workspace: str) -> str:
    """Where a job's plan lies while its parts are done."""
    if isinstance(claim.recipe, Recipe) and claim.recipe.search is not None:
        return artifacts.searched_plan(workspace, claim.job_id)
    return claim.prefix + artifacts.PLAN


def read_plan(objects: Objects, claim: Claim, workspace: str) -> Plan:
    """The plan that a job's first stage wrote. Raises StorageFailure, InputMissing."""
    with failures():
        return Plan.model_validate_json(objects.read_all(plan_address(claim, workspace), PLAN_LIMIT_BYTES))
