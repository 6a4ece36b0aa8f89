"""The OpenAPI document: FastAPI's own, with problems where they are answered."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from service.api.problems import MEDIA_TYPE, Problem

DESCRIPTION = """
Merges fine-tuned checkpoints without training. Submit a recipe, look at the job until it has ended, download the
result. Errors are problem documents (RFC 9457); their `code` is stable. Times are RFC 3339 in UTC.
"""
REFUSED: dict[int | str, dict[str, Any]] = {
    "default": {"model": Problem, "description": "Refused: a problem document (RFC 9457)"}
}


def describe(app: FastAPI) -> dict[str, Any]:
    """The document of an application, made once."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
            separate_input_output_schemas=False,
        )
        for path in document["paths"].values():
            for operation in path.values():
                _as_problem(operation["responses"].get("default"))
        app.openapi_schema = document
    return app.openapi_schema


def _as_problem(response: dict[str, Any] | None) -> None:
    """FastAPI files a model under application/json or the route's own media type; problems have theirs."""
    if response is not None:
        response["content"] = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
