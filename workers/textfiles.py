"""Turns labeled text into the tensors that a model takes, by the tokenizer of its own checkpoint."""

from __future__ import annotations

import json
import re
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from service.contract.errors import BadInput
from service.contract.evaluation import TaskEvaluation, TextColumns
from service.contract.labeled import DOCUMENT, QUERY, SCORED
from service.contract.metrics import Kind
from service.contract.notices import Notice
from service.contract.samples import LABELS
from service.contract.textfiles import Sample, TextFault, class_numbers, holds_tokenizer, read_samples
from workers.exemplars import arguments, longest_sequence, takes_choices
from workers.metrics.sequence_to_sequence import UNSPACED
from workers.predicting import IGNORED, MAX_NEW_TOKENS
from workers.skeleton import build_empty

# A tokenizer's configuration is input from outside: it may name neither code nor files elsewhere.
NEVER_READ = re.compile(r"auto_map|init_inputs|vocab|merges|.*_(file|path|object)")
TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids")

Encoded = Mapping[str, Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Tokenized:
    """What a .safetensors file of the same samples would hold; ``warnings`` are sentences for people."""

    tensors: Mapping[str, Tensor]
    warnings: tuple[str, ...] = ()


def load_tokenizer(files: Mapping[str, bytes]) -> Any:
    """The tokenizer of a checkpoint, from its files by their names: ``tokenizer.json``, ``config.json`` and so on.

    Nothing is fetched, and no code of the checkpoint runs.

    Raises:
        BadInput: transformers can't make a fast tokenizer of them.
    """
    if not holds_tokenizer(files):
        listed = ", ".join(sorted(files)) or "no files"
        raise BadInput(f"text needs a tokenizer.json or a vocabulary beside the checkpoint; there is only {listed}")
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
        for name, data in files.items():
            Path(folder, Path(name).name).write_bytes(_tamed(data) if name == "tokenizer_config.json" else data)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # what tokenizers raises on malformed files is Exception itself
            said = (str(error).splitlines() or [type(error).__name__])[0].strip(": ")
            raise BadInput(
                f"the files beside the checkpoint ({', '.join(sorted(files)) or 'none'}) make no tokenizer: {said}"
            ) from error
    if not tokenizer.is_fast:
        raise BadInput("the checkpoint's tokenizer has no tokenizer.json; save it with save_pretrained once")
    return tokenizer


def read_text(data: bytes, address: str, row: TaskEvaluation, tokenizer: Any, config: Mapping[str, Any]) -> Tokenized:
    """The samples of a text file as tensors, for the model of a ``config.json``.

    Rows that are longer than the model takes are cut, and a warning counts them.

    Raises:
        BadInput: a row does not fit, naming its line and column, or a label is none of the model's.
        UnsupportedArchitecture: transformers can't build the model.
    """
    try:
        samples = read_samples(address, data, row.kind, row.columns or TextColumns())
        maker = _Maker(address, row, tokenizer, build_empty(config))
        return Tokenized(_MAKERS[row.kind](maker, samples), tuple(maker.warnings))
    except TextFault as fault:
        raise BadInput(f"{address}, {fault.detail}") from fault


@dataclass(frozen=True)
class _Maker:
    """Makes tensors of samples for one model (on the meta device), and gathers what there is to warn of."""

    address: str
    row: TaskEvaluation
    tokenizer: Any
    model: Any
    warnings: list[str] = field(default_factory=list)

    @property
    def longest(self) -> int | None:
        """As many tokens as the model takes; None where it does not matter."""
        limits = (longest_sequence(self.model, self.model.config.get_text_config()), self.tokenizer.model_max_length)
        return min((limit for limit in limits if isinstance(limit, int) and limit < 1 << 30), default=None)

    def encode(self, texts: Any, pairs: Any = None, room: int = 0, **options: Any) -> Any:
        """Tokens of texts, cut to what the model takes, less ``room``."""
        limit = None if self.longest is None else max(1, self.longest - room)
        encoded = self.tokenizer(texts, pairs, truncation=limit is not None, max_length=limit, **options)
        self._warn_of_cuts(sum(bool(row.overflowing) for row in encoded.encodings), len(texts), limit)
        return encoded

    def padded(self, encoded: Encoded, *, at_start: bool = False) -> dict[str, Tensor]:
        """The model's inputs ``[n, longest row]`` among what a tokenizer gave."""
        known = arguments(self.model)
        inputs = {name: rows for name, rows in encoded.items() if name in TOKEN_INPUTS and name in known}
        if not all(inputs["input_ids"]):
            raise BadInput(f"{self.address}: sample {list(map(bool, inputs['input_ids'])).index(False)} has no tokens")
        fill = {"input_ids": self._padding()}
        return {name: pad(rows, fill.get(name, 0), at_start=at_start) for name, rows in inputs.items()}

    def labels(self, samples: Sequence[Sample]) -> list[list[int]]:
        """The numbers of each sample's class or tags."""
        names = self._names()
        return [class_numbers(sample, self.row.columns or TextColumns(), names) for sample in samples]

    def _names(self) -> dict[int, str] | None:
        """What the model calls its classes; a head of features does not say."""
        if self.row.head:
            return None
        names = {int(number): str(name) for number, name in self.model.config.id2label.items()}
        if len(set(names.values())) < len(names):
            raise BadInput("two classes have the same name in the id2label of the checkpoint's config.json")
        return names

    def _padding(self) -> int:
        known = (self.model.config.get_text_config().pad_token_id, self.tokenizer.pad_token_id)
        return next((number for number in known if number is not None), 0)

    def _warn_of_cuts(self, cut: int, rows: int, limit: int | None) -> None:
        if cut:
            self.warnings.append(Notice("texts_cut", file=self.address, count=cut, total=rows, limit=limit))


def pad(rows: Sequence[Sequence[int]], fill: int, *, at_start: bool = False) -> Tensor:
    """Rows of unequal length as ``[n, longest]`` int64, filled up at their end, or at their start."""
    padded = torch.full((len(rows), max(map(len, rows))), fill, dtype=torch.long)
    for row, values in zip(padded, rows, strict=True):
        row[len(row) - len(values) if at_start else 0 :][: len(values)] = torch.tensor(values, dtype=torch.long)
    return padded


def joined(text: str, more: str) -> str:
    """A text and what follows it, with a space between them where there is none and their script has any."""
    if re.search(rf"[\s{UNSPACED}]$", text) or re.match(rf"[\s{UNSPACED}]", more):
        return text + more
    return f"{text} {more}"


def _classes(maker: _Maker, samples: Sequence[Sample]) -> dict[str, Tensor]:
    return {**_texts(maker, samples), LABELS: torch.tensor(maker.labels(samples))[:, 0]}


def _numbers(maker: _Maker, samples: Sequence[Sample]) -> dict[str, Tensor]:
    return {**_texts(maker, samples), LABELS: torch.tensor([sample.label for sample in samples], dtype=torch.float64)}


def _texts(maker: _Maker, samples: Sequence[Sample]) -> dict[str, Tensor]:
    pairs = [sample.pair for sample in samples]
    return maker.padded(maker.encode([sample.text for sample in samples], None if None in pairs else pairs))


def _tags(maker: _Maker, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """A word's first token has its tag; the others have none. Words have a space between them, as in any text."""
    encoded = maker.encode([" ".join(sample.text) for sample in samples], return_offsets_mapping=True)
    labels = [
        _first_tags(tags, _words_of(sample.text, offsets))
        for tags, sample, offsets in zip(maker.labels(samples), samples, encoded["offset_mapping"], strict=True)
    ]
    _warn_of_lost(maker, samples, sum(tag != IGNORED for row in labels for tag in row))
    return {**maker.padded(encoded), LABELS: pad(labels, IGNORED)}


def _words_of(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """Which word each token ends in, from the tokens' places in the text; None for a token that is of no text."""
    begins = [0, *accumulate(len(word) + 1 for word in words)]
    return [bisect_left(begins, end) - 1 if end > begin else None for begin, end in offsets]


def _first_tags(tags: Sequence[int], words: Sequence[int | None]) -> list[int]:
    befores = [None, *words[:-1]]
    return [
        IGNORED if word is None or word == before else tags[word] for before, word in zip(befores, words, strict=True)
    ]


def _warn_of_lost(maker: _Maker, samples: Sequence[Sample], kept: int) -> None:
    words = sum(len(sample.label) for sample in samples)
    if kept < words:
        maker.warnings.append(Notice("words_unmeasured", file=maker.address, count=words - kept, total=words))


def _language(maker: _Maker, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Every token counts; where there is a second text, only its tokens do."""
    follows = [sample.pair for sample in samples]
    if None in follows:
        encoded = maker.encode([sample.text for sample in samples])
        return {**maker.padded(encoded), LABELS: pad(encoded["input_ids"], IGNORED)}
    encoded, counted = _continued(maker, [(sample.text, str(sample.pair)) for sample in samples])
    labels = [
        [token if counts else IGNORED for token, counts in zip(tokens, row, strict=True)]
        for tokens, row in zip(encoded["input_ids"], counted, strict=True)
    ]
    return {**maker.padded(encoded), LABELS: pad(labels, IGNORED)}


def _continued(maker: _Maker, texts: Sequence[tuple[str, str]]) -> tuple[Any, list[list[bool]]]:
    """Tokens of texts and what follows them, and which tokens are of what follows; what is too long loses its start."""
    maker.tokenizer.truncation_side = "left"
    whole = [joined(text, more) for text, more in texts]
    encoded = maker.encode(whole, return_offsets_mapping=True)
    counted = [
        [end > len(text) for _, end in offsets]
        for (text, _), offsets in zip(texts, encoded["offset_mapping"], strict=True)
    ]
    return encoded, counted


def _choices(maker: _Maker, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """All choices of a sample one after the other, ``[n, choices, length]``; a sample with fewer repeats its first."""
    labels = torch.tensor([sample.label for sample in samples])
    most = max(len(sample.choices) for sample in samples)
    filled = [(*sample.choices, *[sample.choices[0]] * (most - len(sample.choices))) for sample in samples]
    texts = [(sample.text, choice) for sample, row in zip(samples, filled, strict=True) for choice in row]
    if takes_choices(maker.model):
        _refuse_fewer(samples, most)
        encoded, counted = maker.encode([text for text, _ in texts], [choice for _, choice in texts]), None
    else:
        encoded, counted = _continued(maker, texts)
    inputs = {name: values.reshape(len(samples), most, -1) for name, values in maker.padded(encoded).items()}
    if counted is None:
        return {**inputs, LABELS: labels}
    scored = pad(counted, 0).bool().reshape(len(samples), most, -1)
    for row, sample in zip(scored, samples, strict=True):
        row[len(sample.choices) :] = False
    return {**inputs, SCORED: scored, LABELS: labels}


def _refuse_fewer(samples: Sequence[Sample], most: int) -> None:
    for sample in samples:
        if len(sample.choices) < most:
            raise TextFault(
                f"there are {len(sample.choices)} choices, but {most} in another row; a model with a head for "
                "multiple choice needs the same number in all",
                sample.line,
            )


def _texts_to_texts(maker: _Maker, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """A causal model goes on where its input ends, so prompts are padded and cut at their start."""
    is_causal = not maker.model.config.is_encoder_decoder
    most = MAX_NEW_TOKENS if maker.longest is None else min(MAX_NEW_TOKENS, maker.longest // 2)
    new_tokens = maker.row.max_new_tokens or (most if is_causal else MAX_NEW_TOKENS)
    wanted = maker.tokenizer(text_target=[sample.label for sample in samples], add_special_tokens=False)["input_ids"]
    short = sum(len(tokens) > new_tokens for tokens in wanted)
    if short:
        maker.warnings.append(
            Notice("right_texts_long", file=maker.address, count=short, total=len(samples), limit=new_tokens)
        )
    if is_causal:
        maker.tokenizer.truncation_side = "left"
    pairs = [sample.pair for sample in samples]
    encoded = maker.encode(
        [sample.text for sample in samples], None if None in pairs else pairs, room=new_tokens if is_causal else 0
    )
    return {**maker.padded(encoded, at_start=is_causal), LABELS: pad(wanted, IGNORED)}


def _searches(maker: _Maker, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Equal documents are one: either is right."""
    documents = list(dict.fromkeys(str(sample.pair) for sample in samples))
    places = {document: place for place, document in enumerate(documents)}
    asked = [sample for sample in samples if sample.text is not None]
    sides = {QUERY: [sample.text for sample in asked], DOCUMENT: documents}
    tensors = {
        prefix + name: values
        for prefix, texts in sides.items()
        for name, values in maker.padded(maker.encode(texts)).items()
    }
    return {**tensors, LABELS: torch.tensor([places[str(sample.pair)] for sample in asked])}


_MAKERS: dict[Kind, Callable[[_Maker, Sequence[Sample]], dict[str, Tensor]]] = {
    Kind.CLASSIFICATION: _classes,
    Kind.REGRESSION: _numbers,
    Kind.TOKEN_CLASSIFICATION: _tags,
    Kind.LANGUAGE_MODELING: _language,
    Kind.MULTIPLE_CHOICE: _choices,
    Kind.SEQUENCE_TO_SEQUENCE: _texts_to_texts,
    Kind.RETRIEVAL: _searches,
}


def _tamed(data: bytes) -> bytes:
    try:
        values = json.loads(data)
        return json.dumps({name: value for name, value in values.items() if not NEVER_READ.fullmatch(name)}).encode()
    except (ValueError, AttributeError) as error:
        raise BadInput("the checkpoint's tokenizer_config.json is no JSON object") from error
