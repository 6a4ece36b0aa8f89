"""What can be asked for: the merge methods and parameter treatments, with their parameters."""

from __future__ import annotations

import inspect
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from service.contract.methods import METHODS
from service.contract.presets import PRESETS
from service.contract.treatments import TREATMENTS, Role, Statistic

router = APIRouter(prefix="/v1", tags=["catalogue"])


class MethodView(BaseModel):
    """A merge method."""

    object: Literal["method"] = "method"
    name: str
    summary: str
    description: str
    paper: str
    trims: bool = Field(description="Whether task vectors are treated before they are combined")
    any_order: bool = Field(description="Whether the order of tasks makes no difference beyond rounding")
    parameters: dict[str, Any] = Field(description="JSON Schema of the members of `method`, beside its name")


class TreatmentView(BaseModel):
    """A treatment of one parameter's task vectors."""

    object: Literal["treatment"] = "treatment"
    name: str
    summary: str
    description: str
    paper: str
    roles: list[Role] = Field(description="What kinds of parameter it serves")
    statistic: Statistic = Field(description="What it needs to know about the parameter's inputs")
    parameters: dict[str, Any] = Field(description="JSON Schema of `parameters` in an entry of `treatments`")


class PresetView(BaseModel):
    """A method with all its parameters under one name."""

    object: Literal["preset"] = "preset"
    name: str = Field(description="What a recipe may give as `method`")
    summary: str
    source: str
    method: dict[str, Any] = Field(description="What the name stands for, and what a stored recipe holds in its place")
    without_data: dict[str, Any] = Field(description="The same where tasks bring neither exemplars nor statistics")


class MethodList(BaseModel):
    """Every merge method, and the presets."""

    object: Literal["list"] = "list"
    data: list[MethodView]
    presets: list[PresetView]
    has_more: Literal[False] = False


class TreatmentList(BaseModel):
    """Every treatment."""

    object: Literal["list"] = "list"
    data: list[TreatmentView]
    has_more: Literal[False] = False


@router.get("/methods")
def list_methods() -> MethodList:
    """List the merge methods, with their papers and parameters, and the presets that name some of them."""
    return MethodList(
        data=[
            MethodView(name=name, paper=row.paper, trims=row.trims, any_order=row.any_order, **_described(row))
            for name, row in METHODS.items()
        ],
        presets=[
            PresetView(
                name=row.name,
                summary=row.why,
                source=row.source,
                method=row.method.model_dump(mode="json"),
                without_data=row.without_data.model_dump(mode="json"),
            )
            for row in PRESETS.values()
        ],
    )


@router.get("/treatments")
def list_treatments() -> TreatmentList:
    """List the parameter treatments, with the roles they serve and their parameters."""
    return TreatmentList(
        data=[
            TreatmentView(name=name, paper=row.paper, roles=list(row.roles), statistic=row.statistic, **_described(row))
            for name, row in TREATMENTS.items()
        ]
    )


def _described(row: type[BaseModel]) -> dict[str, Any]:
    text = inspect.cleandoc(row.__doc__ or "")
    schema = row.model_json_schema()
    schema["properties"] = {name: about for name, about in schema["properties"].items() if name != "name"}
    return {"summary": text.partition("\n")[0], "description": text, "parameters": schema}
