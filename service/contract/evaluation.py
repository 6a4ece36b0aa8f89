"""What to measure on a merged model beside its base and its experts, and the rules that the result must hold to."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from service.contract.addresses import Address, Name
from service.contract.base import Frozen
from service.contract.methods import METHODS, AnyMethod, Method
from service.contract.metrics import METRICS, Better, Kind, Metric, metrics_of

MAX_EVALUATED = 64
MODELS = ("base", "expert", "merged")
SPEED = "speed"
TEXT_SUFFIXES = (".jsonl", ".csv")
SUFFIXES = (".safetensors", *TEXT_SUFFIXES)
Column = Annotated[str, Field(min_length=1, max_length=256)]

RETENTIONS = ("worst_task_retention", "mean_retention", "task_retention")
ABOUT_ONE_TASK = ("task_retention", "task_score", "task_drop")
MEASURED_ONCE = ("model_bytes", "latency_ratio", "min_samples")  # figures without an interval
AT_MOST = ("task_drop", "model_bytes", "latency_ratio")  # of these less is better; of a score, as its metric says


def is_text(address: str) -> bool:
    """Whether a file of samples is text, which the task's tokenizer turns into tensors."""
    return address.lower().endswith(TEXT_SUFFIXES)


def _checked_samples(address: str) -> str:
    if not address.lower().endswith(SUFFIXES):
        raise ValueError(f"must be a file that ends in {', '.join(SUFFIXES)}")
    return address


Samples = Annotated[Address, AfterValidator(_checked_samples)]


def _checked_baseline(name: str) -> str:
    baseline_method(name)
    return name


Baseline = Annotated[str, AfterValidator(_checked_baseline)]


def baseline_method(name: str, method: Method | None = None) -> AnyMethod:
    """The method that a baseline merges by: with its own defaults, and entries ranked within tensors where any are.

    Where ``method`` combines task vectors just so once they are trimmed, the baseline has its parameters.

    Raises:
        ValueError: there is no such method, it trims, or it needs data.
    """
    fitting = [known for known, row in METHODS.items() if not row.trims and not row.observes]
    if name not in fitting:
        raise ValueError(f"{name!r} is no method that merges without data; those are {', '.join(fitting)}")
    row = METHODS[name]
    given = method.combining if method is not None else None
    same = given.model_dump() if given is not None and given.combines == row.combines else {}
    parameters = {key: value for key, value in same.items() if key in row.model_fields and key != "name"}
    return row(**parameters | ({"scope": "tensor"} if "scope" in row.model_fields else {}))


class FeatureHead(Frozen):
    """A head matrix applied to pooled features, as CLIP's zero-shot heads are."""

    weight: Address = Field(
        description="A .safetensors file: `weight` [classes, d], and `logit_scale`, a logarithm, if wanted"
    )
    pooling: Literal["cls", "mean"] = "mean"
    normalize: bool = Field(True, description="Scale features to unit length before the product")


class TextColumns(Frozen):
    """What the columns of a text file are called, in CSV, or the members of its lines, in JSONL."""

    text: Column = Field(
        "text", description="The sample; of token classification a list of words, of retrieval a query"
    )
    pair: Column | None = Field(
        None,
        description="A second text; of retrieval the right document, of language modeling what follows and counts",
    )
    choices: Column = Field("choices", description="Multiple choice: a list of answers")
    label: Column = Field("label", description="Class, number, list of tags, index of the right choice, or right text")


class TaskEvaluation(Frozen):
    """Labeled samples of one task, and what to measure on them."""

    task: Name
    kind: Kind = Field(Kind.CLASSIFICATION, description="What the samples ask of a model")
    labeled: Samples = Field(description="A .safetensors file of model inputs and `labels`, or a .jsonl or .csv file")
    validation: Samples | None = Field(None, description="Other labeled samples, which a search may look at")
    columns: TextColumns | None = Field(None, description="Names of the columns of a text file")
    head: FeatureHead | None = Field(None, description="Omit to use the checkpoint's own head")
    metrics: tuple[Metric, ...] | None = Field(
        None, min_length=1, max_length=16, description="The first is what retention and gates look at; omitted, all"
    )
    max_new_tokens: int | None = Field(
        None, ge=1, le=4096, description="Tokens generated at most; omitted, 64, or what the model has room for"
    )

    @model_validator(mode="after")
    def _fields_fit_kind(self) -> Self:
        fitting = metrics_of(self.kind)
        for metric in self.metrics or ():
            if metric not in fitting:
                raise ValueError(f"{metric} does not measure {self.kind}; its metrics are {', '.join(fitting)}")
        if self.metrics and len(set(self.metrics)) < len(self.metrics):
            raise ValueError("a metric is named twice")
        if self.head and self.kind is not Kind.CLASSIFICATION:
            raise ValueError(f"a head of features scores classes; {self.kind} has none")
        if self.max_new_tokens and self.kind is not Kind.SEQUENCE_TO_SEQUENCE:
            raise ValueError(f"max_new_tokens is about generated text; {self.kind} generates none")
        if self.columns and not any(is_text(file) for file in (self.labeled, self.validation) if file):
            raise ValueError("columns are about text files (.jsonl, .csv); the labeled samples are none")
        return self

    @property
    def measured(self) -> tuple[Metric, ...]:
        """The metrics to measure, the primary one first."""
        return self.metrics or metrics_of(self.kind)

    @property
    def primary(self) -> Metric:
        """The metric that retention and gates look at."""
        return self.measured[0]

    @property
    def better(self) -> Better:
        """Whether more or less of the primary metric is better."""
        return METRICS[self.primary].better


