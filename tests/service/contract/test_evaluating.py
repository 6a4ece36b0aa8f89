"""The recipe of an evaluation by itself: what it must say, and what it may not."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from service.contract.asked import stored_recipe
from service.contract.evaluating import EvaluationRecipe
from service.contract.recipe import Recipe
from service.contract.resources import EVALUATIONS, MERGES

TASKS = ("cars", "pets")


def asked(**changes: Any) -> dict[str, Any]:
    rows = [{"task": task, "labeled": f"s3://data/{task}.safetensors"} for task in TASKS]
    return {"models": [model("merged")], "evaluation": {"tasks": rows}, **changes}


def model(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "checkpoint": f"s3://models/{name}/", **more}


def expert(task: str) -> dict[str, Any]:
    return model(f"{task}-expert", tasks=[task], reference=True)


def read(**changes: Any) -> EvaluationRecipe:
    return EvaluationRecipe.model_validate(asked(**changes))


def test_every_model_is_measured_on_its_tasks_in_order() -> None:
    recipe = read(models=[model("merged"), expert("pets"), expert("cars")])
    found = [(row.task, measured.name) for row, measured in recipe.parts]
    assert found == [("cars", "merged"), ("cars", "cars-expert"), ("pets", "merged"), ("pets", "pets-expert")]
    assert [recipe.reference_on(task) for task in TASKS] == [recipe.models[2], recipe.models[1]]
    assert [measured.name for measured in recipe.judged] == ["merged"]


def test_a_stored_recipe_is_of_its_kind() -> None:
    evaluation = read()
    merge = Recipe.model_validate({"base": "s3://a/b/", "tasks": [{"name": "cars", "checkpoint": "s3://a/c/"}]})
    for recipe, resource in ((evaluation, EVALUATIONS), (merge, MERGES)):
        again = stored_recipe(recipe.model_dump(mode="json"))
        assert again == recipe
        assert (again.sha256, again.resource) == (recipe.sha256, resource)


def test_a_row_from_before_there_were_modes_is_a_merge() -> None:
    assert isinstance(stored_recipe({"base": "s3://a/b/", "tasks": [{"name": "t", "checkpoint": "s3://a/c/"}]}), Recipe)


ROWS = asked()["evaluation"]["tasks"]
GATE = {"metric": "worst_task_retention", "at_least": 0.9}


@pytest.mark.parametrize(
    ("changes", "place", "sentence"),
    [
        ({"models": []}, "models", "at least 1"),
        ({"models": [model("a"), model("A")]}, "models", "different names"),
        ({"models": [model("a", reference=True)]}, "models", "all models are references"),
        ({"models": [model("a", tasks=["carz"])]}, "models", "names the tasks carz, which evaluation does not measure"),
        ({"models": [model("a"), model("b", reference=True), expert("cars")]}, "models", "more than one reference"),
        ({"models": [model("a", tasks=["cars"]), expert("pets")]}, "models", "no model but a reference"),
        ({"evaluation": {"tasks": [ROWS[0], ROWS[0]]}}, "evaluation", "named twice"),
        ({"evaluation": {"tasks": ROWS, "baselines": ["ties"]}}, "evaluation", "nothing is merged here"),
        (
            {"evaluation": {"tasks": [{**ROWS[0], "validation": "s3://data/v.safetensors"}]}},
            "evaluation",
            "nothing is searched for here",
        ),
        ({"gates": [GATE]}, "gates", "there is none on cars, pets"),
        ({"gates": [GATE], "models": [model("a"), expert("cars")]}, "gates", "there is none on pets"),
        ({"gates": [{"metric": "task_drop", "task": "cars", "at_most": 0.1}]}, "gates", "there is none on cars"),
        ({"gates": [{"metric": "task_score", "task": "vans", "at_least": 1}]}, "gates", "does not measure"),
        ({"gates": [{"metric": "latency_ratio", "at_most": 1}]}, "gates", 'ask for it with "speed": true'),
        ({"gates": [{"metric": "latency_ratio", "at_most": 1}], "speed": True}, "gates", "against references, and the"),
        ({"base": "ftp://here/"}, "base", "must start with"),
        ({"method": "cat"}, "method", "Extra inputs"),
    ],
)
def test_what_can_not_be_measured_is_refused(changes: dict[str, Any], place: str, sentence: str) -> None:
    with pytest.raises(ValidationError) as raised:
        read(**changes)
    (fault,) = raised.value.errors()
    assert fault["loc"][0] == place
    assert sentence in fault["msg"]


def test_gates_that_can_be_computed_are_let_be() -> None:
    gates = [
        GATE,
        {"metric": "task_score", "task": "cars", "at_least": 0.5},
        {"metric": "model_bytes", "at_most": 10},
        {"metric": "min_samples", "at_least": 10},
    ]
    assert len(read(models=[model("a"), model("b", reference=True)], gates=gates).gates) == 4
