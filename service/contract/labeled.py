"""Does a file of labeled samples fit its kind and its model? Told from its header, or its first lines, alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from service.contract.checkpoint import FLOATING, Header, TensorInfo
from service.contract.evaluation import TaskEvaluation
from service.contract.metrics import Kind
from service.contract.samples import INTEGERS, LABELS, input_faults

SCORED, ID2LABEL = "scored", "id2label"
QUERY, DOCUMENT = "query.", "document."
# What the heads of transformers' models answer, by how the models are called.
WRITING = (Kind.SEQUENCE_TO_SEQUENCE, Kind.LANGUAGE_MODELING, Kind.MULTIPLE_CHOICE)
HEADS: dict[str, tuple[Kind, ...]] = {
    "ForSequenceClassification": (Kind.CLASSIFICATION, Kind.REGRESSION),
    "ForImageClassification": (Kind.CLASSIFICATION, Kind.REGRESSION),
    "ForTokenClassification": (Kind.TOKEN_CLASSIFICATION,),
    "ForMultipleChoice": (Kind.MULTIPLE_CHOICE,),
    "ForQuestionAnswering": (),
    "ForMaskedLM": (),
    "ForCausalLM": WRITING,
    "LMHeadModel": WRITING,
    "ForConditionalGeneration": WRITING,
    "EncoderDecoderModel": WRITING,
    "DoubleHeadsModel": tuple(Kind),
    "Model": (),  # a model without a head
}
Tensors = Mapping[str, TensorInfo]
Config = Mapping[str, Any] | None


def labeled_faults(header: Header, config: Mapping[str, Any] | None, row: TaskEvaluation) -> list[str]:
    """What is wrong with a file of labeled samples of a task's kind; one sentence each, empty where nothing is."""
    return [*LABELED[row.kind](header.tensors, config), *_name_faults(header.metadata, config, row)]


def model_faults(config: Mapping[str, Any], row: TaskEvaluation) -> list[str]:
    """What the model of a ``config.json`` lacks to be measured so; what it is called tells, where it is known."""
    labels, architecture, kinds = config.get(ID2LABEL), _architecture(config), _kinds(config)
    if not (row.head or row.kind in (*kinds, Kind.RETRIEVAL)):
        return [f"{architecture} can't be measured by {row.kind}; it can by {', '.join((*kinds, Kind.RETRIEVAL))}"]
    if row.kind is Kind.REGRESSION and isinstance(labels, Mapping) and len(labels) != 1:
        return [f"regression needs a head that gives one number, but that of the checkpoint gives {len(labels)}"]
    return []


def class_fault(config: Mapping[str, Any]) -> str | None:
    """Why the model of a ``config.json`` predicts no classes of samples; None where it does, as far as can be told."""
    labels, architecture = config.get(ID2LABEL), _architecture(config)
    if Kind.CLASSIFICATION not in _kinds(config):
        return f"{architecture} scores no classes of samples"
    if isinstance(labels, Mapping) and len(labels) == 1:
        return f"the head of {architecture} gives one number, and no classes"
    return None


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _kinds(config: Mapping[str, Any]) -> tuple[Kind, ...]:
    """The kinds of samples that a model may be measured by; all where it is not known."""
    architecture = _architecture(config)
    kinds = next((kinds for ending, kinds in HEADS.items() if architecture.endswith(ending)), tuple(Kind))
    if config.get("is_encoder_decoder"):  # what it writes depends on what it reads, which a lone text does not have
        kinds = tuple(kind for kind in kinds if kind not in (Kind.LANGUAGE_MODELING, Kind.MULTIPLE_CHOICE))
    return kinds


def _class_labels(tensors: Tensors, config: Config) -> list[str]:
    return _per_sample(tensors, config, "the class of each sample", INTEGERS, "int64")


def _number_labels(tensors: Tensors, config: Config) -> list[str]:
    return _per_sample(tensors, config, "the right number of each sample", FLOATING | INTEGERS, "float32")


