"""Sets merges and the models of evaluations side by side: what each kept, how recipes differ, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from service.cli.output import human_bytes
from service.cli.wording import Language, Say, speaker
from service.contract.metrics import METRICS
from service.contract.resources import EVALUATIONS

NONE = "-"
Job = Mapping[str, Any]
Read = Callable[[Job], float | None]
ReadEnds = Callable[[Job], tuple[float, float] | None]
Write = Callable[[float], str]
Spans = Callable[[Job, str, Write], str]

SIZES = {
    "read": "cost.bytes_read",
    "written": "cost.bytes_written",
    "memory": "cost.peak_memory_bytes",
}
STORED = "savings.bytes_after"


@dataclass(frozen=True)
class Row:
    """One figure of every job. ``values`` are numbers where it is one; ``best`` are the places of the best."""

    name: str
    cells: tuple[str, ...]
    values: tuple[float | None, ...] = ()
    best: tuple[int, ...] = ()


@dataclass(frozen=True)
class Section:
    """Rows that belong together."""

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Comparison:
    """Jobs, by id, and everything about them; ``warnings`` say where they can't fairly be compared.

    A model of an evaluation has the id of that, and its name.
    """

    jobs: tuple[str, ...]
    sections: tuple[Section, ...]
    warnings: tuple[str, ...]
    language: Language = "en"

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def compared(jobs: Sequence[Job], language: Language = "en") -> Comparison:
    """Compare jobs as the service tells of them; one that has no result yet has no figures.

    Of an evaluation every model that is no reference is compared, as if it were a merge of the references.
    """
    say = speaker(language)
    jobs = [column for job in jobs for column in _columns(job)]
    sections = (
        Section(say("outcome"), tuple(_outcome(jobs, say))),
        Section(say("recipe"), tuple(_recipe(jobs))),
        Section(say(_kept(jobs)), tuple(_retention(jobs, say))),
        Section(say("scores_of_models" if any(map(_is_evaluation, jobs)) else "scores"), tuple(_scores(jobs, say))),
        Section(say("cost"), tuple(_cost(jobs, say))),
    )
    return Comparison(
        jobs=tuple(job["id"] for job in jobs),
        sections=tuple(section for section in sections if section.rows),
        warnings=tuple(_warnings(jobs, say)),
        language=language,
    )


def _columns(job: Job) -> Iterator[Job]:
    """The job; of an evaluation each of its models that is no reference, told of as a merge is."""
    if not _is_evaluation(job):
        yield job
        return
    for model in job["recipe"]["models"]:
        if not model.get("reference"):
            yield {**job, "id": f"{job['id']} {model['name']}", **_as_merge(job, model)}


def _as_merge(job: Job, model: Mapping[str, Any]) -> dict[str, Any]:
    name, found, recipe = model["name"], _metrics(job), job["recipe"]
    settings = {key: recipe.get(key) for key in ("evaluation", "gates", "seed")} | {"checkpoint": model["checkpoint"]}
    if not found:
        return {"recipe": settings, "result": None}
    own, speed = found["models"][name], ((found.get("speed") or {}).get("models") or {}).get(name)
    tasks = {task: _merged(row, row["models"][name]) for task, row in found["tasks"].items() if name in row["models"]}
    gates = [gate for gate in _result(job).get("gates") or [] if gate.get("model") == name]
    metrics = {**own, "tasks": tasks, "speed": speed}
    savings = {"bytes_after": own["bytes"]}
    return {"recipe": settings, "result": {**_result(job), "gates": gates, "metrics": metrics, "savings": savings}}


def _merged(task: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured of a model on one task, in the words in which a merge's result has it."""
    intervals = {"merged": row["interval"], "retention": row["retention_interval"]}
    return {"metric": task["metric"], "merged": row["score"], "retention": row["retention"], "intervals": intervals}


def _is_evaluation(job: Job) -> bool:
    return bool(job.get("object") == EVALUATIONS.name)


