"""Metrics of classification and regression: answers worked out by hand, and resamples as the libraries have them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from torchmetrics.functional.classification import multiclass_calibration_error

from service.contract.metrics import METRICS, Kind, Metric, metrics_of
from workers.bootstrap import figures
from workers.metrics import KINDS

MEASURES = {**KINDS[Kind.CLASSIFICATION].measures, **KINDS[Kind.REGRESSION].measures}


def figure(metric: Metric, predictions: NDArray[np.float64], labels: NDArray[Any]) -> float:
    return MEASURES[metric].figure(MEASURES[metric].contributions(predictions, labels))


def guesses(*classes: int) -> NDArray[np.float64]:
    return np.eye(3)[list(classes)]


def test_every_kind_measures_what_the_contract_says() -> None:
    assert set(KINDS) == set(Kind)
    for kind, row in KINDS.items():
        assert set(row.measures) == set(metrics_of(kind))
    assert {metric for kind in Kind for metric in metrics_of(kind)} == set(METRICS)


def test_classes_by_hand() -> None:
    scores, labels = guesses(0, 0, 1, 2, 2), np.array([0, 0, 0, 1, 2])
    assert figure(Metric.ACCURACY, scores, labels) == pytest.approx(3 / 5)
    assert figure(Metric.BALANCED_ACCURACY, scores, labels) == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert figure(Metric.MACRO_F1, scores, labels) == pytest.approx((4 / 5 + 0 + 2 / 3) / 3)


def test_a_guess_of_a_class_that_does_not_occur_is_a_miss() -> None:
    scores, labels = guesses(0, 2), np.array([0, 1])
    assert figure(Metric.BALANCED_ACCURACY, scores, labels) == pytest.approx(1 / 2)
    assert figure(Metric.MACRO_F1, scores, labels) == pytest.approx(1 / 3)


def test_area_by_hand() -> None:
    """Of the four pairs of a positive and a negative, two are in order, one is a tie, one is wrong."""
    margin = np.array([0.1, 0.4, 0.4, 0.5])
    scores = np.stack([np.zeros(4), margin], axis=1)
    assert figure(Metric.AUROC, scores, np.array([0, 1, 0, 1])) == pytest.approx(3.5 / 4)
    assert math.isnan(figure(Metric.AUROC, scores, np.zeros(4, np.int64)))


def test_area_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    scores, labels = generator.normal(size=(200, 4)), generator.integers(0, 4, 200)
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    expected = roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    assert figure(Metric.AUROC, scores, labels) == pytest.approx(expected)


def test_calibration_by_hand() -> None:
    """Two samples of confidence 0.75, one of them right; one of 0.5, right."""
    scores = np.log(np.array([[0.75, 0.25], [0.75, 0.25], [0.5, 0.5]]))
    labels = np.array([0, 1, 0])
    assert figure(Metric.CALIBRATION_ERROR, scores, labels) == pytest.approx((2 * 0.25 + 0.5) / 3)
    sure = np.array([[1000.0, 0.0], [1000.0, 0.0]])
    assert figure(Metric.CALIBRATION_ERROR, sure, np.array([0, 1])) == pytest.approx(0.5)


def test_calibration_is_that_of_torchmetrics() -> None:
    generator = np.random.default_rng(1)
    scores, labels = 2 * generator.normal(size=(300, 5)), generator.integers(0, 5, 300)
    expected = multiclass_calibration_error(torch.from_numpy(scores).softmax(1), torch.from_numpy(labels), 5, 15)
    assert figure(Metric.CALIBRATION_ERROR, scores, labels) == pytest.approx(float(expected))


def test_numbers_by_hand() -> None:
    predicted, labels = np.array([1.0, 2.0, 3.0, 10.0]), np.array([2.0, 4.0, 6.0, 7.0])
    assert figure(Metric.SPEARMAN, predicted, labels) == pytest.approx(1.0)
    assert figure(Metric.MSE, predicted, labels) == pytest.approx((1 + 4 + 9 + 9) / 4)
    assert figure(Metric.PEARSON, predicted, 3 - 2 * predicted) == pytest.approx(-1.0)
    for metric in (Metric.PEARSON, Metric.SPEARMAN):
        assert math.isnan(figure(metric, np.ones(4), labels))
        assert math.isnan(figure(metric, predicted, np.ones(4)))


@pytest.mark.parametrize("samples", [7, 120])
@pytest.mark.parametrize("metric", MEASURES)
def test_resamples_are_what_the_metric_itself_says_of_them(metric: Metric, samples: int) -> None:
    """Small samples leave classes out and ties in."""
    generator = np.random.default_rng(2)
    labels = generator.integers(0, 3, samples)
    scores = generator.normal(size=(samples, 3)).round(1)
    if METRICS[metric].kinds == (Kind.REGRESSION,):
        scores = scores[:, 0]
    measure = MEASURES[metric]
    assert measure.resampled is not None
    contributions = measure.contributions(scores, labels)
    fast = figures(measure, contributions, 0, "cars", 100)
    np.testing.assert_allclose(
        fast, figures(replace(measure, resampled=None), contributions, 0, "cars", 100), atol=1e-12
    )
    assert np.ptp(fast[np.isfinite(fast)]) > 0


def test_balanced_accuracy_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(3)
    scores, labels = generator.normal(size=(90, 3)), generator.integers(0, 3, 90)
    expected = balanced_accuracy_score(labels, scores.argmax(1))
    assert figure(Metric.BALANCED_ACCURACY, scores, labels) == pytest.approx(expected)
