"""One durable step each: artifacts in, artifacts out; no Celery, no database."""

from collections.abc import Callable

from service.contract.parts import Done
from service.contract.recipe import Recipe
from service.contract.stages import Stage
from workers.recording import recorded
from workers.stages.analyze import run as analyze
from workers.stages.calibrate import run as calibrate
from workers.stages.evaluate import run as evaluate
from workers.stages.evaluate_alone import run as evaluate_alone
from workers.stages.finalize import run as finalize
from workers.stages.finalize_evaluation import run as finalize_evaluation
from workers.stages.merge import run as merge
from workers.stages.plan import run as plan
from workers.stages.plan_evaluation import run as plan_evaluation
from workers.stages.search import run as search
from workers.work import Work

StageRun = Callable[[Work], Done]


def _by_kind(merge: StageRun, evaluation: StageRun) -> StageRun:
    """A stage that merges and evaluations both have."""
    return lambda work: (merge if isinstance(work.claim.recipe, Recipe) else evaluation)(work)


RUN: dict[Stage, StageRun] = {
    Stage.PLAN: recorded(_by_kind(plan, plan_evaluation)),
    Stage.CALIBRATE: recorded(calibrate),
    Stage.SEARCH: recorded(search),
    Stage.ANALYZE: recorded(analyze),
    Stage.MERGE: recorded(merge),
    Stage.EVALUATE: recorded(_by_kind(evaluate, evaluate_alone)),
    Stage.FINALIZE: recorded(_by_kind(finalize, finalize_evaluation)),
}
