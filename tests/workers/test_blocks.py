"""Stacked matrices are trimmed as what they are: one layer each, or one layer whose matrix is zero between groups."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from service.contract.errors import BadInput
from service.contract.treatments import Projection, Role
from workers.blocks import trim_blocks
from workers.layout import as_blocks, from_blocks
from workers.statistics import Statistic, observe_rows, stack_statistics
from workers.treatments import trim

BLOCKS, OUT, IN, TASKS = 4, 3, 5, 3


def scene(dtype: torch.dtype = torch.float64, out: int = OUT) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Task vectors ``[blocks, out, in]``, and rows ``[n, in]`` per task and block."""
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(BLOCKS, out, IN, generator=generator, dtype=dtype) for _ in range(TASKS)]
    rows = [[torch.randn(9, IN, generator=generator, dtype=dtype) for _ in range(BLOCKS)] for _ in range(TASKS)]
    return vectors, rows


def stacked(rows: Sequence[Sequence[Tensor]]) -> list[Statistic | None]:
    return [stack_statistics([observe_rows(x) if len(x) else None for x in blocks]) for blocks in rows]


@pytest.mark.parametrize("out", [1, OUT])
@pytest.mark.parametrize(
    "params",
    [
        Projection(rank=4, balance=0.5),
        Projection(rank=2, balance=0.5, moments="sum"),
        Projection(rank=3, balance=1.0, restore_norm=True),
        Projection(rank=3, balance=50.0),
        Projection(rank=0),
    ],
)
def test_a_grouped_convolution_is_one_layer_with_nothing_between_groups(params: Projection, out: int) -> None:
    vectors, rows = scene(out=out)
    whole = [torch.block_diag(*vector) for vector in vectors]  # type: ignore[no-untyped-call]
    factors = [torch.block_diag(*(observe_rows(x).held for x in blocks)) for blocks in rows]  # type: ignore[no-untyped-call]
    expected = trim(whole, [Statistic(rows=9, factor=factor) for factor in factors], params)
    found = trim_blocks(vectors, stacked(rows), params, Role.GROUPED_CONVOLUTION)
    for k in range(TASKS):
        assert found.removed[k].count == expected.removed[k].count
        torch.testing.assert_close(found.removed[k].scores, expected.removed[k].scores)
        torch.testing.assert_close(torch.block_diag(*found.task_vectors[k]), expected.task_vectors[k])  # type: ignore[no-untyped-call]
        for name in ("energy_removed", "own_response_lost"):
            assert getattr(found.effects[k], name) == pytest.approx(getattr(expected.effects[k], name))


def test_each_expert_is_a_layer_of_its_own() -> None:
    vectors, rows = scene()
    params = Projection(rank=2, balance=0.5)
    rows[1][2] = rows[1][2][:0]  # no exemplar of task 1 reaches expert 2
    found = trim_blocks(vectors, stacked(rows), params, Role.EXPERTS)
    for expert in range(BLOCKS):
        before = [vector[expert] for vector in vectors]
        after = [vector[expert] for vector in found.task_vectors]
        if expert == 2:
            expected = before
        else:
            expected = trim(before, [observe_rows(blocks[expert]) for blocks in rows], params).task_vectors
        for one, other in zip(after, expected, strict=True):
            torch.testing.assert_close(one, other)
    assert all(effect.energy_removed > 0 for effect in found.effects)


@pytest.mark.parametrize("role", [Role.EXPERTS, Role.GROUPED_CONVOLUTION])
def test_what_was_removed_makes_the_same_again(role: Role) -> None:
    vectors, rows = scene(torch.float32)
    found = trim_blocks(vectors, stacked(rows), Projection(rank=2, balance=0.5), role)
    for i, vector in enumerate(vectors):
        again = vector
        for k, part in enumerate(found.removed):
            if k != i:
                again = again - part.directions @ (part.directions.mT @ again)
        torch.testing.assert_close(again, found.task_vectors[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "role", "blocks", "transposed", "expected"),
    [
        ((4, 3, 5), Role.EXPERTS, 4, False, (4, 3, 5)),
        ((4, 5, 3), Role.EXPERTS, 4, True, (4, 3, 5)),
        ((6, 2, 3, 3), Role.GROUPED_CONVOLUTION, 3, False, (3, 2, 18)),
        ((8, 1, 7, 7), Role.GROUPED_CONVOLUTION, 8, False, (8, 1, 49)),
        ((4, 2, 7), Role.GROUPED_CONVOLUTION, 4, False, (4, 1, 14)),
    ],
)
def test_stacks_of_matrices_and_back(
    shape: tuple[int, ...], role: Role, blocks: int, transposed: bool, expected: tuple[int, ...]
) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = as_blocks(tensor, role, blocks, transposed)
    assert tuple(found.shape) == expected
    assert from_blocks(found, shape, transposed).equal(tensor)


def test_a_stack_of_nothing_and_counts_that_do_not_fit() -> None:
    assert stack_statistics([None, None]) is None
    with pytest.raises(BadInput, match="2 blocks"):
        Statistic(rows=3, factor=torch.zeros(2, 1, 4), block_rows=(3,))
