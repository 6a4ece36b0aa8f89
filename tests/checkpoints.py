"""Tiny real checkpoints, as ``save_pretrained`` writes them: a base, tasks fine-tuned from it, and their samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from tests.workers.tiny_models import IMAGE, TEXT, build, configuration, pixels, tokens

SPREAD = 0.05  # how far fine-tuning moved each weight, about
WEIGHTS = "model.safetensors"

Change = Callable[[dict[str, Tensor]], None]


@dataclass(frozen=True)
class Kind:
    """A kind of model: its class, its configuration, and samples of its inputs."""

    architecture: str
    model_type: str
    values: Mapping[str, Any]
    samples: Callable[[int, int], dict[str, Tensor]]

    def model(self, classes: int, seed: int) -> Any:
        config = configuration(self.model_type, **self.values, num_labels=classes)
        return build(self.architecture, config, seed)


KINDS = {
    "vit": Kind(
        "ViTForImageClassification", "vit", IMAGE, lambda count, seed: pixels(count, IMAGE["image_size"], seed)
    ),
    "bert": Kind("BertForSequenceClassification", "bert", TEXT, lambda count, seed: tokens(count, length=8, seed=seed)),
}


@dataclass(frozen=True)
class Family:
    """Folders and files on this machine: ``base``, ``<task>``, ``<task>-exemplars`` and ``<task>-labeled``."""

    folder: Path
    tasks: tuple[str, ...]

    @property
    def base(self) -> Path:
        return self.folder / "base"

    def checkpoint(self, task: str) -> Path:
        return self.folder / task

    def exemplars(self, task: str) -> Path:
        return self.folder / f"{task}-exemplars.safetensors"

    def labeled(self, task: str) -> Path:
        return self.folder / f"{task}-labeled.safetensors"

    def recipe(self, place: str, *, evaluated: bool = False, **changes: Any) -> dict[str, Any]:
        """A recipe over this family as it lies under the address ``place``."""
        tasks = [
            {"name": task, "checkpoint": f"{place}{task}/", "exemplars": f"{place}{task}-exemplars.safetensors"}
            for task in self.tasks
        ]
        rows = [{"task": task, "labeled": f"{place}{task}-labeled.safetensors"} for task in self.tasks]
        evaluation = {"evaluation": {"tasks": rows}} if evaluated else {}
        return {"base": f"{place}base/", "tasks": tasks, **evaluation, **changes}


def write_family(
    folder: Path, kind: str, classes: Mapping[str, int], *, dtype: torch.dtype = torch.float32, samples: int = 4
) -> Family:
    """A base with two classes, and a task of as many classes as ``classes`` says: its labels are what it answers."""
    row = KINDS[kind]
    base = row.model(2, seed=0).to(dtype)
    base.save_pretrained(folder / "base")
    family = Family(folder, tuple(classes))
    for seed, (task, count) in enumerate(classes.items(), start=1):
        expert = _fine_tuned(base, row.model(count, seed), seed).to(dtype)
        expert.save_pretrained(family.checkpoint(task))
        save_file(row.samples(samples, seed), family.exemplars(task))
        save_file(_labeled(expert, row.samples(4 * samples, 100 + seed)), family.labeled(task))
    return family


def _fine_tuned(base: Any, fresh: Any, seed: int) -> Any:
    """The base's weights moved a little, with a head of its own."""
    generator = torch.Generator().manual_seed(seed)
    before = base.state_dict()
    for name, values in fresh.state_dict().items():
        if values.is_floating_point() and values.shape == before[name].shape:
            values.copy_(before[name].float() + SPREAD * torch.randn(values.shape, generator=generator))
    return fresh


def _labeled(expert: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        answers = expert.float()(**inputs).logits.argmax(dim=1)
    return {**inputs, "labels": answers}


def read_tensors(file: Path) -> dict[str, Tensor]:
    """A file's tensors in memory of their own, so that the file may be written over."""
    return load(file.read_bytes())


def change_tensors(folder: Path, change: Change) -> Path:
    """Change a checkpoint's tensors in place; returns the file."""
    file = folder / WEIGHTS
    tensors = read_tensors(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return file


def change_header(file: Path, change: Callable[[str], str]) -> Path:
    """Put another header text before the data of a safetensors file, whatever it claims; returns the file."""
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    text = change(raw[8:end].decode()).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    return file


def change_entry(file: Path, tensor: str, **members: Any) -> Path:
    """Let the header say something else of one tensor than is true; returns the file."""

    def lie(text: str) -> str:
        header = json.loads(text)
        header[tensor] |= members
        return json.dumps(header)

    return change_header(file, lie)
