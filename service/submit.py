"""The first rooms a merge goes through: admit, persist, enqueue."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy.exc import DBAPIError

from service.admission import admit
from service.contract.artifacts import default_prefix
from service.contract.job import Job
from service.contract.recipe import Recipe
from service.contract.stages import PartMessage, Stage
from service.dispatch import Dispatcher
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
    recipe: Recipe, caller: str, key: IdempotencyKey | None, rooms: Rooms, answer: Callable[[Job], KeptAnswer]
) -> Job | KeptAnswer:
    """Take a merge in, or find the answer that an earlier request with the same key got.

    ``answer`` makes what is kept for the key. Raises any Refusal of admission; then nothing is stored.
    """
    rooms.jobs.expect_room(caller)  # before much is read in vain; what counts is asked again when it is stored
    plan = admit(recipe, rooms.objects)
    submission = Submission(
        caller=caller,
        recipe=recipe,
        prefix=lambda job_id: recipe.output.prefix or default_prefix(rooms.workspace, job_id),
        warnings=plan.warnings,
        expires_after_seconds=rooms.job_retention_seconds,
    )
    stored = rooms.jobs.submit(submission, key, answer)
    if isinstance(stored, Job):
        enqueue([PartMessage(Stage.PLAN, stored.id, 0)], rooms)
    return stored


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
