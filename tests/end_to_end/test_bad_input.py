"""What people get wrong: each gets an answer that names the field, the file and the tensor, and nothing is written."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.checkpoints import Family, change_entry, change_header, change_tensors, read_tensors, write_family
from tests.end_to_end.stack import Stack

LINEAR = "vit.encoder.layer.0.intermediate.dense.weight"
BIAS = "vit.encoder.layer.1.output.dense.bias"
TASK = "/tasks/1/checkpoint"
EXEMPLARS = "/tasks/1/exemplars"
FRESH = itertools.count()


@dataclass
class Trial:
    """A family on this machine that a test spoils, and the service it is shown to."""

    stack: Stack
    family: Family
    prefix: str

    @property
    def place(self) -> str:
        return f"file://{self.family.folder}/"

    @property
    def task(self) -> Path:
        """The folder of the second task's checkpoint."""
        return self.family.checkpoint(self.family.tasks[1])

    @property
    def weights(self) -> Path:
        return self.task / "model.safetensors"

    @property
    def exemplars(self) -> Path:
        return self.family.exemplars(self.family.tasks[1])

    def recipe(self, **changes: Any) -> dict[str, Any]:
        return self.family.recipe(self.place, **{"output": {"prefix": self.prefix}, **changes})

    def ids(self) -> set[str]:
        rows = self.stack.client.get("/v1/merges", params={"limit": 100}).json()["data"]
        return {row["id"] for row in rows}

    def problem(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """The problem that a recipe gets; nothing is stored and nothing written."""
        before, lying = self.ids(), self.stack.listed(self.prefix)
        answer = self.stack.client.post("/v1/merges", json=recipe)
        assert answer.headers["Content-Type"] == "application/problem+json", answer.text
        found: dict[str, Any] = answer.json()
        assert found["status"] == answer.status_code
        assert self.ids() == before
        assert self.stack.listed(self.prefix) == lying
        return found

    def refused(
        self, recipe: dict[str, Any], code: str, pointer: str, *named: object, status: int = 422
    ) -> dict[str, Any]:
        """Whether a recipe is refused over this field, in a sentence that has everything ``named`` in it."""
        found = self.problem(recipe)
        assert (found["status"], found["code"]) == (status, code), found
        fitting = [fault for fault in found["errors"] if fault["pointer"] == pointer]
        assert fitting, found
        sentences = [fault["detail"] for fault in fitting]
        assert any(all(str(name) in sentence for name in named) for sentence in sentences), (named, sentences)
        return found

    def failed(self, recipe: dict[str, Any], code: str, tensor: str | None, *named: object) -> dict[str, Any]:
        """Whether a recipe is taken in and fails for good, and leaves nothing."""
        job = self.stack.ended(self.stack.submit(recipe)["id"])
        assert job["status"] == "failed", job
        error: dict[str, Any] = job["error"]
        assert (error["code"], error["blame"], error["tensor"]) == (code, "user", tensor), error
        assert all(str(name) in error["detail"] for name in named), error
        assert job["result"] is None
        assert self.stack.listed(self.prefix) == []
        assert self.stack.client.get(f"/v1/merges/{job['id']}/artifacts").json()["code"] == "not_ready"
        return error


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return write_family(tmp_path_factory.mktemp("template"), "vit", {"cars": 3, "pets": 5})


@pytest.fixture
def trial(embedded: Stack, files: Path, template: Family) -> Trial:
    """A family of its own for every test."""
    number = next(FRESH)
    folder = files / f"trial-{number}"
    shutil.copytree(template.folder, folder)
    return Trial(embedded, Family(folder, template.tasks), f"s3://merged/bad-{number}/")


def set_value(value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[LINEAR][3, 5] = value

    return change


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def replace(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = make(tensors[name]).contiguous()

    return change


# What is well is taken in: the refusals below are for what each test spoils.


def test_an_unspoiled_family_is_merged(trial: Trial) -> None:
    job = trial.stack.run(trial.recipe())
    assert job["result"]["prefix"] == trial.prefix
    assert "model.safetensors" in trial.stack.listed(trial.prefix)


# Checkpoints that are none


def test_a_checkpoint_that_does_not_exist(trial: Trial) -> None:
    shutil.rmtree(trial.task)
    trial.refused(trial.recipe(), "checkpoint_not_found", TASK, f"file://{trial.task}/")


def test_a_base_that_does_not_exist(trial: Trial) -> None:
    shutil.rmtree(trial.family.base)
    trial.refused(trial.recipe(), "checkpoint_not_found", "/base", f"file://{trial.family.base}/")


def test_a_shard_that_does_not_exist(trial: Trial) -> None:
    index = {"weight_map": {LINEAR: "model-00001-of-00001.safetensors"}}
    (trial.task / "model.safetensors.index.json").write_text(json.dumps(index))
    trial.weights.unlink()
    trial.refused(trial.recipe(), "malformed_checkpoint", TASK, "model-00001-of-00001.safetensors", LINEAR)


def test_a_pickle_in_the_folder(trial: Trial) -> None:
    torch.save(read_tensors(trial.weights), trial.task / "pytorch_model.bin")
    trial.weights.unlink()
    trial.refused(trial.recipe(), "malformed_checkpoint", TASK, trial.task / "pytorch_model.bin", "save_file")


@pytest.mark.parametrize("protocol", [None, 2, 4])
def test_a_pickle_by_another_name(trial: Trial, protocol: int | None) -> None:
    if protocol is None:
        torch.save(read_tensors(trial.weights), trial.weights)
    else:
        trial.weights.write_bytes(pickle.dumps({"weights": [1.0] * 100}, protocol=protocol))
    trial.refused(trial.recipe(), "malformed_checkpoint", TASK, trial.weights, "pickle")


def test_a_pickle_named_itself(trial: Trial) -> None:
    recipe = trial.recipe()
    recipe["tasks"][1]["checkpoint"] = f"file://{trial.task}/pytorch_model.bin"
    trial.refused(recipe, "malformed_checkpoint", TASK, "pytorch_model.bin", "pickle")


def test_an_adapter(trial: Trial) -> None:
    trial.weights.rename(trial.task / "adapter_model.safetensors")
    trial.refused(trial.recipe(), "malformed_checkpoint", TASK, "adapter_model.safetensors", "merge_and_unload")


# Headers


def test_a_truncated_file(trial: Trial) -> None:
    tensors = read_tensors(trial.weights)
    os.truncate(trial.weights, trial.weights.stat().st_size - 1)
    found = trial.refused(trial.recipe(), "malformed_checkpoint", TASK, trial.weights, "cut short")
    assert any(repr(name) in found["detail"] for name in tensors)


def test_a_file_cut_inside_its_header(trial: Trial) -> None:
    os.truncate(trial.weights, 40)
    trial.refused(trial.recipe(), "malformed_checkpoint", TASK, trial.weights, "40 bytes")


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_of_nothing(trial: Trial, size: int) -> None:
    os.truncate(trial.weights, size)
    trial.refused(trial.recipe(), "malformed_checkpoint", TASK, trial.weights, f"{size} bytes")


def test_a_key_twice(trial: Trial) -> None:
    def twice(text: str) -> str:
        return text.replace("{", '{"' + LINEAR + '":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},', 1)

    change_header(trial.weights, twice)
    trial.refused(trial.recipe(), "malformed_checkpoint", TASK, trial.weights, LINEAR, "twice")


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"shape": [32, 17]}, "needs 2176 bytes"),
        ({"dtype": "F64"}, "needs 4096 bytes"),
        ({"dtype": "F4"}, "'F4'"),
        ({"shape": [-32, -16]}, "whole numbers"),
        ({"shape": [2**40, 2**40]}, "needs"),
        ({"data_offsets": [0, 2048]}, "overlaps"),
        ({"data_offsets": [10**12, 10**12 + 2048]}, "gap"),
        ({"extra": 1}, "nothing else"),
    ],
)
def test_a_lying_header(trial: Trial, members: dict[str, Any], says: str) -> None:
    change_entry(trial.weights, LINEAR, **members)
    found = trial.refused(trial.recipe(), "malformed_checkpoint", TASK, trial.weights, says)
    assert "tensor '" in found["detail"]


