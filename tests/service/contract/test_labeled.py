"""Labeled files of every kind, held to their kind by their headers: what fits, and one sentence for what does not."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from service.contract.checkpoint import Header, parse_header
from service.contract.evaluation import TaskEvaluation
from service.contract.labeled import labeled_faults, model_faults

CONFIG = {"model_type": "bert", "vocab_size": 50, "id2label": {"0": "bad", "1": "good"}}


def whole(*shape: int) -> Any:
    return np.zeros(shape, np.int64)


def numbers(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


TOKENS = {"input_ids": whole(4, 6), "attention_mask": whole(4, 6)}
CHOICES = {"input_ids": whole(4, 3, 6), "attention_mask": whole(4, 3, 6)}
FITTING: dict[str, dict[str, Any]] = {
    "classification": {**TOKENS, "labels": whole(4)},
    "regression": {**TOKENS, "labels": numbers(4)},
    "token_classification": {**TOKENS, "labels": whole(4, 6)},
    "language_modeling": {**TOKENS, "labels": whole(4, 6)},
    "multiple_choice": {**CHOICES, "scored": np.zeros((4, 3, 6), bool), "labels": whole(4)},
    "sequence_to_sequence": {**TOKENS, "labels": whole(4, 9)},
    "retrieval": {"query.input_ids": whole(4, 6), "document.input_ids": whole(7, 9), "labels": whole(4)},
}


def faults(kind: str, tensors: dict[str, Any], metadata: dict[str, str] | None = None, **row: Any) -> list[str]:
    data = save(tensors, metadata)
    header: Header = parse_header(data, len(data), "s3://data/x.safetensors")
    asked = {"task": "cars", "kind": kind, "labeled": "s3://data/x.safetensors", **row}
    return labeled_faults(header, CONFIG, TaskEvaluation.model_validate(asked))


def without(kind: str, *names: str) -> dict[str, Any]:
    return {name: values for name, values in FITTING[kind].items() if name not in names}


@pytest.mark.parametrize("kind", FITTING)
def test_what_fits_has_no_fault(kind: str) -> None:
    assert faults(kind, FITTING[kind]) == []


def test_language_modeling_needs_no_labels() -> None:
    assert faults("language_modeling", TOKENS) == []


@pytest.mark.parametrize(
    ("kind", "tensors", "sentence"),
    [
        ("classification", without("classification", "labels"), "'labels' is missing: the class of each sample"),
        ("classification", {**TOKENS, "labels": numbers(4)}, "is F32 [4]; it must be [samples] int64"),
        ("classification", {**TOKENS, "labels": whole(4, 6)}, "is I64 [4, 6]; it must be [samples] int64"),
        ("classification", {**TOKENS, "labels": whole(5)}, "has 5 entries, but the inputs 4 samples"),
        ("classification", {**TOKENS, "labels": whole(4), "scored": whole(4)}, "'scored' is no model input"),
        ("regression", {**TOKENS, "labels": numbers(4, 2)}, "it must be [samples] float32"),
        ("regression", {"input_ids": whole(0, 6), "labels": numbers(0)}, "it is empty"),
        ("token_classification", TOKENS, "'labels' is missing: the class of each token"),
        ("token_classification", {**TOKENS, "labels": whole(4)}, "it must be [4, 6] int64, as 'input_ids' is"),
        ("token_classification", {"labels": whole(4, 6)}, "'input_ids' is missing"),
        ("language_modeling", {**TOKENS, "labels": numbers(4, 6)}, "is F32 [4, 6]; it must be [4, 6] int64"),
        ("multiple_choice", {**TOKENS, "labels": whole(4)}, "it must be [samples, choices, length]"),
        ("multiple_choice", {"input_ids": whole(4, 1, 6), "labels": whole(4)}, "with 2 choices at least"),
        ("multiple_choice", {**CHOICES, "scored": whole(4, 6), "labels": whole(4)}, "'scored' has shape [4, 6]"),
        ("multiple_choice", {**CHOICES, "scored": numbers(4, 3, 6), "labels": whole(4)}, "'scored' is F32"),
        ("multiple_choice", {**CHOICES, "labels": whole(3)}, "has 3 entries, but the inputs 4 samples"),
        ("multiple_choice", CHOICES, "'labels' is missing; it must be [samples] int64: which choice"),
        ("sequence_to_sequence", {**TOKENS, "labels": whole(4)}, "[samples, target length] int64"),
        ("sequence_to_sequence", {**TOKENS, "labels": whole(3, 9)}, "has 3 entries"),
        ("retrieval", {**TOKENS, "labels": whole(4)}, "'input_ids' begins with neither 'query.' nor 'document.'"),
        ("retrieval", without("retrieval", "document.input_ids"), "of document.*: it holds no model inputs"),
        ("retrieval", {**without("retrieval", "labels"), "labels": whole(7)}, "there are 4 queries"),
        ("retrieval", {**FITTING["retrieval"], "query.input_ids": numbers(4, 6)}, "of query.*: tensor 'input_ids' is"),
    ],
)
def test_what_does_not_fit_is_named(kind: str, tensors: dict[str, Any], sentence: str) -> None:
    found = faults(kind, tensors)
    assert any(sentence in fault for fault in found), found


def test_labels_are_called_as_the_checkpoint_calls_them() -> None:
    def named(names: Any, **row: Any) -> list[str]:
        return faults("classification", FITTING["classification"], {"id2label": json.dumps(names)}, **row)

    assert named({"0": "bad", "1": "good"}) == []
    assert named({"0": "bad"}) == []
    (swapped,) = named({"0": "good", "1": "bad"})
    assert "label 0 is 'good' in its metadata 'id2label', but 'bad' in the checkpoint's config.json" in swapped
    assert "no JSON object" in named(["bad", "good"])[0]
    assert named({"0": "good"}, head={"weight": "s3://data/head.safetensors"}) == []


@pytest.mark.parametrize(
    ("architecture", "kind", "fits"),
    [
        ("T5ForConditionalGeneration", "sequence_to_sequence", True),
        ("T5ForConditionalGeneration", "language_modeling", False),
        ("T5ForConditionalGeneration", "multiple_choice", False),
        ("BartForSequenceClassification", "classification", True),
    ],
)
def test_a_model_that_reads_before_it_writes_foretells_no_lone_text(architecture: str, kind: str, fits: bool) -> None:
    row = TaskEvaluation.model_validate({"task": "t", "kind": kind, "labeled": "file:///t.jsonl"})
    found = model_faults({"architectures": [architecture], "is_encoder_decoder": True}, row)
    assert bool(found) is not fits
