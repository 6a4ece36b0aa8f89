"""How well a model tells classes apart: hits, F1, the ranking of its scores, and whether to believe its confidence."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import f1_score, recall_score, roc_auc_score
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_calibration_error

from service.contract.errors import BadInput
from service.contract.evaluation import FeatureHead
from service.contract.metrics import Metric
from service.contract.samples import LABELS
from workers.forward import class_scores, pooled_features
from workers.measuring import Answers, KindRow, Measure, Rows, Samples, Setting, mean_of_rows, refuse_non_finite

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
BINS = 15  # of confidence, as Guo et al., On Calibration of Modern Neural Networks, ICML 2017
LOGIT_SCALE = "logit_scale"


def hits(scores: Floats, labels: Integers) -> NDArray[np.bool_]:
    """Per sample whether the right class has the highest of its scores ``[n, classes]``; ``[n]``."""
    return np.asarray(scores.argmax(1) == labels)


def share(found: NDArray[np.bool_]) -> float:
    """The share of samples whose class was found."""
    return float(found.mean())


def labels_and_guesses(scores: Floats, labels: Integers) -> Integers:
    """Per sample the right class and the one with the highest score, ``[n, 2]``."""
    return np.stack([labels, scores.argmax(1)], axis=1)


def balanced_accuracy(pairs: Integers) -> float:
    """The mean over the classes that occur of the share of their samples found, of ``[n, 2]``."""
    labels, guesses = pairs.T
    return float(recall_score(labels, guesses, labels=np.unique(labels), average="macro"))


def balanced_accuracies(pairs: Integers, rows: Rows) -> Floats:
    """As ``balanced_accuracy``, for many choices of rows."""
    labeled, _guessed, found = _class_counts(pairs, rows)
    return _mean_where(found / np.maximum(labeled, 1), labeled > 0)


def macro_f1(pairs: Integers) -> float:
    """The mean of F1 over the classes that occur or are guessed, of ``[n, 2]``."""
    return float(f1_score(pairs[:, 0], pairs[:, 1], average="macro"))


def macro_f1s(pairs: Integers, rows: Rows) -> Floats:
    """As ``macro_f1``, for many choices of rows."""
    labeled, guessed, found = _class_counts(pairs, rows)
    either = labeled + guessed
    return _mean_where(2 * found / np.maximum(either, 1), either > 0)


def labels_and_ranks(scores: Floats, labels: Integers) -> NDArray[np.int32]:
    """Per sample the right class and, per class, the rank of its probability among all samples', ``[n, 1 + classes]``.

    A curve of true against false positives depends on nothing else. Equal probabilities have equal ranks.
    """
    probabilities = _softmax(scores)
    ranks = [np.unique(column, return_inverse=True)[1] for column in probabilities.T]
    return np.stack([labels, *ranks], axis=1).astype(np.int32)


def auroc(ranked: NDArray[np.int32]) -> float:
    """The area under the ROC curve of each class against the rest, mean over the classes that have both."""
    labels = ranked[:, 0]
    present = [label for label in np.unique(labels) if (labels != label).any()]
    areas = [roc_auc_score(labels == label, ranked[:, 1 + label]) for label in present]
    return float(np.mean(areas)) if areas else math.nan


def aurocs(ranked: NDArray[np.int32], rows: Rows) -> Floats:
    """As ``auroc``, for many choices of rows: a class's samples are ordered once, and choices weigh them."""
    weights = np.stack([np.bincount(chosen, minlength=len(ranked)) for chosen in rows], axis=1).astype(np.int32)
    areas = [_areas(ranked[:, 1 + label], ranked[:, 0] == label, weights) for label in np.unique(ranked[:, 0])]
    stacked = np.stack(areas, axis=1)
    return _mean_where(np.nan_to_num(stacked), np.isfinite(stacked))


def confidences(scores: Floats, labels: Integers) -> Floats:
    """Per sample the highest probability, and 1 where that is the right class's, else 0; ``[n, 2]``."""
    return np.stack([_softmax(scores).max(1), scores.argmax(1) == labels], axis=1)


def calibration_error(confident: Floats) -> float:
    """The mean gap between confidence and accuracy over bins of confidence of equal width, of ``[n, 2]``."""
    confidence, right = torch.from_numpy(confident.T.copy())
    return float(binary_calibration_error(confidence, right.long(), n_bins=BINS, validate_args=False))


def calibration_errors(confident: Floats, rows: Rows) -> Floats:
    """As ``calibration_error``, for many choices of rows."""
    bins = np.searchsorted(np.linspace(0, 1, BINS + 1), confident[:, 0], side="right") - 1
    gaps = confident[:, 0] - confident[:, 1]
    sums = np.stack([np.bincount(bins[row], weights=gaps[row], minlength=BINS + 1) for row in rows])
    return np.asarray(np.abs(sums).sum(1) / rows.shape[1])


