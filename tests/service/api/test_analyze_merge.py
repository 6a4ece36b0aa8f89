from __future__ import annotations

import pytest

from service.contract.recipe import Recipe
from tests.service.api.test_submit_merge import refused
from tests.service.front import Front, recipe

CARS = "s3://models/cars.safetensors"
TWO = [{"name": name, "checkpoint": CARS} for name in ("cars", "pets")]


def test_an_analysis_is_a_job_with_a_mode(front: Front) -> None:
    response = front.http.post("/v1/merges:analyze", json=recipe(tasks=TWO))
    job = response.json()
    assert (response.status_code, response.headers["location"]) == (202, f"/v1/merges/{job['id']}")
    assert job["recipe"]["mode"] == "analysis"
    assert job["recipe_sha256"] == Recipe.model_validate(recipe(tasks=TWO, mode="analysis")).sha256
    assert front.http.get(job["links"]["self"]).json() == job
    assert front.submit(tasks=TWO)["recipe"]["mode"] == "merge", "that is the default"
    assert front.submit(tasks=TWO, mode="analysis")["recipe"]["mode"] == "analysis"


def test_a_key_makes_one_analysis_and_is_not_that_of_a_merge(front: Front) -> None:
    headers = {"Idempotency-Key": "once"}
    first, again = (front.http.post("/v1/merges:analyze", json=recipe(tasks=TWO), headers=headers) for _ in range(2))
    assert (again.json()["id"], again.headers["idempotent-replayed"]) == (first.json()["id"], "true")
    merge = front.http.post("/v1/merges", json=recipe(tasks=TWO), headers=headers)
    assert (merge.status_code, merge.json()["recipe"]["mode"]) == (202, "merge")


@pytest.mark.parametrize(
    ("changes", "pointer", "sentence"),
    [
        ({}, "/tasks", "give at least two"),
        ({"tasks": TWO, "method": {"name": "average"}}, "/method", "what cat would remove, not average"),
        ({"tasks": TWO, "method": "auto"}, "/method", "leave method out, or give cat"),
        ({"tasks": TWO, "gates": [{"metric": "model_bytes", "at_most": 1}]}, "/gates", "leave gates out, or merge"),
        (
            {"tasks": TWO, "evaluation": {"tasks": [{"task": "cars", "labeled": CARS}]}},
            "/evaluation",
            "leave evaluation",
        ),
    ],
)
def test_what_needs_a_merged_model_is_refused(
    front: Front, changes: dict[str, object], pointer: str, sentence: str
) -> None:
    problem = refused(front.http.post("/v1/merges:analyze", json=recipe(**changes)), 422, "validation_error")
    assert [fault["pointer"] for fault in problem["errors"]] == [pointer]
    assert sentence in problem["errors"][0]["detail"]


@pytest.mark.parametrize("body", ["[]", "3", '"analysis"', "{"])
def test_what_is_no_recipe_is_refused_as_it_is(front: Front, body: str) -> None:
    response = front.http.post("/v1/merges:analyze", content=body, headers={"Content-Type": "application/json"})
    assert 400 <= response.status_code < 500
    assert (
        response.json()["code"]
        == front.http.post("/v1/merges", content=body, headers={"Content-Type": "application/json"}).json()["code"]
    )
