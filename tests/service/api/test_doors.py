from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import validate
from sqlalchemy import update

from service.contract.methods import METHODS
from service.contract.presets import PRESETS
from service.contract.recipe import Recipe
from service.contract.treatments import TREATMENTS
from service.stores.schema import jobs
from tests.servers import postgres_server
from tests.service.api.test_submit_merge import refused
from tests.service.front import Front, connections_to, open_front, recipe, with_checkpoints

ROUTES = {
    ("post", "/v1/merges"),
    ("get", "/v1/merges"),
    ("post", "/v1/merges:plan"),
    ("post", "/v1/evaluations:plan"),
    ("post", "/v1/merges:analyze"),
    ("get", "/v1/merges/{job_id}"),
    ("delete", "/v1/merges/{job_id}"),
    ("post", "/v1/merges/{job_id}/cancel"),
    ("post", "/v1/merges/{job_id}/retry"),
    ("get", "/v1/merges/{job_id}/events"),
    ("get", "/v1/merges/{job_id}/artifacts"),
    ("get", "/v1/merges/{job_id}/artifacts/{name}"),
    ("get", "/v1/merges/{job_id}/trim-log"),
    ("post", "/v1/evaluations"),
    ("get", "/v1/evaluations"),
    ("get", "/v1/evaluations/{job_id}"),
    ("delete", "/v1/evaluations/{job_id}"),
    ("post", "/v1/evaluations/{job_id}/cancel"),
    ("post", "/v1/evaluations/{job_id}/retry"),
    ("get", "/v1/evaluations/{job_id}/events"),
    ("get", "/v1/evaluations/{job_id}/artifacts"),
    ("get", "/v1/evaluations/{job_id}/artifacts/{name}"),
    ("get", "/v1/methods"),
    ("get", "/v1/treatments"),
    ("get", "/v1/workers"),
    ("get", "/healthz"),
    ("get", "/readyz"),
    ("get", "/metrics"),
}


def document(front: Front) -> dict[str, Any]:
    found: dict[str, Any] = front.http.get("/openapi.json").json()
    return found


def test_the_openapi_document_is_valid_and_whole(empty_front: Front) -> None:
    found = document(empty_front)
    validate(found)
    assert {(method, path) for path, item in found["paths"].items() for method in item} == ROUTES
    names = [operation["operationId"] for item in found["paths"].values() for operation in item.values()]
    assert len(set(names)) == len(names)


def test_the_openapi_document_says_what_goes_in_and_out(empty_front: Front) -> None:
    found = document(empty_front)
    submit = found["paths"]["/v1/merges"]["post"]
    recipe_schema = submit["requestBody"]["content"]["application/json"]["schema"]
    job_schema = submit["responses"]["202"]["content"]["application/json"]["schema"]
    assert recipe_schema == {"$ref": "#/components/schemas/Recipe"}
    assert job_schema == {"$ref": "#/components/schemas/JobView"}
    schemas = found["components"]["schemas"]
    assert set(schemas["Recipe"]["properties"]) == set(Recipe.model_fields)
    assert set(schemas["Recipe"]["required"]) == {"base", "tasks"}
    assert "self" in schemas["Links"]["properties"]
    assert {"self", "trim_log"} <= set(schemas["MergeLinks"]["properties"])
    assert "HTTPValidationError" not in schemas
    assert {"Idempotency-Key", "Prefer"} == {parameter["name"] for parameter in submit["parameters"]}
    for item in found["paths"].values():
        for operation in item.values():
            assert list(operation["responses"]["default"]["content"]) == ["application/problem+json"]
            assert "422" not in operation["responses"]


def test_a_job_is_what_the_document_says(front: Front) -> None:
    from openapi_schema_validator import OAS31Validator

    job = front.submit(metadata={"team": "search"})
    schema = {**document(front), "$ref": "#/components/schemas/JobView"}
    OAS31Validator(schema).validate(job)
    front.finish(job)
    OAS31Validator(schema).validate(front.http.get(job["links"]["self"]).json())


def test_there_are_pages_to_read(empty_front: Front) -> None:
    page = empty_front.http.get("/docs").text
    assert "swagger" in page
    needed = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert needed
    for address in needed:
        assert address.startswith("/docs/"), "the page asks nobody else for its scripts"
        assert empty_front.http.get(address).status_code == 200


def test_methods_are_listed(empty_front: Front) -> None:
    listed = empty_front.http.get("/v1/methods").json()
    assert (listed["object"], listed["has_more"]) == ("list", False)
    assert [row["name"] for row in listed["data"]] == list(METHODS)
    cat = listed["data"][0]
    assert "2505.06977" in cat["paper"]
    assert cat["summary"]
    assert cat["trims"] is True
    assert cat["parameters"]["properties"]["rank"]["default"] == 4
    assert "name" not in cat["parameters"]["properties"]


def test_presets_are_listed_beside_the_methods(empty_front: Front) -> None:
    presets = {row["name"]: row for row in empty_front.http.get("/v1/methods").json()["presets"]}
    assert list(presets) == list(PRESETS)
    assert presets["paper"]["method"]["name"] == "cat"
    assert presets["auto"]["summary"]


