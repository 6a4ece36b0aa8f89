"""How sure a measured figure is: the same figure on many resamples of the same samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.measuring import Measure, Rows

CHUNK_ENTRIES = 1 << 21  # indices that are drawn at once
Figures = NDArray[np.float64]


def draws(seed: int, task: str, samples: int, resamples: int) -> Iterator[Rows]:
    """Choices of rows, with replacement, ``[b, samples]`` at a time until ``resamples`` are drawn.

    They depend on the arguments alone: every model of a task is measured on the same ones, so that the differences
    and ratios of two models' figures are those of pairs.
    Efron, Bootstrap Methods: Another Look at the Jackknife, 1979.
    """
    key = hashlib.sha256(f"{seed}:{samples}:{task}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(int.from_bytes(key[:16], "little")))
    step = max(1, CHUNK_ENTRIES // samples)
    for first in range(0, resamples, step):
        yield generator.integers(0, samples, (min(step, resamples - first), samples))


def figures(measure: Measure, contributions: NDArray[Any], seed: int, task: str, resamples: int) -> Figures:
    """A metric's figure on all samples, and then on each resample: ``[1 + resamples]``."""
    choices = draws(seed, task, len(contributions), resamples)
    return np.concatenate(
        [[measure.figure(contributions)], *(measure.figures(contributions, rows) for rows in choices)]
    )


def interval(values: Figures, confidence: float) -> list[float] | None:
    """The percentile interval of ``figures``'s resamples; None where most of them have no figure."""
    resampled = values[1:]
    finite = resampled[np.isfinite(resampled)]
    if not np.isfinite(values[0]) or 2 * len(finite) <= len(resampled):
        return None
    low, high = np.quantile(finite, [(1 - confidence) / 2, (1 + confidence) / 2])
    return [float(low), float(high)]
