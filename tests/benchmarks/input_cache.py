"""Measures what a machine's cache of inputs saves: the same merge without one, into an empty one, and from a full one.

    python -m tests.benchmarks.input_cache [--folder /tmp/models] [--rate 13] [--repeats 3]

The folder holds ``base`` and ``e0``, ``e1`` and so on, as ``checkpoints.py`` makes them; without one they are made.
They are put on an S3 server on this machine (rclone) behind a proxy, in a process of its own, that lets ``--rate`` MB/s
through each connection, of which a worker has eight; 0 is as fast as it goes. The three merges (Task Arithmetic, plan
and merge stages) alternate in one process; figures are medians. Blocks that were read or written a moment ago lie in
memory, as they do on a machine that has some to spare.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from service.contract.settings import Connections
from service.stores.cached import open_blocks
from tests.benchmarks.floor import BUCKETS, SHARD_BYTES, Server, family, timed
from tests.benchmarks.one_merge import run_stages
from tests.benchmarks.processes import become_a_worker
from tests.faulty import CHUNK_BYTES, TcpProxy
from tests.servers import s3_server

METHOD = {"name": "task_arithmetic"}
LIMIT_BYTES = 10**12
CASES = ("no cache", "empty cache", "full cache")


@dataclass(frozen=True)
class Took:
    """One merge: seconds, and processor seconds of all threads together."""

    seconds: float
    processor: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rate", type=float, default=13.0, help="MB/s of each connection; 0: no limit")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--proxy", type=int, help="be the proxy before this port")
    options = parser.parse_args()
    if options.proxy:
        be_proxy(options.proxy, options.rate)
        return
    become_a_worker("tests.benchmarks.input_cache")
    with family(options.folder, options.layers, options.width) as folder, ExitStack() as stack:
        models = [folder / "base", *sorted(path for path in folder.glob("e*") if path.is_dir())]
        server = stack.enter_context(s3_server("rclone", buckets=BUCKETS))
        place = Server(models, server.environment())
        url = stack.enter_context(throttled(server.port, options.rate)) if options.rate else server.url
        cache = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder.parent))) / "cache"
        compare(models, place, {**server.environment(), "CATMERGE_S3_ENDPOINT": url}, cache, options.repeats)


def be_proxy(port: int, rate: float) -> None:
    """Hand bytes on, so many a second on each connection, until the parent is gone."""
    proxy = TcpProxy(port)
    proxy.delay_seconds = CHUNK_BYTES / (rate * 1e6)
    print(proxy.port, flush=True)
    sys.stdin.read()
    proxy.close()


@contextmanager
def throttled(port: int, rate: float) -> Iterator[str]:
    """The address of a proxy before a server of this machine, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.input_cache", "--proxy", str(port), "--rate", str(rate)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as proxy:
        assert proxy.stdin is not None
        assert proxy.stdout is not None
        yield f"http://127.0.0.1:{int(proxy.stdout.readline())}"
        proxy.stdin.close()


def compare(models: Sequence[Path], place: Server, variables: dict[str, str], cache: Path, repeats: int) -> None:
    keeping = {"CATMERGE_INPUT_CACHE": str(cache), "CATMERGE_INPUT_CACHE_BYTES": str(LIMIT_BYTES)}
    took: dict[str, list[Took]] = {case: [] for case in CASES}
    for _ in range(repeats):
        shutil.rmtree(cache, ignore_errors=True)
        for case in CASES:
            place.clear()
            asked = {**place.asked(), "method": METHOD, "shard_bytes": SHARD_BYTES}
            asked["environment"] = variables if case == "no cache" else {**variables, **keeping}
            took[case].append(Took(*timed(lambda asked=asked: run_stages(asked))))  # type: ignore[misc]
    show(models, took, kept_bytes({**variables, **keeping}))


def kept_bytes(variables: dict[str, str]) -> int:
    blocks = open_blocks(Connections.from_environment(variables))
    return 0 if blocks is None else blocks.used_bytes


def show(models: Sequence[Path], took: dict[str, list[Took]], kept: int) -> None:
    read = sum(file.stat().st_size for model in models for file in model.glob("*.safetensors"))
    print(f"{read / 1e9:.2f} GB of models, {kept / 1e9:.2f} GB kept")
    print("| | seconds | times as long | processor seconds |")
    print("|---|---:|---:|---:|")
    plain = took["no cache"]
    for case, runs in took.items():
        ratio = statistics.median(run.seconds / first.seconds for run, first in zip(runs, plain, strict=True))
        seconds, processor = (
            statistics.median(side) for side in zip(*((r.seconds, r.processor) for r in runs), strict=True)
        )
        print(f"| {case} | {seconds:.2f} | {ratio:.2f} | {processor:.2f} |")


if __name__ == "__main__":
    main()
