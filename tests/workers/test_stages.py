"""The stages one after another on real files, without a broker or a database, and what they stand on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from service.contract.errors import BadInput, BadTensor, InputChanged, OutputTaken, Stopped
from service.contract.job import Status
from service.contract.parts import Claim, Done, SoFar
from service.contract.recipe import Recipe
from service.contract.stages import Stage
from service.stores.local import LocalStore
from service.stores.objects import Objects
from workers import stages
from workers.cleanup import remove_outputs
from workers.statistics import Statistic
from workers.statistics_file import StatisticsFile, write_statistics
from workers.tensors import TensorReader
from workers.watch import Watch
from workers.work import Work

PREFIX = "s3://merged/run/"
WORKSPACE = "s3://catmerge/"
TASKS = ("cars", "pets")


@pytest.fixture
def objects(tmp_path: Path) -> Objects:
    """``s3://bucket/key`` lies at ``tmp_path/bucket/key``."""
    return Objects({"s3": LocalStore(buckets=tmp_path)}, buckets=None, workspace=WORKSPACE)


@pytest.fixture(autouse=True)
def models(tmp_path: Path) -> Path:
    """A base and two tasks of a few tensors each, as lone files."""
    folder = tmp_path / "models"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for name in ("base", *TASKS):
        tensors = {
            "layer.weight": torch.randn(6, 4, generator=generator),
            "layer.bias": torch.randn(6, generator=generator),
            "counter": torch.tensor([3, 4]),
            "classifier.weight": torch.randn(2 if name == "base" else 3, 6, generator=generator),
        }
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


def recipe_of(**changes: Any) -> Recipe:
    tasks = [{"name": name, "checkpoint": f"s3://models/{name}.safetensors"} for name in TASKS]
    return Recipe.model_validate(
        {"base": "s3://models/base.safetensors", "tasks": tasks, "output": {"prefix": PREFIX}, **changes}
    )


class Walk:
    """A job's way through the stages; ``commit_point`` answers for the database."""

    def __init__(self, objects: Objects, recipe: Recipe, job_id: str = "mrg_1") -> None:
        self.objects = objects
        self.recipe = recipe
        self.job_id = job_id
        self.done: dict[Stage, list[Done]] = {}
        self.may_commit = True

    def claim(self, stage: Stage, part: int = 0) -> Claim:
        return Claim(self.job_id, stage, part, f"{stage} {part}", "token", 1, self.recipe, PREFIX)

    def work(self, stage: Stage, part: int = 0, watch: Watch | None = None) -> Work:
        return Work(
            claim=self.claim(stage, part),
            objects=self.objects,
            watch=watch or Watch(lambda: self.may_commit),
            workspace=WORKSPACE,
            device="cpu",
            outputs=lambda earlier: [dict(done.output) for done in self.done.get(earlier, [])],
            so_far=lambda: SoFar(0.0, 1.0, 2.0, 0, 0),
        )

    def step(self, stage: Stage, part: int = 0) -> Done:
        done = stages.RUN[stage](self.work(stage, part))
        self.done.setdefault(stage, []).append(done)
        return done

    def until(self, last: Stage) -> Done:
        """Every part that the plan asks for, in order, up to and with a stage."""
        planned = self.step(Stage.PLAN)
        for part in planned.parts:
            if list(Stage).index(part.stage) <= list(Stage).index(last):
                planned = self.step(part.stage, part.part)
        return planned


def listed(objects: Objects, prefix: str = PREFIX) -> set[str]:
    return {info.address.removeprefix(prefix) for info in objects.list(prefix)}


def test_the_whole_way(objects: Objects, tmp_path: Path, models: Path) -> None:
    done = Walk(objects, recipe_of(method={"name": "average"})).until(Stage.FINALIZE)
    assert done.status is Status.SUCCEEDED
    merged = load_file(tmp_path / "merged/run/model.safetensors")
    base, cars, pets = (load_file(models / f"{name}.safetensors") for name in ("base", *TASKS))
    torch.testing.assert_close(merged["layer.weight"], (cars["layer.weight"] + pets["layer.weight"]) / 2)
    assert merged["counter"].equal(base["counter"])
    assert merged["classifier.weight"].equal(base["classifier.weight"])
    head = load_file(tmp_path / "merged/run/heads/pets.safetensors")
    assert head["classifier.weight"].equal(pets["classifier.weight"])
    assert listed(objects) == {file["name"] for file in (done.result or {})["artifacts"]}


def test_a_job_can_be_finished_again_and_leaves_the_same_bytes(objects: Objects) -> None:
    """As when the worker that finished it died before the database heard of it."""
    walk = Walk(objects, recipe_of(method={"name": "average"}))
    first = walk.until(Stage.FINALIZE)
    before = {info.address: objects.read_all(info.address, 1 << 20) for info in objects.list(PREFIX)}
    again = walk.step(Stage.FINALIZE)
    assert replace(again, output={}) == replace(first, output={})
    assert {info.address: objects.read_all(info.address, 1 << 20) for info in objects.list(PREFIX)} == before


