"""What the report's page and the model card say, read as text; how the page looks is tested in a browser."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from string import Formatter
from typing import Any, get_args

import pytest

from service.contract.methods import METHODS
from service.contract.metrics import METRICS, Metric
from service.contract.notices import SENTENCES, Notice, as_rows
from service.contract.stages import Stage
from service.contract.treatments import Role
from service.contract.trials import TrialState
from tests.workers.made_up_report import made_up
from workers import figures
from workers.charts.chart import VEGA_LITE, library
from workers.charts.layers import layer_charts
from workers.charts.quality import quality_charts
from workers.languages import LANGUAGES, both, known, noticed, said, texts, token
from workers.report import render_card, render_html
from workers.usage import Usage, summed

LIMIT_BYTES = 3_000_000
TEMPLATES = files("workers") / "templates"


@pytest.fixture(scope="module")
def page() -> str:
    return render_html(made_up())


def old_report() -> dict[str, Any]:
    """A report from before there were kinds, intervals, layers and inputs."""
    whole = made_up()
    scores = ("samples", "base", "expert", "merged", "retention")
    measured = whole["metrics"]
    kept = ("title", "method", "paper", "base", "tasks", "trimmed", "savings", "plan", "licenses", "warnings")
    return {
        **{key: whole[key] for key in kept},
        "cost": {key: whole["cost"][key] for key in ("seconds", "seconds_queued", "bytes_read", "bytes_written")},
        "metrics": {
            "tasks": {name: {key: row[key] for key in scores} for name, row in measured["tasks"].items()},
            **{key: measured[key] for key in ("mean_accuracy", "mean_retention", "worst_retention", "worst_task")},
        },
        "gates": [{"metric": "mean_retention", "task": None, "at_least": 0.5, "value": 0.9, "passed": True}],
    }


# Texts


def gaps(text: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(text) if name}


def test_every_text_is_there_in_both_languages_with_the_same_gaps() -> None:
    for name, found in texts().items():
        assert tuple(found) == LANGUAGES, name
        assert all(found.values()), name
        assert gaps(found["en"]) == gaps(found["ja"]), name


def test_every_warning_is_there_in_japanese_with_the_same_values() -> None:
    japanese = json.loads((TEMPLATES / "notices.json").read_text("utf-8"))
    assert list(japanese) == list(SENTENCES)
    for code, sentence in SENTENCES.items():
        assert gaps(japanese[code]) == gaps(sentence), code


def test_a_warning_speaks_the_language_of_its_reader() -> None:
    (row,) = as_rows([Notice("within_noise", task="<b>", count=24, metric="accuracy", merged="0.8", expert="0.9")])
    english, japanese = str(noticed(row)).split("</span>")[:2]
    assert "task &#39;&lt;b&gt;&#39;: 24 samples are too few" in english
    assert "統合モデルの正解率（0.8）" in japanese
    several = Notice("no_figure", task="cars", metrics="auroc, macro_f1", model="merged")
    assert "統合モデルのAUROC、マクロ F1は" in str(noticed(as_rows([several])[0]))
    assert str(noticed(as_rows(["careful"])[0])) == '<span lang="en">careful</span>'


def test_trials_that_failed_alike_are_told_of_together_and_older_ones_as_they_were_written() -> None:
    report = made_up()
    trials = report["search"]["trials"]
    trials[5] |= {key: trials[3][key] for key in ("state", "value", "detail", "why")}
    trials[7] |= {"state": "failed", "value": None, "detail": "it was <too> much", "why": None}
    page = render_html(report)
    chapter = page[page.index('<section id="search">') : page.index('<section id="cost">')]
    assert chapter.count("<li>") == 2
    assert "3, 5: " in chapter
    assert "does not fit into F16" in chapter
    assert "F16 の範囲を超えて" in chapter
    assert '<span lang="en">it was &lt;too&gt; much</span>' in chapter


def test_what_becomes_of_parameters_without_statistics_has_a_text() -> None:
    treated = {method.without or "kept untrimmed" for method in METHODS.values()}
    assert [words for words in treated if not known("treated_" + words.replace(" ", "_"))] == []


def test_every_text_is_used() -> None:
    """Those of metrics, gates, roles, models and charts are named in the code by the end of their names."""
    code = "".join(file.read_text() for file in TEMPLATES.iterdir() if file.name.endswith((".html", ".js")))
    code += "".join(file.read_text() for file in (files("workers") / "charts").iterdir() if file.name.endswith(".py"))
    families = ("metric_", "gate_", "role_", "model_", "analysis_", "judged_", "why_", "state_", "stage_", "treated_")
    charts = ("_chart", "_alt", "_likeness")
    unused = [
        name
        for name in texts()
        if not name.startswith(families) and not name.endswith(charts) and not re.search(rf'["@]{name}"', code)
    ]
    assert unused == []


def test_what_the_contract_names_has_a_text() -> None:
    gates = [row["metric"] for row in made_up()["gates"]]
    names = [*(f"metric_{m}" for m in Metric), *(f"role_{r}" for r in Role), *(f"gate_{g}" for g in gates)]
    names += [*(f"stage_{stage}" for stage in Stage), *(f"state_{state}" for state in get_args(TrialState))]
    assert [name for name in names if not known(name)] == []


def test_a_token_without_a_text_is_an_error_and_a_name_is_no_token() -> None:
    with pytest.raises(KeyError, match="no_such_text"):
        token("no_such_text")
    assert said("task") == "task"
    assert said(token("task")) == both("task")
    assert both("says_noise", tasks="<b>").count("&lt;b&gt;") == 2


# Figures


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (figures.percent(0.951), "95.1 %"),
        (figures.percent(None), "–"),
        (figures.percent(float("nan")), "–"),
        (figures.score(0.5, "accuracy"), "50.0 %"),
        (figures.score(12.345, "perplexity"), "12.35"),
        (figures.span((0.9, 0.95), "accuracy"), "90.0–95.0 %"),
        (figures.span((3.0, 4.5), "perplexity"), "3–4.5"),
        (figures.span((None, 0.5), "accuracy"), None),
        (figures.figure(86_567_656), "86,567,656"),
        (figures.figure(1561.4), "1,561"),
        (figures.difference(0.037, "accuracy"), "+3.7"),
        (figures.difference(-0.25, "perplexity"), "-0.25"),
        (figures.difference(None, "accuracy"), None),
        (figures.size(999), "999 B"),
        (figures.size(1_234_567), "1.2 MB"),
        (figures.size(5e15), "5000.0 TB"),
        (figures.seconds(0.0412), "41.2 ms"),
        (figures.seconds(18.44), "18.4 s"),
        (figures.seconds(381.5), "6 min"),
        (figures.seconds(9000), "2.5 h"),
    ],
)
def test_numbers_are_written_as_people_read_them(written: str | None, expected: str | None) -> None:
    assert written == expected


# The page


def test_the_page_asks_for_nothing_from_elsewhere(page: str) -> None:
    own = page.replace(library().replace("</script", "<\\/script"), "")
    assert not re.findall(r"""(?:src|href|action)\s*=\s*["'](?!#|data:,)""", own)
    assert not re.findall(r"url\(|@import\s|https?://", own)
    assert "default-src 'none'" in own