def _are_mixed(jobs: Sequence[Job]) -> bool:
    """Whether there are merges and models of evaluations: what their recipes and costs are about differs."""
    return len({_is_evaluation(job) for job in jobs}) > 1


def _kept(jobs: Sequence[Job]) -> str:
    if _are_mixed(jobs):
        return "kept_or_reference"
    return "kept_of_reference" if any(map(_is_evaluation, jobs)) else "kept"


def _outcome(jobs: Sequence[Job], say: Say) -> Iterator[Row]:
    yield Row(say("status"), tuple(say(job["status"]) for job in jobs))
    if not all(_is_evaluation(job) for job in jobs):
        yield Row(say("method"), tuple((job["recipe"].get("method") or {}).get("name", NONE) for job in jobs))
    gates = [_result(job).get("gates") or [] for job in jobs]
    if any(gates):
        counts = [(sum(gate["passed"] for gate in found), len(found)) for found in gates]
        yield Row(say("gates"), tuple(say("gates_met", met=met, count=count) for met, count in counts))


def _recipe(jobs: Sequence[Job]) -> Iterator[Row]:
    """Every setting in which the jobs differ, asked for or chosen; where a result goes is no setting.

    Of merges and models of evaluations together, only what either has settings of.
    """
    flat = [{**dict(_flattened(job["recipe"])), **_chosen(job)} for job in jobs]
    for name in dict.fromkeys(name for settings in flat for name in settings):
        values = [settings.get(name) for settings in flat]
        if _are_mixed(jobs) and any(name not in settings for settings in flat):
            continue
        if any(value != values[0] for value in values) and not name.startswith(("output.prefix", "metadata.")):
            yield Row(name, tuple(NONE if value is None else str(value) for value in values))


def _chosen(job: Job) -> dict[str, object]:
    """What a search has chosen, by the names of settings."""
    chosen = (_result(job).get("search") or {}).get("chosen") or {}
    return {f"search.chosen.{name}": value for name, value in chosen.items()}


