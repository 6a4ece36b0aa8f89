"""What can be measured: the kinds of labeled samples, and the metrics that fit each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class Kind(StrEnum):
    """What a task's labeled samples ask of a model."""

    CLASSIFICATION = "classification"
    REGRESSION = "regression"
    TOKEN_CLASSIFICATION = "token_classification"  # noqa: S105 (no password)
    LANGUAGE_MODELING = "language_modeling"
    MULTIPLE_CHOICE = "multiple_choice"
    SEQUENCE_TO_SEQUENCE = "sequence_to_sequence"
    RETRIEVAL = "retrieval"


class Metric(StrEnum):
    """A figure for one model on one task."""

    ACCURACY = "accuracy"
    BALANCED_ACCURACY = "balanced_accuracy"
    MACRO_F1 = "macro_f1"
    AUROC = "auroc"
    CALIBRATION_ERROR = "calibration_error"
    PEARSON = "pearson"
    SPEARMAN = "spearman"
    MSE = "mse"
    ENTITY_F1 = "entity_f1"
    PERPLEXITY = "perplexity"
    ROUGE_L = "rouge_l"
    EXACT_MATCH = "exact_match"
    CHRF = "chrf"
    RECALL_AT_1 = "recall_at_1"
    RECALL_AT_5 = "recall_at_5"
    RECALL_AT_10 = "recall_at_10"


Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class MetricRow:
    """What the house knows about a metric: the kinds it fits, which way is better, what it is, who computes it."""

    kinds: tuple[Kind, ...]
    better: Better
    says: str
    library: str


# A kind's first row is its primary metric, which retention and gates look at unless a recipe names another first.
METRICS: dict[Metric, MetricRow] = {
    Metric.ACCURACY: MetricRow(
        (Kind.CLASSIFICATION, Kind.MULTIPLE_CHOICE),
        "higher",
        "The share of samples whose class or choice the model finds.",
        "numpy",
    ),
    Metric.BALANCED_ACCURACY: MetricRow(
        (Kind.CLASSIFICATION,), "higher", "The mean over classes of the share of their samples found.", "scikit-learn"
    ),
    Metric.MACRO_F1: MetricRow(
        (Kind.CLASSIFICATION,),
        "higher",
        "The mean over classes of F1, so that rare ones count as much.",
        "scikit-learn",
    ),
    Metric.AUROC: MetricRow(
        (Kind.CLASSIFICATION,),
        "higher",
        "How surely a sample of a class is scored above one of another: area under the ROC curve, mean over classes.",
        "scikit-learn",
    ),
    Metric.CALIBRATION_ERROR: MetricRow(
        (Kind.CLASSIFICATION,),
        "lower",
        "How far confidence is from accuracy, over 15 bins of confidence of equal width.",
        "torchmetrics",
    ),
    Metric.PEARSON: MetricRow(
        (Kind.REGRESSION,), "higher", "The linear correlation of predictions and labels.", "scipy"
    ),
    Metric.SPEARMAN: MetricRow(
        (Kind.REGRESSION,), "higher", "The correlation of the ranks of predictions and labels.", "scipy"
    ),
    Metric.MSE: MetricRow((Kind.REGRESSION,), "lower", "The mean squared error.", "scikit-learn"),
    Metric.ENTITY_F1: MetricRow(
        (Kind.TOKEN_CLASSIFICATION,),
        "higher",
        "F1 of whole entities, found with their type and both ends, over all samples.",
        "numpy",
    ),
    Metric.PERPLEXITY: MetricRow(
        (Kind.LANGUAGE_MODELING,), "lower", "The exponential of the mean loss per token.", "numpy"
    ),
    Metric.ROUGE_L: MetricRow(
        (Kind.SEQUENCE_TO_SEQUENCE,),
        "higher",
        "The longest common subsequence of words with the right text, as an F-measure from 0 to 1.",
        "torchmetrics",
    ),
    Metric.EXACT_MATCH: MetricRow(
        (Kind.SEQUENCE_TO_SEQUENCE,), "higher", "The share of texts that are exactly the right one.", "numpy"
    ),
    Metric.CHRF: MetricRow(
        (Kind.SEQUENCE_TO_SEQUENCE,), "higher", "Common character n-grams with the right text, 0 to 100.", "sacrebleu"
    ),
    Metric.RECALL_AT_1: MetricRow(
        (Kind.RETRIEVAL,), "higher", "The share of queries whose right document comes first.", "numpy"
    ),
    Metric.RECALL_AT_5: MetricRow(
        (Kind.RETRIEVAL,), "higher", "The share of queries whose right document is among the first 5.", "numpy"
    ),
    Metric.RECALL_AT_10: MetricRow(
        (Kind.RETRIEVAL,), "higher", "The share of queries whose right document is among the first 10.", "numpy"
    ),
}


def metrics_of(kind: Kind) -> tuple[Metric, ...]:
    """The metrics that fit a kind, its primary one first."""
    return tuple(metric for metric, row in METRICS.items() if kind in row.kinds)
