"""What the doors show: jobs, events and artifacts as JSON. Times are RFC 3339 in UTC, with milliseconds."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from service.contract.asked import AnyRecipe
from service.contract.evaluating import EvaluatedModel, EvaluationRecipe
from service.contract.evaluation_plan import bytes_of_model, inputs_of, measured_tasks
from service.contract.job import Artifact, Event, FailureRecord, Job, Progress, Status
from service.contract.methods import AnyMethod
from service.contract.plan import Plan
from service.contract.recipe import Recipe
from service.contract.resources import EVALUATIONS, MERGES, Resource
from service.contract.search import Search
from service.contract.stages import Stage

Timestamp = Annotated[
    str,
    Field(
        description="RFC 3339, in UTC, with milliseconds",
        json_schema_extra={"format": "date-time"},
        examples=["2026-01-31T12:00:00.000Z"],
    ),
]

RECIPE = "With defaults filled in, and the place where the result goes"


class Links(BaseModel):
    """Where to go from a job."""

    model_config = ConfigDict(serialize_by_alias=True)

    own: str = Field(alias="self")
    events: str
    artifacts: str
    cancel: str
    retry: str


class MergeLinks(Links):
    """Where to go from a merge."""

    trim_log: str


class AnyJobView(BaseModel):
    """A job: what was asked for, how far it is, and what came of it."""

    id: str
    object: str
    status: Status
    stage: Stage | None
    recipe: AnyRecipe = Field(description=RECIPE)
    recipe_sha256: str = Field(description="Digest of the recipe with its defaults, without a place chosen for it")
    progress: Progress
    attempt: int
    queue_position: int | None = Field(description="1 is next; null unless queued")
    error: FailureRecord | None
    warnings: list[str]
    result: dict[str, Any] | None
    metadata: dict[str, str]
    created_at: Timestamp
    queued_at: Timestamp
    started_at: Timestamp | None
    finished_at: Timestamp | None
    expires_at: Timestamp | None = Field(description="When the job is forgotten; its artifacts stay")
    links: Links


class JobView(AnyJobView):
    """A merge: what was asked for, how far it is, and what came of it."""

    model_config = ConfigDict(title="Merge")

    id: str = Field(examples=["mrg_0198c5a07b1f7c3e9d2f4b6a8c0e1f22"])
    object: Literal["merge"]
    recipe: Recipe = Field(description=RECIPE)
    links: MergeLinks


class EvaluationView(AnyJobView):
    """An evaluation: what was asked for, how far it is, and what came of it."""

    model_config = ConfigDict(title="Evaluation")

    id: str = Field(examples=["evl_0198c5a07b1f7c3e9d2f4b6a8c0e1f22"])
    object: Literal["evaluation"]
    recipe: EvaluationRecipe = Field(description=RECIPE)


class EventView(BaseModel):
    """One line of a job's history."""

    object: Literal["event"]
    seq: int = Field(description="Counts from 1 without gaps")
    type: str = Field(examples=["job.queued"])
    created_at: Timestamp
    data: dict[str, Any]


class JobList(BaseModel):
    """A page of merges."""

    object: Literal["list"]
    data: list[JobView]
    has_more: bool
    first_id: str | None
    last_id: str | None


class EvaluationList(BaseModel):
    """A page of evaluations."""

    object: Literal["list"]
    data: list[EvaluationView]
    has_more: bool
    first_id: str | None
    last_id: str | None


class EventList(BaseModel):
    """A page of events; ``last_id`` is the ``after`` of the next."""

    object: Literal["list"]
    data: list[EventView]
    has_more: bool
    first_id: int | None
    last_id: int | None


class ArtifactList(BaseModel):
    """Every file of a result."""

    object: Literal["list"]
    data: list[Artifact]
    has_more: Literal[False]


class TrimLogRow(BaseModel):
    """What was done to one parameter of one task; ``row`` is its number in the log, from 1."""

    model_config = ConfigDict(extra="allow")

    row: int
    parameter: str
    task: str
    role: str
    treatment: str


class TrimLogPage(BaseModel):
    """A page of the trim log; ``last_id`` is the ``after`` of the next."""

    object: Literal["list"]
    data: list[TrimLogRow]
    has_more: bool
    first_id: int | None
    last_id: int | None


class PlanView(BaseModel):
    """What a merge would do, counted."""

    model_config = ConfigDict(extra="allow", title="Plan")

    object: Literal["plan"]
    shards: list[dict[str, Any]]
    tensors: int
    roles: dict[str, int]
    treatments: dict[str, int]
    bytes_in: int
    bytes_out: int
    peak_memory_bytes: int
    warnings: list[str]
    method: AnyMethod = Field(description="With defaults filled in")
    search: Search | None = Field(description="What is searched for before the merge, asked for or by default")
    trials: int = Field(description="Trials of the search at most")


