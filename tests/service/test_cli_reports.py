"""`catmerge report` and `catmerge compare`, against a real API."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from string import Formatter
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from service.cli.app import app
from service.cli.comparison import Comparison, Row, Section, compared
from service.cli.comparison_page import STYLE, page
from service.cli.wording import LANGUAGES, TEXTS
from service.contract.job import Status
from service.contract.parts import Counters, Done
from service.contract.stages import PartMessage, Stage
from tests.service.front import Front, artifact, checkpoint, open_front, recipe
from workers.palette import contrast

PAGE = b"<!doctype html><title>report</title>"


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    with open_front(tmp_path_factory.mktemp("front")) as opened:
        for name in ("base", "cars"):
            opened.put(f"s3://models/{name}.safetensors", checkpoint(weight=(2, 3), bias=(2,)))
        yield opened


def call(front: Front, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["--url", str(front.http.base_url), *arguments])


def metrics(kept: float, **changes: Any) -> dict[str, Any]:
    row = {"base": 0.5, "expert": 0.8, "merged": 0.8 * kept, "retention": kept, "samples": 100, **changes}
    return {
        "tasks": {"cars": row},
        "mean_accuracy": {"base": 0.5, "expert": 0.8, "merged": 0.8 * kept},
        "mean_retention": kept,
        "worst_retention": kept,
        "worst_task": "cars",
    }


def ended(front: Front, result: dict[str, Any], **changes: Any) -> str:
    """The id of a job that ended with this result and a page."""
    job = front.submit(**changes)
    prefix = job["recipe"]["output"]["prefix"]
    front.put(prefix + "merge/report.html", PAGE)
    claim = front.house.parts.claim(PartMessage(Stage.PLAN, job["id"], 0), "worker")
    assert claim is not None
    whole = {"prefix": prefix, "artifacts": [artifact("merge/report.html", PAGE)], **result}
    assert front.house.parts.complete(claim, Done(status=Status.SUCCEEDED, result=whole), Counters()) == []
    return str(job["id"])


def result(kept: float, seconds: float) -> dict[str, Any]:
    return {
        "metrics": metrics(kept),
        "gates": [{"metric": "mean_retention", "task": None, "at_least": 0.9, "value": kept, "passed": kept >= 0.9}],
        "cost": {"seconds": seconds, "seconds_queued": 0.0, "bytes_read": 5_000_000, "bytes_written": 1_000_000},
        "savings": {"bytes_after": 1_000_000},
    }


# report


def test_the_report_is_brought_here_and_opened(front: Front, tmp_path: Path) -> None:
    job_id = ended(front, {})
    seen, browser = tmp_path / "seen", tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > "{seen}"\n')
    browser.chmod(0o755)
    arguments = ["--url", str(front.http.base_url), "report", job_id, "--out", str(tmp_path / "out"), "--lang", "ja"]
    environment = {**os.environ, "BROWSER": f"{browser} %s"}
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    path = tmp_path / "out" / "merge" / "report.html"
    assert (done.stdout.strip(), path.read_bytes()) == (str(path), PAGE)
    assert seen.read_text().strip() == f"{path.as_uri()}?lang=ja"


def test_the_report_is_only_brought_here_and_replaces_an_older_one(front: Front, tmp_path: Path) -> None:
    job_id = ended(front, {})
    path = tmp_path / "merge" / "report.html"
    path.parent.mkdir()
    path.write_text("older")
    said = call(front, "report", job_id, "--out", str(tmp_path), "--no-open", "--json")
    assert json.loads(said.stdout) == {"out": str(path), "opened": False}
    assert path.read_bytes() == PAGE


def test_a_report_that_is_not_there_yet_or_in_a_language_it_lacks(front: Front, tmp_path: Path) -> None:
    unfinished = call(front, "report", front.submit()["id"], "--out", str(tmp_path), "--no-open")
    assert (unfinished.exit_code, unfinished.stdout) == (1, "")
    assert unfinished.stderr.startswith("catmerge: ")
    language = call(front, "report", ended(front, {}), "--lang", "fr", "--no-open")
    assert (language.exit_code, "en and ja" in language.stderr) == (1, True)


# compare


def test_jobs_side_by_side(front: Front, tmp_path: Path) -> None:
    first = ended(front, result(0.85, 10.0), method={"name": "task_arithmetic", "scaling": 0.3})
    second = ended(front, result(0.95, 20.0), method={"name": "task_arithmetic", "scaling": 0.5})
    out = tmp_path / "compared.html"
    said = call(front, "compare", first, second, "--html", str(out))
    assert said.exit_code == 0, said.output
    lines = {re.split(r"\s{2,}", line.strip())[0]: line for line in said.stdout.splitlines()}
    assert re.search(r"0\.3\s+0\.5", lines["method.scaling"])
    assert re.search(r"85\.0%\s+95\.0%", lines["mean"])
    assert re.search(r"0 of 1\s+1 of 1", lines["gates met"])
    assert "method.name" not in lines
    assert "output.prefix" not in said.stdout
    html = out.read_text()
    assert '<td class="best">✓ 95.0%' in html
    assert '<td class="best">✓ 10.0 s' in html
    assert first in html
    assert "<script" not in html
    assert not re.findall(r"https?://|url\(", html)


def test_jobs_side_by_side_for_programs(front: Front) -> None:
    first, second = ended(front, result(0.9, 1.0)), front.submit()["id"]
    found = json.loads(call(front, "compare", first, second, "--json").stdout)
    assert found["jobs"] == [first, second]
    assert found["warnings"] == [f"No result yet, or none any more: {second}"]
    kept = next(section for section in found["sections"] if section["title"].startswith("kept"))
    assert kept["rows"][0]["values"] == [0.9, None]


def test_one_job_alone_is_no_comparison(front: Front) -> None:
    job_id = front.submit()["id"]
    said = call(front, "compare", job_id, job_id)
    assert (said.exit_code, "two different jobs" in said.stderr) == (1, True)


def test_a_page_that_cant_be_written(front: Front, tmp_path: Path) -> None:
    said = call(front, "compare", ended(front, {}), ended(front, {}), "--html", str(tmp_path / "no" / "page.html"))
    assert (said.exit_code, "can't be written" in said.stderr) == (1, True)


def job(name: str, found: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    whole = {**recipe(), "method": {"name": "cat", "rank": 4}, **changes}
    return {"id": name, "status": "succeeded", "recipe": whole, "result": found}


def test_a_comparison_speaks_japanese(front: Front, tmp_path: Path) -> None:
    first, second = ended(front, result(0.85, 10.0)), front.submit()["id"]
    out = tmp_path / "compared.html"
    said = call(front, "compare", first, second, "--lang", "ja", "--html", str(out))
    assert said.exit_code == 0, said.output
    assert "結果がまだないか" in said.stdout
    page = out.read_text("utf-8")
    for words in (
        '<html lang="ja">',
        "<h1>2 件の結果の比較</h1>",
        "cars（正解率）",
        "10.0 秒",
        "1 件中 0 件",
        "待機中",
    ):
        assert words in page
    own = re.sub(r"<style>.*?</style>|<[^>]*>", " ", page)
    for words in ("merge", "outcome", "status", "queued", "worst", "read", "best of a row"):
        assert not re.search(rf"\b{words}\b", own), words
    as_json = json.loads(call(front, "compare", first, second, "--lang", "ja", "--json").stdout)
    assert as_json["sections"][0]["title"] == "outcome"
    assert call(front, "compare", first, second, "--lang", "fr").exit_code == 1


def test_every_text_of_a_comparison_is_there_in_both_languages_and_metrics_are_called_as_in_reports() -> None:
    def gaps(text: str) -> set[str]:
        return {name for _, name, _, _ in Formatter().parse(text) if name}

    for name, found in TEXTS.items():
        assert tuple(found) == LANGUAGES, name
        assert gaps(found["en"]) == gaps(found["ja"]), name
    reports = json.loads((files("workers") / "templates" / "texts.json").read_text("utf-8"))
    assert {n: f for n, f in TEXTS.items() if n.startswith("metric_")} == {
        n: f for n, f in reports.items() if n.startswith("metric_")
    }
    assert [status for status in Status if status not in TEXTS] == []


def row(comparison: Comparison, name: str) -> Row:
    return next(row for section in comparison.sections for row in section.rows if row.name == name)


def test_less_is_better_where_the_metric_says_so() -> None:
    jobs = [
        job(name, {"metrics": metrics(0.9, metric="perplexity", merged=score, intervals={"merged": [1.0, 9.0]})})
        for name, score in (("a", 8.0), ("b", 5.0))
    ]
    found = row(compared(jobs), "cars (perplexity)")
    assert found.best == (1,)
    assert found.cells == ("8 (1 to 9)", "5 (1 to 9)")


def test_what_a_search_has_chosen_stands_beside_what_was_asked_for() -> None:
    jobs = [
        job(name, {"search": {"chosen": {"scaling": chosen}}}, search={"space": {"scaling": [0.2, chosen]}})
        for name, chosen in (("a", 0.4), ("b", 0.5))
    ]
    assert row(compared(jobs), "search.chosen.scaling").cells == ("0.4", "0.5")
    assert row(compared(jobs), "search.space.scaling").cells == ("[0.2, 0.4]", "[0.2, 0.5]")


def test_equal_figures_have_no_best_and_missing_ones_are_gaps() -> None:
    same = compared([job("a", {"metrics": metrics(0.9)}), job("b", {"metrics": metrics(0.9)}), job("c", None)])
    assert row(same, "mean").best == ()
    assert row(same, "mean").cells == ("90.0%", "90.0%", "-")
    assert not [section for section in same.sections if section.title.startswith("recipe")]


def evaluation(name: str, **kept: float) -> dict[str, Any]:
    """An evaluation of some models, by what each keeps, beside one reference."""
    models = [{"name": model, "checkpoint": f"s3://models/{model}/"} for model in kept]
    reference = {"name": "expert", "checkpoint": "s3://models/expert/", "reference": True}
    rows = {
        model: {"score": 0.8 * share, "interval": [0.6, 0.9], "retention": share, "retention_interval": None}
        for model, share in {**kept, "expert": 1.0}.items()
    }
    found = {
        "tasks": {"cars": {"metric": "accuracy", "models": rows}},
        "models": {
            model: {"mean_retention": share, "worst_retention": share, "bytes": 10} for model, share in kept.items()
        },
        "speed": {"models": {model: {"latency_ratio": 1.25} for model in kept}},
    }
    gates = [{"model": model, "passed": share > 0.9} for model, share in kept.items()]
    labeled = {"tasks": [{"task": "cars", "labeled": "s3://x/test.safetensors"}]}
    return {
        "id": name,
        "object": "evaluation",
        "status": "rejected",
        "recipe": {"models": [*models, reference], "evaluation": labeled, "gates": [], "seed": 0},
        "result": {"metrics": found, "gates": gates, "cost": {"seconds": 1.0}},
    }


def test_the_models_of_evaluations_stand_side_by_side() -> None:
    found = compared([evaluation("evl_a", one=0.85, two=0.95), evaluation("evl_b", three=0.9)])
    assert found.jobs == ("evl_a one", "evl_a two", "evl_b three")
    assert [section.title for section in found.sections][2] == "kept of the reference's score"
    assert row(found, "mean").cells == ("85.0%", "95.0%", "90.0%")
    assert row(found, "mean").best == (1,)
    assert row(found, "cars (accuracy)").cells[0] == "0.68 (0.6 to 0.9)"
    assert row(found, "gates met").cells == ("0 of 1", "1 of 1", "0 of 1")
    assert row(found, "checkpoint").cells[1] == "s3://models/two/"
    assert row(found, "latency against the experts' or references'").cells == ("1.25",) * 3
    assert row(found, "time").cells == ("1.0 s",) * 3


def test_a_merge_and_an_evaluation_stand_side_by_side() -> None:
    measured = {"tasks": [{"task": "cars", "labeled": "s3://x/test.safetensors"}]}
    merge = {**job("mrg_a", {"metrics": metrics(0.9), "savings": {"bytes_after": 20}}, evaluation=measured)}
    found = compared([merge, evaluation("evl_a", one=0.95)])
    assert row(found, "mean").cells == ("90.0%", "95.0%")
    assert row(found, "method").cells == ("cat", "-")
    assert row(found, "stored").best == (1,)
    assert [cost.name for cost in found.sections[-1].rows] == ["stored", "latency against the experts' or references'"]
    assert not [section for section in found.sections if section.title.startswith("recipe")]
    assert found.warnings == ()
    other = {"tasks": [{"task": "cars", "labeled": "s3://x/val.safetensors"}]}
    elsewhere = {**merge, "recipe": {**merge["recipe"], "evaluation": other}}
    assert "different labeled samples" in compared([elsewhere, evaluation("evl_a", one=0.95)]).warnings[0]


def test_an_evaluation_without_a_result_is_compared_as_far_as_it_goes() -> None:
    waiting = {**evaluation("evl_b", two=0.9), "result": None, "status": "queued"}
    found = compared([evaluation("evl_a", one=0.95), waiting])
    assert row(found, "mean").cells == ("95.0%", "-")
    assert [warning.split(":")[0] for warning in found.warnings] == ["No result yet, or none any more"]


def test_what_can_not_fairly_be_compared_is_said() -> None:
    def measured_on(file: str) -> dict[str, Any]:
        return {"tasks": [{"task": "cars", "labeled": file}]}

    jobs = [
        job("a", {"metrics": metrics(0.9)}, evaluation=measured_on("s3://x/val.safetensors")),
        job("b", {"metrics": metrics(0.9)}, evaluation=measured_on("s3://x/test.safetensors"), base="s3://other/"),
    ]
    assert [warning.split(":")[0] for warning in compared(jobs).warnings] == [
        "The jobs were measured on different labeled samples",
        "The jobs start from different bases",
    ]
    assert row(compared(jobs), "evaluation.tasks.cars.labeled").cells[1] == "s3://x/test.safetensors"


def test_what_a_recipe_says_is_never_taken_for_markup() -> None:
    found = Comparison(("a", "b"), (Section("<i>", (Row("<b>", ("<u>", "&")),)),), ("<s>",))
    html = page(found)
    assert not re.findall(r"<[ibus]>", html.partition("<body>")[2])
    assert "&lt;u&gt;" in html


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_the_page_can_be_read_in_either_theme(theme: int) -> None:
    """Text at 4.5 to 1 and graphics at 3 to 1, as WCAG 2.2 has it at level AA."""
    block = re.findall(r":root {([^}]*)}", STYLE)[theme]
    whole = {name: six_digits(color) for name, color in re.findall(r"--(\w+): (#[0-9a-f]+)", block)}
    for ink in ("ink", "soft", "good"):
        assert contrast(whole[ink], whole["paper"]) >= 4.5, ink
    assert min(contrast(whole["bar"], whole[ground]) for ground in ("track", "paper")) >= 3


def six_digits(color: str) -> str:
    return color if len(color) == 7 else "#" + "".join(2 * digit for digit in color[1:])