def test_the_schema_knows_presets_by_name(empty_front: Front) -> None:
    method = empty_front.http.get("/openapi.json").json()["components"]["schemas"]["Recipe"]["properties"]["method"]
    assert {"enum": ["auto", "paper"], "type": "string"} in method["anyOf"]


def test_treatments_are_listed(empty_front: Front) -> None:
    listed = empty_front.http.get("/v1/treatments").json()
    assert [row["name"] for row in listed["data"]] == list(TREATMENTS)
    roles = ["linear", "convolution", "grouped_convolution", "experts", "embedding"]
    assert listed["data"][0]["roles"] == roles


def test_the_service_lives_and_is_ready(empty_front: Front) -> None:
    assert empty_front.http.get("/healthz").json() == {"status": "ok"}
    response = empty_front.http.get("/readyz")
    assert (response.status_code, response.json()["status"]) == (200, "ready"), "though the broker is away"
    assert response.json()["checks"] == {"database": "ok", "object_store": "ok", "broker": "does not answer"}


def test_a_database_that_goes_away(tmp_path: Path) -> None:
    with postgres_server() as server:
        connections = connections_to(tmp_path, database_url=server.url)
        opened = open_front(tmp_path, connections)
        front = opened.__enter__()
        job = with_checkpoints(front).submit()
        assert front.http.get("/readyz").status_code == 200
    try:
        for response in (
            front.http.get(job["links"]["self"]),
            front.http.get("/v1/merges"),
            front.http.post("/v1/merges", json=recipe()),
        ):
            problem = refused(response, 503, "store_unavailable")
            assert problem["retryable"]
            assert response.headers["retry-after"].isdecimal()
            assert "127.0.0.1" not in response.text
        ready = front.http.get("/readyz")
        problem = refused(ready, 503, "store_unavailable")
        assert problem["checks"]["database"] == "does not answer"
        assert front.http.get("/healthz").status_code == 200
        assert "catmerge_database_up 0.0" in front.http.get("/metrics").text
    finally:
        opened.__exit__(None, None, None)


def test_an_api_that_may_not_migrate_is_ready_when_somebody_did(tmp_path: Path) -> None:
    with open_front(tmp_path, migrate_at_start=False) as front:
        problem = refused(front.http.get("/readyz"), 503, "store_unavailable")
        assert problem["checks"]["database"] == "its schema is not this version's"
        front.house.database.migrate()
        assert front.http.get("/readyz").status_code == 200


def test_a_fault_of_ours_is_told_without_its_trace(front: Front, caplog: pytest.LogCaptureFixture) -> None:
    job = front.submit()
    with front.house.database.write() as connection:
        connection.execute(update(jobs).values(recipe={"from": "another version"}))
    with caplog.at_level(logging.ERROR, logger="service.api"):
        response = front.http.get(job["links"]["self"])
    problem = refused(response, 500, "internal_error")
    assert "another version" not in response.text
    assert "pydantic" not in response.text
    (line,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert problem["request_id"] in line.getMessage()
    assert line.exc_info is not None


def test_an_address_that_is_not_there(empty_front: Front) -> None:
    for path in ("/", "/v1", "/v1/merges/", "/v2/merges", "/%0a"):
        refused_at = empty_front.http.get(path)
        assert (refused_at.status_code, refused_at.json()["code"]) == (404, "not_found")


def test_a_method_that_is_not_there(empty_front: Front) -> None:
    response = empty_front.http.put("/v1/merges")
    refused(response, 405, "method_not_allowed")
    assert response.headers["allow"]


def test_a_request_keeps_its_id(empty_front: Front, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="service.api.access"):
        response = empty_front.http.get("/healthz", headers={"X-Request-Id": "trace-1.2:3"})
    assert response.headers["x-request-id"] == "trace-1.2:3"
    assert any("trace-1.2:3" in line.getMessage() for line in caplog.records)


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "<script>"])
def test_an_id_that_is_not_fit_for_a_log_is_replaced(empty_front: Front, given: str) -> None:
    response = empty_front.http.get("/healthz", headers={"X-Request-Id": given})
    assert response.headers["x-request-id"].startswith("req_")


def test_requests_and_merges_are_counted(front: Front) -> None:
    job = front.submit()
    front.http.get(job["links"]["self"])
    front.http.get("/nowhere/1")
    text = front.http.get("/metrics").text
    assert 'catmerge_jobs{status="queued"} 1.0' in text
    assert 'catmerge_jobs{status="failed"} 0.0' in text
    assert 'catmerge_parts{queue="light",state="queued"} 1.0' in text
    assert 'catmerge_parts{queue="heavy",state="running"} 0.0' in text
    assert 'catmerge_http_requests_total{method="POST",route="/v1/merges",status="202"} 1.0' in text
    assert 'route="/v1/merges/{job_id}",status="200"} 1.0' in text
    assert 'route="unmatched",status="404"} 1.0' in text
    assert job["id"] not in text


@pytest.mark.parametrize("query", ["a=1&a=2", "a=%00"])
def test_a_query_that_could_be_read_in_two_ways_is_refused(empty_front: Front, query: str) -> None:
    refused(empty_front.http.get(f"/v1/methods?{query}"), 400, "invalid_parameter")
