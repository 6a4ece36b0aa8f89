"""The first rooms a job goes through: admit, persist, enqueue."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy.exc import DBAPIError

from service.admission import admit
from service.contract.artifacts import default_prefix
from service.contract.asked import AnyRecipe
from service.contract.job import Job
from service.contract.plan import Plan
from service.contract.recipe import Recipe
from service.contract.stages import PartMessage, Stage
from service.dispatch import Dispatcher
from service.evaluation_admission import admit_evaluation
from service.stores.jobs import IdempotencyKey, JobStore, KeptAnswer, Submission
from service.stores.objects import Objects
from service.stores.parts import PartStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rooms:
    """What a submit passes through. ``workspace`` is where results go that were given no place."""

    objects: Objects
    jobs: JobStore
    parts: PartStore
    dispatcher: Dispatcher
    workspace: str
    job_retention_seconds: float | None


def submit(
    recipe: AnyRecipe, caller: str, key: IdempotencyKey | None, rooms: Rooms, answer: Callable[[Job], KeptAnswer]
) -> Job | KeptAnswer:
    """Take a job in, or find the answer that an earlier request with the same key got.

    ``answer`` makes what is kept for the key. Raises any Refusal of admission; then nothing is stored.
    """
    rooms.jobs.expect_room(caller)  # before much is read in vain; what counts is asked again when it is stored
    plan = _admitted(recipe, rooms.objects)
    submission = Submission(
        caller=caller,
        recipe=recipe,
        prefix=lambda job_id: recipe.output.prefix or _workspace_prefix(recipe, rooms, job_id),
        warnings=plan.warnings,
        expires_after_seconds=rooms.job_retention_seconds,
    )
    stored = rooms.jobs.submit(submission, key, answer)
    if isinstance(stored, Job):
        enqueue([PartMessage(Stage.PLAN, stored.id, 0)], rooms)
    return stored


def _admitted(recipe: AnyRecipe, objects: Objects) -> Plan:
    return admit(recipe, objects) if isinstance(recipe, Recipe) else admit_evaluation(recipe, objects)


def _workspace_prefix(recipe: AnyRecipe, rooms: Rooms, job_id: str) -> str:
    return default_prefix(rooms.workspace, recipe.resource.plural, job_id)


def enqueue(messages: Sequence[PartMessage], rooms: Rooms) -> None:
    """Ring the workers' bell as well as can be: what does not get through, the sweeper sends.

    The parts count as sent before they are, so that the sweeper does not send them at the same moment.
    """
    try:
        rooms.parts.mark_sent(messages)
        unsent = rooms.dispatcher.ring(messages)
        if unsent:
            rooms.parts.mark_unsent(unsent)
    except DBAPIError as error:  # the job is stored: its caller must not be told otherwise
        logger.warning("Could not note what was sent (%s); the sweeper sends it again", error)
