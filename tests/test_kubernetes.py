"""The manifests of deploy/kubernetes: held to the schemas of Kubernetes and KEDA, and to what the code does."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import psycopg
import pytest
import yaml

from service.contract.settings import Connections
from service.contract.stages import Stage
from service.settings import Settings
from service.stores.database import Database
from service.stores.jobs import JobStore
from service.stores.parts import PartStore
from tests import named_settings
from tests.servers import postgres_server
from tests.service.jobs_by_hand import claim, finish, merges, plan, submit
from workers.__main__ import STOP_LIMIT_SECONDS
from workers.settings import WorkerSettings

FOLDER = Path(__file__).resolve().parents[1] / "deploy/kubernetes"
OVERLAYS = ("cpu", "gpu")
VERSION = "1.37"
EXAMPLE = "secret.example.yaml"  # for a copy to be applied; no overlay has it

Manifest = dict[str, Any]


def closed(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    """A schema of an object that has these properties and no others."""
    names = list(required)
    return {"type": "object", "properties": dict(properties), "required": names, "additionalProperties": False}


# KEDA's documentation as schemas, as far as our manifests go: what is not written down here is refused.
COUNT = {"type": "integer", "minimum": 0}
TEXT = {"type": "string", "minLength": 1}
METADATA = closed({"name": TEXT, "namespace": TEXT, "labels": {"type": "object"}}, "name")
POLICY = closed(
    {"type": {"enum": ["Percent", "Pods"]}, "value": {"type": "integer", "minimum": 1}, "periodSeconds": COUNT},
    "type",
    "value",
    "periodSeconds",
)
RULES = closed(
    {
        "stabilizationWindowSeconds": {"type": "integer", "minimum": 0, "maximum": 3600},
        "selectPolicy": {"enum": ["Max", "Min", "Disabled"]},
        "policies": {"type": "array", "items": POLICY},
    }
)
QUERY = closed(
    {
        "query": TEXT,
        "targetQueryValue": {"type": "string", "pattern": r"^[0-9.]+$"},
        "activationTargetQueryValue": {"type": "string", "pattern": r"^[0-9.]+$"},
    },
    "query",
    "targetQueryValue",
)
TRIGGER = closed(
    {
        "type": {"const": "postgresql"},
        "metadata": QUERY,
        "authenticationRef": closed({"name": TEXT, "kind": TEXT}, "name"),
    },
    "type",
    "metadata",
    "authenticationRef",
)
HPA = closed({"name": TEXT, "behavior": closed({"scaleDown": RULES, "scaleUp": RULES})})
SCALING = closed(
    {
        "scaleTargetRef": closed({"apiVersion": TEXT, "kind": TEXT, "name": TEXT}, "name"),
        "minReplicaCount": COUNT,
        "maxReplicaCount": COUNT,
        "pollingInterval": COUNT,
        "cooldownPeriod": COUNT,
        "advanced": closed({"horizontalPodAutoscalerConfig": HPA}),
        "triggers": {"type": "array", "minItems": 1, "items": TRIGGER},
    },
    "scaleTargetRef",
    "triggers",
)
PARAMETER = closed({"parameter": {"const": "connection"}, "name": TEXT, "key": TEXT}, "parameter", "name", "key")
AUTHENTICATION = closed({"secretTargetRef": {"type": "array", "items": PARAMETER}}, "secretTargetRef")


def of_keda(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    version = {"const": "keda.sh/v1alpha1"}
    return closed({"apiVersion": version, "kind": {"const": kind}, "metadata": METADATA, "spec": spec}, "spec")


KEDA = {
    kind: of_keda(kind, spec) for kind, spec in (("ScaledObject", SCALING), ("TriggerAuthentication", AUTHENTICATION))
}
KUSTOMIZATION = closed(
    {
        "apiVersion": TEXT,
        "kind": {"enum": ["Kustomization", "Component"]},
        "resources": {"type": "array", "items": TEXT},
        "components": {"type": "array", "items": TEXT},
        "images": {"type": "array", "items": closed({"name": TEXT, "newName": TEXT, "newTag": TEXT}, "name")},
    },
    "apiVersion",
    "kind",
)


def check(manifest: Manifest) -> None:
    """Raises where a manifest has a field too many, too few, or of another type."""
    if manifest["apiVersion"].startswith("kustomize."):
        jsonschema.validate(manifest, KUSTOMIZATION)
    elif manifest["apiVersion"].startswith("keda."):
        jsonschema.validate(manifest, KEDA[manifest["kind"]])
    else:
        kubernetes_validate.validate(manifest, VERSION, strict=True)


def documents(text: str) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(text) if document]


def written() -> Iterator[tuple[str, Manifest]]:
    """Every document of the folder, and its file."""
    for path in sorted(FOLDER.rglob("*.yaml")):
        for document in documents(path.read_text()):
            yield str(path.relative_to(FOLDER)), document


WRITTEN = list(written())


def gathered(folder: Path) -> Iterator[Manifest]:
    """What an overlay consists of: its resources and components, as they are written."""
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())
    for name in (*listed.get("resources", ()), *listed.get("components", ())):
        place = (folder / name).resolve()
        if place.is_dir():
            yield from gathered(place)
        else:
            yield from documents(place.read_text())


def named(manifests: list[Manifest]) -> dict[tuple[str, str], Manifest]:
    return {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in manifests}


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> dict[tuple[str, str], Manifest]:
    """The objects of an overlay by kind and name."""
    manifests = list(gathered(FOLDER / "overlays" / request.param))
    by_name = named(manifests)
    assert len(by_name) == len(manifests), "two have the same name"
    return by_name


def pods(overlay: Mapping[tuple[str, str], Manifest]) -> list[Manifest]:
    """The templates of all pods."""
    return [found["spec"]["template"] for (kind, _), found in overlay.items() if kind in ("Deployment", "Job")]


def paths(value: object, here: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where the fields of a document are."""
    items: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
        yield from ((*here, name) for name in value)
    elif isinstance(value, list):
        items = list(enumerate(value))
    for name, inner in items:
        yield from paths(inner, (*here, name))


