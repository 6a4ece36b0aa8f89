"""Rows of JSONL and CSV as each kind understands them, and the sentences about those that do not fit."""

import json
from typing import Any

import pytest

from service.contract.evaluation import TextColumns
from service.contract.metrics import Kind
from service.contract.textfiles import (
    HEAD_ROWS,
    TextFault,
    class_numbers,
    holds_tokenizer,
    label_names,
    read_samples,
    text_faults,
)

COLUMNS = TextColumns()


def lines(*rows: Any) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def said(address: str, data: bytes, kind: Kind, columns: TextColumns = COLUMNS) -> str:
    with pytest.raises(TextFault) as fault:
        read_samples(address, data, kind, columns)
    assert text_faults(address, data, True, kind, columns) == [fault.value.detail]
    return fault.value.detail


def test_jsonl_rows_keep_their_lines() -> None:
    data = (
        b"\xef\xbb\xbf" + lines({"text": "猫", "label": "cat"}) + b"\r\n\n" + lines({"text": "dog", "label": 1}) + b"\n"
    )
    first, second = read_samples("a.jsonl", data, Kind.CLASSIFICATION, COLUMNS)
    assert (first.line, first.text, first.label) == (1, "猫", "cat")
    assert (second.line, second.text, second.label) == (3, "dog", 1)


def test_csv_cells_may_hold_commas_quotes_and_lines() -> None:
    data = b'label, text\r\n1,"one, ""two""\nthree"\r\n\r\ncat,four\r\n'
    first, second = read_samples("A.CSV", data, Kind.CLASSIFICATION, COLUMNS)
    assert (first.line, first.text, first.label) == (3, 'one, "two"\nthree', "1")
    assert (second.line, second.text, second.label) == (5, "four", "cat")


def test_columns_are_called_as_the_recipe_says() -> None:
    columns = TextColumns(text="premise", pair="hypothesis", label="gold")
    data = lines({"premise": "a", "hypothesis": "b", "gold": 2, "id": 7})
    (sample,) = read_samples("a.jsonl", data, Kind.CLASSIFICATION, columns)
    assert (sample.text, sample.pair, sample.label) == ("a", "b", 2)


def test_labels_of_each_kind() -> None:
    def label(kind: Kind, address: str, data: bytes) -> Any:
        return read_samples(address, data, kind, COLUMNS)[0].label

    assert label(Kind.REGRESSION, "a.csv", b"text,label\na,-1.5e0\n") == -1.5
    assert label(Kind.CLASSIFICATION, "a.jsonl", b'{"text": "a", "label": 1.0}') == 1
    assert label(Kind.CLASSIFICATION, "a.jsonl", b'{"text": "a", "label": true}') == 1
    assert label(Kind.SEQUENCE_TO_SEQUENCE, "a.csv", b"text,label\na,b c\n") == "b c"
    assert label(Kind.TOKEN_CLASSIFICATION, "a.csv", b"text,label\na b,O 3\n") == ["O", "3"]
    assert label(Kind.TOKEN_CLASSIFICATION, "a.csv", b'text,label\n"[""a b""]","[1]"\n') == [1]
    assert label(Kind.TOKEN_CLASSIFICATION, "a.jsonl", b'{"text": "a", "label": ["O"]}') == ["O"]
    assert label(Kind.LANGUAGE_MODELING, "a.jsonl", b'{"text": "a"}') is None


@pytest.mark.parametrize(
    ("answer", "number"), [("1", 1), ('"blue"', 1), ('"0"', 0), ('"3"', 2), ("2", 2), ('"red"', 0)]
)
def test_a_right_choice_is_named_by_its_text_or_its_number(answer: str, number: int) -> None:
    data = f'{{"text": "q", "choices": ["red", "blue", "3"], "label": {answer}}}'.encode()
    assert read_samples("a.jsonl", data, Kind.MULTIPLE_CHOICE, COLUMNS)[0].label == number


def test_a_row_of_retrieval_without_a_query_brings_a_document() -> None:
    data = b"text,pair\nwhat,this\n,that\n"
    found = read_samples("a.csv", data, Kind.RETRIEVAL, COLUMNS)
    assert [(sample.text, sample.pair) for sample in found] == [("what", "this"), (None, "that")]
    assert "no row has a query" in _read_fault("a.csv", b"text,pair\n,that\n", Kind.RETRIEVAL)


def _read_fault(address: str, data: bytes, kind: Kind) -> str:
    with pytest.raises(TextFault) as fault:
        read_samples(address, data, kind, COLUMNS)
    return fault.value.detail


