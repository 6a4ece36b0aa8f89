"""Compares seconds and memory with mergekit's, method by method, on the same Llama-type checkpoints in bf16.

    python -m tests.benchmarks.against_mergekit --mergekit /path/to/venv/bin/python [--folder /tmp/llama]

mergekit runs as a program of its own environment and is never imported. Each run is a new process. Work is the time of
the whole process less that of the same program on a tiny model, which is what starting and importing takes. Runs
alternate; figures are medians, and ratios medians of the ratios of neighbors.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.floor import SHARD_BYTES, family
from tests.benchmarks.processes import Measured, measure, merge_folders

MB = 1 << 20


@dataclass(frozen=True)
class Pair:
    """One method as both programs are asked for it. ``ours`` is the recipe's, ``theirs`` the rest of a config."""

    ours: Mapping[str, Any]
    theirs: Mapping[str, Any]
    each: Mapping[str, float] | None = None
    between_two: bool = False

    def config(self, base: Path, tasks: Sequence[Path]) -> dict[str, Any]:
        """mergekit's configuration; JSON is YAML too."""
        chosen = tasks[:2] if self.between_two else tasks
        models = [{"model": str(task), **({"parameters": dict(self.each)} if self.each else {})} for task in chosen]
        from_base = chosen[0] if self.between_two else base
        return {**self.theirs, "base_model": str(from_base), "models": models, "dtype": "bfloat16"}


def _summed(name: str, **parameters: float) -> dict[str, Any]:
    return {"merge_method": name, "parameters": {"normalize": False, "lambda": 0.4, **parameters}}


def _elected(name: str) -> dict[str, Any]:
    return {"merge_method": name, "parameters": {"normalize": True}}


PAIRS = {
    "task arithmetic": Pair({"name": "task_arithmetic"}, _summed("task_arithmetic"), {"weight": 1.0}),
    "slerp": Pair({"name": "slerp", "t": 0.5}, {"merge_method": "slerp", "parameters": {"t": 0.5}}, between_two=True),
    "model stock": Pair({"name": "model_stock"}, {"merge_method": "model_stock"}),
    "dare, linear": Pair({"name": "dare", "density": 0.2}, _summed("dare_linear"), {"weight": 1.0, "density": 0.2}),
    "dare, ties": Pair(
        {"name": "dare", "combine": "ties", "density": 0.2}, _elected("dare_ties"), {"weight": 1.0, "density": 0.2}
    ),
    "ties, by tensor": Pair(
        {"name": "ties", "density": 0.2, "scope": "tensor"}, _elected("ties"), {"weight": 1.0, "density": 0.2}
    ),
    "ties, whole vector": Pair({"name": "ties", "density": 0.2}, _elected("ties"), {"weight": 1.0, "density": 0.2}),
    "della": Pair(
        {"name": "della", "density": 0.4, "epsilon": 0.2},
        _elected("della"),
        {"weight": 1.0, "density": 0.4, "epsilon": 0.1},
    ),
    "della, linear": Pair(
        {"name": "della", "combine": "linear", "density": 0.4, "epsilon": 0.2},
        _summed("della_linear"),
        {"weight": 1.0, "density": 0.4, "epsilon": 0.1},
    ),
    "breadcrumbs": Pair(
        {"name": "breadcrumbs", "density": 0.2, "gamma": 0.01},
        _summed("breadcrumbs"),
        {"weight": 1.0, "density": 0.2, "gamma": 0.01},
    ),
    "breadcrumbs, ties": Pair(
        {"name": "breadcrumbs", "combine": "ties", "density": 0.2, "gamma": 0.01},
        _elected("breadcrumbs_ties"),
        {"weight": 1.0, "density": 0.2, "gamma": 0.01},
    ),
    "sce": Pair({"name": "sce", "density": 0.1}, {"merge_method": "sce", "parameters": {"select_topk": 0.1}}),
    "karcher": Pair({"name": "karcher"}, {"merge_method": "karcher", "parameters": {"max_iter": 100, "tol": 1e-10}}),
}


@dataclass(frozen=True)
class Programs:
    """Both programs, on one folder of models."""

    mergekit: Path
    scratch: Path

    def ours(self, pair: Pair, folder: Path) -> Measured:
        tasks = _experts(folder)[: 2 if pair.between_two else None]
        out = self.scratch / "ours"
        try:
            return merge_folders(folder / "base", tasks, pair.ours, out, SHARD_BYTES)[0]
        finally:
            shutil.rmtree(out, ignore_errors=True)

    def theirs(self, pair: Pair, folder: Path) -> Measured:
        config, out = self.scratch / "config.yml", self.scratch / "theirs"
        config.write_text(json.dumps(pair.config(folder / "base", _experts(folder))))
        words: list[str | Path] = [
            "-m",
            "mergekit.scripts.run_yaml",
            config,
            out,
            "--quiet",
            "--out-shard-size",
            str(SHARD_BYTES),
        ]
        try:
            return measure([self.mergekit, *words], {"HF_HUB_OFFLINE": "1"})
        finally:
            shutil.rmtree(out, ignore_errors=True)


def _experts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("e*") if path.is_dir())


def compare(programs: Programs, pair: Pair, folder: Path, tiny: Path, repeats: int) -> str:
    """One row of the table."""
    rounds = [
        (
            programs.ours(pair, tiny).seconds,
            programs.theirs(pair, tiny).seconds,
            programs.ours(pair, folder),
            programs.theirs(pair, folder),
        )
        for _ in range(repeats)
    ]
    work = [(ours.seconds - start, theirs.seconds - their_start) for start, their_start, ours, theirs in rounds]
    whole = [(ours.seconds, theirs.seconds) for _, _, ours, theirs in rounds]
    memory = [(ours.peak_bytes / MB, theirs.peak_bytes / MB) for _, _, ours, theirs in rounds]
    return " | ".join([*_columns(work, ".1f"), *_columns(whole, ".1f"), *_columns(memory, ".0f")])


def _columns(pairs: Sequence[tuple[float, float]], spelling: str) -> list[str]:
    """The median of ours, that of theirs, and of how many times theirs is ours."""
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    return [f"{ours:{spelling}}", f"{theirs:{spelling}}", f"**{ratio:.1f}**"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, required=True, help="the python of an environment that has mergekit")
    parser.add_argument("--folder", type=Path, help="base, e0, e1 ... as checkpoints.py makes them")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    options = parser.parse_args()
    with family(options.folder, options.layers, options.width) as folder, tempfile.TemporaryDirectory() as scratch:
        tiny = Path(scratch).resolve() / "tiny"
        _make_tiny(tiny, len(_experts(folder)))
        programs = Programs(options.mergekit, Path(scratch).resolve())
        print("| method | work: ours, s | mergekit, s | times | process: ours, s | mergekit, s | times ", end="")
        print("| peak: ours, MB | mergekit, MB | times |")
        print("|---|" + "---:|" * 9)
        for name in options.methods:
            row = compare(programs, PAIRS[name], folder, tiny, options.repeats)
            print(f"| {name} | {row} |", flush=True)


def _make_tiny(folder: Path, experts: int) -> None:
    maker = Path(__file__).with_name("checkpoints.py")
    sizes = ["--layers", "1", "--width", "64", "--vocabulary", "64", "--shards", "1", "--experts"]
    subprocess.run([sys.executable, maker, folder, *sizes, str(experts)], check=True)


if __name__ == "__main__":
    main()
