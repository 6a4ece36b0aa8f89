"""What each tensor of a checkpoint is, read off the modules of the model it belongs to, without loading a weight."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Split,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from service.contract.errors import UnsupportedArchitecture
from service.contract.notices import Notice
from service.contract.roles import Parameter, guess_parameter, guess_role, is_table
from service.contract.treatments import Role

CHANNELS_SECOND = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What a residual branch is multiplied with, where no module of its own does it.
LAYER_SCALE = re.compile(r"^(layer_scale(_parameter)?|lambda_?\d*|gamma_?\d*)$")

# While it builds a model, transformers patches functions of torch for the whole process: one build at a time.
building = threading.Lock()

# A config.json is input from outside: none of these may choose code, kernels or another repository's weights.
_NEVER_READ = frozenset(
    {
        "auto_map",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "_attn_implementation_autoset",
        "experts_implementation",
        "_experts_implementation",
        "fusion_config",
        "kernel_config",
        "name_or_path",
        "_name_or_path",
        "transformers_weights",
        "use_pretrained_backbone",
        "distributed_config",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
    }
)

# What transformers' configurations and constructors raise on values that make no model.
_UNBUILDABLE = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Skeleton:
    """What each tensor of one checkpoint is, by its name in the checkpoint.

    ``memory_names`` gives the name of the model's own parameter for every tensor that the model could place; names in
    memory differ from names in the file where transformers renames on loading. ``experts`` gives the number of the
    expert for tensors that loading stacks into one ``[experts, ...]``. ``warnings`` are sentences for people.
    """

    parameters: Mapping[str, Parameter]
    memory_names: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    experts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where a checkpoint's tensor goes in memory, and as which expert's part where loading stacks experts."""

    memory_name: str
    expert: int | None = None


def read_skeleton(config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> Skeleton:
    """What the ``tensors`` (checkpoint name -> shape) of a model with this ``config.json`` are.

    A tensor that the model can't place gets its role guessed from name and shape; without a known architecture that is
    every tensor, and a warning says so.
    """
    try:
        model = build_empty(config)
    except UnsupportedArchitecture as failure:
        guessed = {name: guess_parameter(name, shape) for name, shape in tensors.items()}
        return Skeleton(guessed, {}, (Notice("roles_guessed", reason=failure.detail),))
    return describe(model, tensors)


def describe(model: nn.Module, tensors: Mapping[str, tuple[int, ...]]) -> Skeleton:
    """As ``read_skeleton``, for a model that is already built (weights do not matter)."""
    places = find_places(model, tensors)
    memory_names = {name: place.memory_name for name, place in places.items()}
    tied = _tied_names(model, memory_names)
    parameters: dict[str, Parameter] = {}
    for name, shape in tensors.items():
        described = _describe_one(model, name, places.get(name), shape)
        parameters[name] = replace(described, tied_to=tied.get(name))
    unplaced = [name for name in tensors if name not in memory_names]
    experts = {name: place.expert for name, place in places.items() if place.expert is not None}
    return Skeleton(parameters, memory_names, _warn_of(type(model).__name__, unplaced), experts)


def build_empty(config: Mapping[str, Any]) -> nn.Module:
    """The model that a ``config.json`` describes, on the meta device: shapes and modules, no weights, no foreign code.

    Raises:
        UnsupportedArchitecture: transformers has no such model, or can't build it from this configuration.
    """
    model_class, model_config = read_config(config)
    try:
        with building, torch.random.fork_rng(devices=[]), torch.device("meta"):
            model: nn.Module = model_class(model_config).eval()
    except _UNBUILDABLE as error:
        raise UnsupportedArchitecture(f"{model_class.__name__} can't be built from config.json: {error}") from error
    return model


def read_config(config: Mapping[str, Any]) -> tuple[type[Any], Any]:
    """transformers' model class and configuration for a ``config.json``.

    Raises:
        UnsupportedArchitecture: no ``architectures`` or ``model_type``, unknown ones, ones that don't belong together,
            values that make no configuration, or quantized weights.
    """
    if not config:
        raise UnsupportedArchitecture("there is no config.json")
    if config.get("quantization_config"):
        raise UnsupportedArchitecture("config.json says that the weights are quantized")
    model_class = _model_class(config.get("architectures"))
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise UnsupportedArchitecture(f"transformers knows no model_type {model_type!r}")
    try:
        model_config = transformers.CONFIG_MAPPING[model_type].from_dict(_tamed(config))
    except _UNBUILDABLE as error:
        raise UnsupportedArchitecture(f"config.json makes no {model_type} configuration: {error}") from error
    wanted = model_class.config_class
    if wanted is not None and not isinstance(model_config, wanted):
        raise UnsupportedArchitecture(f"config.json names {model_class.__name__} and model_type {model_type!r}")
    return model_class, model_config


def _model_class(architectures: object) -> type[Any]:
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(name, str):
        raise UnsupportedArchitecture("config.json names no architecture")
    found = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise UnsupportedArchitecture(f"transformers has no architecture {name!r}")
    return found


def _tamed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tamed(inner) for key, inner in value.items() if key not in _NEVER_READ}
    return value


