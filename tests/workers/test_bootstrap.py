"""The bootstrap: the same resamples for every model of a task, and intervals as wide as theory has them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from workers import bootstrap
from workers.bootstrap import draws, figures, interval
from workers.measuring import Measure, mean_of_rows

MEAN = Measure(lambda values, _: values, lambda values: float(values.mean()), mean_of_rows)


def drawn(seed: int = 0, task: str = "cars", samples: int = 50, resamples: int = 30) -> list[list[int]]:
    return [row.tolist() for rows in draws(seed, task, samples, resamples) for row in rows]


def test_resamples_depend_on_seed_task_and_number_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn() == drawn()
    assert len(drawn()) == 30
    assert all(len(row) == 50 and min(row) >= 0 and max(row) < 50 for row in drawn())
    for other in (drawn(seed=1), drawn(task="pets"), drawn(samples=49)):
        assert other != drawn()
    assert drawn(resamples=10) == drawn()[:10]


def test_many_samples_are_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "CHUNK_ENTRIES", 100)
    pieces = [rows.shape for rows in draws(0, "cars", 50, 5)]
    assert pieces == [(2, 50), (2, 50), (1, 50)]
    assert [rows.shape for rows in draws(0, "cars", 1000, 2)] == [(1, 1000), (1, 1000)]


def test_the_interval_of_a_share_is_that_of_the_binomial() -> None:
    values = figures(MEAN, np.arange(400) < 300, 0, "cars", 4000)
    assert values[0] == 0.75
    deviation = math.sqrt(0.75 * 0.25 / 400)
    found = interval(values, 0.95)
    assert found is not None
    assert found[0] == pytest.approx(0.75 - 1.96 * deviation, abs=0.005)
    assert found[1] == pytest.approx(0.75 + 1.96 * deviation, abs=0.005)


def test_a_wider_confidence_has_a_wider_interval() -> None:
    values = figures(MEAN, np.arange(100) < 30, 0, "cars", 1000)
    narrow, wide = interval(values, 0.8), interval(values, 0.99)
    assert narrow is not None
    assert wide is not None
    assert wide[0] < narrow[0] < 0.3 < narrow[1] < wide[1]


def test_figures_that_mostly_can_not_be_computed_have_no_interval() -> None:
    assert interval(np.array([1.0, math.nan, math.nan, 1.0, 2.0]), 0.9) is None
    assert interval(np.array([1.0, math.nan, 1.0, 2.0]), 0.9) is not None
    assert interval(np.array([math.nan, 1.0, 1.0, 2.0]), 0.9) is None


def test_without_a_faster_way_every_resample_is_measured_alone() -> None:
    values = np.arange(20.0)
    slow = Measure(MEAN.contributions, MEAN.figure)
    np.testing.assert_allclose(figures(slow, values, 3, "cars", 50), figures(MEAN, values, 3, "cars", 50))
