"""Every merge method against a plain float64 formula that shares nothing with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
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
    IsoCts,
    Karcher,
    Lot,
    ModelStock,
    Pcb,
    Regmean,
    Sce,
    Shrinkage,
    Slerp,
    TaskArithmetic,
    Ties,
    TsvM,
    Wudi,
)
from service.contract.treatments import Role
from workers.draws import BLOCK, drawn_mask, key_of, lower_bytes, upper_bytes
from workers.methods import Context, merge
from workers.statistics import Statistic, observe_indices, observe_rows, observe_squares

WEIGHTS = [1.0, 0.5, 2.0]
SHAPE = (12, 9)
Matrix = Any  # an array of float64; numpy's own types say too little of its sums
Formula = Callable[[list[Matrix], list[float], Any, Context], Matrix]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Three task vectors with something in common, as those of one base are."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(shape, generator=generator, dtype=dtype)
    return [0.7 * shared + torch.randn(shape, generator=generator, dtype=dtype) for _ in WEIGHTS]


def rows_of(width: int, task: int) -> Tensor:
    count = (4, 30, 7)[task]
    return torch.randn(count, width, generator=torch.Generator().manual_seed(40 + task), dtype=torch.float64)


def context_of(shape: tuple[int, ...] = SHAPE, role: Role = Role.LINEAR, **changes: Any) -> Context:
    (base,) = drawn(*shape, seed=99)[:1]
    width = math.prod(shape[1:])
    known = [observe_rows(rows_of(width, task)) for task in range(3)]
    return replace(Context("layer.weight", role, False, base, ["a", "b", "c"], known, seed=3), **changes)


def kept_largest(values: Matrix, count: int) -> Matrix:
    """True for the ``count`` largest magnitudes; ties to the lower index."""
    order = sorted(range(values.size), key=lambda i: (-abs(values.flat[i]), i))
    mask = np.zeros(values.size, dtype=bool)
    mask[order[:count]] = True
    return mask.reshape(values.shape)


def share(density: float, count: int) -> int:
    return max(1, math.floor(density * count + 0.5))


def elected(vectors: Sequence[Matrix], weights: Sequence[float], votes: Sequence[float] | None = None) -> Matrix:
    """Entry by entry, in plain Python."""
    merged = np.zeros(vectors[0].shape)
    for place in np.ndindex(vectors[0].shape):
        entries = [float(vector[place]) for vector in vectors]
        vote = sum(w * v for w, v in zip(votes or weights, entries, strict=True))
        agreeing = [(w, v) for w, v in zip(weights, entries, strict=True) if v * vote > 0]
        total = sum(w for w, _ in agreeing)
        merged[place] = sum(w * v for w, v in agreeing) / total if total else 0.0
    return merged


def weighted(vectors: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    return np.einsum("k,k...->...", np.array(weights), np.stack(vectors))


def combined(vectors: Sequence[Matrix], weights: Sequence[float], how: str) -> Matrix:
    return elected(vectors, weights) if how == "ties" else weighted(vectors, weights)


# --- formulas ---------------------------------------------------------------------------------------------------------


def task_arithmetic(T: list[Matrix], w: list[float], p: Any, c: Context) -> Matrix:
    return p.scaling * weighted(T, w)


def average(T: list[Matrix], w: list[float], p: Any, c: Context) -> Matrix:
    return weighted(T, w) / sum(w)


def ties(T: list[Matrix], w: list[float], p: Ties, c: Context) -> Matrix:
    return p.scaling * elected([t * kept_largest(t, share(p.density, t.size)) for t in T], w)


def breadcrumbs(T: list[Matrix], w: list[float], p: Breadcrumbs, c: Context) -> Matrix:
    crumbs = []
    for t in T:
        dropped = math.floor(p.gamma * (t.size - 1) + 0.5)
        mask = kept_largest(t, dropped + share(p.density, t.size)) & ~kept_largest(t, dropped)
        crumbs.append(t * mask)
    return p.scaling * combined(crumbs, w, p.combine)


def numbers(count: int, c: Context, task: str) -> Matrix:
    """The draws as fractions of 1; that they are random is tested apart."""
    return draws(count, key_of(c.seed, c.parameter, task)) / 65536


def draws(count: int, key: bytes, first: int = 0) -> Matrix:
    return upper_bytes(count, key, first) * 256.0 + lower_bytes(np.arange(first, first + count), key)


def rescaled(before: Matrix, after: Matrix, how: str, chances: Any) -> Matrix:
    return after / chances if how == "density" else after * np.abs(before).sum() / np.abs(after).sum()


def dare(T: list[Matrix], w: list[float], p: Dare, c: Context) -> Matrix:
    chance = round(p.density * 65536) / 65536
    masks = [(numbers(t.size, c, task) < chance).reshape(t.shape) for t, task in zip(T, c.tasks, strict=True)]
    return p.scaling * combined(
        [rescaled(t, t * m, p.rescale, chance) for t, m in zip(T, masks, strict=True)], w, p.combine
    )


def della(T: list[Matrix], w: list[float], p: Della, c: Context) -> Matrix:
    thinned = []
    for t, task in zip(T, c.tasks, strict=True):
        table, by_rank = t.reshape(t.shape[0], -1), numbers(t.size, c, task).reshape(t.shape[0], -1)
        after, chances = np.zeros_like(table), np.ones_like(table)
        n = table.shape[1]
        for i in range(table.shape[0]):
            order = sorted(range(n), key=lambda j: (-abs(table[i, j]), j))
            for rank, j in enumerate(order):
                drop = (1 - p.density - p.epsilon / 2) + p.epsilon / n * (rank + 0.5)
                chances[i, j] = round((1 - drop) * 65536) / 65536
                after[i, j] = table[i, j] * (by_rank[i, rank] < chances[i, j])
        thinned.append(rescaled(table, after, p.rescale, chances).reshape(t.shape))
    return p.scaling * combined(thinned, w, p.combine)


def slerp(T: list[Matrix], w: list[float], p: Slerp, c: Context) -> Matrix:
    base = c.base.numpy()
    one, two = base + T[0], base + T[1]
    t = w[1] / (w[0] + w[1]) if p.t is None else p.t
    angle = math.acos((one * two).sum() / np.linalg.norm(one) / np.linalg.norm(two))
    return (math.sin((1 - t) * angle) * one + math.sin(t * angle) * two) / math.sin(angle) - base


def karcher(T: list[Matrix], w: list[float], p: Karcher, c: Context) -> Matrix:
    """Gradient descent on the sphere itself, with whole vectors."""
    base, a = c.base.numpy(), np.array(w) / sum(w)
    checkpoints = [(base + t).ravel() for t in T]
    lengths = [np.linalg.norm(x) for x in checkpoints]
    units = [x / n for x, n in zip(checkpoints, lengths, strict=True)]
    center = weighted(units, list(a))
    for _ in range(500):
        center = center / np.linalg.norm(center)
        step = np.zeros_like(center)
        for share_k, u in zip(a, units, strict=True):
            angle = math.acos(min(1.0, u @ center))
            step += share_k * angle / math.sin(angle) * (u - (u @ center) * center)
        center = center + step
    return (float(a @ lengths) * center / np.linalg.norm(center)).reshape(base.shape) - base


def model_stock(T: list[Matrix], w: list[float], p: Any, c: Context) -> Matrix:
    a = [x / sum(w) for x in w]
    pairs = [(i, j) for i in range(3) for j in range(i)]
    cosines = [(T[i] * T[j]).sum() / np.linalg.norm(T[i]) / np.linalg.norm(T[j]) for i, j in pairs]
    cosine = sum(a[i] * a[j] * x for (i, j), x in zip(pairs, cosines, strict=True)) / sum(a[i] * a[j] for i, j in pairs)
    n = 1 / sum(x * x for x in a)
    return n * cosine / (1 + (n - 1) * cosine) * weighted(T, a)


def sce(T: list[Matrix], w: list[float], p: Sce, c: Context) -> Matrix:
    a = [x / sum(w) for x in w]
    mean = weighted(T, a)
    variance = sum(x * (t - mean) ** 2 for x, t in zip(a, T, strict=True))
    selected = [t * kept_largest(variance, share(p.density, variance.size)) for t in T]
    energies = [x * (t**2).sum() for x, t in zip(w, selected, strict=True)]
    return p.scaling * elected(selected, [e / sum(energies) for e in energies], votes=w)


def consensus(T: list[Matrix], w: list[float], p: Consensus, c: Context) -> Matrix:
    vectors = [x * t for x, t in zip(w, T, strict=True)]
    total = sum(vectors)
    votes = sum((np.abs(v) >= p.threshold * np.abs(total - v)).astype(int) for v in vectors)
    return p.scaling * total * (votes >= p.agreeing)


def pcb(T: list[Matrix], w: list[float], p: Pcb, c: Context) -> Matrix:
    together = sum(x * t for x, t in zip(w, T, strict=True)) * len(T) / sum(w)
    total, scores = np.zeros(T[0].shape), np.zeros(T[0].shape)
    for t, x in zip(T, w, strict=True):
        clipped = math.floor(p.clip * (t.size - 1) + 0.5)
        t_clipped = np.clip(t, -np.sort(np.abs(t).ravel())[-1 - clipped], np.sort(np.abs(t).ravel())[-1 - clipped])
        size = np.abs(t_clipped)
        size = (size - size.min()) / (size.max() - size.min())
        score = np.exp(len(T) * size**2) * np.tanh(t * together)
        limit = np.sort(score.ravel())[-1 - share(p.density, t.size)]
        score = np.maximum(score, limit)
        score = (score - limit) / (score.max() - limit)
        total, scores = total + x * t_clipped * score, scores + x * score
    return p.scaling * np.divide(total, scores, out=np.zeros_like(total), where=scores > 0)


def unfolded(T: list[Matrix]) -> list[Matrix]:
    return [t.reshape(t.shape[0], -1) for t in T]


def polar(x: Matrix) -> Matrix:
    left, _, right = np.linalg.svd(x, full_matrices=False)
    return left @ right


def tsv_m(T: list[Matrix], w: list[float], p: TsvM, c: Context) -> Matrix:
    parts = [np.linalg.svd(t, full_matrices=False) for t in unfolded(T)]
    k = min(parts[0][0].shape[0], parts[0][2].shape[1]) // len(T)
    left = polar(np.hstack([u[:, :k] for u, _, _ in parts]))
    right = polar(np.vstack([v[:k] for _, _, v in parts]))
    values = np.concatenate([x * s[:k] for x, (_, s, _) in zip(w, parts, strict=True)])
    return (p.scaling * left @ np.diag(values) @ right).reshape(T[0].shape)


def iso_c(T: list[Matrix], w: list[float], p: IsoC, c: Context) -> Matrix:
    left, values, right = np.linalg.svd(weighted(unfolded(T), w), full_matrices=False)
    return (p.scaling * values.mean() * left @ right).reshape(T[0].shape)


def iso_cts(T: list[Matrix], w: list[float], p: IsoCts, c: Context) -> Matrix:
    matrices = unfolded(T)
    rank = min(matrices[0].shape)
    own = round((rank - int(rank * p.common)) / len(T))
    left, values, right = np.linalg.svd(weighted(matrices, w), full_matrices=False)
    common = rank - own * len(T)
    U, S, V = [left[:, :common]], [values[:common]], [right[:common]]
    for x, t in zip(w, matrices, strict=True):
        u, s, v = np.linalg.svd(x * (t - U[0] @ U[0].T @ t), full_matrices=False)
        U, S, V = [*U, u[:, :own]], [*S, s[:own]], [*V, v[:own]]
    merged = p.scaling * np.concatenate(S).mean() * polar(np.hstack(U)) @ polar(np.vstack(V))
    return merged.reshape(T[0].shape)


def second_moments(width: int) -> list[Matrix]:
    rows = [rows_of(width, task).numpy() for task in range(3)]
    return [x.T @ x / len(x) for x in rows]


def lot(T: list[Matrix], w: list[float], p: Lot, c: Context) -> Matrix:
    matrices = unfolded(T)
    S = second_moments(matrices[0].shape[1])
    answers = sum(x * t @ s for x, t, s in zip(w, matrices, S, strict=True))
    total = sum(x * s for x, s in zip(w, S, strict=True))
    return (p.scaling * answers @ np.linalg.pinv(total, rcond=p.cutoff)).reshape(T[0].shape)


def regmean(T: list[Matrix], w: list[float], p: Regmean, c: Context) -> Matrix:
    """For the weights, as the paper has it."""
    base = unfolded([c.base.numpy()])[0]
    G = [p.off_diagonal * s + (1 - p.off_diagonal) * np.diag(np.diag(s)) for s in second_moments(base.shape[1])]
    answers = sum(x * (base + t) @ g for x, t, g in zip(w, unfolded(T), G, strict=True))
    return (answers @ np.linalg.inv(sum(x * g for x, g in zip(w, G, strict=True))) - base).reshape(T[0].shape)


def wudi(T: list[Matrix], w: list[float], p: Wudi, c: Context) -> Matrix:
    matrices = unfolded(T)
    if p.solver == "closed":
        S = [x * t.T @ t / (t**2).sum() for x, t in zip(w, matrices, strict=True)]
        merged = sum(t @ s for t, s in zip(matrices, S, strict=True)) @ np.linalg.pinv(sum(S), rcond=p.cutoff)
    else:
        merged = descended([torch.tensor(t) for t in matrices], w, p)
    return (p.scaling * merged).reshape(T[0].shape)


def shrinkage(T: list[Matrix], w: list[float], p: Shrinkage, c: Context) -> Matrix:
    """The stationary point, found with a general solver."""
    matrices = unfolded(T)
    seen = second_moments(matrices[0].shape[1])
    proxies = [t.T @ t / (t**2).sum() for t in matrices]
    M = [(1 - p.proxy) * s / np.trace(s) + p.proxy * q for s, q in zip(seen, proxies, strict=True)]
    answers = sum(x * t @ m for x, t, m in zip(w, matrices, M, strict=True))
    total = sum(x * m for x, m in zip(w, M, strict=True))
    ridge = p.damping * np.trace(total) / len(total)
    return (p.scaling * np.linalg.solve(total + ridge * np.eye(len(total)), answers.T).T).reshape(T[0].shape)


def descended(T: list[Tensor], w: list[float], p: Wudi) -> Matrix:
    """torch's own Adam on the loss itself."""
    point = sum(x * t for x, t in zip(w, T, strict=True)).requires_grad_()  # type: ignore[union-attr]
    adam = torch.optim.Adam([point], lr=p.learning_rate)
    for _ in range(p.steps):
        adam.zero_grad()
        losses = [x * ((point - t) @ t.T).square().sum() / t.square().sum() for x, t in zip(w, T, strict=True)]
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        adam.step()
    found: Matrix = point.detach().numpy()
    return found