def test_the_page_runs_the_scripts_it_came_with_and_no_others(page: str) -> None:
    (policy,) = re.findall(r"script-src ([^;]*)", page)
    assert len(policy.split()) == len(re.findall(r"<script>", page)) == 2
    assert "unsafe" not in policy


def test_the_largest_report_fits_its_limit() -> None:
    tasks = [f"a-rather-long-task-name-{i:02d}" for i in range(64)]
    page = render_html(made_up(tasks, layers=200, files_per_task=30))
    assert len(page.encode()) < LIMIT_BYTES


def test_names_are_never_taken_for_markup(page: str) -> None:
    assert "<b>pets</b>" not in page
    assert "&lt;b&gt;pets&lt;/b&gt;" in page
    assert "</script><script>alert" not in page


def test_a_name_in_the_charts_ends_no_script() -> None:
    report = made_up()
    report["conflict"]["tasks"][0] = "</script><script>alert(1)</script>"
    page = render_html(report)
    assert page.count("<script") == 3
    assert "</script><script>alert" not in page


@pytest.mark.parametrize("report", [old_report(), {**old_report(), "metrics": None, "gates": []}])
def test_older_and_smaller_reports_are_rendered_too(report: dict[str, Any]) -> None:
    page = render_html(report)
    assert ("Quality was not measured" in page) == (report["metrics"] is None)
    assert ('id="chart-retention"' in page) == (report["metrics"] is not None)
    for chapter in ("inputs", "search"):
        assert f'<section id="{chapter}">' not in page


