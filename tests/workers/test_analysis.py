"""An analysis measures what task vectors do to each other, judges by one rule, and leaves no weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from service.contract.recipe import Recipe
from service.contract.treatments import Projection, Role, ScaleMask
from tests.workers.demo_merge import DEMO, TASKS, merge_demo
from workers.analysis import largest, merged_places
from workers.angles import gram
from workers.blocks import trim_blocks
from workers.conflict import Conflict, total
from workers.statistics import Statistic, observe_indices, stack_statistics
from workers.treatments import Effect, trim
from workers.treatments.concentration import concentrations, largest_entries
from workers.verdict import RULE, Verdict, Why, judge, verdict

WITHOUT_MODEL: dict[str, Any] = {"mode": "analysis", "evaluation": None, "gates": []}


def vectors(count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def factors(count: int, rows: int, width: int) -> list[Statistic]:
    return [Statistic(rows=3 + k, factor=factor) for k, factor in enumerate(vectors(count, rows, width))]


def squares(task_vectors: list[Tensor], statistics: list[Statistic]) -> Tensor:
    """||T_i R_k^T||^2 / rows_k in float64, [K, K]."""
    return torch.stack(
        [
            torch.stack([(t.double() @ s.held.double().T).square().sum() / s.rows for s in statistics])
            for t in task_vectors
        ]
    )


def responses(effects: list[Effect], name: str = "responses") -> Tensor:
    return torch.tensor([getattr(effect, name) for effect in effects], dtype=torch.float64)


def few(vector: Tensor) -> Tensor:
    """All but the largest 1 % of entries set to zero, by sorting."""
    flat = vector.flatten()
    kept = flat.abs().sort(descending=True, stable=True).indices[: max(1, math.floor(0.01 * len(flat) + 0.5))]
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view(vector.shape)


# Pure functions against plain formulas


def test_projection_tells_every_answer_before_and_after() -> None:
    task_vectors, statistics = vectors(3, 20, 30), factors(3, 7, 30)
    trimmed = trim(task_vectors, statistics, Projection(rank=2, balance=0.5))
    assert sum(part.count for part in trimmed.removed) == 6
    before, after = squares(task_vectors, statistics), squares(trimmed.task_vectors, statistics)
    torch.testing.assert_close(responses(trimmed.effects), before, rtol=1e-5, atol=0)
    torch.testing.assert_close(responses(trimmed.effects, "responses_left"), after, rtol=1e-4, atol=0)
    assert (after < before).any()


def test_scales_and_stacked_matrices_tell_every_answer() -> None:
    scales = vectors(3, 40)
    moments = [Statistic(rows=5, diagonal=v.double().square()) for v in vectors(4, 40)[:3]]
    expected = torch.stack([torch.stack([(t.double().square() * m.held / 5).sum() for m in moments]) for t in scales])
    torch.testing.assert_close(responses(trim(scales, moments, ScaleMask(rank=2)).effects), expected)

    experts = vectors(2, 3, 8, 10)
    blocks = [factors(3, 4, 10), list(reversed(factors(3, 4, 10)))]
    stacked = [stack_statistics(each) for each in blocks]
    plain = sum(squares([e[b] for e in experts], [each[b] for each in blocks]) for b in range(3))
    found = trim_blocks(experts, stacked, Projection(rank=1, balance=0.5), Role.EXPERTS)
    torch.testing.assert_close(responses(found.effects), torch.as_tensor(plain), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(1, 3), (20, 30), (64, 100)])
def test_the_largest_entries_are_one_percent_and_ties_go_to_the_first(shape: tuple[int, int]) -> None:
    vector = vectors(1, *shape)[0].round(decimals=1)
    assert largest_entries(vector).equal(few(vector))


def test_the_largest_entries_of_matrices_answer_alone() -> None:
    task_vectors, statistics = vectors(3, 40, 50), factors(3, 9, 50)
    found = concentrations(task_vectors, statistics, Projection())
    alone = [few(vector) for vector in task_vectors]
    expected = squares(alone, statistics)
    torch.testing.assert_close(torch.tensor([f.responses for f in found]).double(), expected, rtol=1e-5, atol=0)
    assert [f.energy for f in found] == pytest.approx([float(a.double().square().sum()) for a in alone])


def test_the_largest_entries_of_other_parameters_answer_alone() -> None:
    embeddings = vectors(2, 6, 300)  # turned around: [dimensions, words]
    counts = [observe_indices(torch.arange(300).remainder(3 + k), rows=9) for k in range(2)]
    found = concentrations(embeddings, counts, Projection())
    for vector, each in zip(embeddings, found, strict=True):
        plain = [float((few(vector).double().square() @ (c.held / c.rows)).sum()) for c in counts]
        assert each.responses == pytest.approx(plain)

    scales = vectors(2, 300)
    for vector, each in zip(scales, concentrations(scales, counts, ScaleMask()), strict=True):
        assert each.responses == pytest.approx([float(few(vector).double().square() @ c.held / c.rows) for c in counts])

    experts = vectors(2, 3, 20, 30)
    blocks = [factors(3, 4, 30) for _ in range(2)]
    stacked = [stack_statistics(each) for each in blocks]
    for vector, each in zip(experts, concentrations(experts, stacked, Projection()), strict=True):
        alone = few(vector)
        plain = [sum(float(squares([alone[b]], [row[b]])) for b in range(3)) for row in blocks]
        assert each.responses == pytest.approx(plain, rel=1e-5)


def test_inner_products_do_not_depend_on_threads() -> None:
    task_vectors = vectors(3, 1500, 1000)  # more than one thread's share
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(gram(task_vectors))
    finally:
        torch.set_num_threads(before)
    flat = torch.stack([vector.double().flatten() for vector in task_vectors])
    assert found[0].equal(found[1])
    lengths = flat.norm(dim=1)
    assert float(((found[0] - flat @ flat.T) / torch.outer(lengths, lengths)).abs().max()) < 1e-7


# Sums


def conflict(after: list[list[float]], own: list[float] | None = None, cosine: float = 0.0) -> Conflict:
    count = len(after)
    inner = np.full((count, count), cosine) + (1 - cosine) * np.eye(count)
    before = np.asarray(after, dtype=float)
    np.fill_diagonal(before, own or [1.0] * count)
    return Conflict.of(inner, before.tolist(), before.tolist(), (0.5 * before).tolist(), [0.25] * count)


def test_sums_survive_json_and_add_up_by_place() -> None:
    one = conflict([[0, 1], [2, 0]])
    row = {"layer": "0", "role": "linear", **one.as_dict()}
    parts = json.loads(json.dumps([[row], [row, {**row, "role": "scale"}]]))
    found = merged_places(parts)
    assert {place: sums.parameters for place, sums in found.items()} == {("0", "linear"): 2, ("0", "scale"): 1}
    whole = total(found.values(), 2)
    assert whole.before.tolist() == [[3, 3], [6, 3]]
    assert whole.disturbance(whole.before) == [[1, 1], [2, 1]]
    assert whole.cosine() == [[1, 0], [0, 1]]
    assert largest(whole) == {"energy": 0.25, "conflict": 0.5, "own": 0.5}


def test_what_was_not_measured_counts_for_likeness_alone() -> None:
    bias = Conflict.of(np.array([[4.0, 2.0], [2.0, 1.0]]))
    both = bias + conflict([[0, 1], [2, 0]])
    assert (both.parameters, both.measured) == (2, 1)
    assert both.seen_energy.tolist() == [1, 1]
    assert bias.cosine() == [[1, 1], [1, 1]]
    assert bias.disturbance(bias.before) == [[None, None], [None, None]]
    assert largest(bias) == {"energy": None, "conflict": None, "own": None}


# The rule


def judged(found: Conflict, *, stand_ins: bool = False) -> list[tuple[Verdict, Why]]:
    return [(row.verdict, row.why) for row in judge(found, stand_ins=stand_ins)]


def test_a_task_is_judged_by_what_the_others_do_to_it_on_average() -> None:
    found = conflict([[0, 0.9, 0.4], [0.2, 0, 0.4], [0.7, 0.9, 0]])
    well, care = (Verdict.WELL, Why.CALM), (Verdict.CARE, Why.DISTURBED)
    assert judged(found) == [well, care, well]
    assert [row.suffers for row in judge(found, stand_ins=False)] == pytest.approx([0.45, 0.9, 0.4])
    assert judged(found, stand_ins=True)[0] == (Verdict.CARE, Why.STAND_INS)
    assert verdict(found, ["a", "b", "c"], stand_ins=False)["overall"] == "care"


def test_a_task_that_drowns_the_others_goes_first_and_they_are_judged_without_it() -> None:
    found = conflict([[0, 9, 9], [0.1, 0, 0.1], [0.1, 0.1, 0]])
    assert judged(found) == [(Verdict.LEAVE_OUT, Why.DROWNS_OTHERS), *[(Verdict.WELL, Why.CALM)] * 2]
    said = verdict(found, ["a", "b", "c"], stand_ins=False)
    assert (said["overall"], said["leave_out"], said["rule"]) == ("leave_out", ["a"], RULE)


def test_a_weak_task_is_left_out_rather_than_those_that_drown_it() -> None:
    found = conflict([[0, 0.1, 3], [0.1, 0, 3], [0.1, 0.1, 0]])
    assert judged(found) == [*[(Verdict.WELL, Why.CALM)] * 2, (Verdict.LEAVE_OUT, Why.DROWNED)]


def test_opposed_silent_and_unmeasured_tasks() -> None:
    calm = [[0, 0.1], [0.1, 0]]
    assert judged(conflict(calm, cosine=-0.5)) == [(Verdict.CARE, Why.OPPOSED)] * 2
    assert judged(conflict([[0, 0.1, 0], [0.1, 0, 0], [0, 0, 0]], own=[1, 1, 0]))[2] == (
        Verdict.LEAVE_OUT,
        Why.SILENT,
    )
    assert judged(Conflict.of(np.eye(2))) == [(Verdict.CARE, Why.UNMEASURED)] * 2


# Whole jobs


def read(result: Path, name: str) -> Any:
    return json.loads((result / "merge" / name).read_text())


@pytest.fixture(scope="module")
def analyzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merge_demo(tmp_path_factory.mktemp("analysis"), **WITHOUT_MODEL)


def test_an_analysis_leaves_no_weights_and_ends_with_its_manifest(analyzed: Path) -> None:
    names = {str(path.relative_to(analyzed)) for path in analyzed.rglob("*") if path.is_file()}
    files = ("recipe.json", "plan.json", "analysis.json", "trim-log.jsonl", "report.json", "report.html")
    assert names == {f"merge/{name}" for name in (*files, "manifest.json")}
    assert {file["name"] for file in read(analyzed, "manifest.json")["files"]} == {f"merge/{name}" for name in files}


def test_its_figures_are_those_of_the_formula(analyzed: Path) -> None:
    """One layer's linear weights, from the stored statistics and the checkpoints alone."""
    base = load_file(DEMO / "base" / "model.safetensors")
    experts = [load_file(DEMO / "tasks" / task / "model.safetensors") for task in TASKS]
    stored = {file.stem: load_file(file) for file in (analyzed.parent / "workspace").rglob("statistics/*.safetensors")}
    layer = "vit.encoder.layer.1"
    rows = read(analyzed, "analysis.json")["layers"]
    found = next(row for row in rows if (row["layer"], row["role"]) == (layer, "linear"))
    log = [json.loads(line) for line in (analyzed / "merge" / "trim-log.jsonl").read_text().splitlines()]
    mine = [row for row in log if row["parameter"].startswith(layer) and row["role"] == "linear"]
    assert found["conflict"]["before"] == pytest.approx(sum(row["conflict_before"] for row in mine))
    assert found["conflict"]["after"] == pytest.approx(sum(row["conflict_after"] for row in mine))
    names = list(dict.fromkeys(row["parameter"] for row in mine))
    assert (found["parameters"], len(stored)) == (len(names), len(TASKS))
    flat = [torch.cat([(e[n].double() - base[n].double()).flatten() for n in names]) for e in experts]
    answers = [layer_answers(file, names, base, experts) for file in stored.values()]
    columns = np.array(found["disturbance"]).T
    of = [next(k for k in range(len(TASKS)) if np.allclose(a / a[k], columns[k], rtol=1e-4)) for a in answers]
    assert sorted(of) == list(range(len(TASKS))), "each task's statistics explain one column"
    cosine = torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0)
    assert found["cosine"][0][1] == pytest.approx(float(cosine), rel=1e-4)


