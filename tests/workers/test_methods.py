"""Every merge method: properties that all rows share, and small cases by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from service.contract.methods import METHODS as ROWS
from service.contract.methods import (
    AnyMethod,
    Average,
    Breadcrumbs,
    Cat,
    Consensus,
    Dare,
    Della,
    IsoC,
    Lot,
    ModelStock,
    Sce,
    Shrinkage,
    Slerp,
    TaskArithmetic,
    Ties,
    TsvM,
    Wudi,
)
from service.contract.treatments import Role
from workers.magnitudes import Cut
from workers.methods import METHODS, Context, merge
from workers.statistics import Statistic, observe_indices, observe_rows, observe_squares, stack_statistics

WEIGHTS = [1.0, 0.5, 2.0]
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "ties": [{"scope": "tensor"}],
    "dare": [{}, {"combine": "ties"}, {"rescale": "l1"}],
    "della": [{}, {"combine": "linear", "rescale": "l1"}],
    "breadcrumbs": [{"density": 0.5}, {"density": 0.5, "combine": "ties"}],
    "slerp": [{}, {"t": 0.25}],
    "sce": [{"density": 0.5}],
    "wudi": [{"steps": 20}, {"solver": "closed"}],
    "cat": [{}, {"then": {"name": "ties"}}, {"then": {"name": "tsv_m"}}],
}
METHOD_ROWS = [ROWS[name](**changes) for name in ROWS for changes in VARIANTS.get(name, [{}])]


def named(params: AnyMethod) -> str:
    changed = params.model_dump(include=set(VARIANTS.get(params.name, [{}])[-1]) or {"name"})
    return "-".join([params.name, *(f"{key}={value}" for key, value in changed.items() if key != "name")])


every_row = pytest.mark.parametrize("params", METHOD_ROWS, ids=named)
every_role = pytest.mark.parametrize("role", [Role.LINEAR, Role.OTHER])


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]


def seen(role: Role, shape: tuple[int, ...], task: str) -> Statistic | None:
    """What a task's exemplars say about a parameter: drawn by the task's name, so that it moves with the task."""
    seed = sum(map(ord, task))
    generator = torch.Generator().manual_seed(seed)
    if role is Role.SCALE:
        return observe_squares(torch.randn(5, math.prod(shape), generator=generator))
    if role is Role.EMBEDDING:  # a table [vocabulary, d]
        return observe_indices(torch.randint(0, 3, shape[:1], generator=generator), rows=9)
    if role is Role.LINEAR or role is Role.CONVOLUTION:
        return observe_rows(torch.randn(4, math.prod(shape[1:]), generator=generator))
    return None


def context_of(
    task_vectors: Sequence[Tensor], role: Role = Role.LINEAR, names: Sequence[str] = "abc", **changes: Any
) -> Context:
    shape = tuple(task_vectors[0].shape)
    (base,) = drawn(*shape, seed=99, dtype=task_vectors[0].dtype, count=1)
    known = [seen(role, shape, name) for name in names]
    context = Context("layer.weight", role, role is Role.EMBEDDING, base, list(names), known, seed=7)
    return replace(context, **changes)


def merged(
    task_vectors: Sequence[Tensor], weights: Sequence[float], params: AnyMethod, role: Role = Role.LINEAR
) -> Tensor:
    """The first tasks of ``task_vectors``, as many as the method takes."""
    limit = params.combining.task_limit
    chosen = list(task_vectors[:limit])
    return merge(chosen, weights[:limit], params, context_of(chosen, role, "abc"[: len(chosen)]))


def as_task_vectors(*rows: list[float] | list[list[float]]) -> list[Tensor]:
    return [torch.tensor(row) for row in rows]


# --- all rows ---------------------------------------------------------------------------------------------------------


def test_every_row_has_a_function_and_every_function_a_row() -> None:
    assert {row.combines for row in ROWS.values()} == set(METHODS)
    assert all(row.model_fields["name"].default == name for name, row in ROWS.items())
    assert all(row.paper != "none" for row in ROWS.values())


@every_row
@pytest.mark.parametrize("shape", [(), (1,), (5,), (4, 6), (6, 4), (1, 3), (3, 1), (2, 3, 2, 2), (0, 3)])
def test_shape_type_and_inputs_are_kept(params: AnyMethod, shape: tuple[int, ...]) -> None:
    role = {2: Role.LINEAR, 4: Role.CONVOLUTION}.get(len(shape), Role.OTHER)
    task_vectors = drawn(*shape)
    before = [t.clone() for t in task_vectors]
    update = merged(task_vectors, WEIGHTS, params, role)
    assert (update.shape, update.dtype) == (shape, torch.float32)
    assert bool(update.isfinite().all())
    assert all(torch.equal(a, b) for a, b in zip(task_vectors, before, strict=True))


@every_row
@pytest.mark.parametrize(
    ("role", "shape"), [(Role.EMBEDDING, (7, 4)), (Role.SCALE, (6,)), (Role.SHIFT, (6,)), (Role.LINEAR, (6, 4))]
)
def test_every_role_is_merged_in_float64(params: AnyMethod, role: Role, shape: tuple[int, ...]) -> None:
    update = merged(drawn(*shape, dtype=torch.float64), WEIGHTS, params, role)
    assert (update.shape, update.dtype) == (shape, torch.float64)
    assert bool(update.isfinite().all())


@every_row
@pytest.mark.parametrize("shape", [(310, 290), (97, 400), (400, 97), (257, 129), (3000, 40), (40, 3000)])
def test_any_number_of_threads_leaves_the_same_bytes(params: AnyMethod, shape: tuple[int, int]) -> None:
    task_vectors, before = drawn(*shape, dtype=torch.float64), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(merged(task_vectors, WEIGHTS, params))
    finally:
        torch.set_num_threads(before)
    assert [update.equal(found[0]) for update in found] == [True] * 3


@every_row
@pytest.mark.parametrize("transposed", [False, True])
def test_stacked_matrices_are_merged_one_by_one(params: AnyMethod, transposed: bool) -> None:
    if params.combining.draws:  # masks are drawn for the whole parameter
        return
    limit = params.combining.task_limit
    stacks, names = drawn(3, 6, 4)[:limit], "abc"[:limit]
    known = [stack_statistics([seen(Role.LINEAR, (6, 4), name + str(b)) for b in range(3)]) for name in names]
    context = context_of(stacks, Role.EXPERTS, names, statistics=known, blocks=3, transposed=transposed)
    stored = [stack.mT for stack in stacks] if transposed else stacks
    base = context.base
    context = replace(context, base=base.mT if transposed else base)
    update = merge(stored, WEIGHTS[:limit], params, context)
    if not params.combining.by_matrix:
        assert update.shape == stored[0].shape
        return
    for b in range(3):
        alone = replace(context, role=Role.LINEAR, transposed=False, blocks=1, base=base[b])
        alone = replace(alone, statistics=[s.block(b) for s in known if s is not None])
        expected = merge([stack[b] for stack in stacks], WEIGHTS[:limit], params, alone)
        torch.testing.assert_close(update[b].T if transposed else update[b], expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_della_ranks_the_rows_of_stacked_matrices(transposed: bool) -> None:
    stacks = drawn(3, 6, 4)
    stored = [stack.mT for stack in stacks] if transposed else stacks
    stacked = context_of(stored, Role.EXPERTS, statistics=[None] * 3, blocks=3, transposed=transposed)
    flat = context_of([stack.flatten(0, 1) for stack in stacks], statistics=[None] * 3)
    update = merge(stored, WEIGHTS, Della(), stacked)
    expected = merge([stack.flatten(0, 1) for stack in stacks], WEIGHTS, Della(), flat).view(3, 6, 4)
    torch.testing.assert_close(update.mT if transposed else update, expected)


@every_row
@every_role
def test_zeros_in_zeros_out(params: AnyMethod, role: Role) -> None:
    assert not merged([torch.zeros(3, 4)] * 3, WEIGHTS, params, role).any()


@every_row
def test_equal_task_vectors_are_no_trouble(params: AnyMethod) -> None:
    (same,) = drawn(5, 4, count=1)
    assert bool(merged([same] * 3, [1.0] * 3, params).isfinite().all())


@every_row
@every_role
def test_a_task_that_never_moved_is_no_trouble(params: AnyMethod, role: Role) -> None:
    moved = drawn(6, 4)
    assert bool(merged([moved[0], torch.zeros(6, 4), moved[2]], WEIGHTS, params, role).isfinite().all())


@every_row
@every_role
def test_the_same_twice(params: AnyMethod, role: Role) -> None:
    once, again = (merged(drawn(8, 9), WEIGHTS, params, role) for _ in range(2))
    assert torch.equal(once, again)


@every_row
@every_role
def test_the_order_of_tasks_does_not_matter(params: AnyMethod, role: Role) -> None:
    if not params.combining.any_order:
        return
    task_vectors = drawn(8, 9)
    turned = merge(task_vectors[::-1], WEIGHTS[::-1], params, context_of(task_vectors, role, "cba"))
    torch.testing.assert_close(turned, merged(task_vectors, WEIGHTS, params, role), rtol=1e-4, atol=1e-5)


@every_row
@every_role
def test_a_task_of_weight_zero_has_no_say(params: AnyMethod, role: Role) -> None:
    if params.combining.task_limit == 2:
        return
    task_vectors = drawn(8, 9)
    without = merge(task_vectors[:2], WEIGHTS[:2], params, context_of(task_vectors[:2], role, "ab"))
    assert torch.equal(merged(task_vectors, [*WEIGHTS[:2], 0.0], params, role), without)


@every_row
def test_a_transposed_view_gives_the_transposed_update(params: AnyMethod) -> None:
    if params.combining.draws:  # masks follow the order of entries
        return
    task_vectors = drawn(6, 4)[: params.combining.task_limit]
    names = "abc"[: len(task_vectors)]
    straight = context_of(task_vectors, names=names)
    turned = replace(straight, base=straight.base.T, transposed=True)
    across = merge([t.T for t in task_vectors], WEIGHTS[: len(names)], params, turned)
    upright = merge(task_vectors, WEIGHTS[: len(names)], params, straight)
    torch.testing.assert_close(across.T, upright, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("params", [row for row in METHOD_ROWS if row.combining.draws], ids=named)
def test_draws_depend_on_seed_parameter_and_task_alone(params: AnyMethod) -> None:
    task_vectors = drawn(30, 20)
    alone = [
        merge([t], [1.0], params, context_of([t], names=[name])) for t, name in zip(task_vectors, "abc", strict=True)
    ]
    with_others = merge(task_vectors, [1.0, 1e-9, 1e-9], params, context_of(task_vectors))
    assert bool(((alone[0] != 0) <= (with_others != 0)).all())
    again = context_of(task_vectors)
    for other in (replace(again, seed=8), replace(again, parameter="other"), replace(again, tasks=["x", "b", "c"])):
        assert not torch.equal(merge(task_vectors, WEIGHTS, params, other), merge(task_vectors, WEIGHTS, params, again))


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_task_arithmetic_by_hand() -> None:
    task_vectors = as_task_vectors([[1.0, 2.0], [0.0, -4.0]], [[2.0, 0.0], [6.0, 4.0]])
    for params in (TaskArithmetic(scaling=0.5), Cat(scaling=0.5)):
        assert merged(task_vectors, [1.0, 0.5], params).tolist() == [[1.0, 1.0], [1.5, -1.0]]


def test_average_by_hand() -> None:
    task_vectors = as_task_vectors([[4.0, 0.0], [0.0, -4.0]], [[0.0, 8.0], [4.0, 4.0]])
    assert merged(task_vectors, [3.0, 1.0], Average()).tolist() == [[3.0, 2.0], [1.0, -2.0]]


def test_ties_by_hand() -> None:
    # Kept at density 0.5: [6, 0, -3, 0], [-4, 2, 0, 0], [0, 2, -1, 0]; the sum elects the signs +, +, -.
    task_vectors = as_task_vectors([6.0, 1.0, -3.0, 0.5], [-4.0, 2.0, 1.0, 0.0], [0.0, 2.0, -1.0, -0.5])
    plain = Ties(density=0.5, scope="tensor")
    assert merged(task_vectors, [1.0] * 3, plain, Role.OTHER).tolist() == [6.0, 2.0, -2.0, 0.0]
    # With weights 1, 2, 1 the second task outvotes the first: 6 - 8 < 0.
    halved = Ties(density=0.5, scaling=0.5, scope="tensor")
    assert merged(task_vectors, [1.0, 2.0, 1.0], halved, Role.OTHER).tolist() == [-2.0, 1.0, -1.0, 0.0]


def test_ties_that_cancel_elect_no_sign() -> None:
    task_vectors = as_task_vectors([1.0], [-1.0])
    assert merged(task_vectors, [1.0, 1.0], Ties(scope="tensor"), Role.OTHER).tolist() == [0.0]


@pytest.mark.parametrize("weight", [0.3, 0.7, 1.1])
def test_ties_that_cancel_elect_no_sign_whatever_their_weight(weight: float) -> None:
    vector = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    context = context_of([vector] * 2, Role.OTHER, "ab")
    assert not merge([vector, -vector], [weight, weight], Ties(scope="tensor", density=1.0), context).any()


def test_ties_among_equals_keeps_the_lower_index() -> None:
    only = as_task_vectors([1.0, -1.0, 2.0, 1.0, -1.0])
    kept = merged(only, [1.0], Ties(density=0.6, scope="tensor"), Role.OTHER)
    assert kept.tolist() == [1.0, -1.0, 2.0, 0.0, 0.0]


def test_ties_over_the_whole_vector_keeps_what_the_cuts_say() -> None:
    task_vectors = as_task_vectors([1.0, -1.0, 2.0, 1.0], [5.0, 0.5, 0.0, -4.0])
    context = context_of(task_vectors, Role.OTHER, "ab", cuts=[[Cut(1.0, 1)], [Cut(4.5, 0)]])
    assert merge(task_vectors, [1.0, 1.0], Ties(), context).tolist() == [3.0, 0.0, 2.0, 0.0]


def test_breadcrumbs_by_hand() -> None:
    # Of five entries the largest goes, and of the others the two largest stay.
    only = as_task_vectors([1.0, -9.0, 3.0, -2.0, 0.5])
    params = Breadcrumbs(density=0.4, gamma=0.2, scaling=1.0)
    assert merged(only, [1.0], params, Role.OTHER).tolist() == [0.0, 0.0, 3.0, -2.0, 0.0]
    whole = params.model_copy(update={"scope": "model"})
    context = context_of(only, Role.OTHER, "a", cuts=[[Cut(0.75, 0), Cut(2.5, 0)]])
    assert merge(only, [1.0], whole, context).tolist() == [1.0, 0.0, 0.0, -2.0, 0.0]


def test_slerp_by_hand() -> None:
    # From (1, 0) to (0, 2), a third of a right angle: sin 60 (1, 0) + sin 30 (0, 2).
    task_vectors = as_task_vectors([1.0, -1.0], [0.0, 1.0])
    context = context_of(task_vectors, Role.OTHER, "ab", base=torch.tensor([0.0, 1.0]))
    expected = torch.tensor([math.sqrt(3) / 2, 1.0 - 1.0])
    torch.testing.assert_close(merge(task_vectors, [1.0, 1.0], Slerp(t=1 / 3), context), expected)


def test_slerp_of_one_task_starts_at_the_base() -> None:
    only = as_task_vectors([-1.0, 1.0])
    context = context_of(only, Role.OTHER, "a", base=torch.tensor([1.0, 0.0]))
    half = math.sqrt(0.5)
    torch.testing.assert_close(merge(only, [1.0], Slerp(), context), torch.tensor([half - 1, half]))


def test_model_stock_by_hand() -> None:
    # cos = 3 / 5, N = 2: t = 1.2 / 1.6.
    task_vectors = as_task_vectors([5.0, 0.0], [3.0, 4.0])
    torch.testing.assert_close(merged(task_vectors, [1.0, 1.0], ModelStock(), Role.OTHER), torch.tensor([3.0, 1.5]))


def test_sce_by_hand() -> None:
    # Variances 4, 0, 9, 1 (times 1): the first and third entries stay; energies 25 + 16 and 1 + 4.
    task_vectors = as_task_vectors([5.0, 1.0, -4.0, 1.0], [1.0, 1.0, 2.0, -1.0])
    update = merged(task_vectors, [1.0, 1.0], Sce(density=0.5), Role.OTHER)
    torch.testing.assert_close(update, torch.tensor([(5 * 41 + 5) / 46, 0.0, -4.0, 0.0]))


def test_consensus_by_hand() -> None:
    # At threshold 1: both care for the first entry, one for the second, both for the third.
    task_vectors = as_task_vectors([2.0, 3.0, 1.0], [2.0, 1.0, -1.0])
    params = Consensus(scaling=1.0, threshold=1.0)
    assert merged(task_vectors, [1.0, 1.0], params, Role.OTHER).tolist() == [4.0, 0.0, 0.0]


def test_tsv_m_and_iso_c_by_hand() -> None:
    # Orthogonal rank-one task vectors of sizes 3 and 1 in their own axes.
    task_vectors = as_task_vectors([[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(
        merged(task_vectors, [1.0, 1.0], TsvM(scaling=1.0)), torch.diag(torch.tensor([3.0, 1.0]))
    )
    torch.testing.assert_close(
        merged(task_vectors, [1.0, 1.0], IsoC(scaling=1.0)), torch.diag(torch.tensor([2.0, 2.0]))
    )


def test_lot_by_hand() -> None:
    # One task has seen (1, 0), the other (0, 2): each gets its own column.
    task_vectors = as_task_vectors([[1.0, 2.0]], [[3.0, 4.0]])
    known = [observe_rows(torch.tensor([[1.0, 0.0]])), observe_rows(torch.tensor([[0.0, 2.0]]))]
    context = context_of(task_vectors, names="ab", statistics=known)
    torch.testing.assert_close(merge(task_vectors, [1.0, 1.0], Lot(), context), torch.tensor([[1.0, 4.0]]))
    unknown = replace(context, statistics=[known[0], None])
    torch.testing.assert_close(merge(task_vectors, [1.0, 1.0], Lot(), unknown), torch.tensor([[2.0, 3.0]]))


def test_wudi_in_closed_form_by_hand() -> None:
    # Task vectors whose rows do not overlap do not interfere: both are kept whole.
    task_vectors = as_task_vectors([[1.0, 0.0], [2.0, 0.0]], [[0.0, 3.0], [0.0, 4.0]])
    update = merged(task_vectors, [1.0, 1.0], Wudi(solver="closed"))
    torch.testing.assert_close(update, torch.tensor([[1.0, 3.0], [2.0, 4.0]]))


def test_shrinkage_by_hand() -> None:
    # One task has seen (1, 0), the other (0, 2), and their vectors have a row each: M = diag(1/2, 0) + (1, 2)^T (1, 2)
    # / 10 and diag(0, 1/2) + (3, 4)^T (3, 4) / 50; together [[.78, .44], [.44, 1.22]], of trace 2, to which ridge adds
    # .1 per direction. T_1 M_1 + T_2 M_2 = (1, 1) + (1.5, 4) = (2.5, 5) against [[.88, .44], [.44, 1.32]].
    task_vectors = as_task_vectors([[1.0, 2.0]], [[3.0, 4.0]])
    known = [observe_rows(torch.tensor([[1.0, 0.0]])), observe_rows(torch.tensor([[0.0, 2.0]]))]
    context = context_of(task_vectors, names="ab", statistics=known)
    update = merge(task_vectors, [1.0, 1.0], Shrinkage(scaling=1.0, proxy=0.5, damping=0.1), context)
    torch.testing.assert_close(update, torch.tensor([[1.1 / 0.968, 3.3 / 0.968]]))


def test_a_density_of_one_drops_nothing() -> None:
    task_vectors = drawn(40, 30)
    total = sum(task_vectors)
    assert isinstance(total, Tensor)
    for params in (Dare(density=1.0, scaling=1.0), Della(density=1.0, epsilon=0.0, combine="linear", scaling=1.0)):
        torch.testing.assert_close(merged(task_vectors, [1.0] * 3, params), total)


def test_scalings_follow_from_how_entries_are_combined() -> None:
    assert (Dare().scaling, Dare(combine="ties").scaling, Dare(combine="ties", scaling=0.2).scaling) == (0.4, 1.0, 0.2)
    assert (Della().scaling, Breadcrumbs().scaling) == (1.0, 0.4)


@pytest.mark.parametrize(
    ("row", "parameters"),
    [
        (Della, {"density": 0.1, "epsilon": 0.4}),
        (Della, {"density": 0.95, "epsilon": 0.4}),
        (Breadcrumbs, {"density": 0.9, "gamma": 0.2}),
        (Cat, {"then": {"name": "ties", "scope": "model"}}),
        (Cat, {"then": {"name": "cat"}}),
    ],
)
def test_parameters_that_contradict_each_other_are_refused(row: type[AnyMethod], parameters: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        row(**parameters)
