"""Every treatment: properties that all rows share, each against a plain float64 formula, and one case by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from service.contract.errors import BadInput, BadTensor
from service.contract.treatments import TREATMENTS as ROWS
from service.contract.treatments import Keep, Moments, Projection, ScaleMask, ShiftMask, Treatment
from service.contract.treatments import Statistic as Needs
from workers.statistics import Statistic, observe_indices, observe_rows, observe_squares
from workers.treatments import TREATMENTS, Effect, Removed, apply_removed, projection, trim
from workers.treatments.krylov import first_rows, krylov
from workers.treatments.spectrum import Difference, dense, leading, low_rank, times

ROW_COUNTS = [5, 30, 3, 12]
every_row = pytest.mark.parametrize("params", [row() for row in ROWS.values()], ids=lambda p: p.name)
every_restoring_row = pytest.mark.parametrize(
    "params",
    [Projection(restore_norm=True), ScaleMask(restore_norm=True, balance=0), ShiftMask(restore_norm=True)],
    ids=lambda p: p.name,
)


def figures_of(effect: Effect) -> tuple[float | None, ...]:
    """Every figure of an effect in one row."""
    *figures, responses, left = astuple(effect)
    return (*figures, *responses, *left)


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(params: Treatment, tasks: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shape = (11, 6) if isinstance(params, Projection) else (20,)
    return [drawn(*shape, seed=k, dtype=dtype) for k in range(tasks)]


def features(width: int, tasks: int = 4) -> list[Tensor]:
    return [drawn(ROW_COUNTS[k], width, seed=50 + k) for k in range(tasks)]


def observed(params: Treatment, task_vectors: Sequence[Tensor]) -> list[Statistic | None]:
    observe = TREATMENTS[params.name].observe
    if observe is None:
        return [None for _ in task_vectors]
    return [observe(x, None) for x in features(task_vectors[0].shape[-1], len(task_vectors))]


def size(x: Tensor) -> float:
    return float(x.square().sum())


# --- all rows ---------------------------------------------------------------------------------------------------------


def test_every_row_has_functions_and_they_a_row() -> None:
    assert set(TREATMENTS) == set(ROWS)
    for name, row in ROWS.items():
        assert row().name == name
        assert (TREATMENTS[name].observe is None) == (row.statistic is Needs.NONE)


@every_row
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_type_and_inputs_are_kept(params: Treatment, dtype: torch.dtype) -> None:
    task_vectors = inputs(params, dtype=dtype)
    before = [t.clone() for t in task_vectors]
    outcome = trim(task_vectors, observed(params, task_vectors), params)
    assert [(t.shape, t.dtype) for t in outcome.task_vectors] == [(t.shape, dtype) for t in before]
    assert all(bool(t.isfinite().all()) for t in outcome.task_vectors)
    assert all(torch.equal(a, b) for a, b in zip(task_vectors, before, strict=True))
    assert len(outcome.removed) == len(outcome.effects) == len(task_vectors)


@every_row
def test_zeros_in_zeros_out(params: Treatment) -> None:
    task_vectors = [torch.zeros_like(t) for t in inputs(params)]
    outcome = trim(task_vectors, observed(params, task_vectors), params)
    assert not any(bool(t.any()) for t in outcome.task_vectors)
    assert [r.count for r in outcome.removed] == [0] * 4
    assert all(value in (0.0, None) for effect in outcome.effects for value in figures_of(effect))


@every_row
def test_the_same_twice(params: Treatment) -> None:
    task_vectors = inputs(params)
    once, again = (trim(task_vectors, observed(params, task_vectors), params) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once.task_vectors, again.task_vectors, strict=True))
    assert once.effects == again.effects


@every_row
def test_one_task_alone_loses_nothing(params: Treatment) -> None:
    task_vectors = inputs(params, tasks=1)
    outcome = trim(task_vectors, observed(params, task_vectors), params)
    assert torch.equal(outcome.task_vectors[0], task_vectors[0])
    assert outcome.removed[0].count == 0
    assert outcome.effects[0].energy_removed == 0
    assert outcome.effects[0].conflict_before in (0, None)
    assert outcome.effects[0].large_share is None


@every_row
def test_rank_zero_removes_nothing(params: Treatment) -> None:
    if isinstance(params, Keep):
        return
    idle = params.model_copy(update={"rank": 0})
    task_vectors = inputs(params)
    outcome = trim(task_vectors, observed(params, task_vectors), idle)
    assert all(torch.equal(a, b) for a, b in zip(outcome.task_vectors, task_vectors, strict=True))


@every_row
def test_scores_fall_and_stay_within_the_rank(params: Treatment) -> None:
    outcome = trim(inputs(params), observed(params, inputs(params)), params)
    for removed in outcome.removed:
        scores = removed.scores.tolist()
        assert len(scores) <= getattr(params, "rank", 0)
        assert all(a >= b for a, b in pairwise(scores))
        assert all(score > 0 for score in scores)


@every_row
def test_the_record_alone_gives_the_same(params: Treatment) -> None:
    for dtype in (torch.float32, torch.float64):
        task_vectors = inputs(params, dtype=dtype)
        outcome = trim(task_vectors, observed(params, task_vectors), params)
        again = apply_removed(task_vectors, outcome.removed, params)
        assert all(torch.equal(a, b) for a, b in zip(again, outcome.task_vectors, strict=True))


@every_restoring_row
def test_a_restored_norm_is_the_one_before(params: Treatment) -> None:
    task_vectors = inputs(params)
    statistics = observed(params, task_vectors)
    plain = trim(task_vectors, statistics, params.model_copy(update={"restore_norm": False}))
    restored = trim(task_vectors, statistics, params)
    for before, bare, after in zip(task_vectors, plain.task_vectors, restored.task_vectors, strict=True):
        torch.testing.assert_close(after, bare * (before.norm() / bare.norm()), rtol=1e-12, atol=1e-14)
        assert not torch.equal(bare, before)
    again = apply_removed(task_vectors, restored.removed, params)
    assert all(torch.equal(a, b) for a, b in zip(again, restored.task_vectors, strict=True))


@every_row
def test_task_vectors_that_differ_are_refused(params: Treatment) -> None:
    if isinstance(params, Keep):
        return
    good = inputs(params)
    statistics = observed(params, good)
    for wrong in (good[0][:-1], good[0].float()):
        with pytest.raises(BadInput):
            trim([wrong, *good[1:]], statistics, params)
    with pytest.raises(BadInput):
        trim([t.half() for t in good], statistics, params)
    with pytest.raises(BadInput):
        trim([], [], params)


@every_row
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_refused(params: Treatment, bad: float) -> None:
    if isinstance(params, Keep):
        return
    task_vectors = inputs(params)
    task_vectors[1].view(-1)[3] = bad
    with pytest.raises(BadTensor):
        trim(task_vectors, observed(params, task_vectors), params)


@pytest.mark.parametrize("params", [Projection(), ScaleMask()], ids=lambda p: p.name)
def test_statistics_that_do_not_fit_are_refused(params: Treatment) -> None:
    task_vectors = inputs(params)
    good = observed(params, task_vectors)
    observe = TREATMENTS[params.name].observe
    assert observe is not None
    width = task_vectors[0].shape[-1]
    for wrong in (None, observe(torch.zeros(0, width), None), observe(torch.ones(2, width + 1), None)):
        with pytest.raises(BadInput):
            trim(task_vectors, [wrong, *good[1:]], params)
    with pytest.raises(BadInput):
        trim(task_vectors, good[1:], params)


def test_a_record_of_another_treatment_is_refused() -> None:
    basis = Removed(scores=torch.zeros(0), basis=torch.zeros(11, 0))
    mask = Removed(scores=torch.zeros(0), mask=torch.zeros(0, dtype=torch.int64))
    with pytest.raises(BadInput):
        apply_removed(inputs(Projection()), [mask] * 4, Projection())
    with pytest.raises(BadInput):
        apply_removed(inputs(ShiftMask()), [basis] * 4, ShiftMask())
    with pytest.raises(BadInput):
        Removed(scores=torch.zeros(0))


# --- projection -------------------------------------------------------------------------------------------------------


def plain_projection(
    task_vectors: list[Tensor], moments: list[Tensor], params: Projection
) -> tuple[list[Tensor], list[Tensor]]:
    """The formulas as they stand, with every [out, out] and [in, in] matrix written out."""
    tasks = range(len(task_vectors))
    projectors = []
    for k in tasks:
        conflict = sum(
            task_vectors[i] @ (moments[k] - params.balance * moments[i]) @ task_vectors[i].T for i in tasks if i != k
        )
        assert isinstance(conflict, Tensor)
        values, vectors = torch.linalg.eigh(conflict)
        chosen = [j for j in reversed(range(len(values))) if values[j] > 0 or not params.positive_only][: params.rank]
        projectors.append(vectors[:, chosen] @ vectors[:, chosen].T)
    trimmed = []
    for i in tasks:
        current = task_vectors[i]
        for k in tasks:
            current = current if k == i else current - projectors[k] @ current
        trimmed.append(current)
    return trimmed, projectors


@pytest.mark.parametrize("moments", ["mean", "sum"])
@pytest.mark.parametrize("positive_only", [True, False])
@pytest.mark.parametrize("shape", [(11, 6), (4, 9), (40, 5)])
def test_projection_is_its_formula(moments: Moments, positive_only: bool, shape: tuple[int, int]) -> None:
    params = Projection(rank=3, balance=0.5, moments=moments, positive_only=positive_only)
    task_vectors = [drawn(*shape, seed=k) for k in range(4)]
    xs = features(shape[1])
    outcome = trim(task_vectors, [observe_rows(x) for x in xs], params)
    second = [x.T @ x / (len(x) if moments == "mean" else 1) for x in xs]
    expected, projectors = plain_projection(task_vectors, second, params)
    for ours, theirs in zip(outcome.task_vectors, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    for removed, projector in zip(outcome.removed, projectors, strict=True):
        torch.testing.assert_close(removed.directions @ removed.directions.T, projector, rtol=0, atol=1e-10)


@pytest.mark.parametrize("restore_norm", [True, False])
def test_projection_says_what_it_did(restore_norm: bool) -> None:
    params = Projection(rank=3, balance=0.5, restore_norm=restore_norm)
    task_vectors = inputs(params)
    xs = features(6)
    outcome = trim(task_vectors, [observe_rows(x) for x in xs], params)
    for i, (before, after) in enumerate(zip(task_vectors, outcome.task_vectors, strict=True)):
        effect, gone = outcome.effects[i], before - after
        others = [x for k, x in enumerate(xs) if k != i]
        assert effect.energy_removed == pytest.approx(size(gone) / size(before))
        assert effect.conflict_before == pytest.approx(sum(size(x @ before.T) / len(x) for x in others))
        assert effect.conflict_after == pytest.approx(sum(size(x @ after.T) / len(x) for x in others))
        assert effect.own_response_lost == pytest.approx(size(xs[i] @ gone.T) / size(xs[i] @ before.T))
        largest = before.abs().flatten().argmax()  # 1 % of 66 entries is one
        assert effect.large_share == pytest.approx(float(gone.flatten()[largest] ** 2) / size(gone))


def test_projection_by_hand() -> None:
    # Task 1 answers task 0's input e1 along (3, 4) / 5 and nothing else, so that direction is taken out of it;
    # task 0 does not answer task 1's input e2 at all.
    first, second = torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [4.0, -3.0]])
    statistics = [observe_rows(torch.tensor([[1.0, 0.0]])), observe_rows(torch.tensor([[0.0, 1.0]]))]
    outcome = trim([first.double(), second.double()], statistics, Projection(rank=1, balance=0.0))
    assert torch.equal(outcome.task_vectors[0], first.double())
    assert outcome.removed[1].count == 0
    torch.testing.assert_close(outcome.removed[0].directions.flatten(), torch.tensor([0.6, 0.8]).double())
    torch.testing.assert_close(outcome.removed[0].scores, torch.tensor([25.0]).double())
    torch.testing.assert_close(outcome.task_vectors[1], torch.tensor([[0.0, 4.0], [0.0, -3.0]]).double())
    assert outcome.effects[1].energy_removed == pytest.approx(0.5)
    assert outcome.effects[1].conflict_after == pytest.approx(0.0, abs=1e-25)
    assert outcome.effects[1].own_response_lost == pytest.approx(0.0, abs=1e-25)


def test_one_hot_inputs_as_counts_are_one_hot_inputs_as_rows() -> None:
    task_vectors = [drawn(5, 8, seed=k) for k in range(3)]
    tokens = [torch.tensor([0, 0, 3]), torch.tensor([1, 7]), torch.tensor([3, 3, 3, 2])]
    counts = [observe_indices(torch.bincount(t, minlength=8), len(t)) for t in tokens]
    rows = [observe_rows(torch.nn.functional.one_hot(t, 8).double()) for t in tokens]
    for params in (Projection(rank=2, balance=0.5), Projection(rank=2, balance=0.5, moments="sum")):
        a, b = trim(task_vectors, counts, params), trim(task_vectors, rows, params)
        for ours, theirs in zip(a.task_vectors, b.task_vectors, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        for left, right in zip(a.effects, b.effects, strict=True):
            assert figures_of(left) == pytest.approx(figures_of(right), abs=1e-12)


def test_a_rank_beyond_the_outputs_removes_everything() -> None:
    task_vectors = inputs(Projection())
    params = Projection(rank=500, positive_only=False, restore_norm=True)
    outcome = trim(task_vectors, observed(params, task_vectors), params)
    assert all(float(t.abs().max()) < 1e-13 for t in outcome.task_vectors)


def test_a_transposed_view_is_as_good_as_a_matrix() -> None:
    task_vectors = inputs(Projection())
    statistics = observed(Projection(), task_vectors)
    views = [t.T.contiguous().T for t in task_vectors]
    for ours, theirs in zip(
        trim(views, statistics, Projection()).task_vectors,
        trim(task_vectors, statistics, Projection()).task_vectors,
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_float32_agrees_with_float64() -> None:
    params = Projection(rank=2, balance=0.5)
    task_vectors = inputs(params)
    statistics = observed(params, task_vectors)
    narrow = trim([t.float() for t in task_vectors], statistics, params)
    wide = trim(task_vectors, statistics, params)
    for ours, theirs in zip(narrow.task_vectors, wide.task_vectors, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("restore_norm", [True, False])
@pytest.mark.parametrize("turned", [True, False])
def test_trimming_in_place_is_trimming(turned: bool, restore_norm: bool) -> None:
    # Larger than a chunk, and of a size that is no multiple of one.
    params = Projection(rank=3, balance=0.5, restore_norm=restore_norm)
    task_vectors = [drawn(300, 1001, seed=k, dtype=torch.float32) for k in range(3)]
    if turned:
        task_vectors = [t.T.contiguous().T for t in task_vectors]
    statistics = [observe_rows(x) for x in features(1001, 3)]
    expected = trim(task_vectors, statistics, params)
    again = apply_removed(task_vectors, expected.removed, params)
    largest = [t.abs().flatten().kthvalue(t.numel() - 3003 + 1).values for t in task_vectors]  # 1 % of 300,300
    gone = [before - after for before, after in zip(task_vectors, expected.task_vectors, strict=True)]
    shares = [size(g[t.abs() >= at]) / size(g) for g, t, at in zip(gone, task_vectors, largest, strict=True)]
    outcome = projection.trim(task_vectors, statistics, params, out=task_vectors)
    for ours, theirs, recorded, place in zip(
        outcome.task_vectors, expected.task_vectors, again, task_vectors, strict=True
    ):
        assert ours is place
        assert torch.equal(ours, theirs)
        assert torch.equal(ours, recorded)
    assert outcome.effects == expected.effects
    assert [effect.large_share for effect in outcome.effects] == pytest.approx(shares, rel=1e-4)


def test_the_number_of_threads_changes_no_byte() -> None:
    task_vectors = [drawn(300, 260, seed=k, dtype=torch.float32) for k in range(3)]
    statistics = [observe_rows(drawn(200, 260, seed=50 + k)) for k in range(3)]
    before = torch.get_num_threads()
    outcomes = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outcomes.append(trim(task_vectors, statistics, Projection(balance=0.5)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in outcomes[1:]:
        assert other.effects == outcomes[0].effects
        for ours, theirs in zip(other.task_vectors, outcomes[0].task_vectors, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(11, 6), (6, 11), (40, 5000)])
def test_task_vectors_stand_for_inputs_as_their_copies_do(shape: tuple[int, int]) -> None:
    params = Projection(rank=2, balance=0.001)
    task_vectors = [drawn(*shape, seed=k) for k in range(3)]
    scales = [1 / math.sqrt(size(t)) for t in task_vectors]
    copies = [Statistic(rows=1, factor=t * scale) for t, scale in zip(task_vectors, scales, strict=True)]
    expected = trim(task_vectors, copies, params)
    same = [Statistic(rows=1, factor=t, scale=scale) for t, scale in zip(task_vectors, scales, strict=True)]
    outcome = projection.trim(task_vectors, same, params, out=task_vectors)
    for ours, theirs in zip(outcome.task_vectors, expected.task_vectors, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    for left, right in zip(outcome.effects, expected.effects, strict=True):
        assert figures_of(left) == pytest.approx(figures_of(right), rel=1e-7, abs=1e-12)


@pytest.mark.parametrize(("out", "rows"), [(200, 90), (1100, 100), (1100, 20)])
def test_float32_takes_the_directions_of_the_plain_form(out: int, rows: int) -> None:
    # By a square that is formed, by its columns, and by their factorization.
    params = Projection(rank=3, balance=2.0)
    spread = torch.logspace(0, -2, 96, dtype=torch.float64)
    task_vectors = [drawn(out, 96, seed=k) for k in range(3)]
    xs = [drawn(rows, 96, seed=50 + k) * spread for k in range(3)]
    expected, projectors = plain_projection(task_vectors, [x.T @ x / len(x) for x in xs], params)
    outcome = trim([t.float() for t in task_vectors], [observe_rows(x) for x in xs], params)
    for ours, theirs in zip(outcome.task_vectors, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-4)
    for removed, projector in zip(outcome.removed, projectors, strict=True):
        wide = removed.directions.double()
        torch.testing.assert_close(wide @ wide.T, projector, rtol=0, atol=2e-5)


# --- the spectrum's routes --------------------------------------------------------------------------------------------


def difference(size: int, gain: int, cost: int, seed: int = 0) -> Difference:
    decay = torch.logspace(0, -2, max(gain, cost), dtype=torch.float64)
    gains, costs = drawn(size, gain, seed=seed) * decay[:gain], drawn(size, cost, seed=seed + 1) * decay[:cost]
    return Difference(gains.tensor_split(2, dim=1), [costs])


def onto(vectors: Tensor) -> Tensor:
    return vectors @ vectors.T


@pytest.mark.parametrize("positive_only", [True, False])
def test_the_low_rank_route_and_the_dense_one_agree(positive_only: bool) -> None:
    matrix = difference(30, 6, 8)
    values, vectors = dense(matrix)
    small_values, small_vectors = low_rank(matrix)
    torch.testing.assert_close(small_values[:4], values[:4])
    torch.testing.assert_close(onto(small_vectors[:, :4]), onto(vectors[:, :4]))
    (found,) = leading([matrix], 4, positive_only=positive_only, precision=1e-16)
    torch.testing.assert_close(onto(found.vectors), onto(vectors[:, :4]))


def test_directions_of_eigenvalue_zero_are_found_where_they_are_wanted() -> None:
    matrix = difference(30, 3, 4)
    assert len(leading([matrix], 9, positive_only=True, precision=1e-16)[0].values) == 3
    (found,) = leading([matrix], 9, positive_only=False, precision=1e-16)
    assert len(found.values) == 9
    torch.testing.assert_close(onto(found.vectors) @ found.vectors, found.vectors)


def multiplied(matrices: Sequence[Difference]) -> Callable[[Tensor, Sequence[int]], Tensor]:
    return lambda rows, which: times([matrices[k] for k in which], rows)


def test_the_iteration_agrees_with_the_dense_route() -> None:
    # They are done one after the other, and in the same place as they would be alone.
    matrices = [difference(300, 180, 140), difference(300, 20, 300, seed=7), difference(300, 250, 30, seed=9)]
    start = first_rows(matrices[0].like, 9)
    together = krylov(multiplied(matrices), start, 5, tolerance=1e-12, limit=200, floors=[-math.inf] * 3)
    for matrix, found in zip(matrices, together, strict=True):
        values, vectors = dense(matrix)
        (alone,) = krylov(multiplied([matrix]), start, 5, tolerance=1e-12, limit=200, floors=[-math.inf])
        assert found is not None
        assert alone is not None
        torch.testing.assert_close(found.values, values[:5])
        torch.testing.assert_close(onto(found.vectors), onto(vectors[:, :5]), rtol=0, atol=1e-9)
        torch.testing.assert_close(onto(found.vectors), onto(alone.vectors), rtol=0, atol=1e-9)


def test_the_iteration_gives_up_in_too_small_a_space() -> None:
    matrix = difference(300, 180, 140)
    start = first_rows(matrix.like, 9)
    assert krylov(multiplied([matrix]), start, 5, tolerance=1e-12, limit=32, floors=[-math.inf]) == [None]


@pytest.mark.parametrize("gain", [400, 2])
def test_a_large_problem_takes_the_same_directions(gain: int) -> None:
    # With a gain of rank 2 the iteration can't converge on five positive eigenvalues, and the exact route steps in.
    matrix = difference(1024, gain, 520)
    values, vectors = low_rank(matrix)
    (found,) = leading([matrix], 5, positive_only=True, precision=1e-16)
    count = min(5, gain)
    torch.testing.assert_close(found.values, values[:count])
    torch.testing.assert_close(onto(found.vectors), onto(vectors[:, :count]), rtol=0, atol=1e-9)


def test_rounding_noise_is_not_positive() -> None:
    same = drawn(20, 6, seed=1)
    turned = same @ torch.linalg.qr(drawn(6, 6, seed=2)).Q
    for matrix in (Difference([same], [turned]), Difference([turned], [same])):
        assert len(leading([matrix], 4, positive_only=True, precision=1e-16)[0].values) == 0


def test_the_largest_entry_of_a_direction_is_positive() -> None:
    vectors = leading([difference(30, 6, 8)], 4, positive_only=True, precision=1e-16)[0].vectors
    for column in vectors.T:
        assert column[column.abs().argmax()] > 0


# --- masks ------------------------------------------------------------------------------------------------------------


def plain_mask(task_vectors: list[Tensor], scores: list[Tensor], rank: int, positive_only: bool) -> list[Tensor]:
    trimmed = [t.clone() for t in task_vectors]
    for k, score in enumerate(scores):
        order = sorted(range(len(score)), key=lambda j: (-float(score[j]), j))[:rank]
        for i, task_vector in enumerate(trimmed):
            if i != k:
                task_vector[[j for j in order if score[j] > 0 or not positive_only]] = 0
    return trimmed


@pytest.mark.parametrize("moments", ["mean", "sum"])
@pytest.mark.parametrize("positive_only", [True, False])
def test_scale_mask_is_its_formula(moments: Moments, positive_only: bool) -> None:
    params = ScaleMask(rank=3, balance=0.7, moments=moments, positive_only=positive_only)
    task_vectors = inputs(params)
    xs = features(20)
    q = [x.square().sum(0) / (len(x) if moments == "mean" else 1) for x in xs]
    scores = [
        torch.stack([task_vectors[i].square() * (q[k] - params.balance * q[i]) for i in range(4) if i != k]).sum(0)
        for k in range(4)
    ]
    outcome = trim(task_vectors, [observe_squares(x) for x in xs], params)
    for ours, theirs in zip(outcome.task_vectors, plain_mask(task_vectors, scores, 3, positive_only), strict=True):
        assert torch.equal(ours, theirs)
    for i, effect in enumerate(outcome.effects):
        before, after = task_vectors[i].square(), outcome.task_vectors[i].square()
        others = torch.stack([q[k] for k in range(4) if k != i]).sum(0)
        assert effect.energy_removed == pytest.approx(1 - float(after.sum() / before.sum()))
        assert effect.conflict_before == pytest.approx(float((before * others).sum()))
        assert effect.conflict_after == pytest.approx(float((after * others).sum()))
        assert effect.own_response_lost == pytest.approx(1 - float((after * q[i]).sum() / (before * q[i]).sum()))


def test_scale_mask_by_hand() -> None:
    task_vectors = [torch.tensor([1.0, 2.0, 0.0]), torch.tensor([3.0, 0.0, 1.0])]
    statistics = [observe_squares(torch.tensor([[2.0, 1.0, 1.0]])), observe_squares(torch.tensor([[1.0, 2.0, 1.0]]))]
    # g_0 = [9, 0, 1] * (q_0 - q_1) = [9 * 3, 0, 0], g_1 = [1, 4, 0] * (q_1 - q_0) = [-3, 12, 0]
    outcome = trim(task_vectors, statistics, ScaleMask(rank=2, balance=1.0))
    assert [r.entries.tolist() for r in outcome.removed] == [[0], [1]]
    assert [r.scores.tolist() for r in outcome.removed] == [[27.0], [12.0]]
    assert [t.tolist() for t in outcome.task_vectors] == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    assert outcome.effects[0].energy_removed == pytest.approx(4 / 5)


def test_a_scale_needs_squares() -> None:
    with pytest.raises(BadInput):
        trim([torch.ones(3)] * 2, [observe_rows(torch.ones(2, 3))] * 2, ScaleMask())


def test_shift_mask_is_its_formula() -> None:
    task_vectors = inputs(ShiftMask())
    scores = [torch.stack([task_vectors[i].square() for i in range(4) if i != k]).sum(0) for k in range(4)]
    outcome = trim(task_vectors, [None] * 4, ShiftMask(rank=3))
    for ours, theirs in zip(outcome.task_vectors, plain_mask(task_vectors, scores, 3, True), strict=True):
        assert torch.equal(ours, theirs)


def test_shift_mask_by_hand() -> None:
    task_vectors = [torch.tensor([1.0, 2.0, 2.0, 0.0]), torch.tensor([0.0, 5.0, 0.0, 0.0])]
    # On behalf of task 0 only entry 1 of task 1; on behalf of task 1 the equal entries 1 and 2, before the smaller 0.
    outcome = trim(task_vectors, [None, None], ShiftMask(rank=2))
    assert [r.entries.tolist() for r in outcome.removed] == [[1], [1, 2]]
    assert [t.tolist() for t in outcome.task_vectors] == [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    assert outcome.effects[0].energy_removed == pytest.approx(8 / 9)
    assert (outcome.effects[0].conflict_before, outcome.effects[0].own_response_lost) == (None, None)


@pytest.mark.parametrize("shape", [(), (1, 1, 20), (4, 5), (0,)])
def test_masks_read_any_shape_as_a_vector(shape: tuple[int, ...]) -> None:
    task_vectors = [drawn(*shape, seed=k) for k in range(3)]
    flat = [t.flatten() for t in task_vectors]
    for params in (ShiftMask(), ScaleMask(balance=0.5)):
        statistics = observed(params, flat)
        shaped, vectors = trim(task_vectors, statistics, params), trim(flat, statistics, params)
        for ours, theirs in zip(shaped.task_vectors, vectors.task_vectors, strict=True):
            assert ours.shape == shape
            assert torch.equal(ours.flatten(), theirs)
        assert shaped.effects == vectors.effects


def test_keep_keeps() -> None:
    task_vectors = [drawn(3, 4, seed=k) for k in range(2)]
    outcome = trim(task_vectors, [None, None], Keep())
    assert all(torch.equal(a, b) for a, b in zip(outcome.task_vectors, task_vectors, strict=True))
    assert {figures_of(e) for e in outcome.effects} == {(0.0, None, None, None, None, None)}
