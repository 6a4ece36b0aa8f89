"""From checkpoints to merged weights: parameters of every kind are trimmed by what their exemplars showed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from service.contract.errors import BadInput
from service.contract.recipe import Recipe
from service.contract.stages import Stage
from tests.workers.architectures import CASES
from tests.workers.stage_runs import Run, family
from tests.workers.tiny_models import shapes
from workers.streaming import bytes_in_memory

KINDS = {
    "ConvNextForImageClassification": ("dwconv.weight", "layer_scale_parameter", "pwconv1.weight"),
    "GptOssForCausalLM": ("experts.gate_up_proj", "experts.down_proj", "router.weight"),
    "MixtralForCausalLM": ("experts.0.w1.weight", "experts.3.w2.weight", "block_sparse_moe.gate.weight"),
    "SiglipModel": ("attention.out_proj.weight",),
    "SwinForImageClassification": ("relative_position_bias_table",),
    "T5ForConditionalGeneration": ("EncDecAttention.k.weight", "relative_attention_bias.weight"),
}


@pytest.mark.parametrize("architecture", list(KINDS))
def test_every_kind_of_parameter_is_trimmed(architecture: str, tmp_path: Path) -> None:
    case = CASES[architecture]
    run = Run(tmp_path, Recipe.model_validate(family(tmp_path, architecture, case)))
    run.go()
    unseen = [row["parameter"] for row in run.log() if row["reason"]]
    assert [name for name in unseen if not any(part in name for part in case.unseen)] == []
    rows = {row["parameter"]: row for row in run.log()}
    for part in KINDS[architecture]:
        found = [row for name, row in rows.items() if name.endswith(part)]
        assert found
        assert {row["treatment"] for row in found} <= {"projection", "scale_mask"}
        assert any(row["energy_removed"] > 0 for row in found)
        assert all(row["conflict_after"] <= row["conflict_before"] * 1.001 for row in found)
    merged = run.merged()
    assert all(bool(tensor.isfinite().all()) for tensor in merged.values())
    assert set(shapes(merged)) == set(rows) | {name for name in merged if merged[name].dtype is torch.int64}


@pytest.mark.parametrize("architecture", ["ConvNextForImageClassification", "GptOssForCausalLM"])
@pytest.mark.parametrize("proxy", ["task_vector", "subspace"])
def test_without_exemplars_too(architecture: str, proxy: str, tmp_path: Path) -> None:
    asked: dict[str, Any] = family(tmp_path, architecture, CASES[architecture])
    asked["tasks"] = [{key: row[key] for key in ("name", "checkpoint")} for row in asked["tasks"]]
    asked["method"] = {"name": "cat", "proxy": proxy, "balance": 0}
    run = Run(tmp_path, Recipe.model_validate(asked))
    run.go()
    assert not run.warnings(Stage.MERGE)
    part = KINDS[architecture][0]
    assert any(row["energy_removed"] > 0 for row in run.log() if row["parameter"].endswith(part))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "tsv_m", "iso_c", "regmean", "lot", "wudi"])
def test_methods_that_know_matrices_take_stacks_as_they_are(method: str, tmp_path: Path) -> None:
    for architecture in ("ConvNextForImageClassification", "GptOssForCausalLM"):
        folder = tmp_path / architecture
        folder.mkdir()
        asked = {**family(folder, architecture, CASES[architecture]), "method": {"name": method}}
        run = Run(folder, Recipe.model_validate(asked))
        run.go()
        assert run.merged()


@pytest.mark.parametrize("features_at", ["task", "scaled"])
def test_a_calibration_that_streams_gives_the_same_statistics(features_at: str, tmp_path: Path) -> None:
    case = CASES["MixtralForCausalLM"]
    case = replace(case, values={**case.values, "num_hidden_layers": 4})
    asked = family(tmp_path, "MixtralForCausalLM", case)
    asked["method"]["features_at"] = features_at
    recipe = Recipe.model_validate({**asked, "output": {"overwrite": True}})
    whole = Run(tmp_path, recipe)
    whole.go()
    total = bytes_in_memory(shapes(whole.merged()).values())
    expected = whole.statistics()
    whole.forget()
    streamed = Run(tmp_path, recipe, total - 1)
    streamed.go()
    for one, other in zip(streamed.statistics(), expected, strict=True):
        assert set(one) == set(other)
        for name in one:
            torch.testing.assert_close(one[name], other[name])
    streamed.forget()
    with pytest.raises(BadInput, match="CATMERGE_CALIBRATION_BYTES"):
        Run(tmp_path, recipe, total // 4).go()
