"""How task vectors become one update: one file per method, one row per file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from service.contract.methods import Method
from workers.methods import average, task_arithmetic, ties

__all__ = ["METHODS", "merge"]

# By the name that a method's row in the contract says it ``combines`` with.
METHODS: dict[str, Callable[[Sequence[Tensor], Sequence[float], Any], Tensor]] = {
    "task_arithmetic": task_arithmetic.merge,
    "average": average.merge,
    "ties": ties.merge,
}


def merge(task_vectors: Sequence[Tensor], weights: Sequence[float], params: Method) -> Tensor:
    """One parameter's update, to add to the base, scaling included; task vectors of any one shape, a weight each."""
    return METHODS[params.combines](task_vectors, weights, params)
