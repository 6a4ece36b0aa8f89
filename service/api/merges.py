"""Merges: submit, plan, list, look, cancel, retry, delete."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from service.admission import admit
from service.api import problems
from service.api.body import Body, json_body
from service.api.conditions import etag_of, expect_match, idempotency_key, is_unchanged, wait_seconds
from service.api.deps import Caller, Doors, House
from service.api.faults import pointer_to, read_recipe
from service.api.views import JobList, JobView, PlanView, job_json, next_link, page_json, plan_json
from service.api.waiting import until_ended
from service.contract.asked import AnyRecipe
from service.contract.errors import Fault, InvalidCursor, InvalidParameter, NotFound, ValidationError
from service.contract.job import Job, Status
from service.contract.resources import RESOURCES, Resource
from service.stores.jobs import IdempotencyKey, KeptAnswer, Listing
from service.submit import enqueue, submit
from service.wiping import wipe

router = APIRouter(prefix="/v1", tags=["merges"])

LABEL = re.compile(r"metadata\[(.+)\]", re.DOTALL)
LOOK_AGAIN_SECONDS = 2
ReadRecipe = Callable[[Any], AnyRecipe]


def recipe_body(schema: str) -> dict[str, Any]:
    """How a request looks whose body is a recipe of this name."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"requestBody": {"required": True, "content": content}}


RECIPE_BODY = recipe_body("Recipe")
KEY_HEADER = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Requests with this key and the same body are one request",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
}
WAIT_HEADER = {
    "name": "Prefer",
    "in": "header",
    "required": False,
    "description": "wait=N: answer when the job has ended, after N seconds (60 at most) in any case",
    "schema": {"type": "string"},
}


def _moment(text: str) -> float:
    """Seconds since the epoch, from themselves or from RFC 3339."""
    if re.fullmatch(r"\d{1,12}(\.\d{1,9})?", text):
        return float(text)
    # A plus sign that was not percent-encoded arrives as a space.
    moment = datetime.fromisoformat(text.replace(" ", "+"))
    if moment.tzinfo is None:
        raise ValueError("must say its offset from UTC, as in 2026-01-31T12:00:00Z")
    return moment.timestamp()


class ListQuery(BaseModel):
    """Which jobs to list. Newest first, unless ``order`` is asc; ``metadata[key]=value`` picks by label."""

    model_config = ConfigDict(extra="allow", frozen=True)

    status: Status | None = None
    after: str | None = Field(None, description="The last_id of the page before")
    limit: int = Field(20, ge=1, le=100)
    order: Literal["asc", "desc"] = "desc"
    created_after: Annotated[str, AfterValidator(lambda text: str(_moment(text)))] | None = Field(
        None, description="RFC 3339, or seconds since the epoch"
    )

    def listing(self, caller: str, resource: Resource) -> Listing:
        """The same question, in the store's words. Raises InvalidParameter, InvalidCursor."""
        if self.after is not None and not resource.is_id(self.after):
            raise InvalidCursor(f"after={self.after!r} is no id of this list; use the last_id of a page.")
        return Listing(
            caller=caller,
            resource=resource,
            limit=self.limit,
            after=self.after,
            ascending=self.order == "asc",
            status=self.status,
            created_after=None if self.created_after is None else float(self.created_after),
            metadata={_label(name): text for name, text in (self.model_extra or {}).items()},
        )


def _label(parameter: str) -> str:
    found = LABEL.fullmatch(parameter)
    if found is None:
        known = ", ".join([*ListQuery.model_fields, "metadata[key]"])
        detail = f"There is no parameter {parameter!r}; there are: {known}."
        raise InvalidParameter(detail, (Fault(pointer_to(("query", parameter)), "extra_forbidden", detail),))
    return found[1]


class DeleteQuery(BaseModel):
    """What to delete beside the job itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    artifacts: bool = Field(False, description="Also remove every file that the job wrote")


def asked_for(request: Request) -> Resource:
    """The resource whose door a request came to."""
    return next(row for row in RESOURCES if request.scope["route"].path.startswith(f"/v1/{row.plural}"))


Asked = Annotated[Resource, Depends(asked_for)]


def known_id(job_id: str, resource: Asked) -> str:
    """An id that a job of the resource may have. Raises NotFound: anything else names none."""
    if not resource.is_id(job_id):
        raise NotFound(f"There is no {resource.name} {job_id!r}.")
    return job_id


JobId = Annotated[str, Depends(known_id)]
JsonBody = Annotated[Body, Depends(json_body)]


@router.post(
    "/merges",
    status_code=202,
    responses={202: {"model": JobView}},
    openapi_extra={**RECIPE_BODY, "parameters": [KEY_HEADER, WAIT_HEADER]},
)
async def create_merge(request: Request, body: JsonBody, doors: Doors, caller: Caller) -> Response:
    """Submit a merge. It is checked at once against its checkpoints' headers, stored, and worked on later."""
    return await submitted(request, body, doors, caller, read_recipe)


@router.post(
    "/merges:analyze",
    status_code=202,
    responses={202: {"model": JobView}},
    openapi_extra={**RECIPE_BODY, "parameters": [KEY_HEADER, WAIT_HEADER]},
)
async def analyze_merge(request: Request, body: JsonBody, doors: Doors, caller: Caller) -> Response:
    """Submit a merge to be analyzed only: how much its tasks disturb each other is measured, and no weights written."""
    return await submitted(request, replace(body, value=_as_analysis(body.value)), doors, caller, read_recipe)