def _per_sample(tensors: Tensors, config: Config, meaning: str, types: Collection[str], usual: str) -> list[str]:
    """Model inputs, and one label for each sample."""
    faults = input_faults(_without(tensors, LABELS), config)
    labels = tensors.get(LABELS)
    if labels is None:
        return [*faults, f"tensor {LABELS!r} is missing: {meaning}, [samples] {usual}"]
    if len(labels.shape) != 1 or labels.dtype not in types:
        return [*faults, f"tensor {LABELS!r} is {labels.dtype} {list(labels.shape)}; it must be [samples] {usual}"]
    return faults + _count_faults(tensors, labels)


def _count_faults(tensors: Tensors, labels: TensorInfo) -> list[str]:
    lengths = {info.shape[0] for name, info in tensors.items() if name != LABELS and info.shape}
    if lengths and labels.shape[0] not in lengths:
        return [f"tensor {LABELS!r} has {labels.shape[0]} entries, but the inputs {min(lengths)} samples"]
    return []


def _token_labels(tensors: Tensors, config: Config) -> list[str]:
    """Model inputs, and a class for each token; -100 where there is none."""
    return _token_wise(tensors, config, "the class of each token, -100 where it has none", is_needed=True)


def _text_labels(tensors: Tensors, config: Config) -> list[str]:
    """Tokens, and which of them count, if not all do."""
    return _token_wise(tensors, config, "the tokens that count, -100 elsewhere", is_needed=False)


def _token_wise(tensors: Tensors, config: Config, meaning: str, *, is_needed: bool) -> list[str]:
    faults = input_faults(_without(tensors, LABELS), config)
    tokens, labels = tensors.get("input_ids"), tensors.get(LABELS)
    if tokens is None:
        faults.append("tensor 'input_ids' is missing: tokens, [samples, length] int64")
    if labels is None:
        return [*faults, f"tensor {LABELS!r} is missing: {meaning}, [samples, length] int64"] if is_needed else faults
    if labels.dtype not in INTEGERS or (tokens is not None and labels.shape != tokens.shape):
        wanted = "[samples, length]" if tokens is None else str(list(tokens.shape))
        faults.append(
            f"tensor {LABELS!r} is {labels.dtype} {list(labels.shape)}; it must be {wanted} int64, as 'input_ids' is: "
            f"{meaning}"
        )
    return faults


def _choice_labels(tensors: Tensors, config: Config) -> list[str]:
    """Tokens of every choice of every sample, which of them count, and the index of the right choice."""
    faults = _choice_faults(tensors)
    flat = {
        name: replace(info, shape=(info.shape[0] * info.shape[1], *info.shape[2:]))
        for name, info in _without(tensors, LABELS, SCORED).items()
        if len(info.shape) == 3
    }
    faults += input_faults(flat, config) if not faults else []
    labels = tensors.get(LABELS)
    if labels is None or len(labels.shape) != 1 or labels.dtype not in INTEGERS:
        found = "is missing" if labels is None else f"is {labels.dtype} {list(labels.shape)}"
        return [*faults, f"tensor {LABELS!r} {found}; it must be [samples] int64: which choice is right, from 0"]
    return faults + _count_faults(tensors, labels)


def _choice_faults(tensors: Tensors) -> list[str]:
    tokens, scored = tensors.get("input_ids"), tensors.get(SCORED)
    if tokens is None or len(tokens.shape) != 3 or tokens.shape[1] < 2:
        found = "is missing" if tokens is None else f"has shape {list(tokens.shape)}"
        return [f"tensor 'input_ids' {found}; it must be [samples, choices, length], with 2 choices at least"]
    faults = [
        f"tensor {name!r} has shape {list(info.shape)}; it must be {list(tokens.shape)}, as 'input_ids' is"
        for name, info in _without(tensors, LABELS).items()
        if info.shape != tokens.shape
    ]
    if scored is not None and scored.dtype not in (*INTEGERS, "BOOL"):
        faults.append(f"tensor {SCORED!r} is {scored.dtype}; it must be BOOL: which tokens' likelihood counts")
    return faults


