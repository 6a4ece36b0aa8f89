"""Writes a comparison of jobs as one page that needs nothing but itself."""

from __future__ import annotations

from html import escape

from service.cli.comparison import Comparison, Row, Section
from service.cli.wording import speaker

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --line: #d0d4d8; --soft: #565656; --good: #00694d; --bar: #0072b2; --track: #e8ecef; }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #f0f0f0; --paper: #161616; --line: #454a50; --soft: #b8b8b8; --good: #4fd1a5; --bar: #56b4e9; --track: #2a2f34; } }
body { font: 16px/1.5 system-ui, "Segoe UI", "Noto Sans", "Noto Sans CJK JP", sans-serif; color: var(--ink); background: var(--paper); max-width: 75rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; } .wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .925rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem 1rem .35rem 0; border-bottom: 1px solid var(--line); min-width: 6rem; overflow-wrap: anywhere; }
thead th { font-family: ui-monospace, monospace; font-size: .8rem; }
tbody th { font-weight: 400; color: var(--soft); } tbody th.title { font-weight: 600; color: var(--ink); padding-top: 1.5rem; font-size: 1.05rem; }
td { font-variant-numeric: tabular-nums; } td.best { color: var(--good); font-weight: 600; }
.bar { display: block; height: .4rem; margin-top: .25rem; background: var(--track); } .bar span { display: block; height: 100%; background: var(--bar); }
.warning { border-left: .4rem solid #c43400; padding: .25rem .75rem; }
@media print { body { max-width: none; } .wide { overflow: visible; } .bar span { print-color-adjust: exact; } }
"""  # noqa: E501  # a style sheet reads by its rules
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def page(found: Comparison) -> str:
    """The page; it runs no script and asks for nothing."""
    say = speaker(found.language)
    title = escape(say("title", count=len(found.jobs)))
    head = "".join(f"<th>{escape(job)}</th>" for job in found.jobs)
    body = "".join(_section(section, len(found.jobs)) for section in found.sections)
    warnings = "".join(f'<p class="warning">{escape(warning)}</p>' for warning in found.warnings)
    return (
        f'<!doctype html>\n<html lang="{found.language}"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<title>{title}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head>'
        f"<body><h1>{title}</h1>{warnings}"
        f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"<p>{escape(say('legend'))}</p></body></html>\n"
    )


def _section(section: Section, jobs: int) -> str:
    title = f'<tr><th class="title" colspan="{jobs + 1}">{escape(section.title)}</th></tr>'
    return title + "".join(_row(row) for row in section.rows)


def _row(row: Row) -> str:
    cells = "".join(_cell(row, place) for place in range(len(row.cells)))
    return f"<tr><th>{escape(row.name)}</th>{cells}</tr>"


def _cell(row: Row, place: int) -> str:
    text = escape(row.cells[place])
    is_best = place in row.best
    start, mark = ('<td class="best">', "✓ ") if is_best else ("<td>", "")
    return f"{start}{mark}{text}{_bar(row, place)}</td>"


def _bar(row: Row, place: int) -> str:
    """A figure's length against the longest of its row."""
    value = row.values[place] if row.values else None
    most = max((value for value in row.values if value is not None), default=0)
    if value is None or value < 0 or most <= 0:
        return ""
    return f'<span class="bar" aria-hidden="true"><span style="width:{100 * value / most:.1f}%"></span></span>'