@router.post("/merges:plan", responses={200: {"model": PlanView}}, openapi_extra=RECIPE_BODY)
def plan_merge(body: JsonBody, doors: Doors) -> Response:
    """See what a merge would do, and what speaks against it. Nothing is stored."""
    recipe = read_recipe(body.value)
    plan = admit(recipe, doors.objects)
    return JSONResponse(plan_json(plan, recipe))


@router.get("/merges", responses={200: {"model": JobList}})
def list_merges(
    request: Request, query: Annotated[ListQuery, Query()], resource: Asked, doors: Doors, caller: Caller
) -> Response:
    """List merges, page by page: `after` takes the `last_id` of the page before."""
    jobs, has_more = doors.jobs.page(query.listing(caller, resource))
    page = page_json([job_json(job, doors.base_url) for job in jobs], "id", has_more)
    return JSONResponse(page, headers=next_link(request, doors.base_url, page))


@router.get("/merges/{job_id}", responses={200: {"model": JobView}}, openapi_extra={"parameters": [WAIT_HEADER]})
async def get_merge(request: Request, job_id: JobId, doors: Doors, caller: Caller) -> Response:
    """Look at a merge. With `Prefer: wait=N` the answer comes when it has ended, or after N seconds."""
    job = await run_in_threadpool(doors.jobs.get, caller, job_id)
    return await _answer_waited(request, job, doors, caller, status=200)


@router.post(
    "/merges/{job_id}/cancel",
    status_code=202,
    responses={202: {"model": JobView}, 200: {"model": JobView, "description": "It had ended before; unchanged"}},
)
def cancel_merge(request: Request, job_id: JobId, doors: Doors, caller: Caller) -> Response:
    """End a merge. One that has ended stays as it is; one that is just then publishing its result may still finish."""
    job, was_active = doors.jobs.cancel(caller, job_id, lambda job: expect_match(request, job))
    return _answer(job, doors, 202 if was_active else 200)


@router.post("/merges/{job_id}/retry", status_code=202, responses={202: {"model": JobView}})
def retry_merge(job_id: JobId, doors: Doors, caller: Caller) -> Response:
    """Let a failed or cancelled merge go on from the parts that are done."""
    job, messages = doors.jobs.retry(caller, job_id)
    enqueue(messages, doors.rooms)
    return _answer(job, doors, 202)


@router.delete("/merges/{job_id}", status_code=204)
def delete_merge(
    request: Request, job_id: JobId, query: Annotated[DeleteQuery, Query()], doors: Doors, caller: Caller
) -> Response:
    """Forget a merge that has ended, and with `artifacts=true` remove what it wrote."""
    if query.artifacts:
        job = doors.jobs.get(caller, job_id)
        expect_match(request, job)
        wipe(job, doors.jobs, doors.parts, doors.objects, doors.connections.workspace)
    doors.jobs.delete(caller, job_id, lambda job: expect_match(request, job))
    return Response(status_code=204)


def _as_analysis(value: Any) -> Any:
    """The recipe with its mode, whatever it says itself; what is no object is refused as it is."""
    return {**value, "mode": "analysis"} if isinstance(value, dict) else value


async def submitted(request: Request, body: Body, doors: House, caller: str, read: ReadRecipe) -> Response:
    """Take a job in, whose recipe ``read`` makes of the body, and answer with it. Raises any Refusal of admission."""
    key = idempotency_key(request, caller, body.sha256)
    taken = await run_in_threadpool(_take_in, request, body, doors, caller, key, read)
    if isinstance(taken, KeptAnswer):
        return _replayed(taken)
    return await _answer_waited(request, taken, doors, caller, status=202)


def _take_in(
    request: Request, body: Body, doors: House, caller: str, key: IdempotencyKey | None, read: ReadRecipe
) -> Job | KeptAnswer:
    with doors.in_flight.hold(key):
        kept = doors.jobs.replay(key) if key else None
        if kept is not None:
            return kept
        try:
            recipe = read(body.value)
        except ValidationError as refusal:  # the one refusal that depends on nothing but the body
            if key:
                doors.jobs.keep(key, KeptAnswer(refusal.status, problems.problem(request, refusal)))
            raise
        return submit(recipe, caller, key, doors.rooms, lambda job: KeptAnswer(202, job_json(job, doors.base_url)))


def _replayed(kept: KeptAnswer) -> Response:
    headers = {"Idempotent-Replayed": "true"}
    if kept.status >= 400:
        return problems.answer(kept.body, headers)
    return JSONResponse(kept.body, kept.status, {**headers, "Location": kept.body["links"]["self"]})


async def _answer_waited(request: Request, job: Job, doors: House, caller: str, *, status: int) -> Response:
    seconds = wait_seconds(request)
    if seconds is None:
        return _conditional(request, job, doors, status)
    look = partial(doors.jobs.get, caller, job.id)
    ended = await until_ended(job.id, look, seconds, request, doors.lookout, doors.closing)
    answer = _conditional(request, ended, doors, status)
    answer.headers["Preference-Applied"] = f"wait={seconds}"
    return answer


def _conditional(request: Request, job: Job, doors: House, status: int) -> Response:
    if status == 200 and is_unchanged(request, etag_of(job)):
        return Response(status_code=304, headers=_headers(job))
    return _answer(job, doors, status)


def _answer(job: Job, doors: House, status: int) -> Response:
    document = job_json(job, doors.base_url)
    location = {"Location": document["links"]["self"]} if status == 202 else {}
    return JSONResponse(document, status, {**_headers(job), **location})


def _headers(job: Job) -> dict[str, Any]:
    headers = {"ETag": etag_of(job), "Cache-Control": "no-cache"}
    return headers if job.status.is_terminal else {**headers, "Retry-After": str(LOOK_AGAIN_SECONDS)}