def test_a_header_that_claims_to_be_endless(trial: Trial) -> None:
    raw = trial.weights.read_bytes()
    trial.weights.write_bytes((2**62).to_bytes(8, "little") + raw[8:])
    trial.refused(trial.recipe(), "malformed_checkpoint", TASK, trial.weights, "claims to end")


def test_a_header_that_is_no_json(trial: Trial) -> None:
    change_header(trial.weights, lambda text: text[:-5])
    trial.refused(trial.recipe(), "malformed_checkpoint", TASK, trial.weights, "not valid JSON")


def test_a_name_that_climbs(trial: Trial) -> None:
    change_header(trial.weights, lambda text: text.replace(LINEAR, "../../etc/passwd"))
    trial.refused(trial.recipe(), "malformed_checkpoint", TASK, trial.weights, "../../etc/passwd", "climbs")


# Checkpoints that do not fit


def test_a_missing_tensor(trial: Trial) -> None:
    change_tensors(trial.task, drop(LINEAR))
    trial.refused(trial.recipe(), "incompatible_checkpoints", TASK, f"file://{trial.task}/", LINEAR, "missing")


def test_another_shape(trial: Trial) -> None:
    change_tensors(trial.task, replace(LINEAR, lambda tensor: tensor[:, :15]))
    trial.refused(
        trial.recipe(), "incompatible_checkpoints", TASK, trial.weights, LINEAR, "[32, 15]", "base's has [32, 16]"
    )


