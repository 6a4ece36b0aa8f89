"""Takes out of each task vector the output directions in which it disturbs other tasks: for weight matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.contract.treatments import Projection
from workers.statistics import Statistic
from workers.threads import one_thread, shared_out
from workers.treatments.outcome import Effect, Removed, Trimmed, check_alike, energy, known, share
from workers.treatments.removal import Removal, Stripped, look, take
from workers.treatments.roots import Root, root_of
from workers.treatments.spectrum import Difference, is_formed, leading

ALONE = 1 << 15  # entries of a task vector below which no other thread pays
# All answers are held at once, rather than computed task by task, where they take no more than
HELD_SHARE = 2  # task vectors' worth of memory, or
HELD_ENTRIES = 1 << 24  # entries
TOGETHER = 4  # tasks whose directions are found side by side, where all answers are held


def trim(
    task_vectors: Sequence[Tensor],
    statistics: Sequence[Statistic | None],
    params: Projection,
    out: Sequence[Tensor] | None = None,
) -> Trimmed:
    """Project the basis B_k of every other task k out of each task vector ``[out, in]``, in the order of the tasks.

    B_k holds the eigenvectors of the ``params.rank`` largest eigenvalues (positive ones only, unless ``params`` says
    otherwise) of G_k = sum_{i != k} T_i (S_k - balance * S_i) T_i^T, taken from the untrimmed task vectors:
    CAT Merging, arXiv:2505.06977, in the layout of ``torch.nn.Linear``. With r the rows of a statistic's factor, this
    holds the tasks' answers to their own inputs ``[out, r]`` and those of all tasks to one task's, beside what is
    trimmed. ``out`` is where that goes; it may be the task vectors themselves.

    Raises:
        BadInput: task vectors differ in shape or type, or a statistic is missing, empty or of another width.
        BadTensor: a task vector or a statistic holds NaN or infinity.
    """
    check_alike(task_vectors, dimensions=2)
    roots = [root_of(s, params.moments, like=task_vectors[0]) for s in _usable(task_vectors, statistics)]
    places = [torch.empty_like(vector) for vector in task_vectors] if out is None else out
    tasks = range(len(task_vectors))
    with one_thread() as threads:
        threads = threads if task_vectors[0].numel() >= ALONE else 1
        answers = _Answers.of(task_vectors, roots, threads)
        together = 1 if answers.held is None else TOGETHER
        batches = [tasks[first : first + together] for first in tasks[::together]]
        found = [
            each for batch in shared_out(lambda ks: _disturbed(answers, ks, params), batches, threads) for each in batch
        ]
        removals = [Removal.on_behalf([part for part, _ in found], i) for i in tasks]

        def looked(i: int) -> tuple[Stripped, list[Tensor]]:
            stripped = look(task_vectors[i], removals[i], restore_norm=params.restore_norm, measure=True)
            return stripped, [root.answer(stripped.coefficients) for root in roots]

        # All are looked at before any is changed: without exemplars, task vectors stand for inputs too.
        seen = shared_out(looked, tasks, threads)
        shared_out(lambda i: take(task_vectors[i], removals[i], seen[i][0], places[i]), tasks, threads)
    effects = [_effect(removals[i], *seen[i], [squares[i] for _, squares in found], i) for i in tasks]
    return Trimmed(list(places), [part for part, _ in found], effects)


def apply_removed(task_vectors: Sequence[Tensor], removed: Sequence[Removed], params: Projection) -> list[Tensor]:
    """The trimmed task vectors, from the untrimmed ones and the recorded bases alone: no statistics needed.

    Raises:
        BadInput: task vectors differ in shape or type.
    """
    check_alike(task_vectors, dimensions=2)
    places = [torch.empty_like(vector) for vector in task_vectors]
    with one_thread():
        for i, before in enumerate(task_vectors):
            removal = Removal.on_behalf(removed, i)
            take(before, removal, look(before, removal, restore_norm=params.restore_norm, measure=False), places[i])
    return places


@dataclass(frozen=True, eq=False)
class _Answers:
    """How task vectors answer tasks' inputs: T_i R_k^T ``[out, r_k]``.

    Their ``own`` are all held, the others' too where they are narrow; otherwise those are computed when asked for.
    """

    task_vectors: Sequence[Tensor]
    roots: Sequence[Root]
    own: list[Tensor]
    own_energies: list[float]
    held: list[list[Tensor]] | None = None
    own_squares: Sequence[Tensor] = ()  # of the own answers, [out, out], where every G_k will be made from them

    @classmethod
    def of(cls, task_vectors: Sequence[Tensor], roots: Sequence[Root], threads: int) -> _Answers:
        tasks, (size, width) = range(len(task_vectors)), task_vectors[0].shape
        columns = sum(root.rows for root in roots)
        held, squares = None, []
        is_small = len(tasks) * columns * size <= max(HELD_SHARE * width * size, HELD_ENTRIES)
        if is_small and all(root.indices is None for root in roots):
            answered = _mirrored if _stand_for_inputs(task_vectors, roots) else _answered
            held = answered(task_vectors, roots, threads)
            own = [held[i][i] for i in tasks]
        else:
            own = shared_out(lambda i: roots[i].answer(task_vectors[i]), tasks, threads)
        if is_formed(size, 2 * columns * (len(tasks) - 1) // len(tasks)):  # half of them gains, half costs
            squares = shared_out(lambda answer: answer @ answer.T, own, threads)
        return cls(task_vectors, roots, own, [energy(answer) for answer in own], held, squares)

    def to(self, k: int, i: int) -> Tensor:
        """How task vector ``i`` answers task ``k``'s inputs."""
        if i == k:
            return self.own[k]
        return self.roots[k].answer(self.task_vectors[i]) if self.held is None else self.held[i][k]

    def conflict(self, k: int, to_k: Sequence[Tensor], squares: Sequence[float], balance: float) -> Difference:
        """G_k, from all answers ``to_k`` and their ``squares``."""
        others = [i for i in range(len(to_k)) if i != k]
        gains = [to_k[i] for i in others] or [to_k[k][:, :0]]
        own_squares = [self.own_squares[i] for i in others] if self.own_squares else ()
        energies = (sum(squares[i] for i in others), sum(self.own_energies[i] for i in others))
        return Difference(gains, [self.own[i] for i in others], balance, own_squares, energies)


