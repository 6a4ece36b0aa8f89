"""Says everything on the report's page in English and in Japanese; both are in it, and the reader chooses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from markupsafe import Markup

LANGUAGES = ("en", "ja")
WORDS = {"metric": "metric_", "metrics": "metric_", "model": "model_", "treated": "treated_"}  # in notices
MARK = "@"  # what starts with it in a chart is the name of a text


@cache
def texts() -> dict[str, dict[str, str]]:
    """Every text of the page by its name, then by language."""
    found: dict[str, dict[str, str]] = json.loads((files("workers") / "templates" / "texts.json").read_text("utf-8"))
    return found


def both(name: str, **values: Any) -> Markup:
    """A text in both languages, of which the page shows one."""
    return Markup("").join(
        Markup('<span class="{0}" lang="{0}">{1}</span>').format(language, plain(name, language, **values))
        for language in LANGUAGES
    )


def noticed(notice: Mapping[str, Any]) -> Markup:
    """A warning in both languages: a row of ``service.contract.notices``, whose English is there already."""
    if notice["code"] is None:
        return Markup('<span lang="en">{0}</span>').format(notice["detail"])
    values = {key: _in_japanese(key, value) for key, value in notice["values"].items()}
    japanese = _notices()[notice["code"]].format(**values)
    return Markup('<span class="en" lang="en">{0}</span><span class="ja" lang="ja">{1}</span>').format(
        notice["detail"], japanese
    )


def _in_japanese(key: str, value: Any) -> Any:
    """A value of a notice, where it is a word of ours: metrics, a model, what became of parameters."""
    family = WORDS.get(key)
    if family is None:
        return value
    names = [family + word.replace(" ", "_") for word in value.split(", ")]
    return "、".join(plain(name, "ja") for name in names) if all(map(known, names)) else value


@cache
def _notices() -> dict[str, str]:
    """What job warnings are called in Japanese, by their codes."""
    found: dict[str, str] = json.loads((files("workers") / "templates" / "notices.json").read_text("utf-8"))
    return found


def plain(name: str, language: str, **values: Any) -> str:
    """A text in one language."""
    return texts()[name][language].format(**values)


def token(name: str) -> str:
    """What stands in a chart for a text, until the page knows its reader's language."""
    return MARK + name if name in texts() else _missing(name)


def said(value: str) -> Markup | str:
    """A token's text in both languages; anything else as it is."""
    name = value.removeprefix(MARK)
    return both(name) if value.startswith(MARK) and known(name) else value


def known(name: str) -> bool:
    """Whether there is a text of this name."""
    return name in texts()


def _missing(name: str) -> str:
    raise KeyError(f"there is no text named {name!r} in templates/texts.json")
