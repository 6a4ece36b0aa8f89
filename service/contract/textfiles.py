"""Reads rows of labeled text from JSONL and CSV, and says by line and column what is wrong with them."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from service.contract.evaluation import TextColumns
from service.contract.metrics import Kind

CSV = ".csv"
LIMIT_BYTES = 256 << 20
HEAD_BYTES = 64 << 10  # what is looked at before a job begins: some rows of any usual file
HEAD_ROWS = 50
RETRIEVED = "pair"  # what the column of right documents is called where a recipe says nothing

# What a row of each kind has to have.
FIELDS: dict[Kind, tuple[str, ...]] = {
    Kind.CLASSIFICATION: ("text", "label"),
    Kind.REGRESSION: ("text", "label"),
    Kind.TOKEN_CLASSIFICATION: ("text", "label"),
    Kind.LANGUAGE_MODELING: ("text",),
    Kind.MULTIPLE_CHOICE: ("text", "choices", "label"),
    Kind.SEQUENCE_TO_SEQUENCE: ("text", "label"),
    Kind.RETRIEVAL: ("text", "pair"),
}
VOCABULARY = re.compile(r"tokenizer\.json|vocab.*|.*\.(model|spm|tiktoken)")
CLASSES = (Kind.CLASSIFICATION, Kind.TOKEN_CLASSIFICATION)
NAMES_SHOWN = 20
WITHOUT_PAIR = (Kind.TOKEN_CLASSIFICATION, Kind.MULTIPLE_CHOICE)


class TextFault(Exception):
    """A text file holds something else than its task's evaluation needs; the sentence names line and column."""

    def __init__(self, detail: str, line: int | None = None) -> None:
        self.detail = detail if line is None else f"line {line}: {detail}"
        super().__init__(self.detail)


@dataclass(frozen=True)
class Row:
    """One row of a text file, by the names of the file's columns; lines count from 1."""

    line: int
    cells: Mapping[str, Any]


@dataclass(frozen=True)
class Sample:
    """One row as its kind understands it.

    ``text`` is a list of words for token classification, and None for a row of retrieval that only brings a document.
    ``label`` is the number or name of a class, a number, a list of tags, the number of the right choice, or the right
    text; None where the kind has none.
    """

    line: int
    text: Any
    pair: str | None = None
    choices: tuple[str, ...] = ()
    label: Any = None


def holds_tokenizer(names: Iterable[str]) -> bool:
    """Whether one of these files beside a checkpoint has a tokenizer's vocabulary."""
    return any(VOCABULARY.fullmatch(name) for name in names)


def read_samples(address: str, data: bytes, kind: Kind, columns: TextColumns) -> list[Sample]:
    """All rows of a text file, as ``kind`` understands them.

    Lists (words, tags, choices) stand in a CSV file's cell as JSON, words and tags also with spaces between them. The
    right choice is named by its number, from 0, or its text.

    Raises:
        TextFault: a row does not fit, or there is none.
    """
    samples = [read_sample(row, kind, columns) for row in read_rows(address, data)]
    if not samples:
        raise TextFault("it holds no rows")
    if all(sample.text is None for sample in samples):
        raise TextFault(f"no row has a query in column {columns.text!r}")
    return samples


def text_faults(
    address: str,
    head: bytes,
    is_whole: bool,
    kind: Kind,
    columns: TextColumns,
    names: Mapping[int, str] | None = None,
) -> list[str]:
    """What is wrong with the first rows of a text file: at most one sentence, none where nothing is.

    Args:
        head: the beginning of the file, ``HEAD_BYTES`` of it are plenty; a row that it cuts off is not looked at.
        is_whole: whether ``head`` is all there is.
        names: what the model's classes are called, if that is known.
    """
    complete = head if is_whole else head[: head.rfind(b"\n") + 1]
    try:
        rows = list(islice(read_rows(address, complete, is_whole), HEAD_ROWS))
        for row in rows:
            sample = read_sample(row, kind, columns)
            if kind in CLASSES and names is not None:
                class_numbers(sample, columns, names)
    except TextFault as fault:
        return [fault.detail]
    return ["it holds no rows"] if is_whole and not rows else []


def label_names(config: Mapping[str, Any] | None) -> dict[int, str] | None:
    """What a ``config.json`` calls the classes of its model, by number; None where it does not say."""
    table = (config or {}).get("id2label")
    if not isinstance(table, Mapping) or not all(str(number).isdecimal() for number in table):
        return None
    return {int(number): str(name) for number, name in table.items()}