class Evaluation(Frozen):
    """What to measure on the merged model, on the base and on every expert."""

    tasks: tuple[TaskEvaluation, ...] = Field(min_length=1, max_length=MAX_EVALUATED)
    batch_size: int = Field(64, ge=1, le=65536)
    baselines: tuple[Baseline, ...] = Field(
        (), max_length=8, description="Methods to merge by as well, without trimming, and to compare with"
    )
    confidence: float = Field(0.95, ge=0.5, le=0.999, description="Level of the intervals")
    resamples: int = Field(1000, ge=100, le=10_000, description="Resamples of the bootstrap that intervals come from")

    @model_validator(mode="after")
    def _baselines_differ(self) -> Self:
        if len(set(self.baselines)) < len(self.baselines):
            raise ValueError("a baseline is named twice")
        return self

    @property
    def models(self) -> tuple[str, ...]:
        """What is measured on each task."""
        return (*MODELS, *self.baselines)

    @property
    def parts(self) -> tuple[tuple[TaskEvaluation, str], ...]:
        """What is measured on what, in the order of the evaluation's parts; after them comes the look at speed."""
        return tuple((row, model) for row in self.tasks for model in self.models)

    def row(self, task: str) -> TaskEvaluation | None:
        """What is measured on a task; None where nothing is."""
        return next((row for row in self.tasks if row.task == task), None)


class Gate(Frozen):
    """A rule agreed beforehand: the job is rejected where the merged model falls short of it."""

    metric: Literal[
        "worst_task_retention",
        "mean_retention",
        "task_retention",
        "task_score",
        "task_drop",
        "model_bytes",
        "latency_ratio",
        "min_samples",
    ] = Field(
        description="Retention is the share of the expert's score; task_drop what is lost of it; latency_ratio the "
        "merged model's latency against the experts' mean; min_samples the least number of labeled samples"
    )
    at_least: float | None = Field(None, description="The figure must not be below this")
    at_most: float | None = Field(None, description="The figure must not be above this")
    task: Name | None = Field(None, description="For task_retention, task_score and task_drop: which task")
    use: Literal["point", "bound"] = Field(
        "point", description="Hold the figure itself to the rule, or the end of its interval on the cautious side"
    )

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if (self.metric in ABOUT_ONE_TASK) != (self.task is not None):
            raise ValueError(f"{', '.join(ABOUT_ONE_TASK)} name a task, the other metrics do not")
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("give at_least or at_most, one of them")
        wanted = self.bound if self.metric != "task_score" else None  # a score's direction is its metric's
        if wanted and getattr(self, wanted) is None:
            raise ValueError(f"{self.metric} takes {wanted}")
        if self.metric in RETENTIONS and not 0 <= (self.at_least or 0) <= 10:
            raise ValueError("a retention is a share of the expert's score: at_least is from 0 to 10")
        if self.metric in MEASURED_ONCE and (self.at_least or self.at_most or 0) <= 0:
            raise ValueError(f"{self.metric} must be held to a number above 0")
        if self.metric in MEASURED_ONCE and self.use == "bound":
            raise ValueError(f"{self.metric} has no interval; use its point")
        return self

    @property
    def bound(self) -> Literal["at_least", "at_most"]:
        """Which of the two the metric takes; of a score, which one was given."""
        if self.metric == "task_score":
            return "at_least" if self.at_least is not None else "at_most"
        return "at_most" if self.metric in AT_MOST else "at_least"

    @property
    def limit(self) -> float:
        """The number that the figure is held to."""
        return float((self.at_least if self.at_least is not None else self.at_most) or 0.0)


def gate_fault(gate: Gate, evaluation: Evaluation | None, tasks: tuple[str, ...]) -> str | None:
    """Why a gate can't be computed for a merge of these ``tasks``; None where it can."""
    if gate.metric == "model_bytes":
        return None
    if evaluation is None:
        return f"the gate {gate.metric} needs an evaluation, and the recipe has none"
    if gate.task is not None:
        return task_gate_fault(gate, evaluation.row(gate.task))
    missing = sorted(set(tasks) - {row.task for row in evaluation.tasks})
    if gate.metric in RETENTIONS and missing:
        return f"a gate over all tasks needs labels for every task; missing: {', '.join(missing)}"
    return None


def task_gate_fault(gate: Gate, row: TaskEvaluation | None) -> str | None:
    """Why a gate on one task can't be computed from what is measured there; None where it can."""
    if row is None:
        return f"a gate needs the score of task {gate.task!r}, which evaluation does not measure"
    wanted = "at_least" if row.better == "higher" else "at_most"
    if gate.metric == "task_score" and gate.bound != wanted:
        return f"{row.better} {row.primary} is better, so the score of task {gate.task!r} is held to {wanted}"
    return None
