"""Whole jobs through the stages, without broker and database: trim and then combine, surveys, overrides."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from service.contract.parts import Claim, SoFar
from service.contract.plan import Plan
from service.contract.recipe import Recipe
from service.contract.settings import Connections
from service.contract.stages import NewPart, Stage
from service.contract.treatments import Keep, Role
from service.stores.objects import Objects, open_objects
from tests.checkpoints import Family, read_tensors, write_family
from workers.layout import as_matrix
from workers.methods import Context, merge
from workers.stages import RUN
from workers.statistics_file import StatisticsFile
from workers.tensors import TensorReader
from workers.treatments import trim
from workers.watch import Watch
from workers.work import Work

TASKS = {"news": 4, "mood": 3, "spam": 2}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return write_family(tmp_path_factory.mktemp("bert"), "bert", TASKS)


@dataclass
class Job:
    """A job's stages, run one after another in this process."""

    recipe: Recipe
    objects: Objects
    place: str
    outputs: dict[Stage, list[dict[str, Any]]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def run(self, until: Stage = Stage.MERGE) -> Job:
        parts = self._do(NewPart(Stage.PLAN, 0, "plan", 1.0))
        for part in parts:
            if list(Stage).index(part.stage) <= list(Stage).index(until):
                self._do(part)
        return self

    def _do(self, part: NewPart) -> tuple[NewPart, ...]:
        done = RUN[part.stage](self._work(part))
        self.outputs.setdefault(part.stage, []).append(dict(done.output))
        self.warnings += done.warnings
        return done.parts

    def _work(self, part: NewPart) -> Work:
        return Work(
            claim=Claim("job", part.stage, part.part, part.name, "token", 1, self.recipe, self.prefix),
            objects=self.objects,
            watch=Watch(lambda: True),
            workspace=f"{self.place}workspace/",
            device="cpu",
            outputs=lambda stage: self.outputs.get(stage, []),
            so_far=lambda: SoFar(0, 0, 0, 0, 0),
        )

    @property
    def prefix(self) -> str:
        return f"{self.place}merged/"

    @property
    def plan(self) -> Plan:
        return self._work(NewPart(Stage.PLAN, 0, "plan", 1.0)).plan()

    def merged(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for shard in self.plan.shards:
            found |= read_tensors(Path((self.prefix + shard.file).removeprefix("file://")))
        return found

    def statistics(self, task: int) -> dict[str, Any]:
        with TensorReader(self.objects) as reader:
            file = StatisticsFile(reader, self.outputs[Stage.CALIBRATE][task]["statistics"])
            return file.start(sorted(file.parameters)).wait()


def job(family: Family, tmp_path: Path, *, data: bool = False, **changes: Any) -> Job:
    body = family.recipe(f"file://{family.folder}/", **changes)
    if not data:
        body["tasks"] = [{k: v for k, v in task.items() if k != "exemplars"} for task in body["tasks"]]
    objects = open_objects(
        Connections(
            database_url=f"sqlite:///{tmp_path}/jobs.db",
            broker_url="redis://127.0.0.1:1/0",
            object_store=f"file://{tmp_path}/objects",
            file_roots=(family.folder, tmp_path),
        )
    )
    return Job(Recipe.model_validate(body), objects, f"file://{tmp_path}/")


def vectors(family: Family, name: str) -> tuple[Tensor, list[Tensor]]:
    base = read_tensors(family.base / "model.safetensors")[name]
    tasks = [read_tensors(family.checkpoint(task) / "model.safetensors")[name] for task in TASKS]
    return base, [task - base for task in tasks]


@pytest.mark.parametrize("then", [{"name": "ties", "density": 0.3}, {"name": "tsv_m"}, {"name": "lot"}, None])
def test_trim_first_then_combine(family: Family, tmp_path: Path, then: dict[str, Any] | None) -> None:
    method = {"name": "cat", "rank": 2, **({"then": then} if then else {})}
    done = job(family, tmp_path, data=True, method=method).run()
    merged, known = done.merged(), [done.statistics(k) for k in range(3)]
    trimmed_somewhere = 0
    for tensor in (tensor for shard in done.plan.shards for tensor in shard.tensors if tensor.source == "merged"):
        base, plain = vectors(family, tensor.name)
        statistics = [found.get(tensor.name) for found in known]
        trimmed = plain
        if not isinstance(tensor.treatment, Keep) and (None not in statistics or tensor.role is Role.SHIFT):
            is_matrix = tensor.treatment.name == "projection"
            shaped = [as_matrix(t, tensor.role, tensor.transposed) if is_matrix else t.flatten() for t in plain]
            outcome = trim(shaped, statistics, tensor.treatment).task_vectors
            trimmed = [(t.T if is_matrix and tensor.transposed else t).reshape(base.shape) for t in outcome]
            trimmed_somewhere += any(not torch.equal(a, b) for a, b in zip(trimmed, plain, strict=True))
        context = Context(tensor.name, tensor.role, tensor.transposed, base, list(TASKS), statistics)
        update = merge(trimmed, [1.0] * 3, done.recipe.method, context)
        torch.testing.assert_close(merged[tensor.name], base + update, rtol=1e-5, atol=1e-6)
    assert trimmed_somewhere > 10


def test_ties_over_the_whole_vector_is_the_papers(family: Family, tmp_path: Path) -> None:
    done = job(family, tmp_path, method={"name": "ties", "density": 0.1}).run()
    names = [tensor.name for shard in done.plan.shards for tensor in shard.tensors if tensor.source == "merged"]
    read = {name: vectors(family, name) for name in names}
    flat = [torch.cat([read[name][1][k].flatten() for name in names]) for k in range(3)]
    count = math.floor(0.1 * len(flat[0]) + 0.5)
    trimmed = [t * (t.abs() >= t.abs().sort(descending=True).values[count - 1]) for t in flat]
    sign = torch.stack(trimmed).sum(0).sign()
    agreeing = [t * (t.sign() == sign) for t in trimmed]
    there = torch.stack([(t != 0).float() for t in agreeing]).sum(0)
    expected = torch.stack(agreeing).sum(0) / there.clamp_min(1)
    merged = done.merged()
    ours = torch.cat([(merged[name] - read[name][0]).flatten() for name in names])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    per_tensor = job(family, tmp_path / "t", method={"name": "ties", "density": 0.1, "scope": "tensor"}).run()
    assert Stage.CALIBRATE not in per_tensor.outputs
    other = per_tensor.merged()
    assert any(not torch.equal(other[name], merged[name]) for name in names)


def test_breadcrumbs_over_the_whole_vector(family: Family, tmp_path: Path) -> None:
    method = {"name": "breadcrumbs", "scope": "model", "density": 0.3, "gamma": 0.02, "scaling": 1.0}
    done = job(family, tmp_path, method=method).run()
    merged = done.merged()
    kept = [0, 0]
    for tensor in (tensor for shard in done.plan.shards for tensor in shard.tensors if tensor.source == "merged"):
        base, plain = vectors(family, tensor.name)
        kept[0] += sum(int(t.count_nonzero()) for t in plain) // 3
        kept[1] += int((merged[tensor.name] - base).count_nonzero())
    assert 0.4 < kept[1] / kept[0] < 0.75  # three masks of 0.3 each, of independent vectors: 1 - 0.7^3 = 0.657


def test_a_method_that_needs_statistics_is_given_them(family: Family, tmp_path: Path) -> None:
    done = job(family, tmp_path, data=True, method={"name": "lot"}).run()
    assert len(done.outputs[Stage.CALIBRATE]) == 3
    name = "bert.encoder.layer.0.output.dense.weight"
    base, plain = vectors(family, name)
    S = [s[name].held.double().T @ s[name].held.double() / s[name].rows for s in map(done.statistics, range(3))]
    total = torch.stack(S).sum(0)
    answers = torch.stack([t.double() @ s for t, s in zip(plain, S, strict=True)]).sum(0)
    expected = answers @ torch.linalg.pinv(total, rtol=1e-5, hermitian=True)
    torch.testing.assert_close((done.merged()[name] - base).double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("data", [True, False], ids=["with data", "without"])
def test_auto_uses_the_data_there_is(family: Family, data: bool, tmp_path: Path) -> None:
    done = job(family, tmp_path, data=data, method="auto").run()
    assert (Stage.CALIBRATE in done.outputs) is data
    name = "bert.encoder.layer.0.output.dense.weight"
    known = [done.statistics(k)[name] for k in range(3)] if data else [None] * 3
    base, plain = vectors(family, name)
    context = Context(name, Role.LINEAR, False, base, [str(k) for k in range(3)], known)
    expected = merge(plain, [task.weight for task in done.recipe.tasks], done.recipe.method, context)
    assert done.recipe.method.name == ("shrinkage" if data else "tsv_m")
    torch.testing.assert_close(done.merged()[name], base + expected, rtol=1e-5, atol=1e-6)


def test_statistics_are_not_asked_for_where_no_one_needs_them(family: Family, tmp_path: Path) -> None:
    done = job(family, tmp_path, data=True, method={"name": "tsv_m"}).run()
    assert Stage.CALIBRATE not in done.outputs


def test_overrides_change_parameters_by_name(family: Family, tmp_path: Path) -> None:
    overrides = [
        {"match": "bert.encoder.layer.0.*", "parameters": {"scaling": 0.0}},
        {"match": "bert.encoder.*", "parameters": {"scaling": 1.0}},
    ]
    done = job(family, tmp_path, method={"name": "task_arithmetic", "scaling": 0.5}, overrides=overrides).run()
    merged = done.merged()
    for tensor in (tensor for shard in done.plan.shards for tensor in shard.tensors if tensor.source == "merged"):
        base, plain = vectors(family, tensor.name)
        layer = "bert.encoder.layer.0." in tensor.name
        scaling = 0.0 if layer else 1.0 if tensor.name.startswith("bert.encoder.") else 0.5
        expected = base + scaling * torch.stack(plain).sum(0)
        torch.testing.assert_close(merged[tensor.name], expected, rtol=1e-5, atol=1e-6)


def test_overrides_of_cat_change_treatments_too(family: Family, tmp_path: Path) -> None:
    override = {"match": "*attention*", "parameters": {"rank": 7, "then": {"name": "average"}}}
    planned = job(family, tmp_path, data=True, method={"name": "cat"}, overrides=[override]).run(until=Stage.PLAN).plan
    ranks = {
        tensor.name: getattr(tensor.treatment, "rank", None)
        for shard in planned.shards
        for tensor in shard.tensors
        if tensor.role is Role.LINEAR and tensor.source == "merged"
    }
    assert {rank for name, rank in ranks.items() if "attention" in name} == {7}
    assert {rank for name, rank in ranks.items() if "attention" not in name} == {4}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": {"name": "lot"}}, "lot needs exemplars or statistics of every task"),
        ({"method": {"name": "cat", "then": {"name": "regmean"}}}, "regmean needs exemplars or statistics"),
        ({"method": {"name": "slerp"}}, "slerp takes at most 2 tasks, not 3; karcher takes any number"),
        ({"overrides": [{"match": "x", "parameters": {"ranc": 3}}]}, "ranc: Extra inputs are not permitted"),
        ({"overrides": [{"match": "x", "parameters": {"rank": -3}}]}, "rank: Input should be greater"),
        ({"overrides": [{"match": "x", "parameters": {"features_at": "task"}}]}, "features_at holds for the whole"),
        (
            {"method": {"name": "ties"}, "overrides": [{"match": "x", "parameters": {"density": 0.5}}]},
            "density holds for the whole",
        ),
        ({"overrides": [{"match": "x", "parameters": {}}]}, "at least 1 item"),
    ],
)
def test_a_recipe_that_does_not_fit_its_method_is_refused(
    family: Family, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValidationError, match=said):
        job(family, tmp_path, **changes)