def class_numbers(sample: Sample, columns: TextColumns, names: Mapping[int, str] | None) -> list[int]:
    """The numbers of a sample's class or tags, which its file has by number or by name.

    Without ``names``, classes have numbers only, and any will do.

    Raises:
        TextFault: one is none of the model's.
    """
    labels = sample.label if isinstance(sample.label, list) else [sample.label]
    numbers = {name: number for number, name in (names or {}).items()}
    return [_class_number(sample.line, label, columns, names, numbers) for label in labels]


def _class_number(
    line: int, label: int | str, columns: TextColumns, names: Mapping[int, str] | None, numbers: Mapping[str, int]
) -> int:
    if isinstance(label, str) and label in numbers:
        return numbers[label]
    number = int(label) if isinstance(label, int) or re.fullmatch(r"-?[0-9]{1,9}", label) else None
    if number is None or (names is not None and number not in names):
        raise TextFault(f"column {columns.label!r} has {_shown(label)}, {_known(names)}", line)
    return number


def _known(names: Mapping[int, str] | None) -> str:
    if names is None:
        return "but classes have numbers only, from 0"
    shown = list(names.values())[:NAMES_SHOWN] + (["..."] if len(names) > NAMES_SHOWN else [])
    return (
        f"which is no class of the checkpoint: the id2label of its config.json has {min(names, default=0)} to "
        f"{max(names, default=0)} ({', '.join(shown)})"
    )


def read_rows(address: str, data: bytes, is_whole: bool = True) -> Iterator[Row]:
    """The rows of a JSONL file (an object per line) or a CSV file (a header, then cells), UTF-8; blank lines are none.

    A quoted cell that ``data`` ends in is only wrong where ``is_whole``.

    Raises:
        TextFault: a line is no JSON object, a row has another number of cells than the header, not UTF-8.
    """
    text = _decoded(data)
    return _csv_rows(text, is_whole) if address.lower().endswith(CSV) else _json_rows(text)


def read_sample(row: Row, kind: Kind, columns: TextColumns) -> Sample:
    """A row as ``kind`` understands it. Raises TextFault."""
    if columns.pair and kind in WITHOUT_PAIR:
        raise TextFault(f"{kind} has no second text; leave out columns.pair")
    fields = {"text": None, **{field: _field(row, kind, columns, field) for field in _fields(kind, columns)}}
    sample = Sample(row.line, **fields)
    if kind is Kind.TOKEN_CLASSIFICATION:
        _refuse_unequal(sample, columns)
    return replace(sample, label=_answer(sample, columns)) if kind is Kind.MULTIPLE_CHOICE else sample


def _fields(kind: Kind, columns: TextColumns) -> tuple[str, ...]:
    return FIELDS[kind] if columns.pair is None or "pair" in FIELDS[kind] else (*FIELDS[kind], "pair")


def _column(columns: TextColumns, field: str) -> str:
    return str(getattr(columns, field) or RETRIEVED)


def _field(row: Row, kind: Kind, columns: TextColumns, field: str) -> Any:
    column = _column(columns, field)
    if column not in row.cells:
        named = ", ".join(map(repr, row.cells))
        raise TextFault(
            f"there is no column {column!r}; the columns are {named}. Say in the evaluation's columns.{field} what it "
            "is called",
            row.line,
        )
    value = row.cells[column]
    if value is None or value == "":
        if (kind, field) == (Kind.RETRIEVAL, "text"):
            return None
        raise TextFault(f"column {column!r} is empty", row.line)
    try:
        return _reader(kind, field)(value)
    except _Unlike as unlike:
        raise TextFault(f"column {column!r} is {_shown(value)}; it must be {unlike}", row.line) from None


def _refuse_unequal(sample: Sample, columns: TextColumns) -> None:
    if len(sample.text) != len(sample.label):
        raise TextFault(
            f"column {columns.text!r} has {len(sample.text)} words, but {columns.label!r} has {len(sample.label)} tags",
            sample.line,
        )


def _answer(sample: Sample, columns: TextColumns) -> int:
    """The number of the right choice: a text that is one of them, else a number."""
    label, choices = sample.label, sample.choices
    if isinstance(label, str) and choices.count(label) == 1:
        return choices.index(label)
    number = int(label) if isinstance(label, int) or label.strip().isdecimal() else -1
    if not 0 <= number < len(choices):
        raise TextFault(
            f"column {columns.label!r} is {_shown(label)}; it must be one of the choices, or its number from 0 to "
            f"{len(choices) - 1}",
            sample.line,
        )
    return number


