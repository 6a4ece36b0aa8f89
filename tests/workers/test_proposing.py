"""What a search tries next, and which parameters made the difference."""

from __future__ import annotations

from typing import Any

import pytest

from service.contract.recipe import Recipe
from service.contract.search import Search, Value
from service.contract.trials import TrialRecord
from tests.service.contract.test_search import recipe, search_of
from workers.proposing import ENOUGH_TRIALS, importances, propose

SPACE: dict[str, Any] = {
    "method": ["cat", "ties"],
    "scaling": {"low": 0.05, "high": 4.0, "log": True},
    "rank": {"low": 0, "high": 8},
    "weights.cars": {"low": 0.5, "high": 1.0},
}


def searched(asked: Recipe, count: int) -> list[TrialRecord]:
    """A search whose objective is known: scaling 0.7 is best, and nothing else matters."""
    known: list[TrialRecord] = []
    for number in range(count):
        parameters = propose(asked, search_of(asked), known)
        assert parameters is not None
        known.append(TrialRecord(number, number, "complete", parameters, -abs(scaling(parameters) - 0.7)))
    return known


def scaling(parameters: Any) -> float:
    return float(parameters["scaling"])


def test_proposals_lie_in_the_space() -> None:
    known = searched(recipe({"space": SPACE}), 30)
    assert {trial.parameters["method"] for trial in known} == {"cat", "ties"}
    for trial in known:
        assert 0.05 <= scaling(trial.parameters) <= 4.0
        assert ("rank" in trial.parameters) == (trial.parameters["method"] == "cat")
        assert isinstance(trial.parameters.get("rank", 0), int)


def test_tpe_comes_closer_than_chance() -> None:
    """By where the last trials are on average: they gather where the best ones were."""
    distances = {}
    for sampler in ("tpe", "random"):
        known = searched(recipe({"space": SPACE, "sampler": sampler}), 40)
        distances[sampler] = sum(abs(scaling(trial.parameters) - 0.7) for trial in known[20:])
    assert distances["tpe"] < 0.75 * distances["random"]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_proposal_depends_on_seed_and_trials_alone(sampler: str) -> None:
    first, again, other = (
        [trial.parameters for trial in searched(recipe({"space": SPACE, "sampler": sampler}, seed=seed), 14)]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_two_workers_are_not_sent_to_the_same_place() -> None:
    asked = recipe({"space": SPACE})
    known = searched(asked, 12)
    first = propose(asked, search_of(asked), known)
    assert first is not None
    second = propose(asked, search_of(asked), [*known, TrialRecord(12, 12, "running", first)])
    assert first != second


def test_what_was_asked_for_is_tried_first_if_it_lies_in_the_space() -> None:
    asked = recipe({"space": SPACE})
    own: dict[str, Value] = {"method": "cat", "scaling": 0.4, "rank": 4, "weights.cars": 1.0}
    assert propose(asked, search_of(asked), []) == own
    lost = TrialRecord(0, 0, "lost", own)
    assert propose(asked, search_of(asked), [lost]) == own
    elsewhere = recipe({"space": {"scaling": {"low": 1, "high": 2}}})
    assert scaling(propose(elsewhere, search_of(elsewhere), [])) >= 1


def test_a_grid_is_gone_through_in_order_and_what_was_lost_again() -> None:
    asked = recipe({"space": {"scaling": [0.3, 0.5], "rank": [1]}, "sampler": "grid"})
    search: Search = search_of(asked)
    first = TrialRecord(0, 0, "running", {"scaling": 0.3, "rank": 1})
    assert propose(asked, search, []) == first.parameters
    assert propose(asked, search, [first]) == {"scaling": 0.5, "rank": 1}
    lost = TrialRecord(1, 1, "lost", {"scaling": 0.5, "rank": 1})
    assert propose(asked, search, [first, lost]) == {"scaling": 0.5, "rank": 1}
    failed = TrialRecord(2, 1, "failed", {"scaling": 0.5, "rank": 1})
    assert propose(asked, search, [first, lost, failed]) is None


def test_names_of_one_method_and_of_what_follows_are_proposed_where_they_apply() -> None:
    space = {"method": ["cat", "ties"], "cat.then.scaling": {"low": 1.0, "high": 2.0}, "ties.density": [0.2, 0.5]}
    asked = recipe({"space": space}, {"name": "cat", "then": {"name": "tsv_m"}})
    known: list[TrialRecord] = []
    for number in range(12):
        parameters = propose(asked, search_of(asked), known)
        assert parameters is not None
        known.append(TrialRecord(number, number, "complete", parameters, float(number % 3)))
    assert known[0].parameters == {"method": "cat", "cat.then.scaling": 1.4}
    own = {"cat": {"method", "cat.then.scaling"}, "ties": {"method", "ties.density"}}
    for trial in known:
        assert trial.parameters.keys() == own[str(trial.parameters["method"])]


def test_importances_name_what_made_the_difference() -> None:
    asked = recipe({"space": SPACE, "sampler": "random"})
    known = searched(asked, 40)
    found = importances(asked, search_of(asked), known)
    assert sum(found.values()) == pytest.approx(1)
    assert max(found, key=lambda name: found[name]) == "scaling"
    assert importances(asked, search_of(asked), known[: ENOUGH_TRIALS - 1]) == {}