def _answered(task_vectors: Sequence[Tensor], roots: Sequence[Root], threads: int) -> list[list[Tensor]]:
    """All answers, by task vector and by task: each task vector is read once."""
    widths = [root.rows for root in roots]
    together = roots[0].weights.new_empty(sum(widths), task_vectors[0].shape[1])
    for place, root in zip(torch.split(together, widths), roots, strict=True):
        torch.mul(root.weights, root.scale, out=place)
    return shared_out(lambda vector: list(torch.split(vector @ together.T, widths, dim=1)), task_vectors, threads)


def _stand_for_inputs(task_vectors: Sequence[Tensor], roots: Sequence[Root]) -> bool:
    return all(root.weights is vector for root, vector in zip(roots, task_vectors, strict=True))


def _mirrored(task_vectors: Sequence[Tensor], roots: Sequence[Root], threads: int) -> list[list[Tensor]]:
    """As ``_answered``, where the factors are the task vectors: T_k T_i^T is the transpose of T_i T_k^T."""
    tasks = range(len(task_vectors))
    pairs = [(i, k) for i in tasks for k in tasks[i:]]
    found = shared_out(lambda pair: task_vectors[pair[0]] @ task_vectors[pair[1]].T, pairs, threads)
    products = dict(zip(pairs, found, strict=True))
    both = {**{(k, i): product.T for (i, k), product in products.items()}, **products}
    return [[both[i, k] * roots[k].scale for k in tasks] for i in tasks]


def _usable(task_vectors: Sequence[Tensor], statistics: Sequence[Statistic | None]) -> list[Statistic]:
    return known(statistics, tasks=len(task_vectors), width=task_vectors[0].shape[1])


def _disturbed(answers: _Answers, ks: Sequence[int], params: Projection) -> list[tuple[Removed, list[float]]]:
    """What is removed on each of some tasks' behalf, and the squares of every task vector's answer to its inputs."""
    tasks = range(len(answers.task_vectors))
    conflicts, squares = [], []
    for k in ks:
        to_k = [answers.to(k, i) for i in tasks]
        squares.append([answers.own_energies[i] if i == k else energy(to_k[i]) for i in tasks])
        conflicts.append(answers.conflict(k, to_k, squares[-1], params.balance))
    rank = params.rank if len(tasks) > 1 else 0
    like = answers.own[0]
    pairs = leading(conflicts, rank, positive_only=params.positive_only, precision=torch.finfo(like.dtype).eps)
    removed = [Removed(scores=values, basis=vectors.to(like.dtype)) for values, vectors in pairs]
    return list(zip(removed, squares, strict=True))


def _effect(
    removal: Removal, stripped: Stripped, answers: Sequence[Tensor], squares: Sequence[float], i: int
) -> Effect:
    """``squares`` are those of the untrimmed vector's answers, per task; ``answers`` are those of its coefficients."""
    factor = stripped.factor
    after = [factor**2 * max(0.0, square - energy(a)) for square, a in zip(squares, answers, strict=True)]
    own = answers[i]
    # T - f (T - V a) = (1 - f) T + f V a, whose square has three terms.
    lost = (1 - factor) ** 2 * squares[i] + 2 * factor * (1 - factor) * removal.along(own)
    lost += factor**2 * removal.square_of(own)
    return Effect(
        energy=stripped.whole,
        energy_removed=share(stripped.gone, stripped.whole),
        conflict_before=sum(squares) - squares[i],
        conflict_after=sum(after) - after[i],
        own_response_lost=share(lost, squares[i]),
        large_share=stripped.large / stripped.gone if stripped.gone > 0 else None,
        responses=tuple(squares),
        responses_left=tuple(after),
    )
