"""Compares Task Arithmetic, from folder to folder, with reading and writing the same bytes and nothing else.

    python -m tests.benchmarks.floor [--folder /tmp/llama] [--s3] [--repeats 5]

The folder holds ``base`` and ``e0``, ``e1`` and so on, as ``checkpoints.py`` makes them; without one they are made.
With ``--s3`` they are put on a server on this machine first (rclone), and the floor is the same ranged reads and
multipart writes by the same client. Runs alternate in one process, whose memory both sides find as warm as a worker's
is, and what either has written is deleted before the next; the page cache is warm, and both sides end with the bytes on
disk (fsync). Processor seconds, without the server's, are given too: where other programs keep the processors busy they
say more than the clock.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from service.contract.settings import Connections
from service.stores.objects import Objects, ObjectWriter, open_objects
from tests.benchmarks.one_merge import run_stages
from tests.benchmarks.processes import become_a_worker
from tests.servers import s3_server

SPAN_BYTES = 16 << 20
READERS = 4
SHARD_BYTES = 270_000_000
BUCKETS = ("models", "objects", "workspace")


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


class Place(Protocol):
    """Where models lie and results go: a folder, or a server."""

    def read(self, file: Path, start: int, into: memoryview) -> None: ...

    def written(self, name: str, pieces: Iterator[memoryview]) -> None: ...

    def asked(self) -> dict[str, Any]: ...

    def clear(self) -> None: ...


class Folder:
    """Plain files, by nothing but the system's own calls."""

    def __init__(self, models: Sequence[Path], out: Path) -> None:
        self._models, self._out = models, out
        self._files = {file: os.open(file, os.O_RDONLY) for model in models for file in weights(model)}

    def read(self, file: Path, start: int, into: memoryview) -> None:
        os.preadv(self._files[file], [into], start)

    def written(self, name: str, pieces: Iterator[memoryview]) -> None:
        self._out.mkdir(exist_ok=True)
        with (self._out / name).open("wb", buffering=0) as file:
            for piece in pieces:
                file.write(piece)
            os.fsync(file.fileno())

    def asked(self) -> dict[str, Any]:
        """What to merge, and where to."""
        base, *tasks = map(str, self._models)
        return {"base": base, "tasks": tasks, "out": str(self._out)}

    def clear(self) -> None:
        shutil.rmtree(self._out, ignore_errors=True)


class Server:
    """An S3 server, by the client that the workers use."""

    def __init__(self, models: Sequence[Path], variables: dict[str, str]) -> None:
        self._models, self._variables = models, variables
        self._objects: Objects = open_objects(Connections.from_environment(variables))
        for model in models:
            for file in model.iterdir():
                self._put(f"s3://models/{model.name}/{file.name}", file)

    def _put(self, address: str, file: Path) -> None:
        with file.open("rb") as source, self._objects.write(address) as writer:
            while piece := source.read(SPAN_BYTES):
                writer.write(piece)
            writer.commit()

    def read(self, file: Path, start: int, into: memoryview) -> None:
        self._objects.read(f"s3://models/{file.parent.name}/{file.name}", start, into)

    def written(self, name: str, pieces: Iterator[memoryview]) -> None:
        writer: ObjectWriter
        with self._objects.write(f"s3://objects/floor/{name}") as writer:
            for piece in pieces:
                writer.write(piece)
            writer.commit()

    def asked(self) -> dict[str, Any]:
        """What to merge, and where to."""
        base, *tasks = [f"s3://models/{model.name}/" for model in self._models]
        return {"base": base, "tasks": tasks, "environment": self._variables}

    def clear(self) -> None:
        for found in list(self._objects.list("s3://objects/")):
            self._objects.delete(found.address)


@dataclass(frozen=True)
class Floor:
    """Reads every byte of all models in large spans and writes as many as the first has."""

    models: Sequence[Path]
    place: Place
    buffers: Sequence[Sequence[memoryview]]

    @classmethod
    def of(cls, models: Sequence[Path], place: Place) -> Floor:
        return cls(models, place, [[memoryview(bytearray(SPAN_BYTES)) for _ in models] for _ in range(2)])

    def run(self) -> None:
        with ThreadPoolExecutor(READERS) as pool:
            for index, file in enumerate(weights(self.models[0])):
                files = [weights(model)[index] for model in self.models]
                self.place.written(file.name, self._streamed(pool, files, file.stat().st_size))

    def _streamed(self, pool: ThreadPoolExecutor, files: Sequence[Path], size: int) -> Iterator[memoryview]:
        """One span of each file is read while the span before it is written."""
        reading = self._start(pool, files, 0, size)
        for start in range(0, size, SPAN_BYTES):
            for piece in reading:
                piece.result()
            turn = start // SPAN_BYTES % 2
            reading = self._start(pool, files, start + SPAN_BYTES, size)
            yield self.buffers[turn][0][: size - start]

    def _start(self, pool: ThreadPoolExecutor, files: Sequence[Path], start: int, size: int) -> list[Future[None]]:
        if start >= size:
            return []
        buffers = self.buffers[start // SPAN_BYTES % 2]
        spans = [(file, buffer[: file.stat().st_size - start]) for file, buffer in zip(files, buffers, strict=True)]
        return [pool.submit(self.place.read, file, start, into) for file, into in spans]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--s3", action="store_true")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--method", type=json.loads, default={"name": "task_arithmetic"})
    options = parser.parse_args()
    become_a_worker("tests.benchmarks.floor")
    with family(options.folder, options.layers, options.width) as folder, ExitStack() as stack:
        models = [folder / "base", *sorted(path for path in folder.glob("e*") if path.is_dir())]
        compare(models, _place(stack, models, s3=options.s3), options.repeats, options.method)


def _place(stack: ExitStack, models: Sequence[Path], *, s3: bool) -> Place:
    if s3:
        return Server(models, stack.enter_context(s3_server("rclone", buckets=BUCKETS)).environment())
    scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=models[0].parent))
    return Folder(models, Path(scratch) / "out")


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and processor seconds of all threads together."""
    start, start_processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - start_processor


def compare(models: Sequence[Path], place: Place, repeats: int, method: dict[str, object]) -> None:
    asked = {**place.asked(), "method": method, "shard_bytes": SHARD_BYTES}
    floor = Floor.of(models, place)
    floors: list[tuple[float, float]] = []
    merges: list[tuple[float, float]] = []
    for _ in range(repeats + 1):
        place.clear()
        floors.append(timed(floor.run))
        place.clear()
        took = run_stages(asked)
        merges.append((took["seconds"]["merge"], took["processor"]["merge"]))
    read = sum(file.stat().st_size for model in models for file in weights(model))
    print(f"{read / 1e9:.2f} GB read, {read / len(models) / 1e9:.2f} GB written")
    print("| | floor | merge stage | ratio |")
    print("|---|---:|---:|---:|")
    for kind, name in enumerate(("seconds", "processor seconds")):
        pairs = [(floor[kind], merge[kind]) for floor, merge in zip(floors[1:], merges[1:], strict=True)]  # one to warm
        ratio = statistics.median(merge / floor for floor, merge in pairs)
        plain, merged = (statistics.median(side) for side in zip(*pairs, strict=True))
        print(f"| {name} | {plain:.2f} | {merged:.2f} | **{ratio:.2f}** |")


if __name__ == "__main__":
    main()
