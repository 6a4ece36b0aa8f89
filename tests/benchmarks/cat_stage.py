"""Compares CAT's merge stage with what it can't avoid: its bytes at the disk's rate, its products at the processor's.

    python -m tests.benchmarks.cat_stage --base zoo/base --tasks zoo/election zoo/news20 [--without-data]

The folders are as ``quality.py`` takes them. Unavoidable are, for every matrix, each task vector's answers to the
tasks' inputs (which the trim log needs, whatever finds the directions), and the projection itself; they are counted
from the shapes and from the rows of the statistics that calibration left, at the rate of a large matrix product in
float32. The floor of the bytes is what plain streaming takes, page cache warm. Runs alternate; medians are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from service.contract.plan import Plan, TensorPlan
from service.contract.stages import Stage
from service.contract.treatments import Projection, Role
from tests.benchmarks.processes import become_a_worker
from tests.benchmarks.quality import Merger, Task
from workers.stages import RUN

RATE_SIZE = 2048
SPAN_BYTES = 16 << 20

Rows = Mapping[str, int]  # of one task's factors, by parameter


def matmul_rate() -> float:
    """Floating-point operations a second in a product of large matrices, with torch's threads."""
    left, right = torch.randn(RATE_SIZE, RATE_SIZE), torch.randn(RATE_SIZE, RATE_SIZE)
    out = left @ right
    start = time.perf_counter()
    torch.mm(left, right, out=out)
    return 2 * RATE_SIZE**3 / (time.perf_counter() - start)


def stream(files: Sequence[Path], out: Path) -> float:
    """Seconds to read every byte of all files in large spans, and to write as many as the first has to the disk."""
    room = bytearray(SPAN_BYTES)
    start = time.perf_counter()
    with out.open("wb", buffering=0) as writer:
        for index, path in enumerate(files):
            with path.open("rb", buffering=0) as reader:
                while count := reader.readinto(room):
                    if index == 0:
                        writer.write(memoryview(room)[:count])
        os.fsync(writer.fileno())
    return time.perf_counter() - start


def unavoidable(plan: Plan, known: Sequence[Rows], tasks: int) -> float:
    """Floating-point operations of the products that trimming can't do without."""
    matrices = [tensor for shard in plan.shards for tensor in shard.tensors if tensor.source == "merged"]
    return sum(_products(tensor, known, tasks) for tensor in matrices if isinstance(tensor.treatment, Projection))


def _products(tensor: TensorPlan, known: Sequence[Rows], tasks: int) -> float:
    out = tensor.shape[-1] if tensor.transposed else tensor.shape[0]
    entries = float(torch.Size(tensor.shape).numel())
    rank = tensor.treatment.rank if isinstance(tensor.treatment, Projection) else 0
    projection = 2 * 2 * entries * rank * (tasks - 1) * tasks
    if not known:  # each task vector stands for its inputs, and T_i T_k^T is the transpose of T_k T_i^T
        narrow = min(out, int(entries) // out)
        pairs = tasks * (tasks + 1) / 2 if narrow == out else tasks**2
        return projection + 2 * entries * narrow * pairs
    if tensor.role is Role.EMBEDDING:  # inputs are one-hot: an answer is a selection
        return projection
    return projection + 2 * entries * tasks * sum(rows.get(tensor.name, 0) for rows in known)


def rows_of(path: Path) -> Rows:
    """The rows of each factor in a file of statistics."""
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.endswith(".factor")]  # noqa: SIM118 (not a mapping)
        return {name.removesuffix(".factor"): file.get_slice(name).get_shape()[-2] for name in names}


class Job:
    """A CAT job that has come as far as its merge stage."""

    def __init__(self, merger: Merger, method: Mapping[str, Any]) -> None:
        self._merger = merger
        self._recipe = merger._recipe(method)
        self._outputs: dict[Stage, list[dict[str, Any]]] = {}
        self._parts = dict(merger._stages(self._recipe, self._outputs))
        start = time.perf_counter()
        self._outputs[Stage.CALIBRATE] = self._run(Stage.CALIBRATE)
        self.calibration_seconds = time.perf_counter() - start
        self.plan = merger._work(self._recipe, Stage.MERGE, 0, self._outputs).plan()

    def _run(self, stage: Stage) -> list[dict[str, Any]]:
        works = [self._merger._work(self._recipe, stage, part, self._outputs) for part in range(self._parts[stage])]
        return [dict(RUN[stage](work).output) for work in works]

    def merge(self) -> float:
        """Seconds of the merge stage."""
        start = time.perf_counter()
        self._run(Stage.MERGE)
        return time.perf_counter() - start

    def rows(self) -> list[Rows]:
        """Per task, the rows of each factor; none where nothing was calibrated."""
        found = [output["statistics"] for output in self._outputs[Stage.CALIBRATE] if "statistics" in output]
        root = self._merger.scratch / "objects"
        return [rows_of(root / address.removeprefix("s3://")) for address in found]


def compare(job: Job, files: Sequence[Path], out: Path, repeats: int) -> None:
    merges: list[float] = []
    floors: list[float] = []
    rates: list[float] = []
    for _ in range(repeats):
        merges.append(job.merge())
        floors.append(stream(files, out))
        rates.append(matmul_rate())
    flops = unavoidable(job.plan, job.rows(), len(files) - 1)
    merge, floor, rate = (statistics.median(series) for series in (merges, floors, rates))
    products = flops / rate
    print(f"calibration {job.calibration_seconds:.2f} s")
    print(f"merge stage {merge:.2f} s; bytes {floor:.2f} s; products {products:.2f} s ({flops / 1e9:.0f} GFLOP", end="")
    print(f" at {rate / 1e9:.0f} GFLOP/s); ratio to the larger {merge / max(floor, products):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, nargs="+", required=True)
    parser.add_argument("--exemplars", type=int, default=8)
    parser.add_argument("--without-data", action="store_true")
    parser.add_argument("--method", type=json.loads, default={"name": "cat"})
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    become_a_worker("tests.benchmarks.cat_stage")
    folders = [folder.resolve() for folder in options.tasks]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder).resolve()
        merger = Merger(options.base.resolve(), [Task.read(path, {}) for path in folders], options.exemplars, scratch)
        job = Job(merger, {**options.method, "data": not options.without_data})
        files = [path / "model.safetensors" for path in (merger.base, *folders)]
        compare(job, files, scratch / "streamed", options.repeats)


if __name__ == "__main__":
    main()
