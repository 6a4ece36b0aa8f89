"""What measuring a model is made of: its answers to labeled samples, and the metrics that are read off them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from service.contract.errors import BadInput
from service.contract.evaluation import TaskEvaluation
from service.contract.metrics import Metric
from service.contract.notices import Notice

Samples = Mapping[str, Tensor]  # what a labeled file holds: model inputs [n, ...], and `labels`
Rows = NDArray[np.int64]  # indices of samples


class Answers(NamedTuple):
    """What a model says about each sample, and what is right; both as the kind's metrics take them."""

    predictions: Any
    labels: Any


@dataclass(frozen=True)
class Setting:
    """What gathering answers needs beside the model and the samples.

    ``row`` is what the recipe asks for, ``head`` the tensors of its head of features (empty without one),
    ``tokenizer`` the task's own (None where its checkpoint has none). ``on_batch`` is called after every batch, and
    may raise. ``generation`` is the checkpoint's ``generation_config.json``, where text is written.
    """

    row: TaskEvaluation
    batch_size: int
    head: Samples = field(default_factory=dict)
    tokenizer: Any = None
    on_batch: Callable[[], None] = lambda: None
    generation: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measure:
    """One metric: what each sample contributes, and the figure that contributions make.

    ``contributions`` takes the answers to n samples and returns an array ``[n, ...]``; ``figure`` takes such an array,
    or any choice of its rows, and returns a number; NaN where there is none. ``resampled`` does the same for many
    choices of rows ``[B, n]`` at once and returns ``[B]``; it is only there for speed, and agrees with ``figure``.
    """

    contributions: Callable[[Any, Any], NDArray[Any]]
    figure: Callable[[NDArray[Any]], float]
    resampled: Callable[[NDArray[Any], Rows], NDArray[np.float64]] | None = None

    def figures(self, contributions: NDArray[Any], rows: Rows) -> NDArray[np.float64]:
        """The figure of each choice of rows ``[B, n]``: ``[B]``."""
        if self.resampled is not None:
            return self.resampled(contributions, rows)
        return np.array([self.figure(contributions[chosen]) for chosen in rows], np.float64)


@dataclass(frozen=True)
class KindRow:
    """How one kind of samples is measured.

    ``gather`` runs a loaded model over samples and returns its answers; it refuses labels and inputs that do not fit
    the model with BadInput, and a model that can't do this with UnsupportedArchitecture. ``inputs`` picks from the
    samples what one plain forward pass of the model takes, for a look at its speed and at whether the samples fit it.
    """

    gather: Callable[[nn.Module, Samples, Setting], Answers]
    measures: Mapping[Metric, Measure]
    inputs: Callable[[nn.Module, Samples], dict[str, Tensor]]


def mean_of_rows(contributions: NDArray[Any], rows: Rows) -> NDArray[np.float64]:
    """The mean of what the chosen rows contribute: ``resampled`` of every metric that is a mean over samples."""
    return np.asarray(contributions.astype(np.float64)[rows].mean(1))


def refuse_non_finite(values: Tensor, setting: Setting) -> Tensor:
    """A model's answers, where they are numbers. Raises BadInput."""
    if not values.isfinite().all():
        raise BadInput(Notice("answers_not_finite", task=setting.row.task))
    return values
