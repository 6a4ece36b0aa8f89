"""Times the projection of linear weights against its plain dense form, side by side.

    python -m tests.benchmarks.projection_routes [--widths 768 1024] [--rows 2 16 64] [--whole-up-to 1024]

Where a width is too large to wait for the dense form, it is timed for one task's basis only, and counted for each.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from service.contract.treatments import Projection
from workers.statistics import Statistic, observe_rows
from workers.treatments import Removed, trim
from workers.treatments.projection import apply_removed

T = TypeVar("T")
DECAY = 2.0  # inputs vary along their dimensions by so many powers of ten


@dataclass(frozen=True)
class Scene:
    """Square task vectors and the rows that each task sends into the layer."""

    vectors: list[Tensor]
    known: list[Statistic]

    @classmethod
    def draw(cls, width: int, tasks: int, rows: int) -> Scene:
        generator = torch.Generator().manual_seed(width)
        spread = torch.logspace(0, -DECAY, width)
        vectors = [torch.randn(width, width, generator=generator) / width for _ in range(tasks)]
        known = [observe_rows(torch.randn(rows, width, generator=generator) * spread) for _ in range(tasks)]
        return cls(vectors, known)


def dense_basis(scene: Scene, k: int, params: Projection) -> Tensor:
    """The formula as it is written: G_k = sum_i T_i (S_k - balance * S_i) T_i^T [out, out], and its eigenvectors."""
    others = [i for i in range(len(scene.vectors)) if i != k]
    moments = {i: scene.known[i].held.T @ scene.known[i].held / scene.known[i].rows for i in (k, *others)}
    conflict = torch.zeros_like(scene.vectors[k])
    for i in others:
        conflict += scene.vectors[i] @ (moments[k] - params.balance * moments[i]) @ scene.vectors[i].T
    values, directions = torch.linalg.eigh(conflict)
    basis: Tensor = directions[:, -params.rank :][:, values[-params.rank :] > 0]
    return basis


def dense_form(scene: Scene, params: Projection, bases_of: Sequence[int]) -> list[Tensor]:
    """Every task vector without the bases of the given tasks."""
    trimmed = [vector.clone() for vector in scene.vectors]
    for k in bases_of:
        basis = dense_basis(scene, k, params)
        for i in range(len(trimmed)):
            if i != k:
                trimmed[i] = trimmed[i] - basis @ (basis.T @ trimmed[i])
    return trimmed


@dataclass(frozen=True)
class Figures:
    """Median seconds of both forms, and the largest relative difference of what they leave."""

    ours: float
    dense: float
    apart: float


def measure(scene: Scene, params: Projection, runs: int, *, whole: bool) -> Figures:
    tasks = range(len(scene.vectors))
    ours: list[float] = []
    dense: list[float] = []
    for _ in range(runs):  # interleaved, so that a slow moment of the machine falls on both
        outcome = timed(lambda: trim(scene.vectors, scene.known, params), ours)
        plain = timed(lambda: dense_form(scene, params, tasks if whole else tasks[:1]), dense)
    removed = [part if whole or k == 0 else nothing(part) for k, part in enumerate(outcome.removed)]
    left = apply_removed(scene.vectors, removed, params)
    apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(left, plain, strict=True))
    return Figures(statistics.median(ours), statistics.median(dense) * (1 if whole else len(tasks)), apart)


def nothing(part: Removed) -> Removed:
    return Removed(scores=part.scores[:0], basis=part.directions[:, :0])


def timed(work: Callable[[], T], seconds: list[float]) -> T:
    start = time.perf_counter()
    result = work()
    seconds.append(time.perf_counter() - start)
    return result


def main() -> None:
    """Print the median seconds of both and their ratio, per width and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 1024, 2048, 4096, 8192])
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 16, 64], help="rows of features per task")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--balance", type=float, default=5.0)
    parser.add_argument("--whole-up-to", type=int, default=2048, help="width up to which the dense form runs in full")
    options = parser.parse_args()
    print(f"{options.tasks} tasks, {torch.get_num_threads()} threads, float32, rank 4, balance {options.balance:g}")
    print("| width | rows | treatment, s | dense form, s | times | apart |")
    print("|---:|---:|---:|---:|---:|---:|")
    for width in options.widths:
        whole = width <= options.whole_up_to
        for rows in options.rows:
            scene = Scene.draw(width, options.tasks, rows)
            params = Projection(rank=4, balance=options.balance)
            found = measure(scene, params, 5 if width <= 1024 else 1, whole=whole)
            ratio = found.dense / found.ours
            print(f"| {width} | {rows} | {found.ours:.3f} | {found.dense:.2f} | {ratio:.1f} | {found.apart:.0e} |")


if __name__ == "__main__":
    main()
