"""What one model scores on one task, as a small file: each metric's figure and those of its resamples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from safetensors.numpy import load, save

from service.contract.metrics import Metric
from service.stores.objects import Objects, failures
from workers.bootstrap import Figures

LIMIT_BYTES = 64 << 20
SAMPLES = "samples"


@dataclass(frozen=True, eq=False)
class ModelScores:
    """Figures ``[1 + B]`` by metric, the point first, and over how many samples."""

    samples: int
    figures: Mapping[Metric, Figures]


def to_bytes(scores: ModelScores) -> bytes:
    """The scores as a safetensors file; the same scores give the same bytes."""
    tensors = {metric.value: np.ascontiguousarray(values, np.float64) for metric, values in scores.figures.items()}
    return save({**tensors, SAMPLES: np.array([scores.samples], np.int64)})


def from_bytes(data: bytes) -> ModelScores:
    """The scores of a file that ``to_bytes`` made."""
    tensors = load(data)  # in another order in every process
    (samples,) = tensors.pop(SAMPLES)
    return ModelScores(int(samples), {metric: tensors[metric.value] for metric in Metric if metric.value in tensors})


def read_scores(objects: Objects, address: str) -> ModelScores:
    """The scores that lie at an address. Raises InputMissing, StorageFailure."""
    with failures():
        return from_bytes(objects.read_all(address, LIMIT_BYTES))


def write_scores(objects: Objects, address: str, scores: ModelScores) -> None:
    """Put the scores at an address. Raises StorageFailure."""
    with failures():
        objects.put(address, to_bytes(scores), "application/octet-stream")