CASES: list[tuple[Formula, AnyMethod]] = [
    (task_arithmetic, TaskArithmetic(scaling=0.3)),
    (task_arithmetic, Cat(scaling=0.3)),
    (average, Average()),
    *((ties, Ties(density=d, scaling=0.7, scope="tensor")) for d in (0.01, 0.2, 0.5, 1.0)),
    (ties, Cat(then=Ties(density=0.3))),
    (breadcrumbs, Breadcrumbs(density=0.3, gamma=0.1)),
    (breadcrumbs, Breadcrumbs(density=0.5, gamma=0.0, combine="ties")),
    (dare, Dare(density=0.3)),
    (dare, Dare(density=0.6, combine="ties", rescale="l1")),
    (della, Della(density=0.4, epsilon=0.3)),
    (della, Della(density=0.5, combine="linear", rescale="l1")),
    (karcher, Karcher()),
    (model_stock, ModelStock()),
    (sce, Sce(density=0.3)),
    (sce, Sce(density=1.0, scaling=0.5)),
    (consensus, Consensus()),
    (consensus, Consensus(agreeing=3, threshold=0.2)),
    (pcb, Pcb(density=0.2)),
    (pcb, Pcb(density=0.7, clip=0.05)),
    (tsv_m, TsvM()),
    (iso_c, IsoC(scaling=0.8)),
    (iso_cts, IsoCts()),
    (iso_cts, IsoCts(common=0.5, scaling=1.3)),
    (lot, Lot(scaling=1.2)),
    (regmean, Regmean()),
    (regmean, Regmean(off_diagonal=0.3)),
    (wudi, Wudi(solver="closed")),
    (wudi, Wudi(steps=40, learning_rate=1e-3)),
    (shrinkage, Shrinkage()),
    (shrinkage, Shrinkage(proxy=0.2, damping=0.3)),
]


