"""Evaluations: doors to submit and to plan them; for the rest they are jobs, and answer as merges do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.responses import JSONResponse

from service.api import artifacts, events, merges
from service.api.deps import Caller, Doors
from service.api.faults import read_evaluation
from service.api.merges import KEY_HEADER, WAIT_HEADER, JsonBody, recipe_body, submitted
from service.api.views import (
    EvaluationList,
    EvaluationPlanView,
    EvaluationView,
    JobList,
    JobView,
    evaluation_plan_json,
)
from service.contract.resources import EVALUATIONS, MERGES
from service.evaluation_admission import admit_evaluation

router = APIRouter(prefix="/v1", tags=["evaluations"])

SHOWN: Mapping[type[BaseModel], type[BaseModel]] = {JobView: EvaluationView, JobList: EvaluationList}


@router.post(
    "/evaluations",
    status_code=202,
    responses={202: {"model": EvaluationView}},
    openapi_extra={**recipe_body("EvaluationRecipe"), "parameters": [KEY_HEADER, WAIT_HEADER]},
)
async def create_evaluation(request: Request, body: JsonBody, doors: Doors, caller: Caller) -> Response:
    """Submit checkpoints to be measured. All is checked at once against headers, stored, and worked on later."""
    return await submitted(request, body, doors, caller, read_evaluation)


@router.post(
    "/evaluations:plan",
    responses={200: {"model": EvaluationPlanView}},
    openapi_extra=recipe_body("EvaluationRecipe"),
)
def plan_evaluation(body: JsonBody, doors: Doors) -> Response:
    """See what an evaluation would measure, and what speaks against it. Nothing is stored."""
    recipe = read_evaluation(body.value)
    return JSONResponse(evaluation_plan_json(admit_evaluation(recipe, doors.objects), recipe))


def _of_jobs() -> Iterator[APIRoute]:
    """The doors of merges that are about any job: those to look, list, follow, fetch and end."""
    for route in (*merges.router.routes, *events.router.routes, *artifacts.router.routes):
        if isinstance(route, APIRoute) and (route.methods == {"GET"} or "{job_id}" in route.path):
            yield route


def _name(handler: str) -> str:
    """``get_merge`` becomes ``get_evaluation``; what names no resource gets one: ``list_evaluation_events``."""
    verb, _, rest = handler.partition("_")
    return _in_words(handler) if MERGES.name in handler else f"{verb}_{EVALUATIONS.name}_{rest}"


def _in_words(text: str) -> str:
    return text.replace("a merge", "an evaluation").replace(MERGES.name, EVALUATIONS.name)


def _answers(responses: Mapping[int | str, dict[str, Any]]) -> dict[int | str, dict[str, Any]]:
    return {
        status: {**answer, **({"model": SHOWN.get(answer["model"], answer["model"])} if "model" in answer else {})}
        for status, answer in responses.items()
    }


for _route in _of_jobs():
    router.add_api_route(
        _route.path.removeprefix("/v1").replace(MERGES.plural, EVALUATIONS.plural),
        _route.endpoint,
        methods=sorted(_route.methods or ()),
        name=_name(_route.name),
        description=_in_words(_route.description),
        status_code=_route.status_code,
        response_class=_route.response_class,
        responses=_answers(_route.responses),
        openapi_extra=_route.openapi_extra,
        include_in_schema=_route.include_in_schema,
    )
