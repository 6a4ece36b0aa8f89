"""Merges that a result is only compared with: the same checkpoints by another method, without trimming."""

from __future__ import annotations

from dataclasses import replace

from service.contract import artifacts
from service.contract.evaluation import baseline_method
from service.contract.plan import Plan, ShardPlan
from service.contract.recipe import Recipe
from service.contract.treatments import Keep
from workers.work import Work


def as_asked(work: Work, plan: Plan) -> tuple[Work, Plan]:
    """A merge part's work and plan: of a shard of the result, or, for the parts after those, of a baseline's.

    A baseline's part looks like one of a job of its own, whose every file lies in this job's scratch.
    """
    shards, evaluation = len(plan.shards), work.recipe.evaluation
    if work.part < shards or evaluation is None:
        return work, plan
    which, part = divmod(work.part - shards, shards)
    name = evaluation.baselines[which]
    folder = artifacts.baseline(work.workspace, work.claim.job_id, name)
    claim = replace(work.claim, part=part, prefix=folder, recipe=baseline_recipe(work.recipe, name))
    asked = replace(work, claim=claim, workspace=folder, outputs=lambda _stage: [])
    return asked, plan.model_copy(update={"prefix": folder, "shards": tuple(map(_untrimmed, plan.shards))})


def baseline_recipe(recipe: Recipe, name: str) -> Recipe:
    """The recipe of the same merge by a baseline's method."""
    method = baseline_method(name, recipe.method)
    return recipe.model_copy(update={"method": method, "overrides": (), "treatments": ()})


def _untrimmed(shard: ShardPlan) -> ShardPlan:
    plain = {"treatment": Keep(), "method": None, "observed": False}
    return shard.model_copy(update={"tensors": tuple(tensor.model_copy(update=plain) for tensor in shard.tensors)})