def test_another_type(trial: Trial) -> None:
    change_tensors(trial.task, replace(BIAS, lambda tensor: tensor.half()))
    trial.refused(trial.recipe(), "incompatible_checkpoints", TASK, trial.weights, BIAS, "F16", "base's is F32")


def test_every_disagreement_in_one_answer(trial: Trial) -> None:
    change_tensors(trial.task, replace(BIAS, lambda tensor: tensor.half()))
    change_tensors(trial.task, replace(LINEAR, lambda tensor: tensor[:, :15]))
    change_tensors(trial.family.checkpoint(trial.family.tasks[0]), drop("vit.layernorm.bias"))
    trial.exemplars.unlink()
    found = trial.problem(trial.recipe())
    assert found["status"] == 422
    assert {(fault["pointer"], fault["code"]) for fault in found["errors"]} == {
        ("/tasks/0/checkpoint", "incompatible_checkpoints"),
        (TASK, "incompatible_checkpoints"),
        (EXEMPLARS, "checkpoint_not_found"),
    }
    assert len(found["errors"]) == 4


def test_another_architecture(trial: Trial, bert: Family) -> None:
    shutil.rmtree(trial.task)
    shutil.copytree(bert.checkpoint("news"), trial.task)
    recipe = trial.recipe()
    for task in recipe["tasks"]:
        del task["exemplars"]
    trial.refused(recipe, "incompatible_checkpoints", TASK, f"{trial.task}/config.json", "'bert'", "'vit'")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_or_infinity_in_a_task(trial: Trial, value: float) -> None:
    change_tensors(trial.task, set_value(value))
    # Without exemplars, since no forward pass may find it first.
    recipe = trial.recipe()
    for task in recipe["tasks"]:
        del task["exemplars"]
    trial.failed(recipe, "non_finite_tensor", LINEAR, LINEAR, "'pets'", f"file://{trial.task}/")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_or_infinity_in_a_task_with_exemplars(trial: Trial, value: float) -> None:
    change_tensors(trial.task, set_value(value))
    trial.failed(trial.recipe(), "non_finite_tensor", LINEAR, LINEAR, "'pets'", f"file://{trial.task}/")


def test_nan_in_the_base(trial: Trial) -> None:
    change_tensors(trial.family.base, set_value(float("nan")))
    trial.failed(trial.recipe(), "non_finite_tensor", LINEAR, LINEAR, "base", f"file://{trial.family.base}/")


def test_a_task_vector_that_overflows(trial: Trial) -> None:
    change_tensors(trial.family.base, set_value(-3e38))
    change_tensors(trial.task, set_value(3e38))
    trial.failed(trial.recipe(method={"name": "task_arithmetic"}), "non_finite_tensor", LINEAR, LINEAR)


def test_a_result_that_overflows(trial: Trial) -> None:
    change_tensors(trial.task, set_value(1e6))
    recipe = trial.recipe(method={"name": "average"}, output={"prefix": trial.prefix, "dtype": "F16"})
    trial.failed(recipe, "non_finite_tensor", LINEAR, LINEAR, "F16", "overflows")


# Exemplars


def save_exemplars(trial: Trial, **tensors: Tensor) -> Trial:
    save_file(tensors, trial.exemplars)
    return trial


def test_exemplars_of_another_name(trial: Trial) -> None:
    save_exemplars(trial, images=torch.zeros(2, 3, 16, 16))
    trial.refused(trial.recipe(), "exemplars_do_not_fit", EXEMPLARS, trial.exemplars, "'images'", "pixel_values")


