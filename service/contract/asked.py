"""What a job may be asked for: a merge (or its analysis), or an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from service.contract.evaluating import EvaluationRecipe
from service.contract.recipe import Recipe

AnyRecipe = Recipe | EvaluationRecipe


def stored_recipe(value: Mapping[str, Any]) -> AnyRecipe:
    """A recipe as a job's row has it; its mode says of which kind it is."""
    kind = EvaluationRecipe if value.get("mode") == "evaluation" else Recipe
    return kind.model_validate(value)
