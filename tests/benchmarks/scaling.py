"""Measures how time grows with the number of tensors and of parameters, and how memory does not.

    python -m tests.benchmarks.scaling --tensors 5000 20000 50000 --parameters 50 200 800

Checkpoints are sparse files of zeros without a config, with the names of an expert model: reading them costs what
reading costs from the page cache, and they take no disk.

    python -m tests.benchmarks.scaling --memory 500 2000 7000

merges folders of that many millions of parameters, four tasks, shaped as a Llama is, with two embeddings that are large
beside the rest. Inputs are sparse here too; all shards are planned for and merged, the result of each deleted before
the next is begun, so that 7 billion parameters need no more disk than one shard takes. Peak memory is that of a process
that plans and merges, less what the same process holds for a model of one small tensor: the interpreter and torch.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from service.contract.checkpoint import tensor_bytes, write_header
from tests.benchmarks.processes import Measured, Stages, merge_folders

EXPERTS = 64
TINY = (8, 8)
WIDE = (2048, 2048)
MB = 1 << 20
VOCABULARY = 32_000
WIDTHS = ((10**9, 1024), (3 * 10**9, 2048), (10**12, 4096))  # of models up to so many parameters
SHARD_BYTES = 1 << 30

Line = tuple[Measured, Stages]


def names(count: int) -> Iterator[str]:
    """Names as an expert model has them: three matrices for each of 64 experts of a layer."""
    for index in range(count):
        expert, part = divmod(index, 3)
        layer, number = divmod(expert, EXPERTS)
        yield f"model.layers.{layer}.mlp.experts.{number}.{('gate', 'up', 'down')[part]}_proj.weight"


def make_sparse(path: Path, count: int, shape: tuple[int, ...], dtype: str = "BF16") -> None:
    header = write_header([(name, dtype, shape) for name in names(count)])
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + count * tensor_bytes(dtype, shape))


def measured(folder: Path, count: int, shape: tuple[int, ...], tasks: int, method: dict[str, object]) -> Line:
    """One merge of so many tensors of one shape."""
    files = [folder / f"{name}.safetensors" for name in ("base", *(f"t{index}" for index in range(tasks)))]
    for file in files:
        make_sparse(file, count, shape)
    try:
        return merge_folders(files[0], files[1:], method, folder / "out")
    finally:
        shutil.rmtree(folder / "out", ignore_errors=True)
        for file in files:
            file.unlink()


def by_tensors(folder: Path, counts: list[int], tasks: int, method: dict[str, object]) -> None:
    print("| tensors | plan, s | calibrate, s | merge, s | per tensor, ms | peak memory, MB |")
    print("|---:|---:|---:|---:|---:|---:|")
    for count in counts:
        run, stages = measured(folder, count, TINY, tasks, method)
        each = 1000 * stages.total / count
        seconds = stages.seconds
        figures = f"{seconds['plan']:.2f} | {seconds['calibrate']:.2f} | {seconds['merge']:.2f} | {each:.3f}"
        print(f"| {count:,} | {figures} | {run.peak_bytes / MB:.0f} |", flush=True)


def by_parameters(folder: Path, millions: list[int], tasks: int, method: dict[str, object]) -> None:
    print("| parameters | plan + calibrate + merge, s | s per 10^9 parameters read | peak memory, MB |")
    print("|---:|---:|---:|---:|")
    each = WIDE[0] * WIDE[1]
    for million in millions:
        count = max(1, million * 10**6 // each)
        run, stages = measured(folder, count, WIDE, tasks, method)
        total = stages.total
        rate = total / (count * each * (tasks + 1) / 1e9)
        print(f"| {count * each / 1e6:,.0f} M | {total:.2f} | {rate:.2f} | {run.peak_bytes / MB:.0f} |", flush=True)


def by_tasks(folder: Path, tasks: list[int], million: int, method: dict[str, object]) -> None:
    print("| tasks | plan + calibrate + merge, s | s per task and base | peak memory, MB |")
    print("|---:|---:|---:|---:|")
    for count in tasks:
        run, stages = measured(folder, max(1, million * 10**6 // (WIDE[0] * WIDE[1])), WIDE, count, method)
        total = stages.total
        print(f"| {count} | {total:.2f} | {total / (count + 1):.2f} | {run.peak_bytes / MB:.0f} |", flush=True)


def by_size(folder: Path, millions: list[int], tasks: int, method: dict[str, object]) -> None:
    print("| parameters | shards | plan + merge, s | largest tensor x (tasks + 2), MB | peak memory over idle, MB |")
    print("|---:|---:|---:|---:|---:|")
    idle, _ = _shaped(folder, [("w", (8, 8))], tasks, method)
    for million in millions:
        tensors = list(llama(million * 10**6))
        run, stages = _shaped(folder, tensors, tasks, method)
        parameters = sum(math.prod(shape) for _, shape in tensors)
        shards = -(-2 * parameters // SHARD_BYTES)
        largest = max(tensor_bytes("BF16", shape) for _, shape in tensors) * (tasks + 2) / MB
        peak = (run.peak_bytes - idle.peak_bytes) / MB
        print(f"| {parameters / 1e9:.1f} G | {shards} | {stages.total:.1f} | {largest:.0f} | {peak:.0f} |", flush=True)


def llama(parameters: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A Llama of about so many parameters: as wide as models of its size are."""
    width = next(width for limit, width in WIDTHS if parameters <= limit)
    inner, each = width * 11 // 4, width * width * (4 + 3 * 11 // 4)
    yield "model.embed_tokens.weight", (VOCABULARY, width)
    for layer in range(max(1, (parameters - 2 * VOCABULARY * width) // each)):
        for name in "qkvo":
            yield f"model.layers.{layer}.self_attn.{name}_proj.weight", (width, width)
        for name, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
            yield f"model.layers.{layer}.mlp.{name}_proj.weight", shape
        yield f"model.layers.{layer}.input_layernorm.weight", (width,)
    yield "lm_head.weight", (VOCABULARY, width)


def _shaped(folder: Path, tensors: list[tuple[str, tuple[int, ...]]], tasks: int, method: dict[str, object]) -> Line:
    files = [folder / f"{name}.safetensors" for name in ("base", *(f"t{index}" for index in range(tasks)))]
    header = write_header([(name, "BF16", shape) for name, shape in tensors])
    for path in files:
        with path.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(tensor_bytes("BF16", shape) for _, shape in tensors))
    try:
        return merge_folders(files[0], files[1:], method, folder / "out", SHARD_BYTES, keep=False)
    finally:
        shutil.rmtree(folder / "out", ignore_errors=True)
        for path in files:
            path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, nargs="*", default=[5000, 20000, 50000])
    parser.add_argument("--parameters", type=int, nargs="*", default=[50, 200, 800], help="in millions")
    parser.add_argument("--tasks", type=int, nargs="*", default=[2, 8, 32], help="numbers of tasks to compare")
    parser.add_argument("--method", type=json.loads, default={"name": "task_arithmetic"})
    parser.add_argument("--memory", type=int, nargs="*", help="only peak memory, by millions of parameters")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        if options.memory is not None:
            by_size(folder, options.memory or [500, 2000, 7000], 4, options.method)
            return
        by_tensors(folder, options.tensors, 2, options.method)
        print()
        by_parameters(folder, options.parameters, 2, options.method)
        print()
        by_tasks(folder, options.tasks, min(options.parameters, default=50), options.method)


if __name__ == "__main__":
    main()
