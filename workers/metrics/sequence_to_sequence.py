"""How close generated text comes to what was wanted: word for word, in its longest common words, in its characters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sacrebleu.metrics.chrf import CHRF
from torch import Tensor
from torchmetrics.functional.text.rouge import rouge_score

from service.contract.errors import BadInput
from service.contract.metrics import Metric
from service.contract.samples import LABELS
from workers.exemplars import arguments, naming
from workers.measuring import Answers, KindRow, Measure, Samples, Setting, mean_of_rows
from workers.metrics.classification import inputs_of
from workers.predicting import IGNORED, refuse_unless_writing, written_texts

# Scripts that put no spaces between words, by the character: kana, ideographs, Thai.
UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")


def rouge_l(written: Sequence[str], wanted: Sequence[str]) -> NDArray[np.float64]:
    """The ROUGE-L F-measure of each text ``[n]``, from 0 to 1: their longest common subsequence of words.

    Letter case and punctuation do not count, and words are not stemmed.
    Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004.
    """
    return np.array([_rouge_l(text, reference) for text, reference in zip(written, wanted, strict=True)], np.float64)


def exact_matches(written: Sequence[str], wanted: Sequence[str]) -> NDArray[np.bool_]:
    """Whether each text is the one that was wanted, space at its ends aside; ``[n]``."""
    return np.array([text.strip() == right.strip() for text, right in zip(written, wanted, strict=True)], np.bool_)


def mean(values: NDArray[np.float64] | NDArray[np.bool_]) -> float:
    """The mean over all samples."""
    return float(values.mean())


def chrf_counts(written: Sequence[str], wanted: Sequence[str]) -> NDArray[np.int64]:
    """Per sample: n-grams of 1 to 6 characters in the text, in the one wanted, and in both, ``[n, 18]``."""
    metric = CHRF()
    return np.array(metric._extract_corpus_statistics(list(written), [list(wanted)]), np.int64)


def chrf(counts: NDArray[np.int64]) -> float:
    """chrF2 of all samples together, from 0 to 100, of ``[n, 18]`` counts.

    Popović, chrF: character n-gram F-score for automatic MT evaluation, 2015; with sacrebleu's defaults.
    """
    return float(CHRF()._compute_score_from_stats(counts.sum(0).tolist()).score)


def gather(model: Any, samples: Samples, setting: Setting) -> Answers:
    """The text that the model writes to each sample, and the one that is right: its ``labels [n, length]``, decoded.

    Raises:
        BadInput: there is no tokenizer, or labels are empty or none of its tokens.
        UnsupportedArchitecture: the model writes no text.
    """
    with naming(setting.row.labeled):
        if setting.tokenizer is None:
            raise BadInput(
                "text can only be read with a tokenizer, and the task's checkpoint has none beside its weights"
            )
        wanted = _decoded(samples[LABELS].long(), setting.tokenizer)
        written = written_texts(
            model,
            inputs_of(samples),
            setting.batch_size,
            setting.tokenizer,
            setting.row.max_new_tokens,
            setting.on_batch,
            setting.generation,
        )
        return Answers(written, wanted)


def first_step(model: Any, samples: Samples) -> dict[str, Tensor]:
    """What a forward pass takes that writes the first token.

    Raises:
        UnsupportedArchitecture: the model writes no text.
    """
    refuse_unless_writing(model)
    inputs = inputs_of(samples)
    start = torch.full((len(samples[LABELS]), 1), _start(model))
    if model.config.is_encoder_decoder:
        return {"decoder_input_ids": start, **inputs}
    needs_text = "input_ids" in arguments(model) and model.main_input_name != "input_ids"
    return {**({"input_ids": start} if needs_text else {}), **inputs}


ROW = KindRow(
    gather,
    {
        Metric.ROUGE_L: Measure(rouge_l, mean, mean_of_rows),
        Metric.EXACT_MATCH: Measure(exact_matches, mean, mean_of_rows),
        Metric.CHRF: Measure(chrf_counts, chrf),
    },
    first_step,
)


def _start(model: Any) -> int:
    """The token that writing begins with; any does to see whether and how fast a model takes its inputs."""
    known = model.generation_config
    return next((start for start in (known.decoder_start_token_id, known.bos_token_id) if start is not None), 0)


def _decoded(labels: Tensor, tokenizer: Any) -> list[str]:
    kept = [row[row != IGNORED].tolist() for row in labels]
    if not all(kept):
        raise BadInput(f"sample {kept.index([])} has no labels: the tokens of the right text")
    low, high = min(map(min, kept)), max(map(max, kept))
    if low < 0 or high >= len(tokenizer):
        raise BadInput(f"labels reach from {low} to {high}, but the tokenizer's tokens from 0 to {len(tokenizer) - 1}")
    return [str(text) for text in tokenizer.batch_decode(kept, skip_special_tokens=True)]


def _rouge_l(written: str, wanted: str) -> float:
    scores = rouge_score(written, wanted, rouge_keys="rougeL", normalizer=str.lower, tokenizer=WORD.findall)
    return float(scores["rougeL_fmeasure"])
