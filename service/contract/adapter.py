"""LoRA adapters as checkpoints of their base: which tensor each part changes, told from headers and config alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from service.contract.checkpoint import Checkpoint, LowRank, MalformedHeader, TensorInfo

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_PART = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_WRAPPERS = re.compile(r"(modules_to_save|base_layer)\.(default\.)?")
# What makes of an adapter something else than a sum of scale * B A and replaced tensors.
_UNLIKE_LORA = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
)


def on_base(base: Checkpoint, checkpoint: Checkpoint) -> Checkpoint:
    """A whole checkpoint as it is; an adapter as what it makes of the base. Raises MalformedHeader."""
    return checkpoint if checkpoint.adapter is None else apply_adapter(base, checkpoint)


def apply_adapter(base: Checkpoint, adapter: Checkpoint) -> Checkpoint:
    """The fine-tuned checkpoint that an adapter makes of its base, without a tensor being read.

    Its tensors are the base's, by the base's names. Where a pair A ``[r, in]``, B ``[out, r]`` changes one,
    ``Checkpoint.changes`` says by what: W0 + scale * B A with scale = alpha / r, or alpha / sqrt(r) for rsLoRA
    (arXiv:2312.03732). Tensors that the adapter keeps whole (``modules_to_save``, biases) stand in for the base's.

    Raises:
        MalformedHeader: it is no LoRA adapter, or has a part that changes nothing in the base or does not fit it.
    """
    config = adapter.adapter or {}
    _refuse_unlike_lora(adapter.address + ADAPTER_CONFIG, config)
    pairs: dict[str, dict[str, TensorInfo]] = {}
    tensors = dict(base.tensors)
    changes: dict[str, LowRank | TensorInfo] = {}
    for name, info in adapter.tensors.items():
        plain = name.removeprefix("base_model.model.")
        part = _PART.fullmatch(plain)
        if part:
            pairs.setdefault(part["module"], {})[part["side"]] = info
        elif "lora_" in plain:
            raise MalformedHeader(info.file, "this part of an adapter can't be merged: only linear ones", tensor=name)
        else:
            target = _find(base, _WRAPPERS.sub("", plain)) or _WRAPPERS.sub("", plain)
            whole = replace(info, name=target)
            same = base.tensors.get(target)
            tensors[target] = same if same is not None and same.shape == info.shape else whole
            changes[target] = whole
    for module, pair in pairs.items():
        target, change = _change(base, module, pair, config)
        changes[target] = change
    return replace(
        base,
        address=adapter.address,
        files=adapter.files,
        beside=base.files,
        tensors=tensors,
        side_files=(),
        metadata=adapter.metadata,
        adapter=adapter.adapter,
        changes=changes,
    )


def _refuse_unlike_lora(file: str, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise MalformedHeader(file, f"peft_type is {kind!r}; only LORA adapters are merged")
    unlike = [key for key in _UNLIKE_LORA if config.get(key)]
    if unlike:
        raise MalformedHeader(
            file, f"{unlike[0]} makes it another kind of adapter; add it to its base first (peft: merge_and_unload())"
        )


def _change(
    base: Checkpoint, module: str, pair: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> tuple[str, LowRank]:
    some = next(iter(pair.values()))
    if len(pair) < 2:
        raise MalformedHeader(some.file, "the other half of this pair is missing", tensor=some.name)
    target = _find(base, f"{module}.weight")
    if target is None:
        raise MalformedHeader(
            some.file, f"the base {base.address} has no tensor {module}.weight for it", tensor=some.name
        )
    down, up, shape = pair["A"], pair["B"], base.tensors[target].shape
    rank = down.shape[0]
    transposed = bool(config.get("fan_in_fan_out"))
    made = (*up.shape[:1], *down.shape[1:]) if len(shape) > 2 else (*up.shape[:1], *down.shape[1:2])
    if up.shape[1:2] != (rank,) or (made[::-1] if transposed else made) != shape:
        problem = f"A {list(down.shape)} and B {list(up.shape)} make no {list(shape)} of {target}"
        raise MalformedHeader(some.file, problem, tensor=some.name)
    return target, LowRank(down, up, _scale(module, rank, config), transposed)


def _scale(module: str, rank: int, config: Mapping[str, Any]) -> float:
    """peft's scaling; patterns name modules by the end of their path, or by a regular expression for it."""
    patterns = config.get("alpha_pattern") or {}
    named = (float(value) for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module))
    alpha = next(named, float(config.get("lora_alpha", 8)))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _find(base: Checkpoint, name: str) -> str | None:
    """The base's tensor of this name; a model with a head has one more word before it, or one less."""
    if name in base.tensors:
        return name
    shorter = name.partition(".")[2]
    if shorter in base.tensors:
        return shorter
    longer = sorted({f"{other.partition('.')[0]}.{name}" for other in base.tensors} & base.tensors.keys())
    return longer[0] if len(longer) == 1 else None