def find_places(model: nn.Module, names: Iterable[str]) -> dict[str, Place]:
    """Where each tensor of a checkpoint goes in memory, by transformers' own rules for loading.

    A packed tensor that is cut into several on loading goes by the first of them, whose inputs are its inputs. Experts
    that are stacked on loading keep their number. Other tensors that are put together from several have no place.
    """
    conversions = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [step for step in conversions if isinstance(step, WeightRenaming)]
    converters = [step for step in conversions if isinstance(step, WeightConverter)]
    packed = {pattern for step in converters if _cuts_rows(step) for pattern in step.source_patterns}
    stacked = {pattern for step in converters if _stacks_experts(step) for pattern in step.source_patterns}
    prefix: Any = model.base_model_prefix
    known = model.state_dict()
    placed: dict[str, Place] = {}
    for name in names:
        found, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if found not in known and name in known:  # as transformers does: a name that is already right stays
            found, pattern = rename_source_key(name, [], [], prefix, known)
        if found not in known:
            continue
        if pattern is None or pattern in packed:
            placed[name] = Place(found)
        elif pattern in stacked:
            placed[name] = Place(found, _expert_of(apply_renamings(name, renamings), pattern))
    return placed


def _cuts_rows(step: WeightConverter) -> bool:
    return all(isinstance(operation, Chunk | Split) and operation.dim == 0 for operation in step.operations)


def _stacks_experts(step: WeightConverter) -> bool:
    """Whether loading only stacks the experts' matrices, and puts gate and up one above the other."""
    first, *rest = step.operations
    is_stack = isinstance(first, MergeModulelist) and first.dim == 0
    return is_stack and all(isinstance(operation, Concatenate) and operation.dim == 1 for operation in rest)


def _expert_of(name: str, pattern: str) -> int | None:
    """The number that stands where a pattern like ``.experts.*.w1.weight`` has its star."""
    before, _, after = pattern.partition("*")
    found = re.search(f"{re.escape(before)}([0-9]+){re.escape(after)}", name)
    return int(found[1]) if found else None


def _tied_names(model: Any, memory_names: Mapping[str, str]) -> dict[str, str]:
    """Checkpoint name -> checkpoint name of the tensor it shares its values with, where the file has both."""
    in_file = {memory: name for name, memory in memory_names.items()}
    sources: Mapping[str, str] = model.all_tied_weights_keys
    return {
        in_file[target]: in_file[source]
        for target, source in sources.items()
        if target in in_file and source in in_file and in_file[target] != in_file[source]
    }


def _describe_one(model: Any, name: str, place: Place | None, shape: tuple[int, ...]) -> Parameter:
    if place is None:
        return guess_parameter(name, shape)
    owner, attribute, module = owner_of(model, tied_source(model, place.memory_name))
    if place.expert is not None:
        return Parameter(Role.LINEAR, transposed=stores_experts_transposed(module))
    own_shape = tuple(getattr(module, attribute).shape)
    if len(own_shape) != len(shape):
        return guess_parameter(name, shape)
    if attribute in dict(module.named_buffers(recurse=False)):
        return Parameter(Role.OTHER)
    return _from_module(module, attribute, shape) or _bare(f"{owner}.{attribute}", shape)


def tied_source(model: Any, memory_name: str) -> str:
    """The parameter that a tied one takes its values from; any other is its own source."""
    sources: Mapping[str, str] = model.all_tied_weights_keys
    return sources.get(memory_name, memory_name)


