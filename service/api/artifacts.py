"""What a merge left: the list of its files, and each file by a link or as bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, StreamingResponse

from service.api import problems
from service.api.conditions import is_unchanged
from service.api.deps import Caller, Doors, House
from service.api.merges import JobId
from service.api.ranges import Span, requested
from service.api.views import ArtifactList
from service.contract.errors import NotFound, NotReady, RangeNotSatisfiable
from service.contract.job import Artifact, Job
from service.stores.objects import ObjectInfo, Objects

router = APIRouter(prefix="/v1", tags=["artifacts"])

CHUNK_BYTES = 4 << 20


class DownloadQuery(BaseModel):
    """How to hand a file over."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    proxy: bool = Field(False, description="Send the bytes from here, even where the store has links")


@router.get("/merges/{job_id}/artifacts", responses={200: {"model": ArtifactList}})
def list_artifacts(job_id: JobId, doors: Doors, caller: Caller) -> Response:
    """List the files of a result, with sizes and SHA-256."""
    rows = artifacts_of(doors.jobs.get(caller, job_id))
    data = [artifact.model_dump(mode="json") for artifact in rows.values()]
    return JSONResponse({"object": "list", "data": data, "has_more": False})


@router.head("/merges/{job_id}/artifacts/{name:path}", include_in_schema=False)
@router.get(
    "/merges/{job_id}/artifacts/{name:path}",
    response_class=Response,
    responses={
        200: {"description": "The file", "content": {"application/octet-stream": {}}},
        206: {"description": "The range that was asked for", "content": {"application/octet-stream": {}}},
        307: {"description": "The file is at the address in Location, for a while"},
    },
)
def get_artifact(
    request: Request,
    job_id: JobId,
    name: str,
    query: Annotated[DownloadQuery, Query()],
    doors: Doors,
    caller: Caller,
) -> Response:
    """Download a file: a redirect to the store, or the bytes themselves where the store has no links."""
    job = doors.jobs.get(caller, job_id)
    artifact = named(job, name)
    # A link is signed for GET alone, so HEAD is answered from here.
    link = None if query.proxy or request.method == "HEAD" else _link(job, artifact, doors)
    if link is not None:
        return Response(status_code=307, headers={"Location": link, "Cache-Control": "no-store"})
    return _bytes(request, artifact, found(job, artifact, doors.objects), doors.objects)


def artifacts_of(job: Job) -> dict[str, Artifact]:
    """The files of a job's result by name. Raises NotReady."""
    if not job.status.has_result:
        raise NotReady(f"Job {job.id} is {job.status.value}: artifacts exist once it has succeeded or is rejected.")
    rows = [Artifact.model_validate(row) for row in (job.result or {}).get("artifacts", [])]
    return {artifact.name: artifact for artifact in rows}


def named(job: Job, name: str) -> Artifact:
    """The artifact of that name; only names of the list are ever looked for. Raises NotReady, NotFound."""
    artifact = artifacts_of(job).get(name)
    if artifact is None:
        raise NotFound(f"Job {job.id} has no artifact {name!r}.")
    return artifact


def found(job: Job, artifact: Artifact, objects: Objects) -> ObjectInfo:
    """The object of an artifact as it is now. Raises NotFound: it is gone, or another by now."""
    info = objects.head(job.prefix + artifact.name)
    if info.size != artifact.size:
        raise NotFound(
            f"{info.address} has {info.size} bytes, but the job wrote {artifact.size}: it is no longer the same file."
        )
    return info


def chunks(info: ObjectInfo, span: Span, objects: Objects) -> Iterator[memoryview]:
    """The bytes of a span, a few MiB at a time, all from the same version of the object."""
    for start in range(span.start, span.end, CHUNK_BYTES):
        chunk = memoryview(bytearray(min(CHUNK_BYTES, span.end - start)))
        objects.read(info.address, start, chunk, etag=info.etag)
        yield chunk


def _link(job: Job, artifact: Artifact, doors: House) -> str | None:
    filename = artifact.name.rpartition("/")[2]
    return doors.objects.link(job.prefix + artifact.name, seconds=doors.settings.link_seconds, filename=filename)


def _bytes(request: Request, artifact: Artifact, info: ObjectInfo, objects: Objects) -> Response:
    etag = f'"{artifact.sha256}"'
    headers = {"ETag": etag, "Accept-Ranges": "bytes", "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
    if is_unchanged(request, etag):
        return Response(status_code=304, headers=headers)
    span = requested(_range_header(request, etag), artifact.size)
    if span is not None and not len(span):
        refusal = RangeNotSatisfiable(f"{artifact.name} has {artifact.size} bytes.")
        return problems.answer(problems.problem(request, refusal), {"Content-Range": f"bytes */{artifact.size}"})
    whole = Span(0, artifact.size)
    headers["Content-Disposition"] = _disposition(artifact.name)
    headers["Content-Length"] = str(len(span or whole))
    if span is not None:
        headers["Content-Range"] = f"bytes {span.start}-{span.end - 1}/{artifact.size}"
    status = 200 if span is None else 206
    if request.method == "HEAD":
        return Response(None, status, headers, artifact.media_type)
    return StreamingResponse(chunks(info, span or whole, objects), status, headers, artifact.media_type)


def _range_header(request: Request, etag: str) -> str | None:
    """The Range header, unless it is for a version that the caller no longer has right (If-Range)."""
    condition = request.headers.get("if-range", etag)
    return request.headers.get("range") if request.method == "GET" and condition == etag else None


def _disposition(name: str) -> str:
    filename = name.rpartition("/")[2]
    quoted = quote(filename, safe="")
    return f'attachment; filename="{filename}"' if quoted == filename else f"attachment; filename*=UTF-8''{quoted}"
