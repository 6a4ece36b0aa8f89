"""Measures a loaded model on one task's labeled samples; what a base or an expert scores is kept."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from service.contract import artifacts
from service.stores.objects import failures
from workers.bench import Bench
from workers.bootstrap import figures
from workers.exemplars import naming
from workers.figures_file import ModelScores, read_scores, write_scores
from workers.forward import check_inputs
from workers.metrics import KINDS


def score(bench: Bench, loaded: nn.Module) -> ModelScores:
    """Every metric of a model's answers, on all samples and on each resample."""
    kind, row = KINDS[bench.row.kind], bench.row
    with naming(row.labeled):
        check_inputs(loaded, kind.inputs(loaded, bench.samples))
    answers = kind.gather(loaded, bench.samples, bench.setting)
    found, samples = {}, 0
    for metric in row.measured:
        measure = kind.measures[metric]
        contributions = measure.contributions(*answers)
        samples = len(contributions)
        found[metric] = figures(measure, contributions, bench.seed, row.task, bench.evaluation.resamples)
        bench.work.watch.step()
    return ModelScores(samples, found)


def cached_scores(bench: Bench, digest: str, load: Callable[[], nn.Module]) -> ModelScores:
    """Scores that were measured before on the same bytes, or measured now on the model that ``load`` gives, and kept.

    ``digest`` is that of everything they depend on.
    """
    objects = bench.work.objects
    address = artifacts.cached_figures(bench.work.workspace, digest)
    with failures():
        is_known = objects.exists(address)
    if is_known:
        return read_scores(objects, address)
    scores = score(bench, load())
    write_scores(objects, address, scores)
    return scores
