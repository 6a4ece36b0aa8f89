"""How well a model finds entities in text: counts of found, invented and missed ones, and the F1 they make."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from service.contract.errors import BadInput
from service.contract.metrics import Metric
from service.contract.samples import LABELS
from workers.exemplars import naming
from workers.measuring import Answers, KindRow, Measure, Samples, Setting
from workers.metrics.classification import inputs_of
from workers.predicting import IGNORED, token_classes

Entity = tuple[str, int, int]
OUTSIDE = "O"
OPENS = ("B", "S", "U")  # begins an entity, or is one alone
GOES_ON = ("I", "E", "L")  # is inside an entity, or its last token
CLOSES = ("E", "L", "S", "U")


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities ``(type, first token, token after the last)`` that a row of tags names, as ``conlleval`` reads them.

    Schemes are BIO in both its forms, BIOES and BILOU. An ``I-`` that nothing begins, or that is of another type than
    the token before, begins an entity. A tag of no scheme (``NOUN``) is an entity of one token.

    Tjong Kim Sang and Buchholz, Introduction to the CoNLL-2000 Shared Task: Chunking, 2000.
    """
    return set(_entities(tags))


def entity_counts(predicted: Sequence[Sequence[str]], labeled: Sequence[Sequence[str]]) -> NDArray[np.int64]:
    """Per sample: entities found with type and bounds, invented, and missed, ``[n, 3]``."""
    return np.array([_counts(entities(p), entities(t)) for p, t in zip(predicted, labeled, strict=True)], np.int64)


def entity_f1(counts: NDArray[np.int64]) -> float:
    """The micro F1 of ``[n, 3]`` counts over all samples; 0 where there is no entity at all."""
    found, invented, missed = counts.sum(0).tolist()
    return 2 * found / (2 * found + invented + missed) if found else 0.0


def gather(model: Any, samples: Samples, setting: Setting) -> Answers:
    """The tags of each sample's labeled tokens, as the model has them and as they are right, by the model's names.

    ``labels [n, length]`` are numbers of tags; tokens with -100 are left out.

    Raises:
        BadInput: labels that do not fit the tokens or the model's tags, no entity in them, tags without names.
        UnsupportedArchitecture: the model has no head that scores classes per token.
    """
    with naming(setting.row.labeled):
        names, labels = _names(model), samples[LABELS].long()
        _refuse_labels(labels, samples, names)
        right = _tags(labels, labels, names)
        if not any(tag != OUTSIDE for tags in right for tag in tags):
            raise BadInput("no token is labeled with an entity, so there is none to find")
        classes = token_classes(model, inputs_of(samples), setting.batch_size, setting.on_batch)
        return Answers(_tags(classes, labels, names), right)


ROW = KindRow(gather, {Metric.ENTITY_F1: Measure(entity_counts, entity_f1)}, lambda _, samples: inputs_of(samples))


def _names(model: Any) -> dict[int, str]:
    """The model's tags by number, as its ``config.json`` has them."""
    names = {int(number): str(name) for number, name in model.config.id2label.items()}
    if all(re.fullmatch(r"LABEL_\d+", name) for name in names.values()):
        raise BadInput(
            "the checkpoint's config.json names no tags; entities need names such as O, B-PER and I-PER in its id2label"
        )
    return names


def _refuse_labels(labels: Tensor, samples: Samples, names: Mapping[int, str]) -> None:
    tokens = samples["input_ids"].shape if "input_ids" in samples else labels.shape
    if labels.shape != tokens:
        raise BadInput(f"labels have shape {list(labels.shape)}, but tokens {list(tokens)}; each token needs one")
    for number in np.unique(labels.numpy()).tolist():
        if number not in names and number != IGNORED:
            raise BadInput(
                f"labels hold the tag {number}, but the checkpoint's id2label has {min(names)} to {max(names)} "
                f"({', '.join(names[known] for known in sorted(names))}), and {IGNORED} stands for none"
            )


def _tags(classes: Tensor, labels: Tensor, names: Mapping[int, str]) -> list[list[str]]:
    return [
        [names[number] for number in row[labeled].tolist()]
        for row, labeled in zip(classes, labels != IGNORED, strict=True)
    ]


def _entities(tags: Sequence[str]) -> Iterator[Entity]:
    first, before, kind = 0, OUTSIDE, ""
    for position, tag in enumerate([*tags, OUTSIDE]):
        prefix, named = _parts(tag)
        begins = prefix in OPENS or (prefix in GOES_ON and (before == OUTSIDE or before in CLOSES or named != kind))
        if before != OUTSIDE and (begins or prefix == OUTSIDE):
            yield kind, first, position
        if begins:
            first = position
        before, kind = prefix, named


def _parts(tag: str) -> tuple[str, str]:
    prefix, dash, kind = tag.partition("-")
    if tag == OUTSIDE:
        return OUTSIDE, ""
    return (prefix, kind) if dash and prefix in (*OPENS, *GOES_ON) else ("S", tag)


def _counts(predicted: set[Entity], labeled: set[Entity]) -> tuple[int, int, int]:
    return len(predicted & labeled), len(predicted - labeled), len(labeled - predicted)