@pytest.mark.parametrize(
    ("address", "data", "kind", "words"),
    [
        ("a.jsonl", b"", Kind.CLASSIFICATION, "it holds no rows"),
        ("a.csv", b"text,label\n", Kind.CLASSIFICATION, "it holds no rows"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text"', Kind.CLASSIFICATION, "line 2: this is no JSON"),
        ("a.jsonl", b"[1]", Kind.CLASSIFICATION, "line 1: each line must be a JSON object"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, Kind.CLASSIFICATION, "line 1: this JSON is nested too deeply"),
        (
            "a.jsonl",
            b'{"label": 1}\n',
            Kind.CLASSIFICATION,
            "line 1: there is no column 'text'; the columns are 'label'",
        ),
        ("a.jsonl", b'{"text": "a", "label": null}', Kind.CLASSIFICATION, "line 1: column 'label' is empty"),
        ("a.jsonl", b'{"text": 5, "label": 1}', Kind.CLASSIFICATION, "column 'text' is 5; it must be a text"),
        (
            "a.jsonl",
            b'{"text": "a", "label": 1.5}',
            Kind.CLASSIFICATION,
            "it must be the number of a class or its name",
        ),
        ("a.jsonl", b'{"text": "a", "label": NaN}', Kind.REGRESSION, "it must be a finite number"),
        ("a.csv", b"text,label\na,good\n", Kind.REGRESSION, "line 2: column 'label' is \"good\"; it must be a finite"),
        ("a.csv", b"text;label\na;1\n", Kind.CLASSIFICATION, "cells are separated by commas, not ';'"),
        ("a.csv", b"text,text\na,b\n", Kind.CLASSIFICATION, "line 1: the header names 'text' twice"),
        ("a.csv", b"text,label\na,1,2\n", Kind.CLASSIFICATION, "line 2: there are 3 cells, but the header has 2"),
        ("a.csv", b'text,label\n"a,1\n', Kind.CLASSIFICATION, "this is no CSV: unexpected end of data"),
        ("a.csv", b"text,label\na,1\nb\xff,1\n", Kind.CLASSIFICATION, "line 3: byte 16 is not UTF-8"),
        ("a.csv", b"text,label\na b,O\n", Kind.TOKEN_CLASSIFICATION, "'text' has 2 words, but 'label' has 1 tags"),
        ("a.csv", b"text,label\n[a,O\n", Kind.TOKEN_CLASSIFICATION, "it must be a list as JSON has it"),
        (
            "a.jsonl",
            b'{"text": "q", "choices": ["a", "b"], "label": 2}',
            Kind.MULTIPLE_CHOICE,
            "it must be one of the choices, or its number from 0 to 1",
        ),
        (
            "a.jsonl",
            b'{"text": "q", "choices": ["a"], "label": 0}',
            Kind.MULTIPLE_CHOICE,
            "a list of at least two texts",
        ),
    ],
)
def test_what_does_not_fit_is_named(address: str, data: bytes, kind: Kind, words: str) -> None:
    assert words in said(address, data, kind)


def test_a_second_text_where_a_kind_has_none() -> None:
    columns = TextColumns(pair="b")
    data = lines({"text": ["a"], "label": ["O"], "b": "c"})
    assert "token_classification has no second text" in said("a.jsonl", data, Kind.TOKEN_CLASSIFICATION, columns)


def test_a_second_text_is_missed_once_it_is_asked_for() -> None:
    assert "no column 'b'" in said("a.jsonl", lines({"text": "a"}), Kind.LANGUAGE_MODELING, TextColumns(pair="b"))


@pytest.mark.parametrize("cut", range(1, 60))
def test_a_beginning_is_not_blamed_for_where_it_ends(cut: int) -> None:
    csv = 'text,label\n"é, ""b""\nc",1\n"d\n\ne",2\n"f",3\n'.encode()
    assert text_faults("a.csv", csv[:cut], False, Kind.CLASSIFICATION, COLUMNS) == []
    jsonl = lines({"text": "é", "label": 1}, {"text": "b", "label": 2}, {"text": "c", "label": 3})
    assert text_faults("a.jsonl", jsonl[:cut], False, Kind.CLASSIFICATION, COLUMNS) == []


def test_a_beginning_is_looked_at_row_by_row() -> None:
    good, bad = b'{"text": "a", "label": 1}\n', b'{"text": "a"}\n'
    assert (
        "line 2: there is no column 'label'"
        in text_faults("a.jsonl", good + bad, False, Kind.CLASSIFICATION, COLUMNS)[0]
    )
    far = good * HEAD_ROWS + bad
    assert text_faults("a.jsonl", far, False, Kind.CLASSIFICATION, COLUMNS) == []


@pytest.mark.parametrize(
    ("kind", "label", "fault"),
    [
        (Kind.CLASSIFICATION, "joy", "line 1: column 'label' has \"joy\", which is no class of the checkpoint"),
        (Kind.CLASSIFICATION, 3, "the id2label of its config.json has 0 to 2 (no, yes, 0)"),
        (Kind.TOKEN_CLASSIFICATION, ["joy"], "column 'label' has \"joy\""),
        (Kind.CLASSIFICATION, "yes", None),
        (Kind.CLASSIFICATION, 1, None),
        (Kind.SEQUENCE_TO_SEQUENCE, "joy", None),
    ],
)
def test_labels_are_held_to_the_names_of_the_checkpoint(kind: Kind, label: Any, fault: str | None) -> None:
    names = label_names({"id2label": {"0": "no", "1": "yes", "2": "0"}})
    data = lines({"text": "a", "label": label})
    found = text_faults("a.jsonl", data, True, kind, COLUMNS, names)
    assert found == [] if fault is None else fault in found[0]
    assert text_faults("a.jsonl", data, True, kind, COLUMNS) == []


def test_a_name_of_digits_goes_before_a_number() -> None:
    (sample,) = read_samples("a.csv", b"text,label\na,0\n", Kind.CLASSIFICATION, COLUMNS)
    assert class_numbers(sample, COLUMNS, {0: "no", 2: "0"}) == [2]
    assert class_numbers(sample, COLUMNS, None) == [0]


@pytest.mark.parametrize("config", [None, {}, {"id2label": None}, {"id2label": {"a": "b"}}])
def test_a_config_may_name_no_labels(config: Any) -> None:
    assert label_names(config) is None


@pytest.mark.parametrize(
    ("names", "holds"),
    [
        (["config.json", "tokenizer_config.json"], False),
        (["tokenizer.json"], True),
        (["vocab.txt"], True),
        (["spiece.model"], True),
        ([], False),
    ],
)
def test_a_tokenizer_is_known_by_its_vocabulary(names: list[str], holds: bool) -> None:
    assert holds_tokenizer(names) is holds