def test_exemplars_of_another_kind_of_model(trial: Trial) -> None:
    save_exemplars(trial, input_ids=torch.zeros(2, 8, dtype=torch.int64))
    trial.refused(trial.recipe(), "exemplars_do_not_fit", EXEMPLARS, trial.exemplars, "'input_ids'", "vision")


@pytest.mark.parametrize("shape", [(2, 3, 16, 15), (2, 1, 16, 16), (3, 16, 16), (2,)])
def test_exemplars_of_another_shape(trial: Trial, shape: tuple[int, ...]) -> None:
    save_exemplars(trial, pixel_values=torch.zeros(shape))
    trial.refused(
        trial.recipe(), "exemplars_do_not_fit", EXEMPLARS, trial.exemplars, "'pixel_values'", str(list(shape))
    )


def test_exemplars_without_a_sample(trial: Trial) -> None:
    save_exemplars(trial, pixel_values=torch.zeros(0, 3, 16, 16))
    trial.refused(trial.recipe(), "exemplars_do_not_fit", EXEMPLARS, trial.exemplars, "'pixel_values'", "empty")


def test_exemplars_without_a_tensor(trial: Trial) -> None:
    save_exemplars(trial)
    trial.refused(trial.recipe(), "exemplars_do_not_fit", EXEMPLARS, trial.exemplars, "no model inputs")


def test_exemplars_that_do_not_exist(trial: Trial) -> None:
    trial.exemplars.unlink()
    trial.refused(trial.recipe(), "checkpoint_not_found", EXEMPLARS, trial.exemplars)


def test_exemplars_that_are_a_pickle(trial: Trial) -> None:
    torch.save({"pixel_values": torch.zeros(2, 3, 16, 16)}, trial.exemplars)
    trial.refused(trial.recipe(), "malformed_checkpoint", EXEMPLARS, trial.exemplars, "pickle")


def test_exemplars_with_nan(trial: Trial) -> None:
    pixels = torch.zeros(2, 3, 16, 16)
    pixels[1, 2, 3, 4] = float("nan")
    save_exemplars(trial, pixel_values=pixels)
    trial.failed(trial.recipe(), "bad_input", None, "'pixel_values'", "NaN", trial.exemplars)


def test_statistics_of_another_width(trial: Trial) -> None:
    file = trial.family.folder / "statistics.safetensors"
    save_file({f"{LINEAR}.factor": torch.ones(2, 13), f"{LINEAR}.rows": torch.tensor(2)}, file)
    recipe = trial.recipe()
    del recipe["tasks"][1]["exemplars"]
    recipe["tasks"][1]["statistics"] = f"file://{file}"
    trial.refused(recipe, "exemplars_do_not_fit", "/tasks/1/statistics", file, LINEAR, "13 wide")


def test_statistics_with_nan(trial: Trial) -> None:
    file = trial.family.folder / "statistics.safetensors"
    factor = torch.full((2, 16), float("nan"))
    save_file({f"{LINEAR}.factor": factor, f"{LINEAR}.rows": torch.tensor(2)}, file)
    recipe = trial.recipe()
    for task in recipe["tasks"]:
        del task["exemplars"]
        task["statistics"] = f"file://{file}"
    trial.failed(recipe, "non_finite_tensor", LINEAR, LINEAR, file)


# Recipes


def test_an_unknown_method(trial: Trial) -> None:
    trial.refused(trial.recipe(method={"name": "kitten"}), "validation_error", "/method", "kitten", "task_arithmetic")


def test_a_misspelt_parameter(trial: Trial) -> None:
    recipe = trial.recipe(method={"name": "cat", "balanse": 2})
    trial.refused(recipe, "validation_error", "/method/balanse", "balanse", "balance")


def test_a_rank_below_zero(trial: Trial) -> None:
    recipe = trial.recipe(method={"name": "cat", "rank": -1})
    trial.refused(recipe, "validation_error", "/method/rank", "greater than or equal to 0")


def test_a_rank_that_is_no_number(trial: Trial) -> None:
    trial.refused(trial.recipe(method={"name": "cat", "rank": "many"}), "validation_error", "/method/rank", "integer")


def test_two_tasks_of_one_name(trial: Trial) -> None:
    recipe = trial.recipe()
    recipe["tasks"][1]["name"] = recipe["tasks"][0]["name"]
    trial.refused(recipe, "validation_error", "/tasks", "cars", "twice")