class _Unlike(Exception):
    """A cell is of another type than its field; says what it must be."""


def _reader(kind: Kind, field: str) -> Callable[[Any], Any]:
    return _READERS[field] if field in _READERS else _READERS[kind, field]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Unlike("a text")
    return value


def _class(value: Any) -> int | str:
    """The number or the name of a class; which of them the digits of a CSV file are, the label names decide."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, int | str):
        raise _Unlike("the number of a class or its name")
    return int(value) if isinstance(value, bool) else value


def _number(value: Any) -> float:
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise _Unlike("a finite number")
    return number


def _choice(value: Any) -> int | str:
    if not isinstance(value, int | str) or isinstance(value, bool):
        raise _Unlike("the number of the right choice, from 0, or its text")
    return value


def _words(value: Any) -> list[str]:
    values = _listed(value) if isinstance(value, str) else value
    if not isinstance(values, list) or not values or not all(isinstance(word, str) and word for word in values):
        raise _Unlike("a list of words")
    return values


def _tags(value: Any) -> list[int | str]:
    values = _listed(value) if isinstance(value, str) else value
    if not isinstance(values, list) or not values or any(isinstance(tag, bool) for tag in values):
        raise _Unlike("a list of tags, by name or by number")
    return [_class(tag) for tag in values]


def _choices(value: Any) -> tuple[str, ...]:
    values = _listed(value) if isinstance(value, str) else value
    is_list = isinstance(values, list) and all(isinstance(choice, str) and choice for choice in values)
    if not is_list or len(values) < 2:
        raise _Unlike('a list of at least two texts, such as ["yes", "no"]')
    return tuple(values)


def _listed(cell: str) -> list[Any]:
    """A cell's list: as JSON, or its words."""
    if cell.lstrip().startswith("["):
        try:
            return list(json.loads(cell))
        except (ValueError, RecursionError):
            raise _Unlike("a list as JSON has it") from None
    return cell.split()


_READERS: dict[str | tuple[Kind, str], Callable[[Any], Any]] = {
    "pair": _text,
    "choices": _choices,
    **{(kind, "text"): _text for kind in Kind},
    (Kind.TOKEN_CLASSIFICATION, "text"): _words,
    (Kind.CLASSIFICATION, "label"): _class,
    (Kind.REGRESSION, "label"): _number,
    (Kind.TOKEN_CLASSIFICATION, "label"): _tags,
    (Kind.MULTIPLE_CHOICE, "label"): _choice,
    (Kind.SEQUENCE_TO_SEQUENCE, "label"): _text,
}


def _shown(value: Any) -> str:
    written = json.dumps(value, ensure_ascii=False)
    return written if len(written) <= 60 else f"{written[:57]}..."


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TextFault(f"byte {error.start} is not UTF-8; save the file as UTF-8", line) from None


def _json_rows(text: str) -> Iterator[Row]:
    for line, written in enumerate(text.split("\n"), 1):
        if not written.strip():
            continue
        try:
            cells = json.loads(written)
        except json.JSONDecodeError as error:
            raise TextFault(f"this is no JSON: {error.msg} at character {error.pos + 1}", line) from None
        except (ValueError, RecursionError):
            raise TextFault("this JSON is nested too deeply, or has too long a number", line) from None
        if not isinstance(cells, dict):
            raise TextFault('each line must be a JSON object, such as {"text": "...", "label": 0}', line)
        yield Row(line, cells)


def _csv_rows(text: str, is_whole: bool) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    names: list[str] | None = None
    lines = text.count("\n")
    try:
        for cells in reader:
            if not cells:
                continue
            if names is None:
                names = _header(cells, reader.line_num)
            else:
                yield _csv_row(names, cells, reader.line_num)
    except csv.Error as error:
        if is_whole or reader.line_num < lines:
            raise TextFault(f"this is no CSV: {error}", reader.line_num) from None


def _header(cells: list[str], line: int) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TextFault(f"the header names {', '.join(map(repr, twice))} twice", line)
    if len(names) == 1 and (found := next((mark for mark in (";", "\t") if mark in names[0]), None)):
        raise TextFault(f"the header has one column, {names[0]!r}; cells are separated by commas, not {found!r}", line)
    return names


def _csv_row(names: list[str], cells: list[str], line: int) -> Row:
    if len(cells) != len(names):
        raise TextFault(f"there are {len(cells)} cells, but the header has {len(names)}", line)
    return Row(line, dict(zip(names, cells, strict=True)))
