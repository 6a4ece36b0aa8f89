"""Evaluations over HTTP: a resource of their own, checked at once, with every door that a job has."""

from __future__ import annotations

import json
import struct
from math import prod
from typing import Any

import pytest

from tests.service.api.test_submit_merge import refused
from tests.service.front import Front

CONFIG = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}


def file(header: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """A safetensors file of zeros, by name: type and shape."""
    table, end = {}, 0
    for name, (dtype, shape) in header.items():
        start, end = end, end + prod(shape) * {"F32": 4, "I64": 8}[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def head(classes: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {"classifier.weight": ("F32", (classes, 4)), "classifier.bias": ("F32", (classes,))}


def config(classes: int, **more: Any) -> bytes:
    return json.dumps({**CONFIG, "id2label": {str(n): f"c{n}" for n in range(classes)}, **more}).encode()


@pytest.fixture
def stocked(front: Front) -> Front:
    """A merged model of two classes with heads for cars (3) and pets (5), an expert, and labels of cars and pets."""
    body = {"bert.weight": ("F32", (4, 4))}
    front.put("s3://merged/run/model.safetensors", file({**body, **head(2)}))
    front.put("s3://merged/run/config.json", config(2))
    for task, classes in (("cars", 3), ("pets", 5)):
        front.put(f"s3://merged/run/heads/{task}.safetensors", file(head(classes)))
        front.put(f"s3://merged/run/heads/{task}.json", config(classes))
        front.put(f"s3://data/{task}.safetensors", file({"input_ids": ("I64", (6, 4)), "labels": ("I64", (6,))}))
    front.put("s3://models/cars-expert/model.safetensors", file({**body, **head(3)}))
    front.put("s3://models/cars-expert/config.json", config(3))
    return front


def asked(*tasks: str, **changes: Any) -> dict[str, Any]:
    rows = [{"task": task, "labeled": f"s3://data/{task}.safetensors"} for task in tasks or ("cars", "pets")]
    models = [{"name": "merged", "checkpoint": "s3://merged/run/"}]
    return {"models": models, "evaluation": {"tasks": rows}, **changes}


def submit(front: Front, **changes: Any) -> dict[str, Any]:
    response = front.http.post("/v1/evaluations", json=asked(**changes))
    assert response.status_code == 202, response.text
    job: dict[str, Any] = response.json()
    return job


def test_an_evaluation_is_a_resource_of_its_own(stocked: Front) -> None:
    from openapi_schema_validator import OAS31Validator

    response = stocked.http.post("/v1/evaluations", json=asked())
    job = response.json()
    assert job["id"].startswith("evl_")
    assert (job["object"], job["status"], job["warnings"]) == ("evaluation", "queued", [])
    assert response.headers["location"] == job["links"]["self"] == f"/v1/evaluations/{job['id']}"
    assert job["recipe"]["output"]["prefix"] == f"s3://workspace/evaluations/{job['id']}/"
    assert "trim_log" not in job["links"]
    document = stocked.http.get("/openapi.json").json()
    OAS31Validator({**document, "$ref": "#/components/schemas/EvaluationView"}).validate(job)


def test_lists_hold_their_own_kind_alone(stocked: Front) -> None:
    evaluations = [submit(stocked)["id"] for _ in range(3)]
    merges = [stocked.submit()["id"] for _ in range(2)]
    for plural, ids in (("evaluations", evaluations), ("merges", merges)):
        page = stocked.http.get(f"/v1/{plural}").json()
        assert [job["id"] for job in page["data"]] == ids[::-1]
    page = stocked.http.get("/v1/evaluations?limit=2").json()
    rest = stocked.http.get(f"/v1/evaluations?limit=2&after={page['last_id']}").json()
    assert [job["id"] for job in (*page["data"], *rest["data"])] == evaluations[::-1]
    refused(stocked.http.get(f"/v1/merges?after={evaluations[0]}"), 400, "invalid_cursor")


def test_an_id_opens_the_doors_of_its_own_resource_only(stocked: Front) -> None:
    evaluation, merge = submit(stocked)["id"], stocked.submit()["id"]
    assert stocked.http.get(f"/v1/evaluations/{evaluation}").json()["id"] == evaluation
    for path in ("", "/events", "/artifacts"):
        problem = refused(stocked.http.get(f"/v1/merges/{evaluation}{path}"), 404, "not_found")
        assert problem["detail"] == f"There is no merge {evaluation!r}."
        problem = refused(stocked.http.get(f"/v1/evaluations/{merge}{path}"), 404, "not_found")
        assert problem["detail"] == f"There is no evaluation {merge!r}."


def test_an_evaluation_is_followed_cancelled_retried_finished_and_forgotten(stocked: Front) -> None:
    job = submit(stocked)
    links = job["links"]
    assert stocked.http.post(links["cancel"]).json()["status"] == "cancelled"
    assert stocked.http.post(links["retry"]).json()["status"] == "queued"
    refused(stocked.http.get(links["artifacts"]), 409, "not_ready")
    stocked.finish(job, {"merge/report.json": b"{}"})
    events = [event["type"] for event in stocked.http.get(links["events"]).json()["data"]]
    assert events[:3] == ["job.queued", "job.cancelled", "job.retried"]
    assert [row["name"] for row in stocked.http.get(links["artifacts"]).json()["data"]] == ["merge/report.json"]
    assert stocked.http.get(f"{links['artifacts']}/merge/report.json").content == b"{}"
    assert stocked.http.delete(f"{links['self']}?artifacts=true").status_code == 204
    assert not stocked.has(f"{job['recipe']['output']['prefix']}merge/report.json")
    assert stocked.has("s3://merged/run/model.safetensors"), "what was measured stays"


def test_a_key_makes_one_evaluation(stocked: Front) -> None:
    headers = {"Idempotency-Key": "once"}
    first, again = (stocked.http.post("/v1/evaluations", json=asked(), headers=headers) for _ in range(2))
    assert (again.json()["id"], again.headers["idempotent-replayed"]) == (first.json()["id"], "true")


def faults(front: Front, code: str, body: dict[str, Any]) -> dict[str, str]:
    problem = refused(front.http.post("/v1/evaluations", json=body), 422, code)
    return {fault["pointer"]: fault["detail"] for fault in problem["errors"]}


def test_a_head_of_another_shape_is_refused(stocked: Front) -> None:
    stocked.put("s3://merged/run/heads/cars.json", config(7))
    found = faults(stocked, "incompatible_checkpoints", asked())
    assert "of 7 classes needs a head with 7 rows" in found["/models/0/checkpoint"]


def test_a_missing_head_is_refused(stocked: Front) -> None:
    stocked.put("s3://models/bare/model.safetensors", file({"weight": ("F32", (4, 4))}))
    stocked.put("s3://models/bare/config.json", config(2, architectures=["BertModel"]))
    bare = [{"name": "bare", "checkpoint": "s3://models/bare/"}]
    found = faults(stocked, "incompatible_checkpoints", asked(models=bare))
    assert "BertModel can't be measured by classification" in found["/models/0/checkpoint"]
    heads = [{"name": "bare", "checkpoint": "s3://models/bare/", "heads": "s3://models/none/"}]
    found = faults(stocked, "checkpoint_not_found", asked(models=heads))
    assert "holds no heads" in found["/models/0/heads"]


def test_a_task_that_heads_do_not_know_is_warned_of(stocked: Front) -> None:
    stocked.put("s3://data/carz.safetensors", file({"input_ids": ("I64", (6, 4)), "labels": ("I64", (6,))}))
    rows = [{"task": "carz", "labeled": "s3://data/carz.safetensors"}]
    (warning,) = submit(stocked, evaluation={"tasks": rows})["warnings"]
    assert "has heads for cars, pets, and none for carz" in warning


def test_every_fault_is_told_with_its_place(stocked: Front) -> None:
    stocked.put("s3://models/pickled/pytorch_model.bin", b"\x80\x04")
    stocked.put("s3://models/lone.safetensors", file({"weight": ("F32", (4, 4))}))
    stocked.put("s3://models/adapter/adapter_model.safetensors", file({"a": ("F32", (4, 4))}))
    stocked.put("s3://models/adapter/adapter_config.json", b'{"peft_type": "LORA"}')
    stocked.put("s3://data/cars.safetensors", file({"pixel_values": ("F32", (6, 4)), "labels": ("F32", (6,))}))
    names = ("pickled/", "lone.safetensors", "adapter/", "gone/", "cars-expert/")
    models = [{"name": f"m{place}", "checkpoint": f"s3://models/{name}"} for place, name in enumerate(names)]
    found = faults(
        stocked, "validation_error", asked("cars", models=models, output={"prefix": "s3://models/cars-expert/"})
    )
    assert "pickle" in found["/models/0/checkpoint"]
    assert "no config.json" in found["/models/1/checkpoint"]
    assert "name the whole model that it is of as base" in found["/models/2/checkpoint"]
    assert "does not exist" in found["/models/3/checkpoint"]
    assert "labels" in found["/evaluation/tasks/0/labeled"]
    assert "/output/prefix" in found
    assert "/models/4/checkpoint" not in found


def test_what_the_recipe_lacks_is_told_with_pointers(stocked: Front) -> None:
    found = faults(stocked, "validation_error", {"models": [{"name": "m", "checkpint": "s3://a/b/"}]})
    assert set(found) == {"/evaluation", "/models/0/checkpoint", "/models/0/checkpint"}
    assert "did you mean 'checkpoint'" in found["/models/0/checkpint"]
    problem = refused(stocked.http.post("/v1/merges", json={**asked(), "mode": "evaluation"}), 422, "validation_error")
    assert "/mode" in {fault["pointer"] for fault in problem["errors"]}


def test_a_plan_tells_what_would_be_measured_and_stores_nothing(stocked: Front) -> None:
    expert = {"name": "expert", "checkpoint": "s3://models/cars-expert/", "tasks": ["cars"], "reference": True}
    body = asked(speed=True)
    body["models"].append(expert)
    response = stocked.http.post("/v1/evaluations:plan", json=body)
    assert response.status_code == 200, response.text
    plan = response.json()
    merged, reference = plan["models"]
    assert (merged["name"], merged["tasks"], merged["heads"]) == ("merged", ["cars", "pets"], ["cars", "pets"])
    assert (reference["reference"], reference["tasks"], reference["heads"]) == (True, ["cars"], [])
    heads = [stocked.house.objects.head(f"s3://merged/run/heads/{task}.safetensors").size for task in ("cars", "pets")]
    assert merged["bytes"] == stocked.house.objects.head("s3://merged/run/model.safetensors").size + sum(heads)
    assert (plan["references"], plan["parts"]) == ({"cars": "expert", "pets": None}, 4)
    assert plan["peak_memory_bytes"] > 0
    assert stocked.count() == 0
    refused(stocked.http.post("/v1/evaluations:plan", json={}), 422, "validation_error")
    lost = asked(models=[{"name": "lost", "checkpoint": "s3://models/lost/"}])
    refused(stocked.http.post("/v1/evaluations:plan", json=lost), 422, "checkpoint_not_found")
