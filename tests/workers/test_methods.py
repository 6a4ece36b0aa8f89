"""Every merge method: properties that all rows share, and each against a plain formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from service.contract.methods import METHODS as ROWS
from service.contract.methods import AnyMethod, Average, Cat, TaskArithmetic, Ties
from workers.methods import METHODS, merge

WEIGHTS = [1.0, 0.5, 2.0]
every_row = pytest.mark.parametrize("name", sorted(ROWS))


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in WEIGHTS]


def row(name: str, **parameters: Any) -> AnyMethod:
    return ROWS[name](**parameters)


def test_every_row_has_a_function_and_every_function_a_row() -> None:
    assert {r.combines for r in ROWS.values()} == set(METHODS)
    assert all(name == r().name for name, r in ROWS.items())


@every_row
@pytest.mark.parametrize("shape", [(), (1,), (5,), (4, 6), (2, 3, 2, 2), (0, 3)])
def test_shape_type_and_inputs_are_kept(name: str, shape: tuple[int, ...]) -> None:
    task_vectors = drawn(*shape)
    before = [t.clone() for t in task_vectors]
    merged = merge(task_vectors, WEIGHTS, row(name))
    assert (merged.shape, merged.dtype) == (shape, torch.float32)
    assert bool(merged.isfinite().all())
    assert all(torch.equal(a, b) for a, b in zip(task_vectors, before, strict=True))


@every_row
def test_zeros_in_zeros_out(name: str) -> None:
    assert not merge([torch.zeros(3, 4)] * 3, WEIGHTS, row(name)).any()


@every_row
def test_the_same_twice(name: str) -> None:
    assert torch.equal(merge(drawn(8, 9), WEIGHTS, row(name)), merge(drawn(8, 9), WEIGHTS, row(name)))


@every_row
def test_the_order_of_tasks_does_not_matter(name: str) -> None:
    params = row(name)
    if params.any_order:
        task_vectors = drawn(8, 9)
        turned = merge(task_vectors[::-1], WEIGHTS[::-1], params)
        torch.testing.assert_close(turned, merge(task_vectors, WEIGHTS, params), rtol=1e-5, atol=1e-6)


@every_row
def test_a_task_of_weight_zero_has_no_say(name: str) -> None:
    task_vectors = drawn(8, 9)
    without = merge(task_vectors[:2], WEIGHTS[:2], row(name))
    torch.testing.assert_close(merge(task_vectors, [*WEIGHTS[:2], 0.0], row(name)), without, rtol=1e-6, atol=0)


@every_row
def test_one_task_alone(name: str) -> None:
    (only,) = drawn(4, 5)[:1]
    params = row(name)
    merged = merge([only], [1.0], params)
    expected = only * (0.4 if isinstance(params, Cat | TaskArithmetic) else 1.0)
    torch.testing.assert_close(merged[merged != 0], expected[merged != 0], rtol=1e-6, atol=0)
    assert bool(merged.any())


@every_row
def test_a_transposed_view_gives_the_transposed_update(name: str) -> None:
    task_vectors = drawn(6, 4)
    across = merge([t.T for t in task_vectors], WEIGHTS, row(name))
    torch.testing.assert_close(across.T, merge(task_vectors, WEIGHTS, row(name)))


def test_task_arithmetic_by_hand() -> None:
    task_vectors = [torch.tensor([[1.0, 2.0], [0.0, -4.0]]), torch.tensor([[2.0, 0.0], [6.0, 4.0]])]
    for params in (TaskArithmetic(scaling=0.5), Cat(scaling=0.5)):
        assert merge(task_vectors, [1.0, 0.5], params).tolist() == [[1.0, 1.0], [1.5, -1.0]]


def test_average_by_hand() -> None:
    task_vectors = [torch.tensor([[4.0, 0.0], [0.0, -4.0]]), torch.tensor([[0.0, 8.0], [4.0, 4.0]])]
    assert merge(task_vectors, [3.0, 1.0], Average()).tolist() == [[3.0, 2.0], [1.0, -2.0]]


def test_ties_by_hand() -> None:
    # Kept at density 0.5: [6, 0, -3, 0], [-4, 2, 0, 0], [0, 2, -1, 0]; the sum elects the signs +, +, -.
    task_vectors = [torch.tensor([6.0, 1.0, -3.0, 0.5]), torch.tensor([-4.0, 2.0, 1.0, 0.0])]
    task_vectors.append(torch.tensor([0.0, 2.0, -1.0, -0.5]))
    assert merge(task_vectors, [1.0] * 3, Ties(density=0.5)).tolist() == [6.0, 2.0, -2.0, 0.0]
    # With weights 1, 2, 1 the second task outvotes the first: 6 - 8 < 0.
    assert merge(task_vectors, [1.0, 2.0, 1.0], Ties(density=0.5, scaling=0.5)).tolist() == [-2.0, 1.0, -1.0, 0.0]


def test_ties_that_cancel_elect_no_sign() -> None:
    assert merge([torch.tensor([1.0]), torch.tensor([-1.0])], [1.0, 1.0], Ties()).tolist() == [0.0]


def test_ties_among_equals_keeps_the_lower_index() -> None:
    merged = merge([torch.tensor([1.0, -1.0, 2.0, 1.0, -1.0])], [1.0], Ties(density=0.6))
    assert merged.tolist() == [1.0, -1.0, 2.0, 0.0, 0.0]


def plain_ties(task_vectors: Sequence[Tensor], weights: Sequence[float], density: float, scaling: float) -> list[float]:
    kept = []
    for task_vector in task_vectors:
        values = task_vector.flatten().tolist()
        order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
        best = set(order[: max(1, math.floor(density * len(values) + 0.5))])
        kept.append([v if i in best else 0.0 for i, v in enumerate(values)])
    merged = []
    for entry in zip(*kept, strict=True):
        vote = sum(w * v for w, v in zip(weights, entry, strict=True))
        agreeing = [(w, v) for w, v in zip(weights, entry, strict=True) if v * vote > 0]
        weight = sum(w for w, _ in agreeing)
        merged.append(scaling * sum(w * v for w, v in agreeing) / weight if weight else 0.0)
    return merged


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
def test_each_method_is_its_formula(density: float) -> None:
    task_vectors = drawn(7, 9, dtype=torch.float64)
    weighted = sum(w * t for w, t in zip(WEIGHTS, task_vectors, strict=True))
    assert isinstance(weighted, Tensor)
    torch.testing.assert_close(merge(task_vectors, WEIGHTS, TaskArithmetic(scaling=0.3)), 0.3 * weighted)
    torch.testing.assert_close(merge(task_vectors, WEIGHTS, Average()), weighted / sum(WEIGHTS))
    ours = merge(task_vectors, WEIGHTS, Ties(density=density, scaling=0.7))
    theirs = torch.tensor(plain_ties(task_vectors, WEIGHTS, density, 0.7), dtype=torch.float64)
    torch.testing.assert_close(ours.flatten(), theirs)