class EvaluatedView(BaseModel):
    """One model of an evaluation, and what it is measured with."""

    name: str
    reference: bool
    tasks: list[str]
    heads: list[str] = Field(description="Tasks whose head lies beside the checkpoint")
    bytes: int = Field(description="Of its weights and heads")


class EvaluationPlanView(BaseModel):
    """What an evaluation would measure."""

    model_config = ConfigDict(title="EvaluationPlan")

    object: Literal["plan"]
    models: list[EvaluatedView]
    references: dict[str, str | None] = Field(description="By task, the model that the others are held against")
    parts: int = Field(description="Measurements of one model on one task, and one of speed where that is asked for")
    bytes_in: int
    peak_memory_bytes: int
    warnings: list[str]


VIEWS: dict[Resource, type[AnyJobView]] = {MERGES: JobView, EVALUATIONS: EvaluationView}


def job_json(job: Job, base_url: str) -> dict[str, Any]:
    """A job as its callers see it; ``base_url`` begins its links."""
    output = job.recipe.output.model_copy(update={"prefix": job.prefix})
    resource = job.recipe.resource
    return VIEWS[resource](
        id=job.id,
        object=resource.name,
        status=job.status,
        stage=job.stage,
        recipe=job.recipe.model_copy(update={"output": output}),
        recipe_sha256=job.recipe_sha256,
        progress=job.progress,
        attempt=job.attempt,
        queue_position=job.queue_position,
        error=job.error,
        warnings=list(job.warnings),
        result=job.result,
        metadata=job.metadata,
        created_at=timestamp(job.created_at),
        queued_at=timestamp(job.queued_at),
        started_at=_maybe(job.started_at),
        finished_at=_maybe(job.finished_at),
        expires_at=_maybe(job.expires_at),
        links=_links(f"{base_url}/v1/{resource.plural}/{job.id}", resource),
    ).model_dump(mode="json")


def plan_json(plan: Plan, recipe: Recipe) -> dict[str, Any]:
    """A plan as its reader sees it, with what of the recipe's defaults decides how much is to be done."""
    search = recipe.search
    return {
        "object": "plan",
        **plan.summary(),
        "method": recipe.method.model_dump(mode="json"),
        "search": None if search is None else search.model_dump(mode="json"),
        "trials": 0 if search is None else search.count(recipe.method),
    }


def evaluation_plan_json(plan: Plan, recipe: EvaluationRecipe) -> dict[str, Any]:
    """A plan of an evaluation as its reader sees it."""
    view = EvaluationPlanView(
        object="plan",
        models=[_planned(plan, recipe, model) for model in recipe.models],
        references={row.task: _name(recipe.reference_on(row.task)) for row in recipe.evaluation.tasks},
        parts=len(recipe.parts) + recipe.speed,
        bytes_in=plan.bytes_in,
        peak_memory_bytes=plan.peak_memory_bytes,
        warnings=list(plan.warnings),
    )
    return view.model_dump(mode="json")


def _planned(plan: Plan, recipe: EvaluationRecipe, model: EvaluatedModel) -> EvaluatedView:
    tasks = measured_tasks(recipe, model)
    heads = [task for task in tasks if plan.inputs.get(inputs_of(model.name, task)[1])]
    size = bytes_of_model(plan, recipe, model.name)
    return EvaluatedView(name=model.name, reference=model.reference, tasks=tasks, heads=heads, bytes=size)


def _name(model: EvaluatedModel | None) -> str | None:
    return None if model is None else model.name


def event_json(event: Event) -> dict[str, Any]:
    """An event as its readers see it."""
    view = EventView(
        object="event", seq=event.seq, type=event.type, created_at=timestamp(event.created_at), data=event.data
    )
    return view.model_dump(mode="json")


def page_json(data: list[dict[str, Any]], cursor: str, has_more: bool) -> dict[str, Any]:
    """A page of a list; ``cursor`` is the member that ``after`` takes."""
    return {
        "object": "list",
        "data": data,
        "has_more": has_more,
        "first_id": data[0][cursor] if data else None,
        "last_id": data[-1][cursor] if data else None,
    }


def next_link(request: Request, base_url: str, page: dict[str, Any]) -> dict[str, str]:
    """The header that names the next page, where there is one."""
    if not page["has_more"]:
        return {}
    query = [(name, text) for name, text in request.query_params.multi_items() if name != "after"]
    target = f"{base_url}{request.scope['path']}?{urlencode([*query, ('after', page['last_id'])])}"
    return {"Link": f'<{target}>; rel="next"'}


def timestamp(seconds: float) -> str:
    """Seconds since the epoch as RFC 3339."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _maybe(seconds: float | None) -> str | None:
    return None if seconds is None else timestamp(seconds)


def _links(address: str, resource: Resource) -> Links:
    kind = MergeLinks if resource is MERGES else Links
    names = [name for name in kind.model_fields if name != "own"]
    return kind.model_validate({"self": address, **{name: f"{address}/{name.replace('_', '-')}" for name in names}})