def _flattened(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    items: Iterator[tuple[str, object]]
    if isinstance(value, Mapping):
        items = iter(value.items())
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        items = ((_called(item, place), item) for place, item in enumerate(value))
    else:
        yield name, value
        return
    for key, item in items:
        yield from _flattened(item, f"{name}.{key}" if name else str(key))


def _called(item: object, place: int) -> str:
    """A list's item by its name, or by the task it is about, rather than by its place."""
    name = (item.get("name") or item.get("task")) if isinstance(item, Mapping) else None
    return str(name or place)


def _retention(jobs: Sequence[Job], say: Say) -> Iterator[Row]:
    if not any(_metrics(job) for job in jobs):
        return
    for name, key in (("mean", "mean_retention"), ("worst", "worst_retention")):
        ends = _reading_ends(_metrics, f"{key}_interval")
        yield _row(jobs, say(name), _reading(_metrics, key), _percent, interval=_spans(ends, say))
    for task in _tasks(jobs):
        ends = _reading_ends(_about(task), "intervals.retention")
        yield _row(jobs, task, _reading(_about(task), "retention"), _percent, interval=_spans(ends, say))


def _scores(jobs: Sequence[Job], say: Say) -> Iterator[Row]:
    for task in _tasks(jobs):
        of = _about(task)
        metric = next((str(of(job).get("metric") or "accuracy") for job in jobs if of(job)), "accuracy")
        yield _row(
            jobs,
            say("score_of", task=task, metric=say(f"metric_{metric}")),
            _reading(of, "merged"),
            _figure,
            interval=_spans(_reading_ends(of, "intervals.merged"), say),
            lower=any(name == metric and row.better == "lower" for name, row in METRICS.items()),
        )


def _cost(jobs: Sequence[Job], say: Say) -> Iterator[Row]:
    if not any(_result(job) for job in jobs):
        return
    if not _are_mixed(jobs):
        yield _row(jobs, say("time"), _reading(_result, "cost.seconds"), partial(_seconds, say), lower=True)
        for name, path in SIZES.items():
            yield _row(jobs, say(name), _reading(_result, path), human_bytes, lower=True)
    yield _row(jobs, say("stored"), _reading(_result, STORED), human_bytes, lower=True)
    if any(_metrics(job).get("speed") for job in jobs):
        name = "latency_of_models" if any(map(_is_evaluation, jobs)) else "latency"
        yield _row(jobs, say(name), _reading(_metrics, "speed.latency_ratio"), _figure, lower=True)


def _row(
    jobs: Sequence[Job],
    name: str,
    read: Read,
    write: Write,
    *,
    interval: Spans | None = None,
    lower: bool = False,
) -> Row:
    values = tuple(read(job) for job in jobs)
    cells = [NONE if value is None else write(value) for value in values]
    for place, job in enumerate(jobs):
        if interval and values[place] is not None:
            cells[place] = interval(job, cells[place], write)
    return Row(name, tuple(cells), values, _best(values, lower))


def _spans(ends_of: ReadEnds, say: Say) -> Spans:
    """How to put its interval behind a figure that is written already; none where it is not there."""

    def spanned(job: Job, value: str, write: Write) -> str:
        ends = ends_of(job)
        return say("between", value=value, low=write(ends[0]), high=write(ends[1])) if ends else value

    return spanned


def _best(values: Sequence[float | None], lower: bool) -> tuple[int, ...]:
    """The places of the best value; none where all are equal."""
    there = [value for value in values if value is not None and math.isfinite(value)]
    if len(there) < 2 or min(there) == max(there):
        return ()
    best = min(there) if lower else max(there)
    return tuple(place for place, value in enumerate(values) if value == best)


def _warnings(jobs: Sequence[Job], say: Say) -> Iterator[str]:
    """Where a comparison would mislead."""
    unfinished = [job["id"] for job in jobs if not _result(job)]
    if unfinished:
        yield say("no_result", jobs=", ".join(unfinished))
    if any(len({_labeled(job).get(task) for job in jobs if task in _tasks([job])}) > 1 for task in _tasks(jobs)):
        yield say("other_samples")
    if len({job["recipe"]["base"] for job in jobs if not _is_evaluation(job)}) > 1:
        yield say("other_bases")


def _labeled(job: Job) -> dict[str, str]:
    return {row["task"]: row["labeled"] for row in (job["recipe"].get("evaluation") or {}).get("tasks", [])}


def _tasks(jobs: Sequence[Job]) -> list[str]:
    return list(dict.fromkeys(task for job in jobs for task in _metrics(job).get("tasks", {})))


def _result(job: Job) -> Mapping[str, Any]:
    return job["result"] or {}


def _metrics(job: Job) -> Mapping[str, Any]:
    return _result(job).get("metrics") or {}


def _about(task: str) -> Callable[[Job], Mapping[str, Any]]:
    """What was measured on one task."""

    def of(job: Job) -> Mapping[str, Any]:
        found: Mapping[str, Any] = _metrics(job).get("tasks", {}).get(task) or {}
        return found

    return of


def _reading(of: Callable[[Job], Mapping[str, Any]], path: str) -> Read:
    """How to read a figure at ``a.b`` below what is told of a job; None where it is not there."""

    def read(job: Job) -> float | None:
        value = _at(of(job), path)
        return None if value is None else float(value)

    return read


def _reading_ends(of: Callable[[Job], Mapping[str, Any]], path: str) -> ReadEnds:
    """How to read an interval; None where it is not there, or open."""

    def read(job: Job) -> tuple[float, float] | None:
        low, high = _at(of(job), path) or (None, None)
        return None if low is None or high is None else (low, high)

    return read


def _at(told: Mapping[str, Any], path: str) -> Any:
    value: Any = told
    for key in path.split("."):
        value = (value or {}).get(key)
    return value


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _figure(value: float) -> str:
    return f"{value:.4g}"


def _seconds(say: Say, value: float) -> str:
    return say("seconds", count=f"{value:.1f}")