def test_a_planner_that_is_late_takes_nothing_away(objects: Objects) -> None:
    """Another worker took over, and the job is done: its result lies where this one was about to make room."""
    walk = Walk(objects, recipe_of(method={"name": "average"}))
    walk.until(Stage.FINALIZE)
    before = listed(objects)
    with pytest.raises(Stopped):
        stages.RUN[Stage.PLAN](walk.work(Stage.PLAN, watch=Watch(lambda: True, lambda: False)))
    assert listed(objects) == before


def test_whole_numbers_that_differ_are_refused_by_name(objects: Objects, models: Path) -> None:
    tensors = load_file(models / "pets.safetensors")
    save_file({**tensors, "counter": torch.tensor([3, 5])}, models / "pets2.safetensors")
    recipe = recipe_of(
        tasks=[
            {"name": "cars", "checkpoint": "s3://models/cars.safetensors"},
            {"name": "pets", "checkpoint": "s3://models/pets2.safetensors"},
        ]
    )
    with pytest.raises(BadInput, match=r"'counter'.*task 'pets'") as bad:
        Walk(objects, recipe).step(Stage.PLAN)
    assert bad.value.tensor == "counter"
    assert listed(objects) == set()
    declared = recipe.model_copy(update={"heads": ("counter",)})
    Walk(objects, declared).until(Stage.FINALIZE)


def test_the_plan_is_the_same_every_time(objects: Objects) -> None:
    Walk(objects, recipe_of()).step(Stage.PLAN)
    first = objects.read_all(f"{PREFIX}merge/plan.json", 1 << 20)
    Walk(objects, recipe_of()).step(Stage.PLAN)
    assert objects.read_all(f"{PREFIX}merge/plan.json", 1 << 20) == first


def test_a_shard_written_again_has_the_same_bytes(objects: Objects) -> None:
    walk = Walk(objects, recipe_of())
    walk.until(Stage.MERGE)
    files = [name for name in listed(objects) if name.endswith(".safetensors")]
    assert len(files) == 2
    before = {name: objects.read_all(PREFIX + name, 1 << 20) for name in files}
    again = walk.step(Stage.MERGE)
    first = walk.done[Stage.MERGE][0]
    assert {**again.output, "usage": None} == {**first.output, "usage": None}  # which is measured
    assert {name: objects.read_all(PREFIX + name, 1 << 20) for name in files} == before


def test_an_input_that_changed_after_the_plan(objects: Objects, models: Path) -> None:
    walk = Walk(objects, recipe_of())
    walk.step(Stage.PLAN)
    tensors = load_file(models / "pets.safetensors")
    (models / "pets.safetensors").unlink()
    save_file(tensors, models / "pets.safetensors")
    with pytest.raises(InputChanged, match=r"pets\.safetensors"):
        walk.step(Stage.MERGE)
    assert listed(objects) == {"merge/recipe.json", "merge/plan.json"}


def test_a_cancelled_merge_writes_no_shard(objects: Objects) -> None:
    walk = Walk(objects, recipe_of())
    walk.step(Stage.PLAN)
    watch = Watch(lambda: True)
    watch.stop("cancelled")
    with pytest.raises(Stopped, match="cancelled"):
        stages.RUN[Stage.MERGE](walk.work(Stage.MERGE, watch=watch))
    assert listed(objects) == {"merge/recipe.json", "merge/plan.json"}


def test_a_job_cancelled_at_the_last_moment_has_no_manifest(objects: Objects) -> None:
    walk = Walk(objects, recipe_of())
    walk.until(Stage.MERGE)
    walk.may_commit = False
    with pytest.raises(Stopped, match="before its result was made visible"):
        walk.step(Stage.FINALIZE)
    assert "merge/manifest.json" not in listed(objects)
    walk.may_commit = True
    assert walk.step(Stage.FINALIZE).status is Status.SUCCEEDED


def test_anothers_result_is_not_taken_away(objects: Objects) -> None:
    Walk(objects, recipe_of(), "mrg_1").until(Stage.FINALIZE)
    before = listed(objects)
    with pytest.raises(OutputTaken, match="mrg_1"):
        Walk(objects, recipe_of(), "mrg_2").step(Stage.PLAN)
    assert listed(objects) == before


def test_an_earlier_result_is_overwritten_where_the_recipe_says_so(objects: Objects) -> None:
    Walk(objects, recipe_of(output={"prefix": PREFIX, "shard_bytes": 1024}), "mrg_1").until(Stage.FINALIZE)
    objects.put(f"{PREFIX}notes.txt", b"mine", "text/plain")
    output = {"prefix": PREFIX, "overwrite": True}
    walk = Walk(objects, recipe_of(method={"name": "average"}, output=output), "mrg_2")
    walk.step(Stage.PLAN)
    assert listed(objects) == {"merge/recipe.json", "merge/plan.json", "notes.txt"}


