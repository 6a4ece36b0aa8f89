"""How near the top of a search's answers the right document comes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from service.contract.errors import BadInput
from service.contract.labeled import DOCUMENT, QUERY
from service.contract.metrics import Metric
from service.contract.notices import Notice
from service.contract.samples import LABELS
from workers.exemplars import naming, refuse_misfits
from workers.forward import pooled_features
from workers.measuring import Answers, KindRow, Measure, Samples, Setting

SCORE_BYTES = 256 << 20  # of the scores held at once


def ranks(scores: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place ``[q]``, from 1, of each query's right document in its scores ``[q, documents]``, highest first.

    The right document comes last of those with the same score: a model that tells nothing apart finds nothing.
    """
    right = np.take_along_axis(scores, labels[:, None], axis=1)
    return np.asarray((scores >= right).sum(1), np.int64)


def recall_at_1(ranks: NDArray[np.int64]) -> float:
    """The share of queries whose right document comes first."""
    return _recall(ranks, 1)


def recall_at_5(ranks: NDArray[np.int64]) -> float:
    """The share of queries whose right document is among the first five."""
    return _recall(ranks, 5)


def recall_at_10(ranks: NDArray[np.int64]) -> float:
    """The share of queries whose right document is among the first ten."""
    return _recall(ranks, 10)


def gather(model: Any, samples: Samples, setting: Setting) -> Answers:
    """The rank of each query's right document by the cosine of their features, ``[q]``; the labels are in it.

    Features are the mean of the base model's last hidden state over attended positions. Queries are ``query.<input>``,
    documents ``document.<input>``, and ``labels [q]`` the numbers of the right documents.

    Raises:
        BadInput: labels that are no documents, queries or documents that are missing, features that are not finite.
        UnsupportedArchitecture: the model gives no features.
    """
    with naming(setting.row.labeled):
        queries, documents = (_features(model, samples, prefix, setting) for prefix in (QUERY, DOCUMENT))
        labels = samples[LABELS].long()
        _refuse_labels(labels, len(queries), len(documents))
        return Answers(_ranks(queries, documents, labels), labels.numpy())


def queries(_: Any, samples: Samples) -> dict[str, Tensor]:
    """What a forward pass takes: the queries."""
    return _side(samples, QUERY)


def _of_answers(ranks: NDArray[np.int64], _: NDArray[np.int64]) -> NDArray[np.int64]:
    """What a query contributes is the rank itself."""
    return ranks


ROW = KindRow(
    gather,
    {
        Metric.RECALL_AT_1: Measure(_of_answers, recall_at_1),
        Metric.RECALL_AT_5: Measure(_of_answers, recall_at_5),
        Metric.RECALL_AT_10: Measure(_of_answers, recall_at_10),
    },
    queries,
)


def _side(samples: Samples, prefix: str) -> dict[str, Tensor]:
    side = {name.removeprefix(prefix): values for name, values in samples.items() if name.startswith(prefix)}
    if not side:
        raise BadInput(f"there are no inputs '{prefix}<input>', such as '{prefix}input_ids'")
    return side


def _features(model: Any, samples: Samples, prefix: str, setting: Setting) -> Tensor:
    inputs = _side(samples, prefix)
    refuse_misfits(model, inputs)
    features = pooled_features(model, inputs, setting.batch_size, "mean", normalize=True)
    if not bool(features.isfinite().all()):
        raise BadInput(Notice("features_not_finite", side=prefix.removesuffix(".")))
    return features


def _refuse_labels(labels: Tensor, queries: int, documents: int) -> None:
    if labels.shape != (queries,):
        raise BadInput(f"labels have shape {list(labels.shape)}, but there are {queries} queries")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= documents:
        raise BadInput(f"labels reach from {low} to {high}, but there are {documents} documents, 0 to {documents - 1}")


def _ranks(queries: Tensor, documents: Tensor, labels: Tensor) -> NDArray[np.int64]:
    """In blocks of queries: all scores at once may not fit in memory."""
    rows = max(1, SCORE_BYTES // (4 * len(documents)))
    blocks = [slice(start, start + rows) for start in range(0, len(queries), rows)]
    return np.concatenate([ranks((queries[block] @ documents.T).numpy(), labels[block].numpy()) for block in blocks])


def _recall(ranks: NDArray[np.int64], k: int) -> float:
    return float((ranks <= k).mean())
