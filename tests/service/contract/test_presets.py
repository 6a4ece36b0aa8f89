"""Presets: a name in place of a method."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import ValidationError

from service.contract.presets import PRESETS, PresetName
from service.contract.recipe import Recipe


def recipe(method: Any, exemplars: bool = False) -> Recipe:
    tasks: list[dict[str, Any]] = [{"name": name, "checkpoint": f"s3://models/{name}/"} for name in ("a", "b")]
    if exemplars:
        tasks = [{**task, "exemplars": f"s3://data/{task['name']}.safetensors"} for task in tasks]
    return Recipe.model_validate({"base": "s3://models/base/", "tasks": tasks, "method": method})


def test_the_table_has_every_name() -> None:
    assert list(PRESETS) == list(get_args(PresetName))
    assert all(name == preset.name and preset.why and preset.source for name, preset in PRESETS.items())


@pytest.mark.parametrize("exemplars", [True, False])
@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_is_stored_as_its_method(name: str, exemplars: bool) -> None:
    by_name = recipe(name, exemplars)
    meant = PRESETS[name].method if exemplars else PRESETS[name].without_data
    assert by_name == recipe(meant.model_dump(), exemplars)
    assert by_name == Recipe.model_validate_json(by_name.model_dump_json())


def test_the_paper_is_cat_as_published() -> None:
    method = recipe("paper", exemplars=True).method.model_dump()
    published = {"name": "cat", "rank": 4, "balance": 5.0, "scale_rank": 4, "scale_balance": 10.0, "shift_rank": 4}
    assert {key: method[key] for key in published} == published
    assert method["then"] is None


def test_an_unknown_preset_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValidationError, match="'best' is no preset; presets are auto, paper"):
        recipe("best")


def test_a_preset_given_as_a_method_is_refused_with_how_to_give_it() -> None:
    with pytest.raises(ValidationError, match=r"'auto' is a preset, given by its name alone.*stands for here, 'tsv_m'"):
        recipe({"name": "auto", "scaling": 1.0})
