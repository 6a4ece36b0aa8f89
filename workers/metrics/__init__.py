"""The kinds of labeled samples: how a model's answers to each are gathered, and the metrics that are read off them."""

from __future__ import annotations

from service.contract.metrics import Kind
from workers.measuring import KindRow
from workers.metrics import (
    classification,
    language_modeling,
    multiple_choice,
    regression,
    retrieval,
    sequence_to_sequence,
    token_classification,
)

KINDS: dict[Kind, KindRow] = {
    Kind.CLASSIFICATION: classification.ROW,
    Kind.REGRESSION: regression.ROW,
    Kind.TOKEN_CLASSIFICATION: token_classification.ROW,
    Kind.LANGUAGE_MODELING: language_modeling.ROW,
    Kind.MULTIPLE_CHOICE: multiple_choice.ROW,
    Kind.SEQUENCE_TO_SEQUENCE: sequence_to_sequence.ROW,
    Kind.RETRIEVAL: retrieval.ROW,
}
