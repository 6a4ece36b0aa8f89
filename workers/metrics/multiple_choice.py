"""How often a model gives the right one of several answers the greatest likelihood."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.contract.errors import BadInput
from service.contract.labeled import SCORED
from service.contract.metrics import Metric
from service.contract.samples import LABELS
from workers.exemplars import naming, refuse_misfits, takes_choices
from workers.measuring import Answers, KindRow, Measure, Samples, Setting, mean_of_rows
from workers.predicting import choice_scores, token_losses


def right_choices(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Per sample whether the right choice has the greatest of its scores ``[n, choices]``, alone; ``[n]``.

    A choice that a sample does not have is -inf. A tie is no right answer: a model that tells nothing apart scores 0.
    """
    right = np.take_along_axis(scores, labels[:, None], axis=1)
    return np.asarray((scores >= right).sum(1) == 1)


def share(right: NDArray[np.bool_]) -> float:
    """The share of samples answered right."""
    return float(right.mean())


def gather(model: Any, samples: Samples, setting: Setting) -> Answers:
    """The score of each choice ``[n, choices]``, and the right one.

    A causal language model scores a choice by the log-likelihood of the tokens that ``scored [n, choices, length]``
    names, summed (Brown et al., Language models are few-shot learners, 2020; not normalized by length); a choice
    without one is none. A model with a head for multiple choice scores by that, and needs no ``scored``.

    Raises:
        BadInput: shapes that differ, labels out of range, a likelihood that is NaN or infinite.
        UnsupportedArchitecture: the model is neither.
    """
    with naming(setting.row.labeled):
        inputs, labels = _inputs(samples), samples[LABELS].long()
        if takes_choices(model):
            scores = choice_scores(model, inputs, setting.batch_size, setting.on_batch)
        else:
            scores = _likelihoods(model, inputs, _scored(samples), setting)
        _refuse_labels(labels, scores)
        return Answers(scores.numpy(), labels.numpy())


def first_choices(model: Any, samples: Samples) -> dict[str, Tensor]:
    """What one forward pass takes: all choices, or the first of each sample for a model that takes one at a time."""
    inputs = _inputs(samples)
    return inputs if takes_choices(model) else {name: values[:, 0] for name, values in inputs.items()}


ROW = KindRow(gather, {Metric.ACCURACY: Measure(right_choices, share, mean_of_rows)}, first_choices)


def _inputs(samples: Samples) -> dict[str, Tensor]:
    inputs = {name: values for name, values in samples.items() if name not in (LABELS, SCORED)}
    for name, values in inputs.items():
        if values.dim() != 3:
            raise BadInput(f"{name!r} has shape {list(values.shape)}; multiple choice takes [n, choices, length]")
    return inputs


def _scored(samples: Samples) -> Tensor:
    """The tokens whose likelihood counts: attended ones, with an attended one before."""
    if SCORED not in samples:
        raise BadInput(
            f"tensor {SCORED!r} [n, choices, length] is missing: which tokens belong to a choice, not to the question"
        )
    scored = samples[SCORED].bool().clone()
    if scored.shape != samples["input_ids"].shape:
        raise BadInput(f"{SCORED!r} has shape {list(scored.shape)}, and input_ids {list(samples['input_ids'].shape)}")
    scored[..., 0] = False
    if "attention_mask" in samples:
        attended = samples["attention_mask"].bool()
        scored &= attended
        scored[..., 1:] &= attended[..., :-1]
    return scored


def _likelihoods(model: Any, inputs: Samples, scored: Tensor, setting: Setting) -> Tensor:
    is_choice = scored.any(-1)
    flat = {name: values[is_choice] for name, values in inputs.items()}
    refuse_misfits(model, flat)
    losses = token_losses(model, flat, setting.batch_size, setting.on_batch)
    scores = torch.full(is_choice.shape, -math.inf, dtype=torch.float64)
    scores[is_choice] = -torch.where(scored[is_choice], losses, 0.0).sum(-1)
    return scores


def _refuse_labels(labels: Tensor, scores: Tensor) -> None:
    choices = scores.shape[1]
    wrong = (labels < 0) | (labels >= choices)
    if bool(wrong.any()):
        raise BadInput(
            f"sample {int(wrong.nonzero()[0])} has the label {int(labels[wrong][0])}, but there are {choices} choices, "
            f"0 to {choices - 1}"
        )
    absent = scores.gather(1, labels[:, None])[:, 0].isinf()
    if bool(absent.any()):
        raise BadInput(f"the right choice of sample {int(absent.nonzero()[0])} has no token in {SCORED!r}")
