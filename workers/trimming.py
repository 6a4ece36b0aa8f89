"""Gives one parameter's task vectors the treatment that was planned for them, and says what that did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from service.contract.errors import BadInput
from service.contract.methods import Cat
from service.contract.notices import Notice
from service.contract.plan import TensorPlan
from service.contract.recipe import Recipe
from service.contract.treatments import Keep, Projection, ScaleMask, ShiftMask
from service.contract.treatments import Statistic as Kind
from workers.blocks import trim_blocks
from workers.layout import as_blocks, as_matrix, from_blocks, from_matrix
from workers.proxies import proxy_squares, proxy_statistic
from workers.statistics import Statistic, stack_statistics
from workers.treatments import Effect, Removed, Trimmed, projection, trim
from workers.treatments.concentration import Concentration, concentrations
from workers.treatments.outcome import energy


def trim_parameter(
    plan: TensorPlan, recipe: Recipe, vectors: list[Tensor], statistics: Sequence[Statistic | None]
) -> tuple[Trimmed, str, Notice | None]:
    """Trimmed task vectors in the tensor's own shape, the treatment they got, and why it is another than planned.

    Matrices are trimmed in place, so that there is never more of them than there are tasks: ``vectors`` are used up.
    """
    untouched = Trimmed(vectors, [], [Effect() for _ in vectors])
    if isinstance(plan.treatment, Keep):
        return untouched, "keep", None
    if isinstance(plan.treatment, Projection) and plan.blocks > 1:
        return _trim_blocks(plan, plan.treatment, recipe, vectors, statistics)
    is_matrix = isinstance(plan.treatment, Projection)
    shaped = [as_matrix(vector, plan.role, plan.transposed) if is_matrix else vector.flatten() for vector in vectors]
    known = _known(plan, recipe, shaped, statistics)
    missing = [task.name for task, statistic in zip(recipe.tasks, known, strict=True) if _is_empty(statistic)]
    if missing and type(plan.treatment).statistic is not Kind.NONE:
        return untouched, "keep", _without(missing)
    _refuse_misfits(plan, recipe, shaped[0].shape[-1], known)
    if isinstance(plan.treatment, Projection):
        trimmed = projection.trim(shaped, known, plan.treatment, out=shaped)
    else:
        trimmed = trim(shaped, known, plan.treatment)
    back = [
        from_matrix(vector, plan.shape, plan.role, plan.transposed) if is_matrix else vector.reshape(plan.shape)
        for vector in trimmed.task_vectors
    ]
    return Trimmed(back, trimmed.removed, trimmed.effects), plan.treatment.name, None


def concentrate(
    plan: TensorPlan, recipe: Recipe, vectors: Sequence[Tensor], statistics: Sequence[Statistic | None]
) -> list[Concentration]:
    """How much the largest entries of each task vector answer; nothing where inputs are unknown or there are none.

    Raises:
        BadInput: a statistic does not fit.
    """
    treatment = plan.treatment
    if not isinstance(treatment, Projection | ScaleMask):
        return []
    if isinstance(treatment, ScaleMask):
        shaped = [vector.flatten() for vector in vectors]
    elif plan.blocks > 1:
        shaped = [as_blocks(vector, plan.role, plan.blocks, plan.transposed) for vector in vectors]
    else:
        shaped = [as_matrix(vector, plan.role, plan.transposed) for vector in vectors]
    known = (_known_blocks if shaped[0].dim() > 2 else _known)(plan, recipe, shaped, statistics)
    if any(map(_is_empty, known)):
        return []
    _refuse_misfits(plan, recipe, shaped[0].shape[-1], known)
    return concentrations(shaped, known, treatment)


def _trim_blocks(
    plan: TensorPlan,
    treatment: Projection,
    recipe: Recipe,
    vectors: list[Tensor],
    statistics: Sequence[Statistic | None],
) -> tuple[Trimmed, str, Notice | None]:
    """As ``_trim``, for matrices that are stacked in one tensor."""
    stacked = [as_blocks(vector, plan.role, plan.blocks, plan.transposed) for vector in vectors]
    known = _known_blocks(plan, recipe, stacked, statistics)
    missing = [task.name for task, statistic in zip(recipe.tasks, known, strict=True) if _is_empty(statistic)]
    if missing:
        untouched = Trimmed(vectors, [], [Effect() for _ in vectors])
        return untouched, "keep", _without(missing)
    _refuse_misfits(plan, recipe, stacked[0].shape[-1], known)
    _refuse_other_blocks(plan, recipe, known)
    trimmed = trim_blocks(stacked, known, treatment, plan.role)
    back = [from_blocks(vector, plan.shape, plan.transposed) for vector in trimmed.task_vectors]
    return Trimmed(back, trimmed.removed, trimmed.effects), treatment.name, None


def _without(tasks: Sequence[str]) -> Notice:
    return Notice("no_statistics_in", tasks=", ".join(tasks))


def _known_blocks(
    plan: TensorPlan, recipe: Recipe, stacked: Sequence[Tensor], statistics: Sequence[Statistic | None]
) -> list[Statistic | None]:
    method = plan.method or recipe.method
    if recipe.has_features or not isinstance(method, Cat):
        return list(statistics)
    return [
        stack_statistics([proxy_statistic(block, method.proxy, method.proxy_rank) for block in vector])
        for vector in stacked
    ]


def _refuse_other_blocks(plan: TensorPlan, recipe: Recipe, known: Sequence[Statistic | None]) -> None:
    for task, statistic in zip(recipe.tasks, known, strict=True):
        if statistic is not None and len(statistic.block_rows) != plan.blocks:
            raise BadInput(
                f"task {task.name!r}: the statistics of {plan.name!r} are about {len(statistic.block_rows) or 1} "
                f"matrices, but {plan.blocks} are stacked there",
                tensor=plan.name,
            )


def _known(
    plan: TensorPlan, recipe: Recipe, shaped: Sequence[Tensor], statistics: Sequence[Statistic | None]
) -> list[Statistic | None]:
    """The statistics that the treatment needs: the tasks' own, or proxies where no task brings any."""
    method = plan.method or recipe.method
    if recipe.has_features or not isinstance(method, Cat):
        return list(statistics)
    if isinstance(plan.treatment, Projection):
        return [proxy_statistic(vector, method.proxy, method.proxy_rank) for vector in shaped]
    if isinstance(plan.treatment, ScaleMask):
        return [proxy_squares(vector) for vector in shaped]
    return list(statistics)


