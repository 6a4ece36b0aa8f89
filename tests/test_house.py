"""The walls of the house, and what its papers say about it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from service.cli.app import app
from service.contract.methods import METHODS
from service.contract.treatments import TREATMENTS
from tests import named_settings

ROOT = Path(__file__).resolve().parents[1]
OPEN_TO_WORKERS = {"service.contract", "service.stores"}
# Written so that this file does not name them.
FOREIGN = {
    "a package index's host": r"pypi[.]org|pythonhosted[.]org|download[.]pytorch[.]org",
    "a folder outside of the checkout": r"[.]{2}/shared\b|/home/\w+/|/Users/\w+/",
}
PAPERS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "deploy/README.md", "deploy/demo/README.md")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.DOTALL | re.MULTILINE)


def contract_named(words: str) -> dict[str, Any]:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (found,) = [contract for contract in contracts if words in contract["name"]]
    return dict(found)


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_the_walls_stand() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_room_of_the_service_but_two_is_closed_to_workers() -> None:
    entries = (ROOT / "service").iterdir()
    rooms = {f"service.{path.stem}" for path in entries if path.suffix == ".py" or (path / "__init__.py").exists()}
    closed = contract_named("Workers enter")["forbidden_modules"]
    assert set(closed) == rooms - OPEN_TO_WORKERS - {"service.__init__"}


def test_every_treatment_is_kept_from_the_others() -> None:
    kept_apart = contract_named("Treatments do not import each other")["modules"]
    assert set(kept_apart) == {f"workers.treatments.{name}" for name in TREATMENTS}


def test_every_file_of_methods_is_a_method() -> None:
    files = {path.stem for path in (ROOT / "workers" / "methods").glob("*.py")} - {"__init__"}
    assert files == {row.combines for row in METHODS.values()}


@pytest.mark.parametrize("path", python_files("service/contract"), ids=lambda path: path.name)
def test_the_contract_needs_the_standard_library_and_pydantic_only(path: Path) -> None:
    assert set(imported_from(path)) <= sys.stdlib_module_names | {"pydantic", "pydantic_core", "service.contract"}


def imported_from(path: Path) -> Iterator[str]:
    """The packages a file imports from; what is imported of our own by its first two names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        else:
            continue
        for name in names:
            yield ".".join(name.split(".")[:2]) if name.startswith("service") else name.partition(".")[0]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("import numpy.linalg", "numpy"),
        ("from .. import stores", ""),
        ("from service.stores.jobs import JobStore", "service.stores"),
        ("def later():\n    import torch", "torch"),
        ("import pydantic", "pydantic"),
    ],
)
def test_imports_are_found_wherever_they_stand(tmp_path: Path, line: str, found: str) -> None:
    (tmp_path / "a.py").write_text(line)
    assert list(imported_from(tmp_path / "a.py")) == [found]


def test_every_file_says_what_it_is() -> None:
    silent = []
    for path in python_files("service", "workers", "deploy"):
        text = path.read_text()
        said = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0]
        if text.strip() and not said.endswith((".", ":")):
            silent.append(str(path.relative_to(ROOT)))
    assert silent == []


def test_no_file_names_what_only_one_machine_has() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {what}"
        for path, text in texts_of_the_repository()
        for what, pattern in {**FOREIGN, "the folder of this checkout": re.escape(f"{ROOT}/")}.items()
        if re.search(pattern, text)
    ]
    assert found == []


def texts_of_the_repository() -> Iterator[tuple[Path, str]]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and b"\0" not in (data := path.read_bytes()):
            yield path, data.decode()


@pytest.mark.parametrize("name", PAPERS)
def test_links_lead_somewhere(name: str) -> None:
    paper = ROOT / name
    assert [link for link in LINK.findall(paper.read_text()) if not (paper.parent / link).exists()] == []


@pytest.mark.parametrize("name", PAPERS)
def test_every_command_in_the_papers_exists(name: str) -> None:
    code = "\n".join(CODE.findall((ROOT / name).read_text()))
    targets = set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = set(getattr(typer.main.get_command(app), "commands", {}))
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", code, re.MULTILINE)) <= targets
    assert set(re.findall(r"(?:^|`)catmerge ([a-z]+)", code, re.MULTILINE)) <= commands


def test_the_readme_lists_every_setting() -> None:
    section = (ROOT / "README.md").read_text().partition("\n## Configuration\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| *`(CATMERGE_\w+)`", section, re.MULTILINE)
    assert sorted(listed) == sorted(named_settings.of_processes() | named_settings.of_callers())


def test_the_readme_lists_every_method_with_its_paper() -> None:
    section = (ROOT / "README.md").read_text().partition("\n## Methods\n")[2].partition("\n## ")[0]
    listed = {
        line.split("`")[1]: line.rstrip(" |").rpartition(" | ")[2] for line in section.splitlines() if "| `" in line
    }
    assert listed == {name: method.paper for name, method in METHODS.items()}
