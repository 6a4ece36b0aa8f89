"""The search that a recipe gets which says nothing about one, and nothing about the scaling."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from service.contract.recipe import Recipe

TASKS = ("cars", "pets")


def recipe(
    *, validation: tuple[str, ...] = TASKS, exemplars: bool = True, kind: str = "classification", **changes: Any
) -> Recipe:
    tasks = [{"name": name, "checkpoint": f"s3://models/{name}/"} for name in TASKS]
    if exemplars:
        tasks = [{**task, "exemplars": f"s3://data/{task['name']}.safetensors"} for task in tasks]
    rows = [{"task": name, "labeled": f"s3://data/{name}-test.safetensors", "kind": kind} for name in TASKS]
    for row in rows:
        if row["task"] in validation:
            row["validation"] = f"s3://data/{row['task']}-val.safetensors"
    body = {"base": "s3://models/base/", "tasks": tasks, "evaluation": {"tasks": rows}, **changes}
    return Recipe.model_validate(body)


def space(asked: Recipe) -> Any:
    return asked.search.space if asked.search else None


@pytest.mark.parametrize(
    ("method", "name", "scalings"),
    [
        ({"name": "cat", "rank": 2}, "scaling", (0.4, 0.3, 0.5, 0.2, 0.6)),
        ("auto", "scaling", (1.3, 0.975, 1.625, 0.65, 1.95)),
        ("paper", "scaling", (0.4, 0.3, 0.5, 0.2, 0.6)),
        ({"name": "dare", "combine": "ties"}, "scaling", (1.0, 0.75, 1.25, 0.5, 1.5)),
        ({"name": "cat", "scaling": 0.4, "then": {"name": "ties"}}, "then.scaling", (1.0, 0.75, 1.25, 0.5, 1.5)),
    ],
)
def test_a_few_scalings_around_the_default_are_tried(method: Any, name: str, scalings: tuple[float, ...]) -> None:
    asked = recipe(method=method)
    assert space(asked) == {name: scalings}
    assert asked.search is not None
    assert (asked.search.objective, asked.search.count(asked.method)) == ("mean_retention", 5)


@pytest.mark.parametrize("validation", [(), TASKS[:1]])
def test_without_labels_the_predictions_of_exemplars_are_compared(validation: tuple[str, ...]) -> None:
    asked = recipe(validation=validation)
    assert space(asked) == {"scaling": (0.4, 0.3, 0.5, 0.2, 0.6)}
    assert asked.search is not None
    assert asked.search.objective == "prediction_likeness"


def test_a_recipe_without_a_method_is_searched_for_too() -> None:
    assert space(recipe()) == {"scaling": (0.4, 0.3, 0.5, 0.2, 0.6)}


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"name": "cat", "scaling": 0.4}},
        {"method": {"name": "cat", "then": {"name": "ties", "scaling": 1.0}}},
        {"method": {"name": "cat", "features_at": "scaled"}},
        {"method": {"name": "average"}},
        {"overrides": [{"match": "*", "parameters": {"scaling": 0.2}}]},
        {"search": None},
        {"mode": "analysis", "evaluation": None},
        {"evaluation": None},
        {"validation": (), "exemplars": False},
        {"validation": TASKS[:1], "exemplars": False},
        {"validation": (), "kind": "regression"},
        {"validation": (), "evaluation": {"tasks": [{"task": "cars", "labeled": "s3://data/cars.safetensors"}]}},
    ],
)
def test_nothing_is_searched_for(changes: dict[str, Any]) -> None:
    """Where a scaling is given, there is none, or nothing but test samples to compare by; and where null says so."""
    assert recipe(**changes).search is None


def test_a_recipe_that_was_stored_stays_as_it_is() -> None:
    """Also one that says no: what is filled in and read again is not filled in once more."""
    for asked in (recipe(), recipe(search=None), recipe(validation=())):
        again = Recipe.model_validate(asked.model_dump(mode="json"))
        assert (again, again.sha256) == (asked, asked.sha256)
    assert recipe().sha256 == recipe().sha256 != recipe(search=None).sha256


def test_a_trial_does_not_search() -> None:
    asked = recipe()
    assert asked.tried({"scaling": 0.5}).search is None
    assert recipe(search={"space": {"method": ["cat", "ties"]}}).tried({"method": "ties"}).search is None


@pytest.mark.parametrize(
    ("objective", "measures", "compares"),
    [
        ("feature_likeness", "likeness", "features"),
        ("prediction_likeness", "prediction_likeness", "predictions"),
    ],
)
def test_without_labels_exemplars_are_enough_for_a_search(objective: str, measures: str, compares: str) -> None:
    search = {"space": {"scaling": [0.3, 0.5]}, "objective": objective}
    asked = recipe(search=search, evaluation=None)
    assert asked.search is not None
    assert asked.search.measures == measures
    assert asked.search.value([0.5, 1.0]) == 0.75
    sentence = f"{objective} compares {compares} of exemplars of every task; there are none for cars, pets"
    with pytest.raises(ValidationError, match=sentence):
        recipe(search=search, exemplars=False)
    with pytest.raises(
        ValidationError, match="Without labels, exemplars are enough for feature_likeness and prediction_likeness"
    ):
        recipe(search={"space": {"scaling": [0.3, 0.5]}}, evaluation=None)
