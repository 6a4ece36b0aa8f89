"""How well a language model foretells text: the negative log-likelihood of its tokens, and the perplexity they make."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from service.contract.errors import BadInput
from service.contract.metrics import Metric
from service.contract.samples import LABELS
from workers import predicting
from workers.exemplars import naming
from workers.measuring import Answers, KindRow, Measure, Samples, Setting
from workers.metrics.classification import inputs_of
from workers.predicting import IGNORED


def token_losses(losses: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Per sample: the sum of its tokens' losses, and their number, ``[n, 2]``.

    ``losses [n, length]`` are in nats, each of the token at its place given the tokens before it; tokens whose label
    is -100, and the first of a sample, which nothing comes before, do not count.
    """
    counted = labels != IGNORED
    counted[:, 0] = False
    return np.stack([np.where(counted, losses, 0.0).sum(1), counted.sum(1)], axis=1)


def perplexity(sums: NDArray[np.float64]) -> float:
    """exp of the mean loss per token over all samples, from ``[n, 2]``; infinite where it is too large to be told.

    Samples weigh by their tokens, as in Jelinek et al., Perplexity: a measure of the difficulty of speech recognition
    tasks, 1977. NaN where no token counts.
    """
    loss, count = sums.sum(0).tolist()
    if not count:
        return math.nan
    try:
        return math.exp(loss / count)
    except OverflowError:
        return math.inf


def gather(model: Any, samples: Samples, setting: Setting) -> Answers:
    """The loss of every token ``[n, length]``, and the labels that say which of them count.

    ``labels [n, length]`` repeat ``input_ids``, or are -100 where a token does not count; without them all tokens do.
    Padding does not.

    Raises:
        BadInput: labels that are no such tokens, no token that counts, or a likelihood that is NaN or infinite.
        UnsupportedArchitecture: the model does not foretell a text's next token.
    """
    with naming(setting.row.labeled):
        inputs = inputs_of(samples)
        labels = _counted(samples)
        losses = predicting.token_losses(model, inputs, setting.batch_size, setting.on_batch)
        return Answers(losses.numpy(), labels.numpy())


ROW = KindRow(gather, {Metric.PERPLEXITY: Measure(token_losses, perplexity)}, lambda _, samples: inputs_of(samples))


def _counted(samples: Samples) -> Tensor:
    """The tokens that count, and -100 elsewhere: also at what has nothing but padding before it."""
    ids = samples["input_ids"].long()
    labels = samples[LABELS].long().clone() if LABELS in samples else ids.clone()
    if labels.shape != ids.shape or bool(((labels != ids) & (labels != IGNORED)).any()):
        raise BadInput(f"labels must repeat input_ids, of shape {list(ids.shape)}, or be {IGNORED}; these differ")
    if "attention_mask" in samples:
        attended = samples["attention_mask"].bool()
        labels[~attended] = IGNORED
        labels[:, 1:][~attended[:, :-1]] = IGNORED
    if not bool((labels[:, 1:] != IGNORED).any()):
        raise BadInput("no token counts: every sample is one token long, or its labels are -100")
    return labels
