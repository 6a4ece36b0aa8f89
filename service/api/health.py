"""Whether the service lives, whether it can work, and how much it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import JSONResponse

from service.api import problems
from service.api.deps import Doors, House
from service.contract.errors import StoreUnavailable
from service.stores.objects import StoreError

router = APIRouter(tags=["health"])


class Alive(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Checks(BaseModel):
    """How everything is that the service stands on: ``ok``, or what is wrong with it."""

    database: str
    object_store: str
    broker: str = Field(description="Told, but not needed: submits work while it is away, and are rung for later")


class Ready(BaseModel):
    """The service can take merges in."""

    status: Literal["ready"] = "ready"
    checks: Checks


@router.get("/healthz")
def is_alive() -> Alive:
    """Whether the process lives."""
    return Alive()


@router.get("/readyz", responses={200: {"model": Ready}})
def is_ready(request: Request, doors: Doors) -> Response:
    """Whether the service can take merges in; the problem document of one that can't has `checks` too."""
    checks = Checks(
        database=_state(_check_database, doors),
        object_store=_state(_check_objects, doors),
        broker="ok" if doors.dispatcher.is_reachable() else "does not answer",
    )
    if checks.database == checks.object_store == "ok":
        return JSONResponse(Ready(checks=checks).model_dump(mode="json"))
    refusal = StoreUnavailable(f"database: {checks.database}; object store: {checks.object_store}")
    return problems.answer({**problems.problem(request, refusal), "checks": checks.model_dump(mode="json")})


@router.get("/metrics", response_class=Response)
def get_metrics(doors: Doors) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(doors.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _state(check: Callable[[House], str], doors: House) -> str:
    try:
        return check(doors)
    except SQLAlchemyError:  # its text names the host, which is not for everybody
        return "does not answer"
    except StoreError as error:
        return str(error)


def _check_database(doors: House) -> str:
    return "ok" if doors.database.is_current() else "its schema is not this version's"


def _check_objects(doors: House) -> str:
    next(iter(doors.objects.list(f"{doors.connections.workspace}ready/")), None)
    return "ok"
