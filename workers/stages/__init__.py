"""One durable step each: artifacts in, artifacts out; no Celery, no database."""

from collections.abc import Callable

from service.contract.parts import Done
from service.contract.stages import Stage
from workers.recording import recorded
from workers.stages.analyze import run as analyze
from workers.stages.calibrate import run as calibrate
from workers.stages.evaluate import run as evaluate
from workers.stages.finalize import run as finalize
from workers.stages.merge import run as merge
from workers.stages.plan import run as plan
from workers.stages.search import run as search
from workers.work import Work

RUN: dict[Stage, Callable[[Work], Done]] = {
    Stage.PLAN: recorded(plan),
    Stage.CALIBRATE: recorded(calibrate),
    Stage.SEARCH: recorded(search),
    Stage.ANALYZE: recorded(analyze),
    Stage.MERGE: recorded(merge),
    Stage.EVALUATE: recorded(evaluate),
    Stage.FINALIZE: recorded(finalize),
}
