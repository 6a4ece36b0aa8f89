"""What the demo says last: the report's own figures."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.workers.made_up_report import made_up

SCRIPT = Path(__file__).parents[1] / "deploy" / "demo" / "run.py"


@pytest.fixture
def demo() -> Iterator[ModuleType]:
    specification = importlib.util.spec_from_file_location("demo_run", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["demo_run"] = module  # dataclasses look themselves up there
    specification.loader.exec_module(module)
    yield module
    del sys.modules["demo_run"]


def test_the_summary_is_read_from_the_report(demo: ModuleType, tmp_path: Path) -> None:
    report = made_up()
    report["title"] = "4 models merged into one by cat"
    report["gates"] = report["gates"][:2]
    report["metrics"] |= {"mean_retention": 0.1234, "mean_retention_interval": [0.1, 0.2]}  # what nobody would compute
    (tmp_path / "merge").mkdir()
    (tmp_path / "merge" / "report.json").write_text(json.dumps(report))
    with demo.console.capture() as printed:
        demo.show_report(tmp_path)
    said = printed.get()
    for words in (
        "4 models merged into one by cat",
        "verdict: accepted, 2 gates",
        "✓ worst_task_retention 87.1 %; at least 85.0 % was agreed on",
        "✓ mean_retention 90.5 %, by its cautious bound",
        "12.3 % (10.0 % to 20.0 %) on average",
        f"at worst ({report['metrics']['worst_task']})",
        "models: 4 → 1",
        "75.0 % saved",
        "381.5 s on cuda",
        "6100.00 MB of memory at most",
        "search: scaling 0.41, rank 4, the best of 20 trials; mean kept 94.0 % on validation, 93.0 % on test",
        "warnings to read: 3",
        str(tmp_path / "merge" / "report.html"),
    ):
        assert words in said, words


def test_a_missed_gate_rejects_in_the_summary_too(demo: ModuleType) -> None:
    report = made_up()
    report["gates"] = [{**report["gates"][0], "passed": False}]
    first, second, *_ = demo.summarized(report)
    assert "rejected" in first
    assert second.strip().startswith("✗ worst_task_retention")
