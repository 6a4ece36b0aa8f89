"""Times the projection of linear weights against its plain dense form, side by side."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from service.contract.treatments import Projection
from workers.statistics import Statistic, observe_rows
from workers.treatments import trim


def dense_form(vectors: list[Tensor], known: list[Statistic], params: Projection) -> list[Tensor]:
    """The formula as it is written: G_k = sum_i T_i (S_k - balance * S_i) T_i^T [out, out], eigh, project."""
    moments = [s.held.T @ s.held / s.rows for s in known]
    trimmed = [vector.clone() for vector in vectors]
    for k in range(len(vectors)):
        others = [i for i in range(len(vectors)) if i != k]
        terms = [vectors[i] @ (moments[k] - params.balance * moments[i]) @ vectors[i].T for i in others]
        conflict = torch.stack(terms).sum(0)
        values, directions = torch.linalg.eigh(conflict)
        basis = directions[:, -params.rank :][:, values[-params.rank :] > 0]
        for i in others:
            trimmed[i] = trimmed[i] - basis @ (basis.T @ trimmed[i])
    return trimmed


def main() -> None:
    """Print the median seconds of both and their ratio, per width."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 768, 1024, 2048])
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--rows", type=int, default=64, help="rows of features per task")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    print(f"{options.tasks} tasks, {options.rows} rows each, {torch.get_num_threads()} threads, float32")
    for width in options.widths:
        ours, plain, apart = measure(width, options.tasks, options.rows, options.runs)
        print(
            f"width {width:5d}: {ours:8.4f} s, dense form {plain:8.4f} s: {plain / ours:5.1f} times; apart {apart:.0e}"
        )


def measure(width: int, tasks: int, rows: int, runs: int) -> tuple[float, float, float]:
    """Median seconds of the treatment and of the dense form, and the largest relative difference of their results."""
    generator = torch.Generator().manual_seed(width)
    vectors = [torch.randn(width, width, generator=generator) / width for _ in range(tasks)]
    known = [observe_rows(torch.randn(rows, width, generator=generator)) for _ in range(tasks)]
    params = Projection(rank=4, balance=1.0)
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(runs):  # interleaved, so that a slow moment of the machine falls on both
        ours = timed(lambda: trim(vectors, known, params).task_vectors, seconds["ours"])
        plain = timed(lambda: dense_form(vectors, known, params), seconds["plain"])
    apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, plain, strict=True))
    return statistics.median(seconds["ours"]), statistics.median(seconds["plain"]), apart


def timed(work: Callable[[], list[Tensor]], seconds: list[float]) -> list[Tensor]:
    start = time.perf_counter()
    result = work()
    seconds.append(time.perf_counter() - start)
    return result


if __name__ == "__main__":
    main()
