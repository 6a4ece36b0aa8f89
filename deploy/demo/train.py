"""Trains the demo's checkpoints: one small vision transformer, and four fine-tuned from it on tasks that conflict.

    python deploy/demo/train.py [--out DIR]

Everything is drawn from one seed and computed by one thread, so that a second run writes the same bytes on the same
machine and library versions. The tasks were fixed before any merged model was looked at; they conflict in what they
see (plain, turned, inverted, mirrored) and in what they name (digits, pairs of digits, parity).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Generator, Tensor
from transformers import ViTConfig, ViTForImageClassification

SEED = 20250
SPLITS = (1097, 350, 350)  # train, validation, test: the same images for the base and for every task
EXEMPLARS = 16
BATCH = 64


@dataclass(frozen=True)
class View:
    """A way to look at an image: mirrored left to right, then turned counterclockwise, then light and dark swapped."""

    mirrored: bool = False
    turns: int = 0
    inverted: bool = False

    def of(self, images: Tensor) -> Tensor:
        """``images`` ``[n, 8, 8]`` in 0..1, seen this way."""
        seen = torch.rot90(images.flip(2) if self.mirrored else images, self.turns, (1, 2))
        return 1 - seen if self.inverted else seen

    def __str__(self) -> str:
        said = ("mirrored",) * self.mirrored + (f"turned {90 * self.turns}",) * (self.turns > 0)
        return ", ".join(said + ("inverted",) * self.inverted) or "plain"


@dataclass(frozen=True)
class Task:
    """Which view of the images a task sees, and which class each digit belongs to."""

    name: str
    view: View
    classes: tuple[str, ...]
    class_of_digit: tuple[int, ...]


DIGITS = tuple(str(digit) for digit in range(10))
LOOPS = ("no loop", "one loop", "two loops")
LOOPS_OF_DIGIT = (1, 0, 0, 0, 1, 0, 1, 0, 2, 1)  # as the digit is printed; a written four is often open
VIEWS = tuple(View(*way) for way in product((False, True), range(4), (False, True)))
BASE_CLASSES = tuple(f"{loops}, {view}" for view in VIEWS for loops in LOOPS)
TASKS = (
    Task("digits", View(), DIGITS, tuple(range(10))),
    Task("rotated", View(turns=1), DIGITS, tuple(range(10))),
    Task(
        "inverted",
        View(inverted=True),
        tuple(f"{d} or {d + 1}" for d in range(0, 10, 2)),
        (0, 0, 1, 1, 2, 2, 3, 3, 4, 4),
    ),
    Task("mirrored", View(mirrored=True), ("even", "odd"), (0, 1) * 5),
)


@dataclass(frozen=True)
class Samples:
    """``pixels`` ``[n, 1, 8, 8]`` float32 in 0..1 and ``labels`` ``[n]`` int64."""

    pixels: Tensor
    labels: Tensor

    def at(self, rows: Tensor) -> Samples:
        """The samples at ``rows``, in that order."""
        return Samples(self.pixels[rows].contiguous(), self.labels[rows].contiguous())


@dataclass(frozen=True)
class Schedule:
    """How long and how hard to train; the rates are the peaks of a one-cycle schedule."""

    epochs: int
    body_rate: float
    head_rate: float


PRETRAINING = Schedule(epochs=200, body_rate=1e-3, head_rate=1e-3)
# Gentle for the body, quick for the head: a head that fits soon leaves the body with less to change.
FINE_TUNING = Schedule(epochs=20, body_rate=5e-4, head_rate=5e-3)


def read_digits() -> tuple[Tensor, Tensor]:
    """The 1797 images ``[n, 8, 8]`` float32 in 0..1, and their digits ``[n]`` int64."""
    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target, dtype=torch.int64)


def split_rows(count: int) -> tuple[Tensor, ...]:
    """Row numbers of the train, validation and test images."""
    return torch.split(torch.randperm(count, generator=Generator().manual_seed(SEED)), list(SPLITS))


def samples_of(task: Task, images: Tensor, digits: Tensor) -> Samples:
    """All images as ``task`` sees and labels them."""
    return Samples(task.view.of(images).unsqueeze(1), torch.tensor(task.class_of_digit)[digits])


def new_model(classes: tuple[str, ...]) -> ViTForImageClassification:
    """An untrained model of about 300,000 parameters with one output a class."""
    torch.manual_seed(SEED)  # transformers draws initial weights from torch's global generator
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=192,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        encoder_stride=2,
        pooler_output_size=96,
        id2label=dict(enumerate(classes)),
        label2id={name: index for index, name in enumerate(classes)},
    )
    return ViTForImageClassification(config)


def batches(samples: Samples, generator: Generator) -> Iterator[Samples]:
    """``samples`` in a new order, a batch at a time."""
    order = torch.randperm(len(samples.labels), generator=generator)
    return (samples.at(rows) for rows in torch.split(order, BATCH))


def fit(
    model: ViTForImageClassification, epoch: Callable[[Generator], Samples], schedule: Schedule
) -> ViTForImageClassification:
    """Train ``model`` in place on what ``epoch`` draws, and return it."""
    generator = Generator().manual_seed(SEED)
    rates = [schedule.body_rate, schedule.head_rate]
    groups = [{"params": list(part.parameters())} for part in (model.vit, model.classifier)]
    optimizer = torch.optim.AdamW(groups, lr=schedule.body_rate, weight_decay=0.01)
    steps = schedule.epochs * -(-SPLITS[0] // BATCH)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rates, total_steps=steps)
    model.train()
    for _ in range(schedule.epochs):
        for batch in batches(epoch(generator), generator):
            optimizer.zero_grad()
            model(pixel_values=batch.pixels, labels=batch.labels).loss.backward()
            optimizer.step()
            one_cycle.step()
    model.train(False)
    return model


@torch.no_grad()
def accuracy(model: ViTForImageClassification, samples: Samples) -> float:
    """Share of ``samples`` that ``model`` classifies rightly."""
    right = model(pixel_values=samples.pixels).logits.argmax(1) == samples.labels
    return float(right.double().mean())


def every_view(images: Tensor, digits: Tensor) -> Samples:
    """Each image ``[n, 8, 8]`` in all sixteen views, view by view, labeled as the base labels it."""
    loops = torch.tensor(LOOPS_OF_DIGIT)[digits]
    labels = torch.cat([len(LOOPS) * view + loops for view in range(len(VIEWS))])
    return Samples(torch.cat([view.of(images) for view in VIEWS]).unsqueeze(1), labels)


def train_base(seen: Samples) -> ViTForImageClassification:
    """The common ancestor, trained on ``every_view``: an epoch shows it each image once, in a view drawn at random."""
    count = len(seen.labels) // len(VIEWS)

    def epoch(generator: Generator) -> Samples:
        views = torch.randint(len(VIEWS), (count,), generator=generator)
        return seen.at(views * count + torch.arange(count))

    return fit(new_model(BASE_CLASSES), epoch, PRETRAINING)


def train_expert(task: Task, base: ViTForImageClassification, samples: Samples) -> ViTForImageClassification:
    """``base``'s body with a new head, fine-tuned on one task."""
    model = new_model(task.classes)
    model.vit.load_state_dict(base.vit.state_dict())
    return fit(model, lambda _: samples, FINE_TUNING)