def test_a_page_without_charts_carries_no_library() -> None:
    assert len(render_html({**old_report(), "metrics": None, "gates": []})) < 100_000


def test_a_report_opens_in_the_language_that_was_asked_for() -> None:
    page = render_html({**made_up(), "language": "ja"})
    assert '<html lang="ja">' in page
    assert re.search(r'id="lang-ja" value="ja" checked', page)
    assert "<title>4 個のモデルを cat で 1 個に統合</title>" in page


def test_every_missed_gate_is_named_at_the_top_in_its_own_unit(page: str) -> None:
    top = page[page.index('<section id="summary"') : page.index('<nav class="contents"')]
    assert "Rejected: 1 of 6 gates missed." in top
    assert "drop against the expert (cars) is 4.5\N{NO-BREAK SPACE}%, but at most 2.0\N{NO-BREAK SPACE}%" in top


def test_a_score_that_could_not_be_computed_is_a_gap_and_no_error() -> None:
    report = made_up()
    row = report["metrics"]["tasks"]["pets"]
    row |= {"merged": None, "retention": None, "intervals": {"base": None, "expert": [0.1, None]}, "baselines": {}}
    assert 'id="chart-scores-accuracy"' in render_html(report)


def test_measured_memory_stands_beside_what_was_planned(page: str) -> None:
    costs = page[page.index('<section id="cost">') : page.index('<section id="recipe">')]
    for figure in ("5.0 GB", "6.1 GB", "900.0 MB", "4.0 GB"):  # planned, peak, idle, GPU
        assert figure.replace(" ", "\N{NO-BREAK SPACE}") in costs, figure


def test_a_bound_on_memory_is_told_as_one() -> None:
    report = made_up()
    report["cost"] |= summed({"merge": [Usage(300.0, 6_100_000_000, None, False, "cpu")]})
    page = render_html(report)
    assert "no more than" in page
    assert "≤ 6.1" in page


# Charts


def test_what_is_given_as_a_share_is_drawn_from_zero_and_the_rest_is_not() -> None:
    report = made_up()
    drawn = {chart.name: chart for chart in quality_charts(report["metrics"], report["gates"])}
    assert list(drawn) == ["retention", "scores-accuracy", "scores-perplexity"]
    shares, rest = (drawn[name].spec["layer"][0] for name in ("scores-accuracy", "scores-perplexity"))
    assert (shares["mark"]["type"], rest["mark"]["type"]) == ("bar", "point")
    assert shares["encoding"]["x"]["scale"]["domain"] == [0, 1]
    assert len(drawn["scores-accuracy"].rows) == 3 * 5
    assert METRICS[Metric.PERPLEXITY].better == "lower"


def test_the_retention_chart_shows_what_was_agreed() -> None:
    report = made_up()
    chart = next(iter(quality_charts(report["metrics"], report["gates"])))
    rules = chart.spec["layer"][0]["data"]["values"]
    assert rules == [{"at": 1.0}, {"at": 0.85}]


def test_the_spectrum_opens_at_the_greatest_eigenvalue() -> None:
    layers = made_up()["layers"]
    layers["spectra"][9]["scores"][0] = 1000.0
    chart = next(chart for chart in layer_charts(layers) if chart.name == "spectrum")
    assert chart.spec["params"][0]["value"] == layers["spectra"][9]["parameter"]
    assert len({row["parameter"] for row in layers["spectra"]}) > 1


def test_a_conflict_of_nothing_has_a_place_on_the_logarithmic_axis() -> None:
    layers = made_up()["layers"]
    layers["conflict"] = [{**row, "after": 0.0} for row in layers["conflict"]]
    chart = next(chart for chart in layer_charts(layers) if chart.name == "conflict")
    assert min(row["at"] for row in chart.spec["data"]["values"]) > 0
    assert "-100.0 %" in {row[-1] for row in chart.rows}


def test_the_library_is_one_script_that_loads_nothing() -> None:
    assert "vegaEmbed" in library()
    assert not re.findall(r"\bimport\s*\(?\s*[\"']https?:", library())
    assert VEGA_LITE.startswith("6")


# The card


def test_the_card_names_the_metric_of_each_task() -> None:
    card = render_card({**made_up(), "title": "4 models merged into one by cat"})
    assert "| novels | perplexity |" in card
    assert json.dumps("s3://models/base/") in card
    assert "not stated" in card


def test_the_card_of_an_older_report_speaks_of_accuracy() -> None:
    assert "| cars | accuracy |" in render_card(old_report())
