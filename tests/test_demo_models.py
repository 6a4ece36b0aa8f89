"""The demo's checkpoints and samples are small, load cleanly, and are as good and as separate as their README says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import ViTForImageClassification

DEMO = Path(__file__).parents[1] / "deploy" / "demo"
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "digits": lambda pixels: pixels,
    "rotated": lambda pixels: torch.rot90(pixels, 1, (2, 3)),
    "inverted": lambda pixels: 1 - pixels,
    "mirrored": lambda pixels: pixels.flip(3),
}
FOLDERS = ["base", *(f"tasks/{task}" for task in VIEWS)]


def samples(task: str, name: str) -> dict[str, Tensor]:
    """One of a task's files."""
    tensors: dict[str, Tensor] = load_file(DEMO / "tasks" / task / f"{name}.safetensors")
    return tensors


def images(task: str, name: str) -> set[bytes]:
    """The bytes of each image in one of a task's files."""
    return {image.numpy().tobytes() for image in samples(task, name)["pixel_values"]}


def said_in_readme(task: str) -> tuple[int, float, float]:
    """Classes, validation and test accuracy of ``task`` in the README's table."""
    row = re.search(rf"^\| {task} \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", (DEMO / "README.md").read_text(), re.M)
    assert row, f"the README's table has no row for {task}"
    return int(row[1]), float(row[2]), float(row[3])


def loaded(folder: str) -> ViTForImageClassification:
    """The model in ``folder``, ready to classify."""
    model: ViTForImageClassification = ViTForImageClassification.from_pretrained(DEMO / folder)
    return model


@torch.no_grad()
def accuracy(model: ViTForImageClassification, labeled: dict[str, Tensor]) -> float:
    """Share of ``labeled`` that ``model`` classifies rightly."""
    right = model(pixel_values=labeled["pixel_values"]).logits.argmax(1) == labeled["labels"]
    return float(right.double().mean())


def test_everything_together_is_under_ten_megabytes() -> None:
    files = [path for part in ("base", "tasks") for path in (DEMO / part).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10_000_000


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_checkpoint_loads_with_no_key_missing_or_left_over(folder: str) -> None:
    load: Any = ViTForImageClassification.from_pretrained  # typed as if it never returned a pair
    _, info = load(DEMO / folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {tensor.dtype for tensor in load_file(DEMO / folder / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_config_names_its_classes(folder: str) -> None:
    config: dict[str, Any] = json.loads((DEMO / folder / "config.json").read_text())
    names = config["id2label"]
    assert config["architectures"] == ["ViTForImageClassification"]
    assert config["label2id"] == {name: int(index) for index, name in names.items()}
    assert not any(name.startswith("LABEL_") for name in names.values())


def test_experts_differ_from_the_base_in_the_shape_of_their_heads_only() -> None:
    shapes = [
        {name: t.shape for name, t in load_file(DEMO / folder / "model.safetensors").items()} for folder in FOLDERS
    ]
    differing = {name for name in shapes[0] if len({shape[name] for shape in shapes}) > 1}
    assert all(shape.keys() == shapes[0].keys() for shape in shapes)
    assert differing == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("task", VIEWS)
def test_each_expert_is_as_good_as_the_readme_says(task: str) -> None:
    model = loaded(f"tasks/{task}")
    classes, validation, test = said_in_readme(task)
    assert model.config.num_labels == classes
    assert accuracy(model, samples(task, "val")) == pytest.approx(validation, abs=0.01)
    assert accuracy(model, samples(task, "test")) == pytest.approx(test, abs=0.01)


@pytest.mark.parametrize("task", VIEWS)
def test_no_image_is_in_two_of_a_tasks_files(task: str) -> None:
    exemplars, validation, test = (images(task, name) for name in ("exemplars", "val", "test"))
    assert (len(exemplars), len(validation), len(test)) == (16, 350, 350)
    assert exemplars.isdisjoint(validation | test)
    assert validation.isdisjoint(test)


@pytest.mark.parametrize("name", ["exemplars", "val", "test"])
@pytest.mark.parametrize("task", VIEWS)
def test_all_tasks_share_the_split_each_in_its_own_view(task: str, name: str) -> None:
    plain, seen = samples("digits", name)["pixel_values"], samples(task, name)["pixel_values"]
    assert torch.equal(VIEWS[task](plain), seen)


@pytest.mark.parametrize("task", VIEWS)
def test_exemplars_have_no_labels(task: str) -> None:
    assert samples(task, "exemplars").keys() == {"pixel_values"}
