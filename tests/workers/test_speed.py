"""Timing of models: how often a batch is run, not how fast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from workers import speed
from workers.speed import LEAST_RUNS, MOST_RUNS, run_times


class Counted(nn.Module):
    """Counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.runs = 0

    def forward(self, values: Tensor) -> Tensor:
        self.runs += 1
        return values * self.weight


@pytest.mark.parametrize(("seconds", "runs"), [(0.0, LEAST_RUNS), (1e9, MOST_RUNS)])
def test_the_first_run_does_not_count(monkeypatch: pytest.MonkeyPatch, seconds: float, runs: int) -> None:
    monkeypatch.setattr(speed, "RUN_SECONDS", seconds)
    model, seen = Counted(), list[None]()
    times = run_times(model, {"values": torch.ones(2, 3)}, lambda: seen.append(None))
    assert (len(times), len(seen), model.runs) == (runs, runs, runs + 1)
    assert min(times) > 0


def test_a_stop_between_runs_is_heard() -> None:
    def stop() -> None:
        raise InterruptedError

    model = Counted()
    with pytest.raises(InterruptedError):
        run_times(model, {"values": torch.ones(2, 3)}, stop)
    assert model.runs == 2