def layer_answers(
    stored: dict[str, Tensor], names: list[str], base: dict[str, Tensor], experts: list[dict[str, Tensor]]
) -> Any:
    """The second moment of every task vector's response to what one statistics file saw, in float64, [K]."""
    found = []
    for expert in experts:
        responses = [(expert[n].double() - base[n].double()) @ stored[f"{n}.factor"].double().T for n in names]
        found.append(sum(float(r.square().sum() / stored[f"{n}.rows"]) for n, r in zip(names, responses, strict=True)))
    return np.array(found)


def test_it_says_what_was_found(analyzed: Path) -> None:
    report, analysis = read(analyzed, "report.json"), read(analyzed, "analysis.json")
    assert (report["mode"], report["metrics"], report["gates"]) == ("analysis", None, [])
    assert report["analysis"]["verdict"] == analysis["verdict"]
    assert set(analysis["verdict"]["tasks"]) == set(TASKS)
    assert analysis["inputs"] == "exemplars or statistics"
    assert report["conflict"]["disturbance"] == analysis["total"]["disturbance"]
    assert [row[i] for i, row in enumerate(report["conflict"]["disturbance"])] == [1.0] * len(TASKS)
    assert 0 < analysis["largest"]["all"]["conflict"] < 1
    assert analysis["conflict"]["after"] < analysis["conflict"]["before"]
    assert report["savings"]["bytes_after"] == report["plan"]["bytes_out"]
    page = (analyzed / "merge" / "report.html").read_text()
    for text in ("Merge or not, task by task", "merge with care", "注意して統合", "The rule: while some task"):
        assert text in page
    assert "What each task keeps" not in page
    assert page.index("Merge with care: some tasks") < page.index("Who disturbs whom")


