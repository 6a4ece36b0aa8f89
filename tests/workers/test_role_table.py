"""README's table "What each parameter gets" against every architecture: kind of module, role, treatment, statistic."""

import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from service.contract.methods import Cat
from service.contract.treatments import Role
from tests.workers.architectures import CASES
from tests.workers.tiny_models import build, configuration, saved, shapes
from workers.skeleton import build_empty, is_experts, is_router, is_scaling_module, owner_of, read_skeleton, tied_source

README = Path(__file__).parents[2] / "README.md"
NORMALIZATIONS = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


def expected_role(module: nn.Module, attribute: str, rank: int) -> Role | None:
    """What a parameter of a module of this kind must be; None where the kind does not say it."""
    if attribute == "bias" or attribute.endswith("_bias"):
        return Role.SHIFT
    if isinstance(module, NORMALIZATIONS) or is_scaling_module(module) or attribute == "layer_scale_parameter":
        return Role.SCALE
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return Role.CONVOLUTION if module.groups == 1 else Role.GROUPED_CONVOLUTION
    if isinstance(module, nn.Embedding) or attribute == "relative_position_bias_table":
        return Role.EMBEDDING
    if is_experts(module):
        return Role.EXPERTS if rank == 3 else Role.LINEAR
    is_matrix = isinstance(module, nn.Linear | Conv1D) or is_router(module) or attribute == "in_proj_weight"
    return Role.LINEAR if is_matrix else None


@pytest.mark.parametrize("architecture", list(CASES))
def test_the_kind_of_a_module_decides_the_role(architecture: str, tmp_path: Path) -> None:
    case = CASES[architecture]
    config, tensors = saved(build(architecture, configuration(case.model_type, **case.values)), tmp_path)
    skeleton, model = read_skeleton(config, shapes(tensors)), build_empty(config)
    for name, parameter in skeleton.parameters.items():
        memory = tied_source(model, skeleton.memory_names[name])
        _, attribute, module = owner_of(model, memory)
        if memory not in dict(model.named_parameters()):
            assert parameter.role is Role.OTHER
            continue
        wanted = expected_role(module, attribute, tensors[name].dim())
        assert wanted in (parameter.role, None), (name, type(module).__name__)


def test_every_role_occurs_in_some_architecture(tmp_path: Path) -> None:
    found: set[Role] = set()
    for architecture in (
        "ConvNextForImageClassification",
        "GptOssForCausalLM",
        "CLIPModel",
        "ViTForImageClassification",
    ):
        case = CASES[architecture]
        folder = tmp_path / architecture
        config, tensors = saved(build(architecture, configuration(case.model_type, **case.values)), folder)
        found |= {parameter.role for parameter in read_skeleton(config, shapes(tensors)).parameters.values()}
    assert found == set(Role)


def readme_rows() -> list[list[str]]:
    """The cells of the table under "What each parameter gets", without its head."""
    text = README.read_text().partition("## What each parameter gets")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_readme_says_what_the_method_does() -> None:
    method, rows = Cat(), readme_rows()
    named: dict[Any, str] = {}
    for _, role, treatment, _ in rows:
        for one in filter(None, re.split(r", *", role)):
            named[Role(one.replace(" ", "_"))] = treatment
    assert named
    for role, treatment in named.items():
        words = {"keep": "kept"}.get(method.treatment(role).name, method.treatment(role).name.replace("_", " "))
        assert treatment.startswith(words), (role, treatment)