def _target_labels(tensors: Tensors, config: Config) -> list[str]:
    """Model inputs, and the tokens of the right text; -100 where it has ended."""
    faults = input_faults(_without(tensors, LABELS), config)
    labels = tensors.get(LABELS)
    if labels is None or len(labels.shape) != 2 or labels.dtype not in INTEGERS or not labels.shape[1]:
        found = "is missing" if labels is None else f"is {labels.dtype} {list(labels.shape)}"
        wanted = "[samples, target length] int64: the tokens of the right text, then -100"
        return [*faults, f"tensor {LABELS!r} {found}; it must be {wanted}"]
    return faults + _count_faults(tensors, labels)


def _retrieval_labels(tensors: Tensors, config: Config) -> list[str]:
    """Inputs of queries and of documents, and the index of each query's right document."""
    sides = {
        side: {name.removeprefix(side): info for name, info in tensors.items() if name.startswith(side)}
        for side in (QUERY, DOCUMENT)
    }
    known = {LABELS, *(side + name for side, inputs in sides.items() for name in inputs)}
    faults = [
        f"tensor {name!r} begins with neither {QUERY!r} nor {DOCUMENT!r}" for name in tensors if name not in known
    ]
    for side, inputs in sides.items():
        faults += [f"of {side}*: {sentence}" for sentence in input_faults(inputs, config)]
    labels, queries = tensors.get(LABELS), [info.shape[0] for info in sides[QUERY].values() if info.shape]
    if labels is None or len(labels.shape) != 1 or labels.dtype not in INTEGERS:
        found = "is missing" if labels is None else f"is {labels.dtype} {list(labels.shape)}"
        return [*faults, f"tensor {LABELS!r} {found}; it must be [queries] int64: which document is right, from 0"]
    if queries and labels.shape[0] not in queries:
        faults.append(f"tensor {LABELS!r} has {labels.shape[0]} entries, but there are {min(queries)} queries")
    return faults


LABELED: dict[Kind, Callable[[Tensors, Config], list[str]]] = {
    Kind.CLASSIFICATION: _class_labels,
    Kind.REGRESSION: _number_labels,
    Kind.TOKEN_CLASSIFICATION: _token_labels,
    Kind.LANGUAGE_MODELING: _text_labels,
    Kind.MULTIPLE_CHOICE: _choice_labels,
    Kind.SEQUENCE_TO_SEQUENCE: _target_labels,
    Kind.RETRIEVAL: _retrieval_labels,
}
NAMED = (Kind.CLASSIFICATION, Kind.TOKEN_CLASSIFICATION)  # kinds whose labels are numbers of names


def _name_faults(metadata: Mapping[str, str], config: Config, row: TaskEvaluation) -> list[str]:
    """Where a file says what its labels are called, the checkpoint has to call them the same."""
    if ID2LABEL not in metadata or row.kind not in NAMED or row.head:
        return []
    file = _label_names(metadata[ID2LABEL])
    if file is None:
        return [f"its metadata {ID2LABEL!r} is no JSON object of label names by number"]
    known = _label_names((config or {}).get(ID2LABEL)) or {}
    unlike = next((number for number, name in file.items() if number in known and known[number] != name), None)
    if unlike is None:
        return []
    return [
        f"label {unlike} is {file[unlike]!r} in its metadata {ID2LABEL!r}, but {known[unlike]!r} in the checkpoint's "
        "config.json; number the labels as the checkpoint does"
    ]


def _label_names(table: object) -> dict[str, str] | None:
    """Label names by number, of an object or its JSON; None where it is neither."""
    if isinstance(table, str):
        try:
            table = json.loads(table)
        except (ValueError, RecursionError):
            return None
    return {str(number): str(name) for number, name in table.items()} if isinstance(table, Mapping) else None


def _without(tensors: Tensors, *names: str) -> dict[str, TensorInfo]:
    return {name: info for name, info in tensors.items() if name not in names}
