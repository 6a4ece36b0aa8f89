"""One durable step each: artifacts in, artifacts out; no Celery, no database."""

from collections.abc import Callable

from service.contract.parts import Done
from service.contract.stages import Stage
from workers.stages import calibrate, evaluate, finalize, merge, plan
from workers.work import Work

RUN: dict[Stage, Callable[[Work], Done]] = {
    Stage.PLAN: plan.run,
    Stage.CALIBRATE: calibrate.run,
    Stage.MERGE: merge.run,
    Stage.EVALUATE: evaluate.run,
    Stage.FINALIZE: finalize.run,
}
