"""Statistics stream: whatever the batches, the second moment is that of all rows together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.contract.errors import BadInput
from workers.statistics import Statistic, observe_indices, observe_rows, observe_squares, stack_statistics


def rows(n: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def second_moment(statistic: Statistic) -> Tensor:
    factor = statistic.held.double()
    return factor.T @ factor


@settings(deadline=None)  # the first call of a process loads libraries
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 6), st.integers(0, 99))
def test_a_factor_does_not_depend_on_the_batches(sizes: list[int], width: int, seed: int) -> None:
    x = rows(sum(sizes), width, seed)
    statistic: Statistic | None = None
    for batch in torch.split(x, sizes):
        statistic = observe_rows(batch, statistic)
    assert statistic is not None
    assert statistic.rows == len(x)
    assert len(statistic.held) <= min(len(x), width)
    torch.testing.assert_close(second_moment(statistic), x.T @ x, rtol=1e-12, atol=1e-12)


def test_few_rows_are_kept_as_they_are() -> None:
    x = rows(3, 5)
    assert torch.equal(observe_rows(x[2:], observe_rows(x[:2])).held, x)


def test_many_rows_become_a_triangle() -> None:
    factor = observe_rows(rows(20, 4)).held
    assert factor.shape == (4, 4)
    assert torch.equal(factor, factor.triu())


def test_inputs_are_copied_and_halves_widened() -> None:
    x = rows(2, 3, dtype=torch.bfloat16)
    statistic = observe_rows(x)
    x.zero_()
    assert statistic.held.dtype == torch.float32
    assert bool((statistic.held != 0).all())


def test_squares_by_hand() -> None:
    statistic = observe_squares(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    statistic = observe_squares(torch.tensor([[0.0, 1.0]]), statistic)
    assert (statistic.rows, statistic.held.tolist()) == (3, [10.0, 5.0])


def test_indices_by_hand() -> None:
    statistic = observe_indices(torch.tensor([2, 0, 1]), 3)
    statistic = observe_indices(torch.tensor([0, 0, 4]), 4, statistic)
    assert (statistic.rows, statistic.held.tolist(), statistic.width) == (7, [2.0, 0.0, 5.0], 3)


@pytest.mark.parametrize(
    ("factor", "diagonal", "count"),
    [
        (None, None, 1),
        (torch.ones(1, 2), torch.ones(2), 1),
        (torch.ones(2), None, 1),
        (None, torch.ones(1, 2), 1),
        (torch.ones(1, 2), None, -1),
    ],
)
def test_a_statistic_has_one_form(factor: Tensor | None, diagonal: Tensor | None, count: int) -> None:
    with pytest.raises(BadInput):
        Statistic(rows=count, factor=factor, diagonal=diagonal)


def test_a_batch_that_does_not_fit_is_refused() -> None:
    for statistic in (observe_rows(rows(2, 3)), observe_squares(rows(2, 4))):
        with pytest.raises(BadInput):
            observe_rows(rows(2, 4), statistic)
    for statistic in (observe_rows(rows(2, 3)), observe_squares(rows(2, 4))):
        with pytest.raises(BadInput):
            observe_squares(rows(2, 3), statistic)
    for observe in (observe_rows, observe_squares):
        with pytest.raises(BadInput):
            observe(torch.ones(3), None)


def test_a_scale_is_a_factor_on_the_factor() -> None:
    rows = torch.arange(15.0).reshape(3, 5)
    stacked = stack_statistics([Statistic(rows=1, factor=rows, scale=0.5), None])
    assert stacked is not None
    assert torch.equal(stacked.block(0).held, 0.5 * rows)
    assert (stacked.scale, stacked.block_rows) == (1.0, (1, 0))
