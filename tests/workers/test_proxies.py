"""Proxies, each against its formula."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from service.contract.errors import BadInput
from service.contract.methods import Proxy
from workers.proxies import proxy_squares, proxy_statistic

SHAPES = [(7, 4), (4, 7), (5, 5), (1, 3), (3, 1)]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def formula(task_vector: Tensor, kind: Proxy, rank: int) -> Tensor:
    if kind == "task_vector":
        moment = task_vector.T @ task_vector
    elif kind == "covariance":
        centered = task_vector - task_vector.mean(dim=0)
        moment = centered.T @ centered
    else:
        right = torch.linalg.svd(task_vector, full_matrices=False).Vh[:rank]
        moment = right.T @ right
    trace = moment.trace()
    return moment / trace if trace > 0 else moment


@pytest.mark.parametrize("kind", get_args(Proxy))
@pytest.mark.parametrize("shape", SHAPES)
def test_a_proxy_is_its_formula(kind: Proxy, shape: tuple[int, int]) -> None:
    task_vector = drawn(*shape)
    statistic = proxy_statistic(task_vector, kind, rank=2)
    factor = statistic.held * statistic.scale
    assert statistic.rows == 1
    assert len(factor) <= shape[1]
    torch.testing.assert_close(factor.T @ factor, formula(task_vector, kind, 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", get_args(Proxy))
def test_a_task_vector_of_zeros_knows_nothing(kind: Proxy) -> None:
    statistic = proxy_statistic(torch.zeros(4, 3), kind)
    assert statistic.width == 3
    assert not statistic.held.any()


def test_a_subspace_has_no_more_directions_than_the_task_vector() -> None:
    statistic = proxy_statistic(drawn(6, 1) @ drawn(1, 5), "subspace", rank=4)
    assert statistic.held.shape == (1, 5)
    assert float(statistic.held.norm()) * statistic.scale == pytest.approx(1)


def test_squares_by_hand() -> None:
    statistic = proxy_squares(torch.tensor([1.0, -2.0]))
    assert (statistic.rows, statistic.held.tolist()) == (1, [1.0, 4.0])


def test_a_proxy_needs_a_matrix() -> None:
    with pytest.raises(BadInput):
        proxy_statistic(torch.zeros(4), "task_vector")
