"""Sums of rows that stream by, against the plain product of all of them."""

import pytest
import torch
from torch import Tensor

from service.contract.errors import BadInput
from workers.row_sums import RowSum


def summed(x: Tensor, size: int) -> RowSum:
    found = RowSum()
    for part in torch.split(x, size):
        found = found.add(part)
    return found


@pytest.mark.parametrize(("rows", "width"), [(3, 8), (8, 8), (9, 8), (40, 8), (900, 500)])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_factor_has_the_second_moment_of_all_rows(rows: int, width: int, size: int) -> None:
    if rows == 900 and size == 1:
        size = 300
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -4, width)
    statistic = summed(x, size).statistic()
    assert statistic.rows == rows
    assert statistic.factor is not None
    assert statistic.factor.shape == (min(rows, width), width)
    assert statistic.factor.dtype is torch.float32
    expected, found = x.double().T @ x.double(), statistic.factor.double().T @ statistic.factor.double()
    assert float((found - expected).abs().max()) < 3e-7 * float(expected.abs().max())


def test_inputs_that_span_less_than_all_directions() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    x = x - x.mean(1, keepdim=True)
    x[:, 3] = 0
    for given in (x, torch.zeros(50, 6), x * 1e-20):
        factor = summed(given, 9).statistic().held.double()
        expected = given.double().T @ given.double()
        assert float((factor.T @ factor - expected).abs().max()) <= 3e-7 * float(expected.abs().max())


def test_what_was_added_does_not_change_when_its_tensor_does_and_sums_stay_as_they_are() -> None:
    x = torch.ones(2, 4)
    few = RowSum().add(x)
    more = few.add(torch.ones(5, 4))
    x.zero_()
    again = few.add(torch.ones(5, 4) * 2)
    assert few.statistic().held.equal(torch.ones(2, 4))
    for statistic, each in ((more.statistic(), 7.0), (again.statistic(), 22.0)):
        torch.testing.assert_close(statistic.held.T @ statistic.held, torch.full((4, 4), each))


@pytest.mark.parametrize("x", [torch.zeros(3), torch.zeros(2, 5)])
def test_what_does_not_continue_is_refused(x: Tensor) -> None:
    with pytest.raises(BadInput, match="don't continue"):
        RowSum().add(torch.zeros(1, 4)).add(x)
