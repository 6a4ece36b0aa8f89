"""How exactly a stage computes is the recipe's to say, not the last job's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from service.contract.recipe import Recipe
from tests.workers.architectures import CASES
from tests.workers.stage_runs import Run, family
from workers.machine import allow_tf32


@pytest.mark.parametrize("allowed", [True, False])
def test_a_gpu_multiplies_in_tf32_only_where_the_recipe_allows_it(allowed: bool, tmp_path: Path) -> None:
    allow_tf32(not allowed)  # as a job before may have left it
    asked = family(tmp_path, "ViTForImageClassification", CASES["ViTForImageClassification"])
    Run(tmp_path, Recipe.model_validate({**asked, "allow_tf32": allowed})).go()
    assert torch.backends.cuda.matmul.allow_tf32 is allowed
    assert torch.backends.cudnn.allow_tf32 is allowed
