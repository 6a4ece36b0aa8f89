"""Compares Task Arithmetic, from folder to folder, with reading and writing the same bytes and nothing else.

    python -m tests.benchmarks.floor [--folder /tmp/llama] [--repeats 5]

The folder holds ``base`` and ``e0``, ``e1`` and so on, as ``checkpoints.py`` makes them; without one they are made. Runs
alternate, the page cache is warm, and both sides end with the bytes on disk (fsync).
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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


def stream(models: Sequence[Path], out: Path) -> float:
    """Read every byte of all models in large spans, and write as many as the first has; the seconds that took."""
    start = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        for index, file in enumerate(weights(models[0])):
            with (out / file.name).open("wb", buffering=0) as writer:
                written = file.stat().st_size
                _copy(pool, [weights(model)[index] for model in models], writer.fileno(), written)
                os.fsync(writer.fileno())
    return time.perf_counter() - start


def _copy(pool: ThreadPoolExecutor, files: Sequence[Path], out: int, size: int) -> None:
    """One span of each file is read while the span before is written."""
    opened = [os.open(file, os.O_RDONLY) for file in files]
    buffers = [[bytearray(SPAN_BYTES) for _ in files] for _ in range(2)]
    try:
        offsets = range(0, size, SPAN_BYTES)
        reading = _start(pool, opened, buffers[0], 0)
        for turn, offset in enumerate(offsets):
            for piece in reading:
                piece.result()
            reading = (
                _start(pool, opened, buffers[(turn + 1) % 2], offset + SPAN_BYTES) if offset + SPAN_BYTES < size else []
            )
            os.write(out, memoryview(buffers[turn % 2][0])[: min(SPAN_BYTES, size - offset)])
    finally:
        for file in opened:
            os.close(file)


def _start(pool: ThreadPoolExecutor, files: Sequence[int], buffers: Sequence[bytearray], offset: int) -> list:  # type: ignore[type-arg]
    return [pool.submit(os.preadv, file, [buffer], offset) for file, buffer in zip(files, buffers, strict=True)]


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
    floors: list[float] = []
    merges: list[float] = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        out = Path(scratch)
        stream(models, out)  # warms the page cache
        for _ in range(repeats):
            floors.append(stream(models, out))
            _, stages = merge_folders(models[0], models[1:], method, out / "merged", SHARD_BYTES)
            merges.append(stages["merge"])
            shutil.rmtree(out / "merged")
    ratio = statistics.median(merge / floor for merge, floor in zip(merges, floors, strict=True))
    read = sum(file.stat().st_size for model in models for file in weights(model))
    print("| bytes read | bytes written | floor, s | merge stage, s | ratio |")
    print("|---:|---:|---:|---:|---:|")
    written = read / len(models)
    figures = f"{statistics.median(floors):.2f} | {statistics.median(merges):.2f} | {ratio:.2f}"
    print(f"| {read / 1e9:.2f} GB | {written / 1e9:.2f} GB | {figures} |")


if __name__ == "__main__":
    main()