def save_samples(folder: Path, samples: Samples, rows: tuple[Tensor, ...]) -> None:
    """Write the exemplars (unlabeled, from the training images) and the validation and test samples."""
    train, validation, test = rows
    save_file({"pixel_values": samples.at(train[:EXEMPLARS]).pixels}, folder / "exemplars.safetensors")
    for name, chosen in (("val", samples.at(validation)), ("test", samples.at(test))):
        save_file({"pixel_values": chosen.pixels, "labels": chosen.labels}, folder / f"{name}.safetensors")


def make_base(out: Path, images: Tensor, digits: Tensor, rows: tuple[Tensor, ...]) -> ViTForImageClassification:
    """Train and save the base, and print its row of the README's table."""
    train, validation, test = (every_view(images[chosen], digits[chosen]) for chosen in rows)
    base = train_base(train)
    base.save_pretrained(out / "base")
    report("base", base, validation, test)
    return base


def make_expert(
    task: Task, base: ViTForImageClassification, samples: Samples, rows: tuple[Tensor, ...], out: Path
) -> None:
    """Train and save one task's expert and samples, and print its row of the README's table."""
    expert = train_expert(task, base, samples.at(rows[0]))
    expert.save_pretrained(out / "tasks" / task.name)
    save_samples(out / "tasks" / task.name, samples, rows)
    report(task.name, expert, samples.at(rows[1]), samples.at(rows[2]))


def report(name: str, model: ViTForImageClassification, validation: Samples, test: Samples) -> None:
    """Print one row of the README's table."""
    scores = f"{accuracy(model, validation):.3f} | {accuracy(model, test):.3f}"
    print(f"| {name} | {model.config.num_labels} | {scores} |", flush=True)


def main() -> None:
    """Train everything and write it under ``--out``, which is this file's folder unless said otherwise."""
    parser = argparse.ArgumentParser(description="Train the demo's checkpoints.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    images, digits = read_digits()
    rows = split_rows(len(images))
    base = make_base(out, images, digits, rows)
    for task in TASKS:
        make_expert(task, base, samples_of(task, images, digits), rows, out)


if __name__ == "__main__":
    main()