def test_every_row_has_a_formula() -> None:
    assert {params.combining.combines for _, params in CASES} | {"slerp"} == {row.combines for row in ROWS.values()}


@pytest.mark.parametrize(("formula", "params"), CASES, ids=[f"{f.__name__}-{i}" for i, (f, _) in enumerate(CASES)])
@pytest.mark.parametrize(
    ("role", "shape"),
    [(Role.LINEAR, SHAPE), (Role.LINEAR, SHAPE[::-1]), (Role.CONVOLUTION, (7, 2, 3, 2))],
    ids=["tall", "wide", "convolution"],
)
def test_each_method_is_its_formula(formula: Formula, params: AnyMethod, role: Role, shape: tuple[int, ...]) -> None:
    task_vectors = drawn(*shape)
    context = context_of(shape, role)
    expected = formula([t.numpy() for t in task_vectors], WEIGHTS, params.combining, context)
    update = merge(task_vectors, WEIGHTS, params, context)
    torch.testing.assert_close(update, torch.from_numpy(expected), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("t", [None, 0.0, 0.3, 1.0])
def test_slerp_is_its_formula(t: float | None) -> None:
    two, context = drawn(*SHAPE)[:2], context_of().of([0, 1])
    expected = slerp([t.numpy() for t in two], [1.0, 0.5], Slerp(t=t), context)
    torch.testing.assert_close(merge(two, [1.0, 0.5], Slerp(t=t), context), torch.from_numpy(expected))


def test_the_karcher_mean_of_two_is_slerp() -> None:
    two, context = drawn(*SHAPE)[:2], context_of().of([0, 1])
    unit = [t * ((context.base + drawn(*SHAPE)[0]).norm() / (context.base + t).norm()) for t in two]
    same_length = [(context.base + t) * (10 / (context.base + t).norm()) - context.base for t in unit]
    mean = merge(same_length, [0.7, 0.3], Karcher(), context)
    torch.testing.assert_close(mean, merge(same_length, [0.7, 0.3], Slerp(), context))


def test_what_is_no_matrix_is_averaged() -> None:
    vectors = drawn(9)
    mean = torch.from_numpy(weighted([t.numpy() for t in vectors], WEIGHTS) / sum(WEIGHTS))
    for params in (TsvM(scaling=0.5), IsoC(scaling=0.5), IsoCts(scaling=0.5), Wudi(scaling=0.5), Lot(scaling=0.5)):
        update = merge(vectors, WEIGHTS, params, context_of((9,), Role.SHIFT))
        torch.testing.assert_close(update, 0.5 * mean)


def test_lot_averages_scales_and_embeddings_entry_by_entry() -> None:
    scales, tables = drawn(6), drawn(5, 3)
    squares = [observe_squares(rows_of(6, task)) for task in range(3)]
    counts = [observe_indices(torch.tensor([3.0, 0, 1, task, 0]), rows=4 + task) for task in range(3)]
    q = [s.held.numpy() / s.rows for s in squares]
    seen: Matrix = sum(w * x for w, x in zip(WEIGHTS, q, strict=True))
    expected = sum(w * t.numpy() * x for w, t, x in zip(WEIGHTS, scales, q, strict=True)) / seen
    update = merge(scales, WEIGHTS, Lot(), context_of((6,), Role.SCALE, statistics=squares))
    torch.testing.assert_close(update, torch.as_tensor(expected))
    f = [s.held.numpy()[:, None] / s.rows for s in counts]
    table = merge(tables, WEIGHTS, Lot(), context_of((5, 3), Role.EMBEDDING, statistics=counts, transposed=True))
    total: Matrix = sum(w * x for w, x in zip(WEIGHTS, f, strict=True))
    answers: Matrix = sum(w * t.numpy() * x for w, t, x in zip(WEIGHTS, tables, f, strict=True))
    known = total[:, 0] > 0
    torch.testing.assert_close(table[known], torch.as_tensor(answers[known] / total[known]))
    mean = weighted([t.numpy() for t in tables], WEIGHTS) / sum(WEIGHTS)
    torch.testing.assert_close(table[~known], torch.as_tensor(mean[~known]))


def test_lot_keeps_what_every_task_answers_to_its_own_inputs() -> None:
    """With fewer rows than columns in all, each task's own response can be, and is, kept whole."""
    task_vectors, rows = drawn(8, 20), [rows_of(20, 0), rows_of(20, 2), rows_of(20, 1)[:3]]
    known: list[Statistic | None] = [observe_rows(x) for x in rows]
    update = merge(task_vectors, [1.0] * 3, Lot(cutoff=0), context_of((8, 20), statistics=known))
    for t, x in zip(task_vectors, rows, strict=True):
        torch.testing.assert_close(update @ x.T, t @ x.T)


# --- random numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("proxy", "other"), [(0.0, Lot()), (1.0, Wudi(solver="closed"))], ids=["lot", "wudi"])
def test_shrinkage_lies_between_lot_and_wudi(proxy: float, other: AnyMethod) -> None:
    task_vectors = drawn(*SHAPE)
    context = context_of()
    seen = [replace(s, factor=s.held / s.held.norm() * s.rows**0.5) for s in context.statistics if s is not None]
    context = replace(context, statistics=seen)  # of trace 1, as shrinkage makes them
    found = merge(task_vectors, WEIGHTS, Shrinkage(scaling=1.0, proxy=proxy, damping=1e-6), context)
    torch.testing.assert_close(found, merge(task_vectors, WEIGHTS, other, context), rtol=1e-4, atol=1e-4)


def test_shrinkage_without_statistics_relies_on_task_vectors() -> None:
    task_vectors = drawn(*SHAPE)
    unknown = context_of(statistics=[None] * 3)
    alone = merge(task_vectors, WEIGHTS, Shrinkage(), unknown)
    torch.testing.assert_close(alone, merge(task_vectors, WEIGHTS, Shrinkage(proxy=1.0), context_of()))


KEY = key_of(1, "a", "b")


def test_draws_are_uniform_and_blocks_are_their_own() -> None:
    drawn = draws(2 * BLOCK, KEY)
    assert not np.array_equal(drawn[:BLOCK], drawn[BLOCK:])
    for digits in (drawn[:BLOCK] // 256, drawn[:BLOCK] % 256):
        counts = np.bincount(digits.astype(int), minlength=256)
        chi_squared = ((counts - BLOCK / 256) ** 2 / (BLOCK / 256)).sum()
        assert 160 < chi_squared < 360  # 255 degrees of freedom; the numbers are the same every time
    upper, lower = divmod(drawn[:BLOCK], 256)
    assert abs(np.corrcoef(upper, lower)[0, 1]) < 4 / BLOCK**0.5
    assert not np.array_equal(drawn, draws(2 * BLOCK, key_of(2, "a", "b")))


@pytest.mark.parametrize("first", [1, 32, 100, BLOCK - 3, BLOCK, BLOCK + 17])
def test_draws_can_begin_anywhere(first: int) -> None:
    whole = draws(2 * BLOCK, KEY)
    count = min(BLOCK, 2 * BLOCK - first)
    assert np.array_equal(draws(count, KEY, first), whole[first : first + count])
    limits = np.array([1, 255, 256, 257, 30_000, 65_535, 65_536])
    rows = whole[first : first + 700].reshape(100, 7)
    assert np.array_equal(drawn_mask((100, 7), limits, KEY, first), rows < limits)
    for limit in limits:
        assert np.array_equal(drawn_mask((700,), limit, KEY, first), whole[first : first + 700] < limit)


def test_dare_keeps_the_expectation() -> None:
    ones = [torch.ones(400, 500, dtype=torch.float64)]
    context = context_of((400, 500)).of([0])
    update = merge(ones, [1.0], Dare(density=0.3, scaling=1.0), context)
    assert abs(float(update.mean()) - 1) < 0.02
    assert abs(float((update != 0).double().mean()) - 0.3) < 0.005


def test_della_keeps_large_entries_rather_than_small_ones_and_the_expectation() -> None:
    values = torch.arange(1.0, 501, dtype=torch.float64).expand(400, 500)
    params = Della(density=0.5, epsilon=0.4, combine="linear", scaling=1.0)
    update = merge([values], [1.0], params, context_of((400, 500)).of([0]))
    kept = (update != 0).double().mean(dim=0)
    assert abs(float(kept[:50].mean()) - 0.32) < 0.02
    assert abs(float(kept[-50:].mean()) - 0.68) < 0.02
    assert abs(float((update / values).mean()) - 1) < 0.02
