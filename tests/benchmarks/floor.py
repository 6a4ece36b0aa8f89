"""Compares Task Arithmetic, from folder to folder, with reading and writing the same bytes and nothing else.

    python -m tests.benchmarks.floor [--folder /tmp/llama] [--repeats 5]

The folder holds ``base`` and ``e0``, ``e1`` and so on, as ``checkpoints.py`` makes them; without one they are made.
Runs alternate, the page cache is warm, and both sides end with the bytes on disk (fsync). Processor seconds are given
too: where other programs keep the processors busy they say more than the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.benchmarks.processes import merge_folders

SPAN_BYTES = 16 << 20
READERS = 4
SHARD_BYTES = 270_000_000


@contextmanager
def family(folder: Path | None, layers: int, width: int) -> Iterator[Path]:
    """The given folder of models, or one that is made now and taken away afterwards."""
    if folder is not None:
        yield folder.resolve()
        return
    with tempfile.TemporaryDirectory() as scratch:
        maker = Path(__file__).with_name("checkpoints.py")
        sizes = ["--layers", str(layers), "--width", str(width)]
        subprocess.run([sys.executable, maker, scratch, *sizes], check=True)
        yield Path(scratch).resolve()


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def stream(models: Sequence[Path], out: Path) -> tuple[float, float]:
    """Read every byte of all models in large spans and write as many as the first has; seconds, processor seconds."""
    start, start_processor = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(READERS) as pool:
        for index, file in enumerate(weights(models[0])):
            with (out / file.name).open("wb", buffering=0) as writer:
                _copy(pool, [weights(model)[index] for model in models], writer.fileno(), file.stat().st_size)
                os.fsync(writer.fileno())
    return time.perf_counter() - start, time.process_time() - start_processor


def _copy(pool: ThreadPoolExecutor, files: Sequence[Path], out: int, size: int) -> None:
    """One span of each file is read while the span before it is written."""
    with ExitStack() as stack:
        opened = [stack.enter_context(file.open("rb", buffering=0)).fileno() for file in files]
        buffers = [[bytearray(SPAN_BYTES) for _ in files] for _ in range(2)]

        def start(turn: int) -> list[Future[int]]:
            at = turn * SPAN_BYTES
            return [pool.submit(os.preadv, file, [buffers[turn % 2][i]], at) for i, file in enumerate(opened)]

        turns = -(-size // SPAN_BYTES)
        reading = start(0)
        for turn in range(turns):
            for piece in reading:
                piece.result()
            reading = start(turn + 1) if turn + 1 < turns else []
            os.write(out, memoryview(buffers[turn % 2][0])[: min(SPAN_BYTES, size - turn * SPAN_BYTES)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--method", type=json.loads, default={"name": "task_arithmetic"})
    options = parser.parse_args()
    with family(options.folder, options.layers, options.width) as folder:
        compare(folder, options.repeats, options.method)


def compare(folder: Path, repeats: int, method: dict[str, object]) -> None:
    models = [folder / "base", *sorted(path for path in folder.glob("e*") if path.is_dir())]
    floors: list[tuple[float, float]] = []
    merges: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        out = Path(scratch)
        stream(models, out)  # warms the page cache
        for _ in range(repeats):
            floors.append(stream(models, out))
            _, stages = merge_folders(models[0], models[1:], method, out / "merged", SHARD_BYTES)
            merges.append((stages.seconds["merge"], stages.processor["merge"]))
            shutil.rmtree(out / "merged")
    read = sum(file.stat().st_size for model in models for file in weights(model))
    print(f"{read / 1e9:.2f} GB read, {read / len(models) / 1e9:.2f} GB written")
    print("| | floor | merge stage | ratio |")
    print("|---|---:|---:|---:|")
    for kind, name in enumerate(("seconds", "processor seconds")):
        pairs = [(floor[kind], merge[kind]) for floor, merge in zip(floors, merges, strict=True)]
        ratio = statistics.median(merge / floor for floor, merge in pairs)
        floor, merge = (statistics.median(side) for side in zip(*pairs, strict=True))
        print(f"| {name} | {floor:.2f} | {merge:.2f} | **{ratio:.2f}** |")


if __name__ == "__main__":
    main()
