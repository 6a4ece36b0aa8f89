"""How close a model's numbers come to the right ones, and how well they vary with them."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, rankdata, spearmanr
from sklearn.metrics import mean_squared_error
from torch import nn

from service.contract.errors import BadInput
from service.contract.metrics import Metric
from service.contract.samples import LABELS
from workers.forward import class_scores
from workers.measuring import Answers, KindRow, Measure, Rows, Samples, Setting, refuse_non_finite
from workers.metrics.classification import inputs_of

Floats = NDArray[np.float64]


def pairs(predictions: Floats, labels: Floats) -> Floats:
    """Per sample the number that the model gives and the right one, ``[n, 2]``."""
    return np.stack([predictions, labels], axis=1)


def pearson(both: Floats) -> float:
    """The linear correlation of ``[n, 2]``; NaN where either is constant."""
    return math.nan if _is_constant(both) else float(pearsonr(both[:, 0], both[:, 1]).statistic)


def pearsons(both: Floats, rows: Rows) -> Floats:
    """As ``pearson``, for many choices of rows."""
    return _correlations(both[:, 0][rows], both[:, 1][rows])


def spearman(both: Floats) -> float:
    """The correlation of the ranks of ``[n, 2]``, equal ones sharing theirs; NaN where either is constant."""
    return math.nan if _is_constant(both) else float(spearmanr(both[:, 0], both[:, 1]).statistic)


def spearmans(both: Floats, rows: Rows) -> Floats:
    """As ``spearman``, for many choices of rows."""
    return _correlations(rankdata(both[:, 0][rows], axis=1), rankdata(both[:, 1][rows], axis=1))


def mse(both: Floats) -> float:
    """The mean squared difference of ``[n, 2]``."""
    return float(mean_squared_error(both[:, 1], both[:, 0]))


def mses(both: Floats, rows: Rows) -> Floats:
    """As ``mse``, for many choices of rows."""
    return np.asarray(((both[:, 0] - both[:, 1]) ** 2)[rows].mean(1))


def gather(model: nn.Module, samples: Samples, setting: Setting) -> Answers:
    """The one number ``[n]`` per sample that the model's head gives.

    Raises:
        BadInput: the head gives several numbers per sample, or NaN or infinity.
        UnsupportedArchitecture: the model has no head that gives a row of numbers per sample.
    """
    numbers = class_scores(model, inputs_of(samples), setting.batch_size)
    if numbers.shape[1] != 1:
        raise BadInput(
            f"{setting.row.labeled}: regression needs a head that gives one number per sample, but that of task "
            f"{setting.row.task!r} gives {numbers.shape[1]}"
        )
    return Answers(refuse_non_finite(numbers[:, 0], setting).double().numpy(), samples[LABELS].double().numpy())


ROW = KindRow(
    gather,
    {
        Metric.PEARSON: Measure(pairs, pearson, pearsons),
        Metric.SPEARMAN: Measure(pairs, spearman, spearmans),
        Metric.MSE: Measure(pairs, mse, mses),
    },
    lambda _, samples: inputs_of(samples),
)


def _is_constant(both: Floats) -> bool:
    return bool((both == both[0]).all(0).any())


def _correlations(left: Floats, right: Floats) -> Floats:
    """The linear correlation of each row of ``left`` and ``right`` ``[B, n]``: ``[B]``; NaN where one is constant."""
    left, right = left - left.mean(1, keepdims=True), right - right.mean(1, keepdims=True)
    scale = np.sqrt((left**2).sum(1) * (right**2).sum(1))
    moved = (np.ptp(left, axis=1) > 0) & (np.ptp(right, axis=1) > 0)
    return np.where(moved, (left * right).sum(1) / np.where(moved, scale, 1), np.nan)
