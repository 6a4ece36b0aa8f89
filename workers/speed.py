"""How fast models answer: the same batch again and again, on the same device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from service.contract.errors import BadInput, UnsupportedArchitecture
from workers.bench import Bench
from workers.candidate import Candidate
from workers.exemplars import naming
from workers.forward import batches, check_inputs, device_of, lacks_padding
from workers.metrics import KINDS
from workers.trial import Trial

LARGEST_BATCH = 16  # latency is asked for by those who wait for an answer
LEAST_RUNS, MOST_RUNS = 3, 20
RUN_SECONDS = 0.3  # for one model, once the least runs are done
ALL_SECONDS = 10.0  # after which no further expert is loaded


def compare(trials: Sequence[Trial]) -> dict[str, Any]:
    """How fast the merged model and the experts of ``trials`` are, on one batch of the first one's samples.

    The merged model is timed first and last, so that a machine that slows down or speeds up favors neither; latencies
    are medians of plain forward passes, and the ratio is that of the merged model's to the experts' mean. Experts that
    can't take the first one's samples are left out, and with many of them those that there is no time for.

    Raises:
        BadInput: the samples do not fit the first model.
        InputChanged, StorageFailure, UnsupportedArchitecture.
    """
    start = time.monotonic()
    first, *others = trials
    size, merged = _times(first, first.load("merged"))
    experts = {first.row.task: statistics.median(_times(first, first.load("expert"))[1])}
    for trial in others:
        if time.monotonic() - start < ALL_SECONDS:
            with suppress(BadInput, UnsupportedArchitecture):
                experts[trial.row.task] = statistics.median(_times(first, trial.load("expert"))[1])
    latency = statistics.median([*merged, *_times(first, first.load("merged"))[1]])
    return {
        "device": first.work.device,
        "batch": size,
        "merged": _pace(latency, size),
        "experts": {name: _pace(seconds, size) for name, seconds in experts.items()},
        "latency_ratio": latency / statistics.fmean(experts.values()),
    }


def compare_candidates(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """How fast the models of an evaluation are, on one batch of the first one's samples.

    Models are timed there and, as far as there is time, back again, so that a machine that slows down or speeds up
    favors none; a model's ratio is that of its latency to the mean of the references', None for these and where there
    is none. Models that can't take the first one's samples are left out, and with many references those that there is
    no time for, but one.

    Raises:
        BadInput: the samples do not fit the first model.
        InputChanged, StorageFailure, UnsupportedArchitecture.
    """
    start = time.monotonic()
    first, *others = candidates
    size, seconds = _times(first, first.load())
    times = {first.model.name: seconds}
    for candidate in (*others, *reversed(candidates)):
        if time.monotonic() - start < ALL_SECONDS or _is_needed(candidate, candidates, times):
            with suppress(BadInput, UnsupportedArchitecture):
                found = _times(first, candidate.load())[1]
                times[candidate.model.name] = [*times.get(candidate.model.name, ()), *found]
    return {"device": first.work.device, "batch": size, "models": _paces(candidates, times, size)}


def _is_needed(candidate: Candidate, candidates: Sequence[Candidate], timed: Collection[str]) -> bool:
    """Whether a model is to be timed whatever it takes: each that is no reference, and the first that is one."""
    if candidate.model.reference:
        return not any(other.model.name in timed for other in candidates if other.model.reference)
    return candidate.model.name not in timed


def _paces(candidates: Sequence[Candidate], times: Mapping[str, Sequence[float]], size: int) -> dict[str, Any]:
    """Each model's pace, and how it compares with the references'."""
    paces = {name: _pace(statistics.median(found), size) for name, found in times.items()}
    references = [c.model.name for c in candidates if c.model.reference and c.model.name in paces]
    usual = statistics.fmean(paces[name]["latency_seconds"] for name in references) if references else None
    return {
        name: {**pace, "latency_ratio": _over(pace, None if name in references else usual)}
        for name, pace in paces.items()
    }


def run_times(model: nn.Module, batch: Mapping[str, Tensor], on_run: Callable[[], None]) -> list[float]:
    """Seconds of plain forward passes of one batch ``[n, ...]``, on the model's device, after one to warm up.

    ``on_run`` is called after every pass, and may raise.
    """
    times: list[float] = []
    _timed(model, batch)
    while len(times) < LEAST_RUNS or (len(times) < MOST_RUNS and sum(times) < RUN_SECONDS):
        times.append(_timed(model, batch))
        on_run()
    return times


def _times(first: Bench, model: nn.Module) -> tuple[int, list[float]]:
    """How many samples of the first task are in a batch, and the seconds that a model takes for it."""
    inputs = KINDS[first.row.kind].inputs(model, first.samples)
    with naming(first.row.labeled):
        check_inputs(model, inputs)
    size = 1 if lacks_padding(model, inputs) else min(LARGEST_BATCH, first.evaluation.batch_size)
    batch = next(batches(inputs, size, device_of(model)))
    return len(next(iter(batch.values()))), run_times(model, batch, first.work.watch.step)


def _over(pace: Mapping[str, float], usual: float | None) -> float | None:
    return None if usual is None else pace["latency_seconds"] / usual


def _pace(latency: float, samples: int) -> dict[str, float]:
    return {"latency_seconds": latency, "samples_per_second": samples / latency}


def _timed(model: nn.Module, batch: Mapping[str, Tensor]) -> float:
    device = device_of(model)
    _finish(device)
    start = time.perf_counter()
    with torch.no_grad():
        model(**batch)
    _finish(device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    """A GPU answers before it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