def test_a_merge_reports_the_same_conflict(analyzed: Path, tmp_path: Path) -> None:
    merged = read(merge_demo(tmp_path, evaluation=None, gates=[]), "report.json")
    expected = read(analyzed, "report.json")["conflict"]
    assert merged["analysis"] is None
    for name in ("disturbance", "cosine"):
        np.testing.assert_allclose(merged["conflict"][name], expected[name], rtol=1e-5)


def test_without_samples_it_says_so_and_never_says_well(tmp_path: Path) -> None:
    tasks = [{"name": task, "checkpoint": f"file://{DEMO}/tasks/{task}/"} for task in TASKS]
    result = merge_demo(tmp_path, tasks=tasks, **WITHOUT_MODEL)
    analysis = read(result, "analysis.json")
    assert analysis["inputs"] == "stand-ins"
    assert "well" not in {row["verdict"] for row in analysis["verdict"]["tasks"].values()}
    assert "stand-ins made from the task vectors" in (result / "merge" / "report.html").read_text()


def test_a_task_like_the_base_is_silent(tmp_path: Path) -> None:
    same = {"name": "same", "checkpoint": f"file://{DEMO}/base/"}
    tasks = [{"name": task, "checkpoint": f"file://{DEMO}/tasks/{task}/"} for task in TASKS[:2]]
    tasks = [{**task, "exemplars": f"file://{DEMO}/tasks/{TASKS[0]}/exemplars.safetensors"} for task in (*tasks, same)]
    result = merge_demo(tmp_path, tasks=tasks, **WITHOUT_MODEL)
    report = read(result, "report.json")
    assert report["analysis"]["verdict"]["tasks"]["same"]["why"] == "silent"
    assert report["analysis"]["verdict"]["leave_out"] == ["same"]
    assert report["conflict"]["cosine"][0][2] is None
    assert report["conflict"]["disturbance"][0][2] is None


# Bad input


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method": {"name": "ties"}}, "an analysis measures what cat would remove, not ties"),
        ({"evaluation": {"tasks": [{"task": "a", "labeled": "s3://m/l.safetensors"}]}}, "leave evaluation out"),
        ({"gates": [{"metric": "model_bytes", "at_most": 9}]}, "leave gates out, or merge"),
        ({"tasks": [{"name": "a", "checkpoint": "s3://m/a/"}]}, "give at least two"),
        ({"mode": "guess"}, "'merge' or 'analysis'"),
    ],
)
def test_what_needs_a_merged_model_is_refused(changes: dict[str, Any], sentence: str) -> None:
    tasks = [{"name": name, "checkpoint": f"s3://m/{name}/"} for name in "ab"]
    recipe = {"mode": "analysis", "base": "s3://m/base/", "tasks": tasks}
    assert Recipe.model_validate(recipe).mode == "analysis"
    with pytest.raises(ValidationError, match=sentence):
        Recipe.model_validate({**recipe, **changes})
