"""The treatments against vectors computed at fifty digits by someone else, where CATMERGE_GOLDEN names their folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from service.contract.methods import Cat, Proxy
from service.contract.treatments import Projection, Role, ScaleMask, ShiftMask, Treatment
from workers.methods import Context, merge
from workers.proxies import proxy_statistic
from workers.statistics import Statistic
from workers.treatments import TREATMENTS, Trimmed, apply_removed, trim

FOLDER = os.environ.get("CATMERGE_GOLDEN")
FILES = sorted(Path(FOLDER).glob("*.safetensors")) if FOLDER else []
PROXIES: dict[str, Proxy] = {"wudi": "task_vector", "ace": "covariance"}
EPS = torch.finfo(torch.float64).eps
NO_GAP = 1e-30  # the cut falls among eigenvalues of exactly zero: what is removed there does not depend on a gap

pytestmark = pytest.mark.skipif(FOLDER is None, reason="CATMERGE_GOLDEN is not set")


@dataclass(frozen=True)
class Case:
    hyper: dict[str, Any]
    arrays: dict[str, Tensor]

    def each(self, name: str) -> list[Tensor]:
        return [self.arrays[f"{name}.{k}"] for k in range(self.hyper["K"])]

    def has(self, name: str) -> bool:
        return name in self.arrays or f"{name}.0" in self.arrays

    @property
    def tolerance(self) -> float:
        """The README's, with the smallest gap: a basis trims every other task's vector."""
        gaps = [gap for gap in self.hyper.get("gap", []) if gap and gap > NO_GAP]
        size = max(float(t.abs().max()) for t in self.each("T"))
        return 20 * EPS / min(gaps, default=1.0) * size


def read(path: Path, device: str = "cpu") -> Case:
    with safe_open(path, "pt") as file:
        arrays = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return Case(json.loads(file.metadata()["hyper"]), {k: v.double() for k, v in arrays.items()})


def cases(kind: str, *names: str) -> pytest.MarkDecorator:
    """Every case of a ``kind`` ("" is all) that holds arrays of the given names."""
    found = [(path, read(path)) for path in FILES]
    fitting = [p for p, c in found if c.hyper["kind"].startswith(kind) and all(c.has(n) for n in names)]
    return pytest.mark.parametrize("path", fitting, ids=lambda p: p.stem)


def parameters(case: Case, *, positive_only: bool = False, restore_norm: bool = False) -> Treatment:
    hyper = case.hyper
    if hyper["kind"] == "shift":
        return ShiftMask(rank=hyper["c"], restore_norm=restore_norm)
    row = Projection if hyper["kind"] == "linear" else ScaleMask
    return row(
        rank=hyper["c"],
        balance=hyper["lam"],
        moments=hyper["reduce"],
        positive_only=positive_only,
        restore_norm=restore_norm,
    )


def statistics(case: Case, params: Treatment) -> list[Statistic | None]:
    observe = TREATMENTS[params.name].observe
    if observe is None:
        return [None] * case.hyper["K"]
    if case.hyper.get("proxy"):
        return [proxy_statistic(t, PROXIES[case.hyper["proxy"]]) for t in case.each("T")]
    return [observe(x, None) for x in case.each("X")]


def trimmed(case: Case, *, positive_only: bool = False, restore_norm: bool = False) -> Trimmed:
    params = parameters(case, positive_only=positive_only, restore_norm=restore_norm)
    return trim(case.each("T"), statistics(case, params), params)


def error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def test_the_folder_holds_cases() -> None:
    assert FILES, f"CATMERGE_GOLDEN is {FOLDER} and no .safetensors lies there"


@cases("", "T_paper")
def test_the_largest_whatever_their_sign(path: Path) -> None:
    case = read(path)
    assert error(trimmed(case).task_vectors, case.each("T_paper")) <= case.tolerance


@cases("linear", "T_pos")
def test_the_positive_ones_only(path: Path) -> None:
    case = read(path)
    outcome = trimmed(case, positive_only=True)
    assert error(outcome.task_vectors, case.each("T_pos")) <= case.tolerance
    assert [r.count for r in outcome.removed] == [min(case.hyper["c"], n) for n in case.hyper["n_positive"]]


@cases("linear", "T_paper")
def test_the_positive_ones_are_the_largest_where_there_are_enough(path: Path) -> None:
    case = read(path)
    wanted = [min(case.hyper["c"], n) for n in case.hyper["n_positive"]]
    outcome = trimmed(case, positive_only=True)
    assert [r.count for r in outcome.removed] == wanted
    if min(wanted) == case.hyper["c"]:
        assert error(outcome.task_vectors, case.each("T_paper")) <= case.tolerance


@cases("", "T_norm")
def test_the_norm_restored(path: Path) -> None:
    case = read(path)
    assert error(trimmed(case, restore_norm=True).task_vectors, case.each("T_norm")) <= case.tolerance


@cases("", "merged_paper")
def test_the_merged_weights(path: Path) -> None:
    check_merged(read(path), "merged_paper", restore_norm=False)


@cases("", "merged_norm")
def test_the_merged_weights_with_norms_restored(path: Path) -> None:
    check_merged(read(path), "merged_norm", restore_norm=True)


def check_merged(case: Case, name: str, *, restore_norm: bool) -> None:
    base, expected = case.arrays["W0"], case.arrays[name]
    update = merge(
        trimmed(case, restore_norm=restore_norm).task_vectors,
        [1.0] * case.hyper["K"],
        Cat(scaling=case.hyper["alpha"]),
        Context("", Role.OTHER, False, base, [str(k) for k in range(case.hyper["K"])], [None] * case.hyper["K"]),
    )
    assert error([base + update], [expected]) <= max(case.tolerance, 4 * EPS * float(base.abs().max()))


@cases("linear", "P", "w")
def test_the_directions_removed(path: Path) -> None:
    case = read(path)
    removed = trimmed(case).removed
    size = max(float(t.abs().max()) for t in case.each("T"))
    projectors = [r.directions @ r.directions.T for r in removed]
    assert error(projectors, case.each("P")) <= max(case.tolerance / size, 64 * EPS)
    for each, values in zip(removed, case.each("w"), strict=True):
        close = 64 * EPS * float(values.abs().max())
        torch.testing.assert_close(each.scores, values[: each.count], rtol=0, atol=close)


@cases("s", "m", "g")
def test_the_entries_removed(path: Path) -> None:
    case = read(path)
    for each, mask, scores in zip(trimmed(case).removed, case.each("m"), case.each("g"), strict=True):
        assert sorted(each.entries.tolist()) == mask.nonzero().flatten().tolist()
        torch.testing.assert_close(each.scores, scores[each.entries], rtol=1e-13, atol=1e-15)


@cases("")
@pytest.mark.parametrize("restore_norm", [False, True])
def test_the_record_alone_gives_the_same(path: Path, restore_norm: bool) -> None:
    case = read(path)
    outcome = trimmed(case, positive_only=True, restore_norm=restore_norm)
    params = parameters(case, positive_only=True, restore_norm=restore_norm)
    again = apply_removed(case.each("T"), outcome.removed, params)
    assert all(torch.equal(a, b) for a, b in zip(again, outcome.task_vectors, strict=True))


@cases("linear", "T_port")
@pytest.mark.parametrize("restore_norm", [False, True])
def test_the_smallest_end_is_not_taken(path: Path, restore_norm: bool) -> None:
    case = read(path)
    ours = trimmed(case, restore_norm=restore_norm).task_vectors
    assert error(ours, case.each("T_port")) > 0.1 * max(float(t.abs().max()) for t in case.each("T"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@cases("", "T_paper")
def test_on_a_gpu(path: Path) -> None:
    case = read(path, device="cuda")
    assert error(trimmed(case).task_vectors, case.each("T_paper")) <= 4 * case.tolerance