def owner_of(model: nn.Module, memory_name: str) -> tuple[str, str, nn.Module]:
    """The path of the module that owns a parameter, the parameter's name there, and the module."""
    path, _, attribute = memory_name.rpartition(".")
    return path, attribute, model.get_submodule(path)


def _from_module(module: nn.Module, attribute: str, shape: tuple[int, ...]) -> Parameter | None:
    """What a parameter is to a module of a kind we know; None says that we don't."""
    if attribute == "bias" and shape and prod(shape) == shape[-1]:
        return Parameter(Role.SHIFT)
    if is_scale(module, attribute, shape):
        return Parameter(Role.SCALE)
    if is_experts(module):
        return _from_experts(module, attribute, shape)
    if isinstance(module, nn.MultiheadAttention):
        return _from_attention(attribute)
    if attribute != "weight":
        return None
    if isinstance(module, nn.Linear) or (is_router(module) and len(shape) == 2):
        return Parameter(Role.LINEAR)
    if isinstance(module, Conv1D):
        return Parameter(Role.LINEAR, transposed=True)
    if isinstance(module, CONVOLUTIONS):
        return _from_convolution(module.groups)
    if isinstance(module, nn.Embedding):
        return Parameter(Role.EMBEDDING, transposed=True)
    return None


def _from_convolution(groups: int) -> Parameter:
    return Parameter(Role.CONVOLUTION) if groups == 1 else Parameter(Role.GROUPED_CONVOLUTION, blocks=groups)


def _from_experts(module: nn.Module, attribute: str, shape: tuple[int, ...]) -> Parameter | None:
    if attribute.endswith("_bias"):
        return Parameter(Role.SHIFT)
    if attribute not in ("gate_up_proj", "up_proj", "down_proj") or len(shape) != 3:
        return None
    return Parameter(Role.EXPERTS, transposed=stores_experts_transposed(module), blocks=shape[0])


def _from_attention(attribute: str) -> Parameter | None:
    """torch's own attention: query, key and value in one matrix, or, where their widths differ, in one each."""
    if attribute in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        return Parameter(Role.LINEAR)
    return Parameter(Role.SHIFT) if attribute in ("in_proj_bias", "bias_k", "bias_v") else None


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds stacked experts in the way that transformers' ``use_experts_implementation`` marks."""
    return "is_transposed" in vars(module) and "has_gate" in vars(module) and "down_proj" in module._parameters


def stores_experts_transposed(module: nn.Module) -> bool:
    """Whether experts are stacked as ``[experts, in, out]``."""
    return bool(vars(module).get("is_transposed", False))


def is_router(module: nn.Module) -> bool:
    """Whether a module scores experts with a matrix of its own."""
    return type(module).__name__.endswith(("Router", "Gate")) and "weight" in module._parameters


def is_scale(module: nn.Module, attribute: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter multiplies its module's input, normalized or not, one factor per channel."""
    if not shape or prod(shape) != shape[-1] or attribute == "bias":
        return False
    if type(module).__name__.endswith("LayerScale") or LAYER_SCALE.search(attribute):
        return True
    return is_scaling_module(module) and attribute == "weight"


def is_scaling_module(module: nn.Module) -> bool:
    """Whether all that a module's own parameters do is to scale and shift what it computes from its input."""
    kind = type(module).__name__
    is_norm = isinstance(module, (nn.LayerNorm, *CHANNELS_SECOND))
    return is_norm or kind.endswith(("RMSNorm", "LayerNorm", "GRN", "LayerScale"))


def _bare(memory_name: str, shape: tuple[int, ...]) -> Parameter:
    """A parameter that a module holds itself: tokens and tables of positions are known by their names."""
    if memory_name.endswith("relative_position_bias_table"):  # by this name buffers are skipped, but this is none
        return Parameter(Role.EMBEDDING, transposed=True)
    role = guess_role(memory_name, shape)
    if role is Role.EMBEDDING and is_table(shape):
        return Parameter(role, transposed=True)
    return Parameter(role, guessed=role not in (Role.SHIFT, Role.OTHER))


def _warn_of(model_name: str, unplaced: list[str]) -> tuple[str, ...]:
    if not unplaced:
        return ()
    shown = ", ".join(unplaced[:3]) + (", ..." if len(unplaced) > 3 else "")
    return (Notice("tensors_without_place", model=model_name, count=len(unplaced), tensors=shown),)
