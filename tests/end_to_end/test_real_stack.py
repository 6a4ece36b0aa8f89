"""A merge from submit to ``from_pretrained``, on PostgreSQL, Valkey and an S3 server, and recomputed by hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from service.contract.recipe import Recipe
from service.contract.settings import Connections
from service.contract.stages import Stage
from service.contract.treatments import Role
from service.stores.database import Database
from service.stores.parts import PartStore
from tests.checkpoints import Family
from tests.end_to_end.stack import Stack, open_stack
from tests.servers import redis_server, s3_server
from workers.layout import as_matrix, from_matrix
from workers.treatments import Removed, apply_removed

EPS = torch.finfo(torch.float32).eps
CAT = {"name": "cat", "scaling": 0.4, "rank": 3, "scale_rank": 2, "shift_rank": 2}
ARITHMETIC = {"name": "task_arithmetic", "scaling": 0.3}
SHARD_BYTES = 4096


class Result:
    """A job's files on this machine, beside the family that they were merged from."""

    def __init__(self, job: Mapping[str, Any], folder: Path, family: Family) -> None:
        self.job = job
        self.folder = folder
        self.family = family
        self.base = load_file(family.base / "model.safetensors")
        self.tasks = {name: load_file(family.checkpoint(name) / "model.safetensors") for name in family.tasks}

    @property
    def recipe(self) -> Recipe:
        return Recipe.model_validate_json((self.folder / "merge/recipe.json").read_text())

    @property
    def trim_log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "merge/trim-log.jsonl").read_text().splitlines()]

    def weights(self) -> dict[str, Tensor]:
        """Every tensor of every shard, none of them twice."""
        found: dict[str, Tensor] = {}
        for file in sorted(self.folder.glob("model*.safetensors")):
            tensors = load_file(file)
            assert not tensors.keys() & found.keys()
            found |= tensors
        return found

    def removed(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for file in sorted(self.folder.glob("merge/removed-*.safetensors")):
            found |= load_file(file)
        return found

    def heads(self, task: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"heads/{task}.safetensors")

    def is_merged(self, name: str) -> bool:
        return all(tensors[name].shape == self.base[name].shape for tensors in self.tasks.values())

    def vectors(self, name: str) -> list[Tensor]:
        """Task vectors in float64, in the order of the recipe's tasks."""
        return [self.tasks[task.name][name].double() - self.base[name].double() for task in self.recipe.tasks]


def check_sums(actual: Tensor, base: Tensor, parts: list[Tensor]) -> None:
    """Whether ``actual`` is ``base + sum(parts)`` but for rounding: float32 underway, and its own type at the end."""
    expected = torch.stack([base.double(), *parts]).sum(0)
    size = base.double().abs() + torch.stack(parts).abs().sum(0)
    allowed = 16 * EPS * size + torch.finfo(actual.dtype).eps * expected.abs()
    assert ((actual.double() - expected).abs() <= allowed).all()


@pytest.fixture(scope="module")
def merge_of(real: Stack, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """Uploads a family once, merges it, and downloads what came of it."""
    uploaded: set[Path] = set()

    def run(family: Family, method: Mapping[str, Any], *, evaluated: bool = False, **changes: Any) -> Result:
        place = f"s3://models/{family.folder.name}/"
        if family.folder not in uploaded:
            real.upload(family.folder, place)
            uploaded.add(family.folder)
        output = {"shard_bytes": SHARD_BYTES}
        recipe = family.recipe(place, evaluated=evaluated, method=dict(method), output=output, **changes)
        job = real.run(recipe)
        return Result(job, real.download(job["id"], tmp_path_factory.mktemp("result")), family)

    return run


@pytest.fixture(scope="module")
def vit_cat(merge_of: Callable[..., Result], vit: Family) -> Result:
    gates = [{"metric": "worst_task_retention", "at_least": 0.0}]
    return merge_of(vit, CAT, evaluated=True, gates=gates, metadata={"team": "tests"})


@pytest.fixture(scope="module")
def bert_cat(merge_of: Callable[..., Result], bert: Family) -> Result:
    return merge_of(bert, {**CAT, "restore_norm": True})


@pytest.fixture(scope="module")
def bert_arithmetic(merge_of: Callable[..., Result], bert: Family) -> Result:
    return merge_of(bert, ARITHMETIC)


@pytest.fixture(params=["vit_cat", "bert_cat", "bert_arithmetic"])
def result(request: pytest.FixtureRequest) -> Result:
    found: Result = request.getfixturevalue(request.param)
    return found


def test_names_types_and_shapes_are_the_bases(result: Result) -> None:
    weights = result.weights()
    assert len(list(result.folder.glob("model-*.safetensors"))) > 2
    described = {name: (tensor.dtype, tensor.shape) for name, tensor in weights.items()}
    assert described == {name: (tensor.dtype, tensor.shape) for name, tensor in result.base.items()}


def test_the_index_says_where_each_tensor_is(result: Result) -> None:
    index = json.loads((result.folder / "model.safetensors.index.json").read_text())
    places: dict[str, str] = {}
    for file in result.folder.glob("model-*.safetensors"):
        with safe_open(file, "pt") as opened:
            places |= dict.fromkeys(opened.keys(), file.name)
            assert opened.metadata() == {"format": "pt"}
    assert index["weight_map"] == places
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in result.base.values())


def test_transformers_loads_it_as_it_is(result: Result, tmp_path: Path) -> None:
    kind = getattr(transformers, json.loads((result.folder / "config.json").read_text())["architectures"][0])
    model, loading = kind.from_pretrained(result.folder, output_loading_info=True)
    assert not any(loading[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    # Names in memory are not always those on disk: what it loaded is what it saves.
    model.save_pretrained(tmp_path)
    saved, weights = load_file(tmp_path / "model.safetensors"), result.weights()
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in weights)
    samples = load_file(result.family.exemplars(result.family.tasks[0]))
    with torch.no_grad():
        assert model.float()(**samples).logits.isfinite().all()


def check_manifest(stack: Stack, result: Result) -> None:
    """Whether every file that the manifest lists is there with that size and digest, and nothing else."""
    prefix = result.job["result"]["prefix"]
    manifest = json.loads((result.folder / "merge/manifest.json").read_text())
    for row in manifest["files"]:
        data = (result.folder / row["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (row["size"], row["sha256"]), row["name"]
    assert sorted(stack.listed(prefix)) == sorted([row["name"] for row in manifest["files"]] + ["merge/manifest.json"])
    listed = stack.artifacts(result.job["id"])
    assert {name: row["sha256"] for name, row in listed.items() if name != "merge/manifest.json"} == {
        row["name"]: row["sha256"] for row in manifest["files"]
    }
    assert manifest["job"] == result.job["id"]
    assert manifest["recipe_sha256"] == result.job["recipe_sha256"]


def test_the_manifest_lists_everything_as_it_is(real: Stack, result: Result) -> None:
    check_manifest(real, result)


def test_the_manifest_says_what_it_was_made_from(result: Result) -> None:
    manifest = json.loads((result.folder / "merge/manifest.json").read_text())
    digests = {row["address"]: row["sha256"] for row in manifest["inputs"]}
    place = result.recipe.base.removesuffix("base/")
    used = ["base/model.safetensors", *(f"{task}/model.safetensors" for task in result.family.tasks)]
    used += [f"{task}-exemplars.safetensors" for task in result.family.tasks]
    for name in used:
        assert digests[place + name] == hashlib.sha256((result.family.folder / name).read_bytes()).hexdigest(), name


def test_no_scratch_is_left(real: Stack, result: Result) -> None:
    assert not real.listed(f"s3://catmerge/scratch/{result.job['id']}/")


def test_heads_are_delivered_and_not_merged(result: Result) -> None:
    weights = result.weights()
    heads = {name for name in result.base if not result.is_merged(name)}
    assert heads == {"classifier.weight", "classifier.bias"}
    for task, tensors in result.tasks.items():
        delivered = result.heads(task)
        assert delivered.keys() == heads
        assert all(torch.equal(delivered[name], tensors[name]) for name in heads)
    assert all(torch.equal(weights[name], result.base[name]) for name in heads)


def test_task_arithmetic_by_hand(bert_arithmetic: Result) -> None:
    merged = 0
    for name, actual in bert_arithmetic.weights().items():
        if bert_arithmetic.is_merged(name):
            parts = [0.3 * vector for vector in bert_arithmetic.vectors(name)]
            check_sums(actual, bert_arithmetic.base[name], parts)
            merged += 1
    assert merged == len(bert_arithmetic.base) - 2


def test_task_arithmetic_has_no_trim_log(bert_arithmetic: Result) -> None:
    assert bert_arithmetic.trim_log == []
    assert bert_arithmetic.removed() == {}


@pytest.fixture(params=["vit_cat", "bert_cat"])
def cat(request: pytest.FixtureRequest) -> Result:
    found: Result = request.getfixturevalue(request.param)
    return found


def test_the_trim_log_has_a_row_for_every_parameter_and_task(cat: Result) -> None:
    expected = {(name, task) for name in cat.base if cat.is_merged(name) for task in cat.family.tasks}
    rows = [(row["parameter"], row["task"]) for row in cat.trim_log]
    assert len(rows) == len(set(rows))
    assert set(rows) == expected
    kinds = {(row["role"], row["treatment"]) for row in cat.trim_log}
    assert {("linear", "projection"), ("scale", "scale_mask"), ("shift", "shift_mask")} <= kinds
    assert all(row["removed"] == len(row["scores"]) for row in cat.trim_log)
    assert sum(row["removed"] for row in cat.trim_log if row["treatment"] == "projection") > 0


def test_trimming_lessens_the_conflict(cat: Result) -> None:
    rows = [row for row in cat.trim_log if row["role"] == "linear"]
    before, after = (sum(row[f"conflict_{when}"] for row in rows) for when in ("before", "after"))
    assert before > 0
    assert after < (before if cat.recipe.method.model_dump()["restore_norm"] else 0.95 * before)


def recorded(cat: Result, row: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Removed]:
    """What the log says was removed of a parameter on each task's behalf."""
    form = "basis" if row["treatment"] == "projection" else "mask"
    found = []
    rows = {(r["parameter"], r["task"]): r for r in cat.trim_log}
    for task in cat.recipe.tasks:
        scores = torch.tensor(rows[row["parameter"], task.name]["scores"], dtype=torch.float64)
        tensor = tensors.get(f"{row['parameter']}.{form}.{task.name}")
        if tensor is None:
            tensor = torch.zeros(0, dtype=torch.int64)
            tensor = torch.zeros(_outputs(cat, row), 0, dtype=torch.float64) if form == "basis" else tensor
        assert tensor.shape[-1] == len(scores)
        kept = {form: tensor.double() if form == "basis" else tensor}
        found.append(Removed(scores=scores, **kept))
    return found


def _outputs(cat: Result, row: Mapping[str, Any]) -> int:
    return as_matrix(cat.base[row["parameter"]], Role(row["role"]), row["transposed"]).shape[0]


def recomputed(cat: Result, row: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The trimmed task vectors of a parameter in float64, from the checkpoints and the log alone."""
    vectors, role = cat.vectors(row["parameter"]), Role(row["role"])
    if row["treatment"] == "keep":
        return vectors
    treatment = cat.recipe.method.treatment(role)
    assert treatment.name == row["treatment"]
    removed = recorded(cat, row, tensors)
    if row["treatment"] != "projection":
        return apply_removed(vectors, removed, treatment)
    shape = tuple(vectors[0].shape)
    matrices = [as_matrix(vector, role, row["transposed"]).contiguous() for vector in vectors]
    trimmed = apply_removed(matrices, removed, treatment)
    return [from_matrix(matrix, shape, role, row["transposed"]) for matrix in trimmed]


def test_weights_follow_from_base_checkpoints_and_log_alone(cat: Result) -> None:
    weights, tensors = cat.weights(), cat.removed()
    rows = {row["parameter"]: row for row in cat.trim_log}
    for name, row in rows.items():
        # A basis is stored in float32, so its projections are off by about EPS times the vector's whole length.
        trimmed = recomputed(cat, row, tensors)
        expected = cat.base[name].double() + 0.4 * torch.stack(trimmed).sum(0)
        length = sum(float(vector.norm()) for vector in cat.vectors(name))
        allowed = 32 * EPS * length + 4 * EPS * cat.base[name].double().abs()
        allowed = allowed + torch.finfo(weights[name].dtype).eps * expected.abs()
        assert ((weights[name].double() - expected).abs() <= allowed).all(), name
    changed = [name for name, row in rows.items() if row["treatment"] == "projection" and row["removed"]]
    plain = {name: cat.base[name].double() + 0.4 * torch.stack(cat.vectors(name)).sum(0) for name in changed}
    assert any(not torch.allclose(weights[name].double(), plain[name], atol=1e-3) for name in changed)


def test_one_layer_by_the_book(vit_cat: Result) -> None:
    """G_k dense, from features taken with a plain hook: no code of ours but the job's own result."""
    name = "vit.encoder.layer.0.output.dense.weight"
    vectors = vit_cat.vectors(name)
    moments = [features(vit_cat, task, name) for task in vit_cat.family.tasks]
    trimmed = list(vectors)
    for k, own in enumerate(moments):
        others = [i for i in range(len(vectors)) if i != k]
        terms = [vectors[i] @ (own - 5.0 * moments[i]) @ vectors[i].T for i in others]
        values, directions = torch.linalg.eigh(torch.stack(terms).sum(0))
        basis = directions[:, values > 1e-9 * float(values.abs().max())][:, -3:]
        for i in others:
            trimmed[i] = trimmed[i] - basis @ (basis.T @ trimmed[i])
    expected = vit_cat.base[name].double() + 0.4 * torch.stack(trimmed).sum(0)
    torch.testing.assert_close(vit_cat.weights()[name].double(), expected, rtol=0, atol=1e-5)


def features(result: Result, task: str, name: str) -> Tensor:
    """S_k of a linear weight, in float64."""
    model = transformers.ViTForImageClassification.from_pretrained(result.family.checkpoint(task))
    seen: list[Tensor] = []
    weight = result.tasks[task][name]
    (module,) = (m for m in model.modules() if isinstance(m, torch.nn.Linear) and torch.equal(m.weight, weight))
    handle = module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].flatten(0, -2).double()))
    with torch.no_grad():
        model(**load_file(result.family.exemplars(task)))
    handle.remove()
    rows = torch.cat(seen)
    return rows.T @ rows / len(rows)


def test_the_evaluation_is_right(vit_cat: Result) -> None:
    measured = vit_cat.job["result"]["metrics"]["tasks"]
    assert measured.keys() == set(vit_cat.family.tasks)
    for task, row in measured.items():
        assert row["expert"] == 1.0  # the labels are its own answers
        labeled = load_file(vit_cat.family.labeled(task))
        labels = labeled.pop("labels")
        model = transformers.ViTForImageClassification.from_pretrained(
            None,
            config=transformers.ViTConfig.from_pretrained(vit_cat.family.checkpoint(task)),
            state_dict={**vit_cat.weights(), **vit_cat.heads(task)},
        )
        with torch.no_grad():
            answers = model(**labeled).logits.argmax(dim=1)
        assert row["merged"] == pytest.approx(float((answers == labels).double().mean()))
    assert vit_cat.job["result"]["gates"][0]["passed"] is True


def test_the_report_and_the_card_are_there(vit_cat: Result) -> None:
    report = json.loads((vit_cat.folder / "merge/report.json").read_text())
    assert report["metrics"] == vit_cat.job["result"]["metrics"]
    card = (vit_cat.folder / "README.md").read_text()
    assert "base_model_relation: merge" in card
    assert "<html" in (vit_cat.folder / "merge/report.html").read_text()


def test_progress_and_events_tell_the_whole_way(real: Stack, vit_cat: Result) -> None:
    progress = vit_cat.job["progress"]
    assert progress["fraction"] == 1.0
    assert progress["parts_done"] == progress["parts_total"]
    assert progress["tensors_done"] == progress["tensors_total"] == len(vit_cat.base)
    rows = real.events(vit_cat.job["id"])
    assert [row["seq"] for row in rows] == list(range(1, len(rows) + 1))
    stages = [row["data"]["stage"] for row in rows if row["type"] == "stage.started"]
    assert stages == ["plan", "calibrate", "merge", "evaluate", "finalize"]
    assert rows[-1]["type"] == "job.succeeded"


def test_the_same_again_takes_statistics_from_the_cache_and_gives_the_same_bytes(
    real: Stack, vit_cat: Result, merge_of: Callable[..., Result]
) -> None:
    database = Database(real.connections.database_url)
    parts = PartStore(database, lease_seconds=60, part_attempts=1)
    first = parts.outputs(vit_cat.job["id"], Stage.CALIBRATE)
    again = merge_of(vit_cat.family, CAT, evaluated=True)
    second = parts.outputs(again.job["id"], Stage.CALIBRATE)
    database.close()
    assert [output["cached"] for output in first] == [False] * 3
    assert [output["cached"] for output in second] == [True] * 3
    assert [output["statistics"] for output in first] == [output["statistics"] for output in second]
    ours = [name for name in real.artifacts(again.job["id"]) if name.endswith((".safetensors", ".jsonl"))]
    assert len(ours) > 6
    for name in ours:
        assert (again.folder / name).read_bytes() == (vit_cat.folder / name).read_bytes(), name


def test_another_type_for_the_output(merge_of: Callable[..., Result], vit: Family, real: Stack) -> None:
    place = f"s3://models/{vit.folder.name}/"
    real.upload(vit.folder, place)
    recipe = vit.recipe(place, method=ARITHMETIC, output={"dtype": "F16", "prefix": "s3://merged/half/"})
    job = real.run(recipe)
    assert job["result"]["prefix"] == "s3://merged/half/"
    with real.client.stream("GET", f"/v1/merges/{job['id']}/artifacts/config.json", params={"proxy": "1"}) as answer:
        assert json.loads(answer.read())["dtype"] == "float16"
    index = real.artifacts(job["id"])
    assert "model.safetensors" in index
    assert index["model.safetensors"]["size"] < 0.6 * (vit.base / "model.safetensors").stat().st_size


def test_a_store_that_ignores_conditions(tmp_path: Path, vit: Family) -> None:
    """The same on another S3 server, which checks signatures and knows no If-Match; and on SQLite."""
    with redis_server() as broker, s3_server("rclone", buckets=("catmerge", "models")) as s3:
        environment = {
            **s3.environment(),
            "CATMERGE_DATABASE_URL": f"sqlite:///{tmp_path / 'jobs.db'}",
            "CATMERGE_BROKER_URL": broker.url,
        }
        with open_stack(tmp_path, Connections.from_environment(environment)) as stack:
            stack.upload(vit.folder, "s3://models/vit/")
            job = stack.run(vit.recipe("s3://models/vit/", method=CAT, evaluated=True))
            result = Result(job, stack.download(job["id"], tmp_path / "result"), vit)
            check_manifest(stack, result)
    assert result.weights().keys() == result.base.keys()


def test_a_key_makes_many_submits_one(real: Stack, vit_cat: Result) -> None:
    recipe = vit_cat.family.recipe(f"s3://models/{vit_cat.family.folder.name}/", method=ARITHMETIC)
    headers = {"Idempotency-Key": "one-and-only"}

    def submit(_: int) -> tuple[int, str | None, bool]:
        answer = real.client.post("/v1/merges", json=recipe, headers=headers)
        return answer.status_code, answer.json().get("id"), "Idempotent-Replayed" in answer.headers

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(submit, range(6)))
    taken = {job_id for status, job_id, _ in answers if status == 202}
    assert len(taken) == 1
    assert {status for status, _, _ in answers} <= {202, 409}
    assert sum(status == 202 and not replayed for status, _, replayed in answers) == 1
    status, job_id, replayed = submit(0)
    assert (status, {job_id}, replayed) == (202, taken, True)
    other = real.client.post("/v1/merges", json={**recipe, "seed": 1}, headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    real.succeeded(job_id or "")