def test_two_tasks_whose_names_differ_in_case_only(trial: Trial) -> None:
    recipe = trial.recipe()
    recipe["tasks"][1]["name"] = "CARS"
    trial.refused(recipe, "validation_error", "/tasks", "CARS", "cars")


def test_exemplars_for_some_tasks_only(trial: Trial) -> None:
    recipe = trial.recipe()
    del recipe["tasks"][1]["exemplars"]
    trial.refused(recipe, "validation_error", "/tasks", "pets")


# Places


@pytest.mark.parametrize("inside", ["base/", "pets/merged/", "pets", ""])
def test_an_output_inside_or_around_an_input(trial: Trial, inside: str) -> None:
    recipe = trial.recipe(output={"prefix": trial.place + inside})
    trial.refused(recipe, "validation_error", "/output/prefix", trial.place + inside, "input")


def test_an_output_around_the_exemplars(trial: Trial) -> None:
    folder = trial.family.folder / "samples"
    folder.mkdir()
    trial.exemplars.rename(folder / "pets.safetensors")
    recipe = trial.recipe(output={"prefix": f"file://{folder}/", "overwrite": True})
    recipe["tasks"][1]["exemplars"] = f"file://{folder}/pets.safetensors"
    trial.refused(recipe, "validation_error", "/output/prefix", f"file://{folder}/", EXEMPLARS)


def test_an_output_that_exists(trial: Trial) -> None:
    trial.stack.objects.put(f"{trial.prefix}notes.txt", b"mine", "text/plain")
    trial.refused(
        trial.recipe(), "output_exists", "/output/prefix", f"{trial.prefix}notes.txt", "overwrite", status=409
    )
    assert trial.stack.objects.read_all(f"{trial.prefix}notes.txt", 100) == b"mine"


@pytest.mark.parametrize("field", ["base", "checkpoint", "exemplars", "prefix"])
@pytest.mark.parametrize(
    "climbing", ["../outside/", "%2e%2e/outside/", "..%2foutside/", "%252e%252e/outside/", "..\\outside/"]
)
def test_an_address_that_climbs(trial: Trial, field: str, climbing: str) -> None:
    address = trial.place + climbing
    recipe = trial.recipe()
    pointer = {"base": "/base", "checkpoint": TASK, "exemplars": EXEMPLARS, "prefix": "/output/prefix"}[field]
    if field == "base":
        recipe["base"] = address
    elif field == "prefix":
        recipe["output"] = {"prefix": address}
    else:
        recipe["tasks"][1][field] = address
    found = trial.problem(recipe)
    assert (found["status"], found["code"]) in {(422, "validation_error"), (403, "forbidden")}
    assert [fault["pointer"] for fault in found["errors"]] == [pointer]


def test_an_address_outside_the_roots(trial: Trial, tmp_path: Path) -> None:
    outside = tmp_path / "pets"
    shutil.copytree(trial.task, outside)
    recipe = trial.recipe()
    recipe["tasks"][1]["checkpoint"] = f"file://{outside}/"
    trial.refused(recipe, "forbidden", TASK, f"file://{outside}/", status=403)


def test_a_root_that_is_only_the_beginning_of_a_name(trial: Trial, files: Path) -> None:
    recipe = trial.recipe(output={"prefix": f"file://{files}-other/merged/"})
    trial.refused(recipe, "forbidden", "/output/prefix", f"{files}-other/merged/", status=403)
    assert not Path(f"{files}-other").exists()


def test_a_link_that_leads_out(trial: Trial, tmp_path: Path) -> None:
    outside = tmp_path / "pets"
    shutil.copytree(trial.task, outside)
    shutil.rmtree(trial.task)
    trial.task.symlink_to(outside)
    trial.refused(trial.recipe(), "forbidden", TASK, f"file://{trial.task}", "symbolic link", status=403)


def test_a_file_that_is_a_link_out(trial: Trial, tmp_path: Path) -> None:
    shutil.move(trial.weights, tmp_path / "model.safetensors")
    trial.weights.symlink_to(tmp_path / "model.safetensors")
    found = trial.problem(trial.recipe())
    assert found["status"] in (403, 422)
    assert [fault["pointer"] for fault in found["errors"]] == [TASK]