@pytest.mark.parametrize("last", [Stage.PLAN, Stage.MERGE])
def test_a_failed_job_takes_away_its_own_files_and_no_others(objects: Objects, last: Stage) -> None:
    objects.put(f"{PREFIX}notes.txt", b"mine", "text/plain")
    walk = Walk(objects, recipe_of(output={"prefix": PREFIX, "overwrite": True}))
    walk.until(last)
    remove_outputs(objects, walk.claim(Stage.MERGE), WORKSPACE)
    assert listed(objects) == {"notes.txt"}
    assert listed(objects, "s3://catmerge/scratch/") == set()


def test_a_job_that_fails_when_it_is_finished_again_leaves_no_manifest(objects: Objects) -> None:
    """The first worker died right after the manifest, the second found an input gone."""
    walk = Walk(objects, recipe_of(method={"name": "average"}))
    walk.until(Stage.FINALIZE)
    remove_outputs(objects, walk.claim(Stage.FINALIZE), WORKSPACE)
    assert listed(objects) == set()


def test_a_job_that_fails_at_planning_leaves_an_earlier_result_whole(objects: Objects) -> None:
    Walk(objects, recipe_of(), "mrg_1").until(Stage.FINALIZE)
    before = listed(objects)
    walk = Walk(objects, recipe_of(output={"prefix": PREFIX, "overwrite": True}), "mrg_2")
    remove_outputs(objects, walk.claim(Stage.PLAN), WORKSPACE)
    assert listed(objects) == before


# Statistics files


def test_statistics_are_read_as_they_were_written(objects: Objects) -> None:
    written = {
        "a": Statistic(rows=7, factor=torch.randn(3, 5)),
        "b": Statistic(rows=2**40, diagonal=torch.rand(4, dtype=torch.float64)),
        "c": Statistic(rows=0, factor=torch.zeros(0, 5)),
    }
    write_statistics(objects, "s3://data/", "s.safetensors", written)
    with TensorReader(objects) as reader:
        file = StatisticsFile(reader, "s3://data/s.safetensors")
        assert file.parameters == {"a", "b", "c"}
        found = file.start(["b", "a", "c", "unknown"]).wait()
    assert found.keys() == written.keys()
    for name, statistic in written.items():
        assert found[name].rows == statistic.rows
        assert found[name].held.equal(statistic.held)
        assert (found[name].factor is None) == (statistic.factor is None)


def test_statistics_that_are_no_numbers_are_named(objects: Objects, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    save_file(
        {"a.factor": torch.full((1, 2), float("nan")), "a.rows": torch.tensor(1)}, tmp_path / "data/nan.safetensors"
    )
    save_file({"a.factor": torch.ones(1, 2), "a.rows": torch.tensor(-1)}, tmp_path / "data/below.safetensors")
    with TensorReader(objects) as reader:
        with pytest.raises(BadTensor, match=r"s3://data/nan\.safetensors: the statistics of 'a'") as bad:
            StatisticsFile(reader, "s3://data/nan.safetensors").start(["a"]).wait()
        assert bad.value.tensor == "a"
        with pytest.raises(BadInput, match=r"below\.safetensors: a\.rows is negative"):
            StatisticsFile(reader, "s3://data/below.safetensors")


# The watch


def test_a_watch_counts() -> None:
    watch = Watch(lambda: True)
    watch.step(tensors=2, bytes_read=5)
    watch.step(bytes_read=1, bytes_written=7)
    counters = watch.counters
    assert (counters.tensors_done, counters.bytes_read, counters.bytes_written) == (2, 6, 7)


@pytest.mark.parametrize("act", [lambda watch: watch.step(), lambda watch: watch.announce_commit()])
def test_a_stopped_watch_says_why_and_the_first_reason_stays(act: Callable[[Watch], None]) -> None:
    watch = Watch(lambda: True)
    watch.stop("cancelled")
    watch.stop("the lease ran out")
    assert watch.is_stopped
    with pytest.raises(Stopped, match="cancelled"):
        act(watch)


def test_a_commit_that_may_not_be_is_stopped() -> None:
    Watch(lambda: True).announce_commit()
    with pytest.raises(Stopped, match="made visible"):
        Watch(lambda: False).announce_commit()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": [{}]}', '{"files": [{"name": 3}]}', '{"files": 1}'])
def test_a_manifest_that_is_none_is_named_and_left_alone(objects: Objects, text: str) -> None:
    objects.put(f"{PREFIX}merge/manifest.json", text.encode(), "application/json")
    with pytest.raises(BadInput, match=r"manifest\.json is no manifest of a merge"):
        Walk(objects, recipe_of(output={"prefix": PREFIX, "overwrite": True})).step(Stage.PLAN)
    assert listed(objects) == {"merge/manifest.json"}
