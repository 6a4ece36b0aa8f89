"""What a search may ask for, and the sentence where it may not."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from service.contract.errors import BadInput
from service.contract.methods import Cat, Ties, TsvM
from service.contract.recipe import Recipe
from service.contract.search import Objective, Search

TASKS = ("cars", "pets")
SCALING = {"scaling": {"low": 0.1, "high": 1.0}}


def recipe(search: dict[str, Any], method: Any = None, *, exemplars: bool = True, **changes: Any) -> Recipe:
    samples = {"exemplars": "s3://data/{}.safetensors"} if exemplars else {}
    tasks = [
        {"name": name, "checkpoint": f"s3://models/{name}/", **{k: v.format(name) for k, v in samples.items()}}
        for name in TASKS
    ]
    rows = [
        {
            "task": name,
            "labeled": f"s3://data/{name}-test.safetensors",
            "validation": f"s3://data/{name}-val.safetensors",
        }
        for name in TASKS
    ]
    body = {"base": "s3://models/base/", "tasks": tasks, "method": method or {"name": "cat"}}
    return Recipe.model_validate({**body, "evaluation": {"tasks": rows}, "search": search, **changes})


def search_of(asked: Recipe) -> Search:
    assert asked.search is not None
    return asked.search


def test_a_recipe_with_a_search_says_the_same_when_read_again() -> None:
    space = {**SCALING, "method": ["cat", "ties"], "weights.cars": [0.5, 1], "rank": [0, 4], "positive_only": [True]}
    asked = recipe({"space": space, "objective": {"mean_retention": 0.5, "worst_retention": 0.5}})
    assert Recipe.model_validate_json(asked.model_dump_json()) == asked
    assert search_of(asked).space["positive_only"] == (True,)


@pytest.mark.parametrize(
    ("search", "sentence"),
    [
        ({"space": {"scalng": [1]}}, "cat can't be searched for 'scalng'; parameters are method, weights.<task>, bal"),
        ({"space": {"density": [0.1]}}, "cat can't be searched for 'density'"),
        ({"space": {"method": ["ties", "dare"], "rank": [1]}}, "ties and dare can't be searched for 'rank'"),
        ({"space": {"features_at": ["task"]}}, "can't be searched for 'features_at'"),
        ({"space": {"then.scaling": [1]}}, "cat can't be searched for 'then.scaling'"),
        ({"space": {"cat.then.name": ["ties"]}}, "cat can't be searched for 'cat.then.name'"),
        ({"space": {"ties.scaling": [1]}}, "ties.scaling is about ties, but trials merge by cat; name it in the space"),
        ({"space": {"cat.scalng": [1]}}, "cat can't be searched for 'cat.scalng'; parameters are method, weights.<ta"),
        ({"space": {"cat.scaling": [-1]}}, "cat does not take cat.scaling = -1: .* greater than or equal"),
        ({"space": {"scaling": [1], "cat.scaling": [1]}}, "scaling has no effect where every method that has it"),
        ({"space": {"scaling": {"low": 2, "high": 1}}}, "the range from 2 to 1 is empty"),
        ({"space": {"scaling": {"low": 1, "high": 1}}}, "the range from 1 to 1 is empty"),
        ({"space": {"scaling": {"low": 0, "high": 1, "log": True}}}, "a logarithmic range must begin above 0"),
        ({"space": {"scaling": []}}, "at least 1 item"),
        ({"space": {}}, "at least 1 item"),
        ({"space": {"scaling": {"low": -1, "high": 1}}}, "cat does not take scaling = -1.0: .* greater than or equal"),
        ({"space": {"rank": {"low": 0.5, "high": 2}}}, "cat does not take rank = 0.5: .* valid integer"),
        ({"space": {"proxy": ["nothing"]}}, "cat does not take proxy = 'nothing'"),
        ({"space": {"positive_only": {"low": 0, "high": 1}}}, "positive_only is true or false"),
        ({"space": {"method": ["catt"]}}, "method is searched for in a list of names; those are cat, "),
        ({"space": {"method": {"low": 0, "high": 1}}}, "method is searched for in a list of names"),
        ({"space": {"weights.dogs": [1]}}, "weights.dogs is the weight of no task; tasks are cars, pets"),
        ({"space": {"weights.cars": [-1]}}, "weights.cars: -1 is no weight"),
        ({"space": SCALING, "sampler": "grid"}, "a grid goes through lists of values; scaling is a range"),
        ({"space": SCALING, "objective": {"mean_retention": 0}}, "an objective needs a weight above 0"),
        ({"space": SCALING, "objective": "accuracy"}, "mean_retention"),
        ({"space": SCALING, "trials": 0}, "greater than or equal to 1"),
    ],
)
def test_what_can_not_be_searched_for(search: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        recipe(search)


def test_an_objective_needs_validation_samples_of_every_task() -> None:
    rows = [{"task": name, "labeled": f"s3://data/{name}.safetensors"} for name in TASKS]
    rows[0]["validation"] = "s3://data/cars-val.safetensors"
    for evaluation in ({"tasks": rows}, {"tasks": rows[:1]}):
        with pytest.raises(ValidationError, match="validation samples of every task; the evaluation has none for pets"):
            recipe({"space": SCALING}, evaluation=evaluation)
    with pytest.raises(ValidationError, match="has none for cars, pets"):
        recipe({"space": SCALING}, evaluation=None)


def test_a_method_that_does_not_fit_the_tasks_is_refused_in_a_space_too() -> None:
    with pytest.raises(ValidationError, match="lot needs exemplars or statistics of every task"):
        recipe({"space": {"method": ["cat", "lot"]}}, exemplars=False)


def test_overrides_hold_for_one_method() -> None:
    overrides = [{"match": "*", "parameters": {"rank": 1}}]
    recipe({"space": SCALING}, overrides=overrides)
    with pytest.raises(ValidationError, match="overrides hold for one method alone"):
        recipe({"space": {"method": ["cat", "ties"]}}, overrides=overrides)


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (
            {"name": "cat", "then": {"name": "ties"}},
            "scaling has no effect where ties combines the trimmed task vectors; search for then.scaling",
        ),
        ({"name": "cat", "features_at": "scaled"}, "a search of scaling needs features_at: task"),
    ],
)
def test_a_scaling_that_can_not_be_searched_for(method: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        recipe({"space": SCALING}, method)


def test_a_trial_is_the_recipe_with_its_parameters() -> None:
    asked = recipe({"space": {**SCALING, "method": ["cat", "ties"], "weights.cars": [0.5]}}, {"name": "cat", "rank": 2})
    same = asked.tried({"scaling": 0.7, "weights.cars": 0.5})
    assert same.method == Cat(scaling=0.7, rank=2, balance=5.0)
    assert [task.weight for task in same.tasks] == [0.5, 1.0]
    assert same.search is None
    other = asked.tried({"method": "ties", "scaling": 0.7})
    assert other.method == Ties(scaling=0.7)


FOLLOWED = {"name": "cat", "then": {"name": "tsv_m"}}


def test_a_trial_may_change_the_method_that_follows() -> None:
    asked = recipe({"space": {"then.scaling": {"low": 0.5, "high": 2}, "rank": [2, 4]}}, FOLLOWED)
    assert asked.tried({"then.scaling": 1.1, "rank": 2}).method == Cat(rank=2, balance=5, then=TsvM(scaling=1.1))
    assert search_of(asked).settings(asked.method) == 2


@pytest.mark.parametrize(
    ("space", "sentence"),
    [
        ({"then.rank": [1]}, "can't be searched for 'then.rank'; parameters are .*, then.scaling"),
        ({"then.scaling": [-1]}, "cat does not take then.scaling = -1: .* greater than or equal"),
        ({"then.name": ["ties"]}, "can't be searched for 'then.name'"),
        ({"method": ["cat", "ties"], "cat.scaling": [1]}, "cat.scaling has no effect .* search for cat.then.scaling"),
    ],
)
def test_what_can_not_be_searched_for_in_the_method_that_follows(space: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        recipe({"space": space}, FOLLOWED)


def test_methods_may_have_ranges_of_their_own() -> None:
    space = {"method": ["cat", "ties", "tsv_m"], "scaling": [0.3, 0.5], "tsv_m.scaling": [1.2], "ties.density": [0.2]}
    asked = recipe({"space": space, "sampler": "grid"})
    assert search_of(asked).cells(asked.method) == [
        {"method": "cat", "scaling": 0.3},
        {"method": "cat", "scaling": 0.5},
        {"method": "ties", "scaling": 0.3, "ties.density": 0.2},
        {"method": "ties", "scaling": 0.5, "ties.density": 0.2},
        {"method": "tsv_m", "tsv_m.scaling": 1.2},
    ]
    assert asked.tried({"method": "tsv_m", "tsv_m.scaling": 1.2}).method == TsvM(scaling=1.2)
    assert asked.tried({"method": "ties", "scaling": 0.3, "ties.density": 0.2}).method == Ties(scaling=0.3)
    assert search_of(asked).settings(asked.method) == 3


def test_a_grid_beyond_all_bounds_is_cut_at_the_most_trials() -> None:
    weights = {"weights.cars": [n / 256 for n in range(256)], "weights.pets": [n / 256 for n in range(256)]}
    space = {**weights, "scaling": list(range(1, 100)), "balance": list(range(100)), "scale_balance": list(range(100))}
    asked = recipe({"space": space, "sampler": "grid", "trials": 1000})
    assert search_of(asked).count(asked.method) == len(search_of(asked).cells(asked.method)) == 1000


def test_parameters_that_do_not_go_together() -> None:
    asked = recipe({"space": {"density": [0.05]}}, {"name": "della"})
    with pytest.raises(BadInput, match="epsilon / 2 < density"):
        asked.tried({"density": 0.05})


def test_a_grid_leaves_out_what_a_method_lacks() -> None:
    asked = recipe({"space": {"rank": [0, 2], "method": ["cat", "average"], "scaling": [1]}, "sampler": "grid"})
    assert search_of(asked).cells(asked.method) == [
        {"rank": 0, "method": "cat", "scaling": 1},
        {"rank": 2, "method": "cat", "scaling": 1},
        {"method": "average"},
    ]
    assert search_of(asked).count(asked.method) == 3


@pytest.mark.parametrize(
    ("budget", "trials"), [({}, 20), ({"trials": 7}, 7), ({"seconds": 60}, 200), ({"seconds": 60, "trials": 7}, 7)]
)
def test_how_many_trials_there_are(budget: dict[str, Any], trials: int) -> None:
    asked = recipe({"space": SCALING, **budget})
    assert search_of(asked).count(asked.method) == trials


def test_an_objective_is_a_weighted_sum() -> None:
    objective = Objective(mean_retention=0.5, worst_retention=2)
    assert objective.of([0.5, 1.0]) == pytest.approx(0.5 * 0.75 + 2 * 0.5)
    assert math.isnan(objective.of([0.5, math.nan]))


def test_settings_count_everything_but_the_scaling() -> None:
    asked = recipe({"space": {**SCALING, "rank": {"low": 1, "high": 4}, "method": ["cat", "ties"]}})
    assert search_of(asked).settings(asked.method) == 5  # four ranks of CAT, and TIES
    fractions = recipe({"space": {"balance": {"low": 1, "high": 4}}})
    assert math.isinf(search_of(fractions).settings(fractions.method))
