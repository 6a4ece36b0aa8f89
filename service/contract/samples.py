"""Do these files of samples, labels, statistics and heads fit the model? Told from their headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from service.contract.checkpoint import TensorInfo

INTEGERS = frozenset({"I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64"})
LABELS = "labels"
# What models call the inputs that a file may hold; workers ask the model itself, this is what can be said at once.
KNOWN_INPUTS = {
    "text": ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"),
    "vision": ("pixel_values", "bool_masked_pos", "pixel_mask"),
    "audio": ("input_features", "input_values"),
    "decoder": ("decoder_input_ids", "decoder_attention_mask"),
}
ALL_INPUTS = tuple(name for names in KNOWN_INPUTS.values() for name in names)
FACTOR, DIAGONAL, ROWS = ".factor", ".diagonal", ".rows"


def input_faults(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None) -> list[str]:
    """What is wrong with a file of model inputs ``[samples, ...]``; one sentence each, empty where nothing is."""
    faults = [sentence for name, info in tensors.items() if (sentence := _input_fault(name, info, config or {}))]
    counts = {info.shape[0] for info in tensors.values() if info.shape}
    if len(counts) > 1:
        listed = ", ".join(f"{name}: {info.shape[0]}" for name, info in tensors.items() if info.shape)
        faults.append(f"the first dimension must be the number of samples in every tensor, but they differ ({listed})")
    if not tensors:
        faults.append("it holds no model inputs")
    return faults


def statistics_faults(tensors: Mapping[str, TensorInfo], parameters: Mapping[str, TensorInfo]) -> list[str]:
    """What is wrong with a statistics file for a checkpoint with these ``parameters``."""
    faults = []
    for name, info in tensors.items():
        parameter, _, kind = name.rpartition(".")
        if f".{kind}" not in (FACTOR, DIAGONAL, ROWS) or parameter not in parameters:
            faults.append(f"tensor {name!r} is no <parameter>.factor, .diagonal or .rows of this checkpoint")
        elif f".{kind}" == ROWS:
            blocks = _blocks(tensors.get(parameter + FACTOR))
            if prod(info.shape) != blocks or info.dtype not in INTEGERS:
                wanted = "one whole number" if blocks == 1 else f"{blocks} whole numbers, one per factor"
                faults.append(f"tensor {name!r} is {info.dtype} {list(info.shape)}; it must be {wanted}")
        else:
            faults += _statistic_faults(name, parameter + ROWS, info, parameters[parameter], tensors)
    return faults or ([] if tensors else ["it holds no statistics"])


def head_faults(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """What is wrong with a file of a head matrix."""
    weight = tensors.get("weight")
    if weight is None or len(weight.shape) != 2 or 0 in weight.shape:
        return ["tensor 'weight' [classes, features] is missing or has another shape"]
    return []


def _blocks(factor: TensorInfo | None) -> int:
    """How many matrices a factor [blocks, r, in] is about; a factor [r, in] is about one."""
    return factor.shape[0] if factor is not None and len(factor.shape) == 3 else 1


def _statistic_faults(
    name: str, rows: str, info: TensorInfo, parameter: TensorInfo, tensors: Mapping[str, TensorInfo]
) -> list[str]:
    faults = [] if rows in tensors else [f"tensor {rows!r} is missing: over how many rows {name!r} was summed"]
    if not info.dtype.startswith(("F", "BF")):
        faults.append(f"tensor {name!r} is {info.dtype}; it must be of a floating-point type")
    if len(info.shape) not in ((2, 3) if name.endswith(FACTOR) else (1,)):
        return [*faults, f"tensor {name!r} has shape {list(info.shape)}; a factor is [r, in], a diagonal [d]"]
    width = info.shape[-1]
    # [in, out] layouts and convolutions are only told apart where the model's modules are known.
    possible = {*parameter.shape, prod(parameter.shape[1:]), prod(parameter.shape[:-1])}
    possible |= set(parameter.shape[1:])  # stacked experts
    if width not in possible:
        faults.append(f"tensor {name!r} is {width} wide, but {parameter.name!r} is {list(parameter.shape)}")
    return faults


def _input_fault(name: str, info: TensorInfo, config: Mapping[str, Any]) -> str | None:
    if name not in ALL_INPUTS:
        return f"tensor {name!r} is no model input; known ones are {', '.join(ALL_INPUTS)}"
    if len(info.shape) < 2 or prod(info.shape) == 0:
        return f"tensor {name!r} has shape {list(info.shape)}: it is empty or has no dimension of samples"
    if name == "pixel_values":
        return _pixel_fault(info, config)
    if name in KNOWN_INPUTS["text"] and name != "inputs_embeds":
        return _token_fault(name, info, config)
    return None


def _pixel_fault(info: TensorInfo, config: Mapping[str, Any]) -> str | None:
    if config.get("vocab_size") and not config.get("num_channels") and "vision_config" not in config:
        return f"tensor 'pixel_values' does not fit a text model ({config.get('model_type')})"
    side, channels = config.get("image_size"), config.get("num_channels")
    if not isinstance(side, int) or not isinstance(channels, int):
        return None
    if len(info.shape) != 4 or info.shape[1:] != (channels, side, side):
        expected = f"[samples, {channels}, {side}, {side}]"
        return f"tensor 'pixel_values' has shape {list(info.shape)}, but the model takes {expected}"
    return None


def _token_fault(name: str, info: TensorInfo, config: Mapping[str, Any]) -> str | None:
    if config.get("image_size") and not config.get("vocab_size") and "text_config" not in config:
        return f"tensor {name!r} does not fit a vision model ({config.get('model_type')})"
    if len(info.shape) != 2:
        return f"tensor {name!r} has shape {list(info.shape)}, but the model takes [samples, length]"
    if name == "input_ids" and info.dtype not in INTEGERS:
        return f"tensor 'input_ids' is {info.dtype}; tokens are whole numbers"
    longest = config.get("max_position_embeddings")
    if isinstance(longest, int) and info.shape[1] > longest:
        return f"tensor {name!r} is {info.shape[1]} long, but the model takes at most {longest} positions"
    return None