# --- against the schemas --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "manifest"), WRITTEN, ids=[f"{file}:{each['kind']}" for file, each in WRITTEN])
def test_a_manifest_fits_its_schema(file: str, manifest: Manifest) -> None:
    check(manifest)


FREE = {"labels", "annotations", "matchLabels", "data", "stringData", "requests", "limits", "selector"}  # any name goes


@pytest.mark.parametrize("kind", ["Deployment", "Job", "NetworkPolicy", "PodDisruptionBudget", "Service", *KEDA])
def test_any_misspelled_field_is_found(kind: str) -> None:
    """Every field of a manifest, one after another."""
    manifest = next(each for _, each in WRITTEN if each["kind"] == kind)
    fields = [path for path in paths(manifest) if path[0] not in ("apiVersion", "kind") and not FREE & {*path[:-1]}]
    assert len(fields) > 5
    for path in fields:
        broken = copy.deepcopy(manifest)
        place: Any = broken
        for step in path[:-1]:
            place = place[step]
        place[f"{path[-1]}s"] = place.pop(path[-1])
        with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
            check(broken)


def test_every_file_is_in_an_overlay() -> None:
    used = [each for overlay in OVERLAYS for each in gathered(FOLDER / "overlays" / overlay)]
    for file, manifest in WRITTEN:
        assert file == EXAMPLE or manifest["apiVersion"].startswith("kustomize.") or manifest in used, file


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_renders(name: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    command = [kubectl, "kustomize", str(FOLDER / "overlays" / name)]
    rendered = documents(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    for manifest in rendered:
        check(manifest)
    assert named(rendered).keys() == named(list(gathered(FOLDER / "overlays" / name))).keys()
    images = re.findall(r'"image": "([^"]*)"', json.dumps(rendered))
    assert len(images) == 3
    assert not [image for image in images if image.endswith(":local")]


# --- against each other ---------------------------------------------------------------------------------------------


def test_everything_is_in_one_namespace(overlay: dict[tuple[str, str], Manifest]) -> None:
    (namespace,) = [name for kind, name in overlay if kind == "Namespace"]
    spaces = {found["metadata"].get("namespace") for (kind, _), found in overlay.items() if kind != "Namespace"}
    assert spaces == {namespace}


def test_selectors_find_pods(overlay: dict[tuple[str, str], Manifest]) -> None:
    labels = [pod["metadata"]["labels"].items() for pod in pods(overlay)]
    for (kind, name), found in overlay.items():
        spec = found.get("spec", {})
        selector = spec.get("podSelector", spec.get("selector", {}))
        wanted = selector.get("matchLabels", selector if kind == "Service" else {})
        assert any(wanted.items() <= own for own in labels), (kind, name)


def test_what_is_referred_to_is_there(overlay: dict[tuple[str, str], Manifest]) -> None:
    secret = named([each for file, each in WRITTEN if file == EXAMPLE])
    there = overlay.keys() | secret.keys()
    for pod in pods(overlay):
        (container,) = pod["spec"]["containers"]
        assert ("ServiceAccount", pod["spec"]["serviceAccountName"]) in there
        for source in container["envFrom"]:
            ((kind, reference),) = source.items()
            assert ({"configMapRef": "ConfigMap", "secretRef": "Secret"}[kind], reference["name"]) in there
    scaled = overlay["ScaledObject", "catmerge-worker"]["spec"]
    assert (scaled["scaleTargetRef"]["kind"], scaled["scaleTargetRef"]["name"]) in there
    trigger = overlay["TriggerAuthentication", scaled["triggers"][0]["authenticationRef"]["name"]]
    (reference,) = trigger["spec"]["secretTargetRef"]
    assert reference["key"] in secret["Secret", reference["name"]]["stringData"]


# --- against the code -----------------------------------------------------------------------------------------------


def test_only_settings_that_the_code_reads_are_named() -> None:
    texts = [path.read_text() for path in FOLDER.rglob("*.yaml")]
    assert set(re.findall(r"CATMERGE_\w+", "\n".join(texts))) <= named_settings.of_processes()


def environment(overlay: Mapping[tuple[str, str], Manifest], pod: Manifest) -> dict[str, str]:
    """A container's variables; what Kubernetes puts in is a 4."""
    secret = next(each for file, each in WRITTEN if file == EXAMPLE)
    given = {**overlay["ConfigMap", "catmerge"]["data"], **secret["stringData"]}
    own = {row["name"]: row.get("value", "4") for row in pod["spec"]["containers"][0].get("env", ())}
    return {**given, **own}


def test_the_settings_can_be_used(overlay: dict[tuple[str, str], Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    for pod in pods(overlay):
        variables = environment(overlay, pod)
        assert Connections.from_environment(variables).object_store == "s3"
        worker = WorkerSettings.from_environment(variables)
        assert worker.processes == 1
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    assert not Settings().migrate_at_start, "the Job does it"


def test_no_pod_may_more_than_it_needs(overlay: dict[tuple[str, str], Manifest]) -> None:
    assert len(pods(overlay)) == 3
    for pod in pods(overlay):
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        assert pod["spec"]["automountServiceAccountToken"] is False
        (container,) = pod["spec"]["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        inputs = [environment(overlay, pod)["CATMERGE_INPUT_CACHE"]] if container["name"] == "worker" else []
        assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/tmp", *inputs]
        assert container["resources"]["limits"]["memory"]


def test_a_worker_keeps_less_than_its_volume_holds(overlay: dict[tuple[str, str], Manifest]) -> None:
    pod = overlay["Deployment", "catmerge-worker"]["spec"]["template"]
    (limit,) = (volume["emptyDir"]["sizeLimit"] for volume in pod["spec"]["volumes"] if volume["name"] == "inputs")
    kept = Connections.from_environment(environment(overlay, pod)).input_cache_bytes
    assert kept is not None
    assert kept * 1.05 < int(limit.removesuffix("Gi")) << 30, "or the pod is evicted"


def test_a_worker_is_given_the_time_to_leave(overlay: dict[tuple[str, str], Manifest]) -> None:
    worker = overlay["Deployment", "catmerge-worker"]["spec"]
    assert worker["template"]["spec"]["terminationGracePeriodSeconds"] > STOP_LIMIT_SECONDS
    assert "replicas" not in worker, "applying it again would undo the scaler's work"


def test_the_api_is_asked_where_it_answers(overlay: dict[tuple[str, str], Manifest]) -> None:
    (container,) = overlay["Deployment", "catmerge-api"]["spec"]["template"]["spec"]["containers"]
    probes = {name: probe["httpGet"]["path"] for name, probe in container.items() if name.endswith("Probe")}
    assert probes == {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}
    assert container["ports"] == [{"name": "http", "containerPort": Settings().port}]


def test_the_scalers_query_counts_parts_to_do_and_being_done() -> None:
    (scaler,) = [each for _, each in WRITTEN if each["kind"] == "ScaledObject"]
    query = scaler["spec"]["triggers"][0]["metadata"]["query"]
    with postgres_server() as server:
        database = Database(server.url)
        database.migrate()
        jobs, parts = JobStore(database), PartStore(database, lease_seconds=60, part_attempts=3)
        counts = []
        with psycopg.connect(server.dsn, autocommit=True) as connection:

            def count() -> None:
                row = connection.execute(query).fetchone()
                assert row is not None
                assert row[0] == sum(parts.counts().values())
                counts.append(row[0])

            count()
            first, second, third = (submit(jobs) for _ in range(3))
            count()  # three plans to do
            plan(parts, first.id, *merges(5))
            count()  # five shards in place of the first plan
            claim(parts, first.id, Stage.MERGE, 0)
            count()  # one of them underway
            jobs.cancel("anonymous", second.id)
            finish(parts, third.id)
            count()
        database.close()
    assert counts == [0, 3, 7, 7, 5]