def _is_empty(statistic: Statistic | None) -> bool:
    return statistic is None or statistic.rows == 0


def _refuse_misfits(plan: TensorPlan, recipe: Recipe, width: int, known: Sequence[Statistic | None]) -> None:
    for task, statistic in zip(recipe.tasks, known, strict=True):
        if statistic is not None and not isinstance(plan.treatment, ShiftMask) and statistic.width != width:
            raise BadInput(
                f"task {task.name!r}: the statistics of {plan.name!r} are {statistic.width} wide, but its inputs are "
                f"{width} wide",
                tensor=plan.name,
            )
        if statistic is not None and isinstance(plan.treatment, ScaleMask) and statistic.diagonal is None:
            raise BadInput(
                f"task {task.name!r}: the statistics of the scale {plan.name!r} must be a diagonal", tensor=plan.name
            )


def removed_by_name(plan: TensorPlan, recipe: Recipe, removed: Sequence[Removed]) -> dict[str, Tensor]:
    """What was removed on each task's behalf: ``<parameter>.basis.<task>`` [out, c] or ``.mask.<task>`` [c]."""
    found = {}
    for task, part in zip(recipe.tasks, removed, strict=False):
        if part.count and part.basis is not None:
            found[f"{plan.name}.basis.{task.name}"] = part.basis.cpu().contiguous()
        elif part.count and part.mask is not None:
            found[f"{plan.name}.mask.{task.name}"] = part.mask.cpu()
    return found


def log_rows(
    plan: TensorPlan,
    recipe: Recipe,
    before: Sequence[Tensor],
    trimmed: Trimmed,
    treatment: str,
    reason: Notice | None,
) -> list[dict[str, Any]]:
    """The parameter's rows of the trim log, one per task; ``before`` are what ``trim_parameter`` was given."""
    return [
        {
            "parameter": plan.name,
            "task": task.name,
            "role": plan.role.value,
            "treatment": treatment,
            "shape": list(plan.shape),
            "transposed": plan.transposed,
            "reason": reason,
            "removed": trimmed.removed[k].count if trimmed.removed else 0,
            "scores": [float(score) for score in trimmed.removed[k].scores] if trimmed.removed else [],
            **_effect(trimmed.effects[k], before[k]),
        }
        for k, task in enumerate(recipe.tasks)
    ]


def _effect(effect: Effect, before: Tensor) -> Mapping[str, float | None]:
    return {
        "energy": energy(before) if effect.energy is None else effect.energy,  # unmeasured is untouched
        "energy_removed": effect.energy_removed,
        "conflict_before": effect.conflict_before,
        "conflict_after": effect.conflict_after,
        "own_response_lost": effect.own_response_lost,
        "large_share": effect.large_share,
    }