def gather(model: nn.Module, samples: Samples, setting: Setting) -> Answers:
    """The scores ``[n, classes]`` of the model's own head, or of a head matrix on its pooled features.

    Raises:
        BadInput: labels that the head has no class for, a head matrix of another width than the features, or scores
            that are NaN or infinite.
        UnsupportedArchitecture: the model has no head that scores classes.
    """
    inputs, row = inputs_of(samples), setting.row
    if row.head is None:
        scores = class_scores(model, inputs, setting.batch_size)
    else:
        scores = head_scores(model, inputs, setting.batch_size, row.head, setting.head)
    labels = samples[LABELS].long()
    _refuse_labels(labels, scores.shape[1], setting)
    return Answers(refuse_non_finite(scores, setting).double().numpy(), labels.numpy())


def inputs_of(samples: Samples) -> dict[str, Tensor]:
    """The model's inputs: all but the labels."""
    return {name: values for name, values in samples.items() if name != LABELS}


ROW = KindRow(
    gather,
    {
        Metric.ACCURACY: Measure(hits, share, mean_of_rows),
        Metric.BALANCED_ACCURACY: Measure(labels_and_guesses, balanced_accuracy, balanced_accuracies),
        Metric.MACRO_F1: Measure(labels_and_guesses, macro_f1, macro_f1s),
        Metric.AUROC: Measure(labels_and_ranks, auroc, aurocs),
        Metric.CALIBRATION_ERROR: Measure(confidences, calibration_error, calibration_errors),
    },
    lambda _, samples: inputs_of(samples),
)


def head_scores(
    model: nn.Module, inputs: Mapping[str, Tensor], batch_size: int, row: FeatureHead, head: Samples
) -> Tensor:
    """Pooled features [n, d] times the head's rows [classes, d], times exp(logit_scale) where there is one.

    Raises:
        BadInput: the head is of another width than the features.
        UnsupportedArchitecture: the model gives no features.
    """
    features = pooled_features(model, inputs, batch_size, row.pooling, row.normalize)
    weight = head["weight"].float()
    if features.shape[1] != weight.shape[1]:
        raise BadInput(
            f"{row.weight}: 'weight' takes {weight.shape[1]} features, but the model has {features.shape[1]}"
        )
    scores = features @ weight.T
    return scores * head[LOGIT_SCALE].float().exp() if LOGIT_SCALE in head else scores


def _refuse_labels(labels: Tensor, classes: int, setting: Setting) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise BadInput(
            f"{setting.row.labeled}: labels reach from {low} to {high}, but the head of task {setting.row.task!r} has "
            f"{classes} classes, 0 to {classes - 1}"
        )


def _softmax(scores: Floats) -> Floats:
    shifted = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(shifted / shifted.sum(1, keepdims=True))


def _class_counts(pairs: Integers, rows: Rows) -> tuple[Floats, Floats, Floats]:
    """Per choice of rows and class: samples labeled with it, guessed to be it, and both; each ``[B, classes]``."""
    classes = int(pairs.max()) + 1
    labels, guesses = pairs[:, 0][rows], pairs[:, 1][rows]
    found = np.where(labels == guesses, labels, classes)
    labeled, guessed, both = (_counts(values, classes + 1)[:, :classes] for values in (labels, guesses, found))
    return labeled, guessed, both


def _counts(values: Integers, size: int) -> Floats:
    """How often each of 0 to ``size - 1`` occurs in each row of ``values [B, n]``: ``[B, size]``."""
    apart = values + size * np.arange(len(values))[:, None]
    return np.bincount(apart.ravel(), minlength=size * len(values)).reshape(len(values), size).astype(np.float64)


def _mean_where(values: Floats, counted: NDArray[np.bool_]) -> Floats:
    """The mean of the counted values of each row; NaN where none counts."""
    count = counted.sum(1)
    return np.where(count > 0, (values * counted).sum(1) / np.maximum(count, 1), np.nan)


def _areas(ranks: NDArray[np.int32], positive: NDArray[np.bool_], weights: NDArray[np.int32]) -> Floats:
    """The areas under one class's ROC curve where samples count ``weights [n, B]`` times: ``[B]``.

    The area is the chance that a positive is ranked above a negative, half of ties counted (Mann and Whitney): of
    what a positive is above, positives themselves are half of all pairs of them.
    """
    order = np.argsort(ranks, kind="stable")
    below = np.zeros((len(ranks) + 1, weights.shape[1]), np.int32)
    np.cumsum(weights[order], axis=0, dtype=np.int32, out=below[1:])
    ordered, chosen = ranks[order], ranks[positive]
    ends = [np.searchsorted(ordered, chosen, side=side) for side in ("left", "right")]
    reached = below[ends[0]].astype(np.float64) + below[ends[1]]
    positives = weights[positive].sum(0, dtype=np.float64)
    above = (weights[positive] * reached).sum(0) / 2 - positives**2 / 2
    pairs = positives * (below[-1] - positives)
    return np.where(pairs > 0, above / np.maximum(pairs, 1), np.nan)
