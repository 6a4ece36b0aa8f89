"""Vectors computed at fifty digits by someone else, sent through the whole service as checkpoints and statistics."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.end_to_end.stack import Stack
from tests.workers.test_golden import FILES, NO_GAP, PROXIES, Case, read

pytestmark = pytest.mark.skipif("CATMERGE_GOLDEN" not in os.environ, reason="CATMERGE_GOLDEN is not set")

PARAMETERS = {"linear": "layer.weight", "scale": "norm.weight", "shift": "layer.bias"}
EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Variant:
    """One way to merge a case, and what must come out of it."""

    name: str
    switches: Mapping[str, bool]
    expected: Callable[[Case], Tensor]

    def applies(self, case: Case) -> bool:
        return case.has({"paper": "merged_paper", "norm": "merged_norm", "positive": "T_pos"}[self.name])


def _positive(case: Case) -> Tensor:
    update: Tensor = case.hyper["alpha"] * torch.stack(case.each("T_pos")).sum(0)
    return case.arrays["W0"] + update


VARIANTS = (
    Variant("paper", {"positive_only": False}, lambda case: case.arrays["merged_paper"]),
    Variant("norm", {"positive_only": False, "restore_norm": True}, lambda case: case.arrays["merged_norm"]),
    Variant("positive", {"positive_only": True}, _positive),
)
CASES = [(path, variant) for path in FILES for variant in VARIANTS if variant.applies(read(path))]


def method(case: Case, variant: Variant) -> dict[str, Any]:
    hyper = case.hyper
    switches = {"name": "cat", "scaling": hyper["alpha"], "moments": hyper["reduce"], **variant.switches}
    match hyper["kind"]:
        case "linear":
            proxy = {"proxy": PROXIES[hyper["proxy"]]} if hyper.get("proxy") else {}
            return {**switches, "rank": hyper["c"], "balance": hyper["lam"], **proxy}
        case "scale":
            return {**switches, "scale_rank": hyper["c"], "scale_balance": hyper["lam"]}
        case _:
            return {**switches, "shift_rank": hyper["c"]}


def statistics(parameter: str, x: Tensor, kind: str) -> dict[str, Tensor]:
    """The file that stands for features ``x [n, in]``, by the format alone."""
    rows = {f"{parameter}.rows": torch.tensor(len(x))}
    if kind == "scale":
        return {**rows, f"{parameter}.diagonal": x.square().sum(0)}
    return {**rows, f"{parameter}.factor": torch.linalg.qr(x, mode="r").R.contiguous()}


def write_case(case: Case, folder: Path, base: Tensor) -> list[dict[str, str]]:
    """Lone ``.safetensors`` files of one float64 tensor; returns the recipe's tasks."""
    parameter = PARAMETERS[case.hyper["kind"]]
    folder.mkdir()
    save_file({parameter: base}, folder / "base.safetensors")
    tasks = []
    for k, vector in enumerate(case.each("T")):
        save_file({parameter: base + vector}, folder / f"task-{k}.safetensors")
        task = {"name": f"task-{k}", "checkpoint": f"file://{folder}/task-{k}.safetensors"}
        if case.has("X"):
            save_file(
                statistics(parameter, case.arrays[f"X.{k}"], case.hyper["kind"]), folder / f"statistics-{k}.safetensors"
            )
            task["statistics"] = f"file://{folder}/statistics-{k}.safetensors"
        tasks.append(task)
    return tasks


def tolerance(case: Case) -> float:
    """The README's; the checkpoints are sums, so a task vector comes back off by half a unit in the base's last place,
    and a basis turns by that much over the gap."""
    gaps = [gap for gap in case.hyper.get("gap", []) if gap and gap > NO_GAP]
    size = max(float(tensor.abs().max()) for tensor in [case.arrays["W0"], *case.each("T")])
    return 20 * EPS / min(gaps, default=1.0) * max(size, 1.0)


@pytest.fixture(scope="module")
def submitted(embedded: Stack, files: Path) -> Iterator[dict[str, tuple[str, Tensor]]]:
    """All cases at once: the id and the base of each; the worst error is said at the end."""
    jobs = {}
    for path, variant in CASES:
        case = read(path)
        # Equal scores are only equal where nothing is rounded, so ties are sent with a base of zero.
        base = torch.zeros_like(case.arrays["W0"]) if "ties" in path.stem else case.arrays["W0"]
        name = f"{path.stem}-{variant.name}"
        tasks = write_case(case, files / name, base)
        recipe = {
            "base": f"file://{files / name}/base.safetensors",
            "tasks": tasks,
            "method": method(case, variant),
            "output": {"prefix": f"s3://merged/{name}/"},
        }
        jobs[name] = (embedded.submit(recipe)["id"], base)
    yield jobs
    print(f"\nworst error over {len(errors)} golden merges: {max(errors.values(), default=0.0):.2e}")


errors: dict[str, float] = {}


@pytest.mark.parametrize(("path", "variant"), CASES, ids=[f"{path.stem}-{variant.name}" for path, variant in CASES])
def test_the_service_gives_the_golden_weights(
    path: Path, variant: Variant, submitted: dict[str, tuple[str, Tensor]], embedded: Stack, tmp_path: Path
) -> None:
    case, name = read(path), f"{path.stem}-{variant.name}"
    job_id, base = submitted[name]
    embedded.succeeded(job_id)
    merged = load_file(embedded.download(job_id, tmp_path) / "model.safetensors")
    (actual,) = merged.values()
    assert actual.dtype == torch.float64
    expected = variant.expected(case) - case.arrays["W0"] + base
    errors[name] = float((actual - expected).abs().max())
    assert errors[name] <= tolerance(case)
