"""Proposes what a search tries next, by Optuna, and says which parameters made the difference."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from service.contract.methods import AnyMethod
from service.contract.recipe import Recipe
from service.contract.search import METHOD, WEIGHT, Aim, Range, Search, Value, is_whole, method_named
from service.contract.trials import TrialRecord

ENOUGH_TRIALS = 8  # with a value, before importances say anything
STATES = {
    "running": TrialState.RUNNING,
    "complete": TrialState.COMPLETE,
    "failed": TrialState.FAIL,
    "lost": TrialState.FAIL,
}

optuna.logging.set_verbosity(optuna.logging.WARNING)

Distribution = FloatDistribution | IntDistribution | CategoricalDistribution
Proposal = dict[str, Value]
Suggest = Callable[[str, Distribution], Value]


def propose(recipe: Recipe, search: Search, trials: Sequence[TrialRecord]) -> Proposal | None:
    """What to try after ``trials``, which may still run; None where a grid is through.

    The first trial is the recipe's own parameters, where they lie in the space. Deterministic: the same seed and the
    same trials give the same proposal. ``tpe`` is the tree-structured Parzen estimator, Bergstra et al., Algorithms
    for Hyper-Parameter Optimization, NeurIPS 2011.
    """
    if search.sampler == "grid":
        tried = [dict(trial.parameters) for trial in trials if trial.state != "lost"]
        return next((cell for cell in search.cells(recipe.method) if cell not in tried), None)
    own = _as_asked(recipe, search)
    if own is not None and all(dict(trial.parameters) != own for trial in trials if trial.state != "lost"):
        return own
    study = _study(recipe, search, trials)
    trial = study.ask()
    return _chosen(recipe.method, search, lambda name, choice: _suggested(trial, name, choice))


def importances(recipe: Recipe, search: Search, trials: Sequence[TrialRecord]) -> dict[str, float]:
    """Each parameter's share in how different the trials' values are; empty where there are too few trials to tell.

    Of the parameters that every trial has, by functional ANOVA (Hutter et al., ICML 2014).
    """
    values = {trial.value for trial in trials if trial.value is not None}
    complete = [trial for trial in trials if trial.state == "complete"]
    if len(complete) < ENOUGH_TRIALS or len(values) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=_seed(recipe.seed, 0))
    found = optuna.importance.get_param_importances(_study(recipe, search, complete), evaluator=evaluator)
    return {name: float(share) for name, share in found.items() if math.isfinite(share)}


def _as_asked(recipe: Recipe, search: Search) -> Proposal | None:
    """The recipe's own parameters; None where one of them lies outside of the space."""
    outside = False
    weights = {WEIGHT + task.name: task.weight for task in recipe.tasks}
    known: dict[str, Value] = {METHOD: recipe.method.name, **weights}

    def asked(name: str, choice: Distribution) -> Value:
        nonlocal outside
        value = known[name] if name in known else Aim.of(name).value(recipe.method)
        outside = outside or not _contains(choice, value)
        return value

    found = _chosen(recipe.method, search, asked)
    return None if outside else found


def _contains(choice: Distribution, value: Value) -> bool:
    if isinstance(choice, CategoricalDistribution):
        return value in choice.choices
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return choice.low <= value <= choice.high


def _chosen(asked: AnyMethod, search: Search, choose: Suggest) -> Proposal:
    """The method first, and then what this method has parameters for."""
    found: Proposal = {}
    if METHOD in search.space:
        found[METHOD] = choose(METHOD, _distribution(METHOD, search, asked))
    method = method_named(str(found.get(METHOD, asked.name)), asked)
    for name in search.names(method):
        if name != METHOD:
            found[name] = choose(name, _distribution(name, search, method))
    return found


def _distribution(name: str, search: Search, method: AnyMethod) -> Distribution:
    choice = search.space[name]
    if not isinstance(choice, Range):
        return CategoricalDistribution(choice)
    if is_whole(name, method):
        return IntDistribution(int(choice.low), int(choice.high), log=choice.log)
    return FloatDistribution(choice.low, choice.high, log=choice.log)


def _suggested(trial: optuna.Trial, name: str, choice: Distribution) -> Value:
    if isinstance(choice, FloatDistribution):
        return trial.suggest_float(name, choice.low, choice.high, log=choice.log)
    if isinstance(choice, IntDistribution):
        return trial.suggest_int(name, choice.low, choice.high, log=choice.log)
    chosen: Value = trial.suggest_categorical(name, list(choice.choices))
    return chosen


def _study(recipe: Recipe, search: Search, trials: Sequence[TrialRecord]) -> optuna.Study:
    """Optuna's study, in memory, of the trials that the database knows."""
    study = optuna.create_study(direction="maximize", sampler=_sampler(search, _seed(recipe.seed, len(trials))))
    study.add_trials([_frozen(recipe, search, trial) for trial in trials])
    return study


def _sampler(search: Search, seed: int) -> BaseSampler:
    if search.sampler == "random":
        return RandomSampler(seed=seed)
    return TPESampler(seed=seed)


def _seed(seed: int, number: int) -> int:
    """A seed for each trial, so that a proposal depends on nothing that a worker did before."""
    return int.from_bytes(hashlib.sha256(f"search:{seed}:{number}".encode()).digest()[:4], "little")


def _frozen(recipe: Recipe, search: Search, trial: TrialRecord) -> FrozenTrial:
    method = method_named(str(trial.parameters.get(METHOD, recipe.method.name)), recipe.method)
    return optuna.trial.create_trial(
        state=STATES[trial.state],
        params=dict(trial.parameters),
        distributions={name: _distribution(name, search, method) for name in trial.parameters},
        value=trial.value,
    )
