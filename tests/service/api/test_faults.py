from __future__ import annotations

from typing import Any

import pytest

from service.api.faults import pointer_to, read_recipe
from service.contract.errors import ValidationError
from service.contract.recipe import Recipe
from tests.service.front import recipe


def faults(value: object) -> list[tuple[str, str]]:
    with pytest.raises(ValidationError) as refusal:
        read_recipe(value)
    return [(fault.pointer, fault.code) for fault in refusal.value.faults]


def detail(value: object) -> str:
    with pytest.raises(ValidationError) as refusal:
        read_recipe(value)
    return refusal.value.faults[0].detail


def test_a_valid_recipe_is_read() -> None:
    assert read_recipe(recipe()) == Recipe.model_validate(recipe())


def changed(**changes: Any) -> dict[str, Any]:
    return {**recipe()["tasks"][0], **changes}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([], [("", "model_type")]),
        ({}, [("/base", "missing"), ("/tasks", "missing")]),
        (recipe(tasks=[]), [("/tasks", "too_short")]),
        (recipe(tasks=[changed(), changed(name="b", weight=-1)]), [("/tasks/1/weight", "greater_than_equal")]),
        (recipe(tasks=[{"name": "a"}]), [("/tasks/0/checkpoint", "missing")]),
        (recipe(method={"name": "cat", "rank": -1}), [("/method/rank", "greater_than_equal")]),
        (recipe(method={"name": "cat", "cat": 1}), [("/method/cat", "extra_forbidden")]),
        (recipe(method={"name": "dog"}), [("/method", "union_tag_invalid")]),
        (recipe(method={"rank": 1}), [("/method", "union_tag_not_found")]),
        (recipe(metadata={"x" * 65: "v"}), [("/metadata/" + "x" * 65, "string_too_long")]),
        (recipe(metadata={"a/b~c": 3}), [("/metadata/a~1b~0c", "string_type")]),
        (
            recipe(treatments=[{"match": "*", "use": "projection", "parameters": {"rank": -1, "rnk": 1}}]),
            [
                ("/treatments/0/parameters/rank", "greater_than_equal"),
                ("/treatments/0/parameters/rnk", "extra_forbidden"),
            ],
        ),
        (recipe(tasks=[changed(), changed()]), [("/tasks", "value_error")]),
        (recipe(base="ftp://x"), [("/base", "value_error")]),
        (recipe(output={"prefix": "s3://a/../b/"}), [("/output/prefix", "value_error")]),
    ],
)
def test_a_fault_points_into_the_request(value: object, expected: list[tuple[str, str]]) -> None:
    assert faults(value) == expected


def test_all_that_is_wrong_with_a_search_is_told_at_once_and_where() -> None:
    space = {
        "method": ["cat", "tiess", "lott"],
        "scaling": {"low": 2, "high": 1},
        "rank": [],
        "weights.dogs": [0.5],
        "weights.cars": [0.5, -1],
    }
    asked = {"space": {**space, "rank": [1]}, "sampler": "grid", "objective": "feature_likeness"}
    assert faults(recipe(search=asked)) == [
        ("/search/objective", "value_error"),
        ("/search/space/scaling", "value_error"),
        ("/search/space/scaling", "value_error"),
        ("/search/space/weights.dogs", "value_error"),
        ("/search/space/weights.cars/1", "value_error"),
        ("/search/space/method/1", "value_error"),
        ("/search/space/method/2", "value_error"),
    ]
    assert faults(recipe(search={"space": {**space, "seed": {"low": 1}}})) == [
        ("/search/space/rank", "too_short"),
        ("/search/space/seed/high", "missing"),
    ]


def test_parameters_that_a_method_does_not_take_are_told_at_once_and_where() -> None:
    space = {"method": ["cat", "lot"], "rank": {"low": 0.5, "high": 2}, "balance": [1, -1, -2], "dropp": [1]}
    asked = {"space": space, "objective": "feature_likeness"}
    assert faults(recipe(search=asked)) == [
        ("/search/objective", "value_error"),
        ("/search/space/rank/low", "value_error"),
        ("/search/space/balance/1", "value_error"),
        ("/search/space/balance/2", "value_error"),
        ("/search/space/dropp", "value_error"),
        ("/search/space/method/1", "value_error"),
    ]


def test_every_gate_that_can_not_be_computed_is_told() -> None:
    gates = [{"metric": "mean_retention", "at_least": 0.9}, {"metric": "model_bytes", "at_most": 1e9}]
    assert faults(recipe(gates=[*gates, gates[0]])) == [("/gates/0", "value_error"), ("/gates/2", "value_error")]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (recipe(metod={}), "did you mean 'method' or 'mode' or 'metadata'?"),
        (recipe(method={"name": "ties", "densty": 1}), "did you mean 'density'?"),
        (recipe(tasks=[changed(exemplar="s3://a/b")]), "did you mean 'exemplars'?"),
        (
            recipe(evaluation={"tasks": [{"task": "cars", "labled": "s3://a/b.csv", "labeled": "s3://a/b.csv"}]}),
            "'labeled'",
        ),
        (recipe(output={"prefx": "s3://a/b"}), "did you mean 'prefix'?"),
        (recipe(output={"xyz": 1}), "there are: prefix, overwrite, language, dtype, shard_bytes."),
        (recipe(treatments=[{"match": "*", "use": "scale_mask", "parameters": {"balanc": 1}}]), "'balance'"),
    ],
)
def test_a_field_that_is_not_there_is_told_what_was_meant(value: object, says: str) -> None:
    assert says in detail(value)


def test_a_sentence_of_ours_comes_without_pydantics() -> None:
    assert detail(recipe(base="ftp://x")) == "must start with s3:// or file:///"


def test_there_is_an_end_to_faults() -> None:
    assert len(faults(recipe(tasks=[changed(name=f"t{i}", a=1, b=2, c=3) for i in range(60)]))) == 100


def test_pointers_are_escaped() -> None:
    assert pointer_to(("a/b", 0, "m~n", "")) == "/a~1b/0/m~0n/"