def test_an_output_behind_a_link_that_leads_out(trial: Trial, tmp_path: Path) -> None:
    (trial.family.folder / "away").symlink_to(tmp_path)
    recipe = trial.recipe(output={"prefix": f"{trial.place}away/merged/"})
    trial.refused(recipe, "forbidden", "/output/prefix", f"{trial.place}away/merged", "symbolic link", status=403)
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_that_is_not_allowed(trial: Trial) -> None:
    recipe = trial.recipe(output={"prefix": "s3://secrets/merged/"})
    trial.refused(recipe, "bucket_not_allowed", "/output/prefix", "secrets", status=403)


def test_an_address_of_another_scheme(trial: Trial) -> None:
    recipe = trial.recipe()
    recipe["base"] = "https://example.org/model.safetensors"
    trial.refused(recipe, "validation_error", "/base", "s3://")


def test_the_services_own_folders(trial: Trial) -> None:
    recipe = trial.recipe()
    recipe["tasks"][1]["exemplars"] = "s3://catmerge/cache/statistics/x.safetensors"
    trial.refused(recipe, "forbidden", EXEMPLARS, "s3://catmerge/cache/statistics/x.safetensors", status=403)


# Evaluations and searches

LABELED = "/evaluation/tasks/0/labeled"


def measured(trial: Trial, labels: Tensor, names: dict[int, str] | None = None, **row: Any) -> dict[str, Any]:
    """A recipe whose second task is measured on as many images as there are labels."""
    file = trial.family.folder / "labeled.safetensors"
    metadata = {"id2label": json.dumps(names)} if names else None
    save_file({"pixel_values": torch.zeros(len(labels), 3, 16, 16), "labels": labels}, file, metadata)
    return trial.recipe(evaluation={"tasks": [{"task": trial.family.tasks[1], "labeled": f"file://{file}", **row}]})


def test_labels_out_of_range(trial: Trial) -> None:
    recipe = measured(trial, torch.tensor([0, 4, 5]))
    trial.failed(recipe, "bad_input", None, "labeled.safetensors", "labels reach from 0 to 5", "5 classes, 0 to 4")


def test_labels_that_are_called_otherwise_than_the_checkpoint_calls_them(trial: Trial) -> None:
    recipe = measured(trial, torch.tensor([0, 1]), {0: "LABEL_1", 1: "LABEL_0"})
    trial.refused(recipe, "exemplars_do_not_fit", LABELED, "label 0 is 'LABEL_1'", "'LABEL_0' in the checkpoint's")


def test_a_split_without_a_sample(trial: Trial) -> None:
    recipe = measured(trial, torch.zeros(0, dtype=torch.int64))
    trial.refused(recipe, "exemplars_do_not_fit", LABELED, "'pixel_values'", "empty")


def test_a_kind_that_does_not_fit_the_model(trial: Trial) -> None:
    recipe = measured(trial, torch.tensor([0, 1]), kind="language_modeling")
    trial.refused(recipe, "exemplars_do_not_fit", LABELED, "ViTForImageClassification can't be measured by")


def test_a_metric_that_does_not_fit_the_kind(trial: Trial) -> None:
    recipe = measured(trial, torch.tensor([0, 1]), metrics=["perplexity"])
    trial.refused(recipe, "validation_error", "/evaluation/tasks/0", "perplexity", "classification")


def test_a_search_without_samples_to_compare_trials_on(trial: Trial) -> None:
    recipe = measured(trial, torch.tensor([0, 1])) | {"search": {"space": {"scaling": [0.2, 0.4]}}}
    trial.refused(recipe, "validation_error", "/search", "validation samples of every task", *trial.family.tasks)


def test_a_search_of_what_the_method_does_not_know(trial: Trial) -> None:
    recipe = measured(trial, torch.tensor([0, 1]))
    row = recipe["evaluation"]["tasks"][0] | {"validation": recipe["evaluation"]["tasks"][0]["labeled"]}
    recipe["evaluation"]["tasks"] = [{**row, "task": name} for name in trial.family.tasks]
    recipe["search"] = {"space": {"density": [0.2, 0.4]}}
    trial.refused(recipe, "validation_error", "/search/space/density", "can't be searched for 'density'", "scaling")


def test_a_gate_on_what_is_not_measured(trial: Trial) -> None:
    recipe = measured(trial, torch.tensor([0, 1])) | {
        "gates": [{"metric": "task_score", "task": trial.family.tasks[0], "at_least": 0.5}]
    }
    trial.refused(recipe, "validation_error", "/gates/0", repr(trial.family.tasks[0]), "does not measure")
