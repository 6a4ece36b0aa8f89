"""Runs a model that is larger than memory may be: a block's weights are read when it is called, then let go."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from service.contract.errors import BadInput
from workers.loading import quiet, refuse_misloaded
from workers.skeleton import build_empty, building, find_places

COMPUTE_BYTES = 4  # float32

Shapes = Mapping[str, tuple[int, ...]]
Read = Callable[[Collection[str]], Mapping[str, Tensor]]


def bytes_in_memory(shapes: Iterable[tuple[int, ...]]) -> int:
    """What tensors of these shapes take in the type that models compute in."""
    return COMPUTE_BYTES * sum(prod(shape) for shape in shapes)


def load_streamed(
    config: Mapping[str, Any], shapes: Shapes, read: Read, device: torch.device | str, limit_bytes: int
) -> nn.Module:
    """The model of a ``config.json`` in float32, whose blocks have no weights but while they are called.

    Blocks are the members of the model's outermost ``nn.ModuleList``s; everything else is read now and stays. ``read``
    gives tensors by their names in the checkpoint, whose ``shapes`` are known. At no time do weights take more than
    ``limit_bytes``: what stays, one block, and that block once more as it was read. Every forward pass reads all blocks
    once, so large batches pay.

    Raises:
        UnsupportedArchitecture: transformers has no such model, or can't build it.
        BadInput: a tensor is missing, has no place in the model or the wrong shape, or the limit is too low.
    """
    model: Any = build_empty(config)
    absent = _prepare(model, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    stream = _Stream(model, read, device, _names_by_block(model, shapes))
    _refuse_limit(shapes, stream.blocks, limit_bytes)
    _fill(model, read([name for name in shapes if name not in stream.streamed]), device)
    model.tie_weights(missing_keys=absent, recompute_mapping=False)
    for owner in model.modules():
        owner._buffers.update({name: _moved(buffer, device) for name, buffer in owner._buffers.items()})
    stream.attach()
    found: nn.Module = model.requires_grad_(False).eval()
    return found


def _moved(buffer: Tensor | None, device: torch.device | str) -> Tensor | None:
    return buffer if buffer is None or buffer.is_meta else buffer.to(device)


def _prepare(model: Any, empty: Mapping[str, Tensor]) -> set[str]:
    """Make what a model computes itself, and refuse a checkpoint that does not fit it, before any weight is read.

    Returns the names in memory that the checkpoint does not have, which only tied parameters may be.
    """
    try:
        found = _fill(model, empty, "meta")
        absent = set(found.missing_keys)
        with building, torch.random.fork_rng(devices=[]), quiet():
            found = model._finalize_model_loading(model, _plan(model), found)
    except (RuntimeError, ValueError) as error:
        raise BadInput(f"the tensors can't be loaded into {type(model).__name__}: {error}") from error
    loading = {kind: getattr(found, kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    refuse_misloaded(model, empty, loading)
    return absent


def _fill(model: Any, tensors: Mapping[str, Tensor], device: torch.device | str) -> Any:
    """Give a model these tensors by transformers' own rules; returns what it says was wrong."""
    place = replace(_plan(model), device_map={"": torch.device(device)})
    with building, torch.random.fork_rng(devices=[]), quiet():
        found, _ = convert_and_load_state_dict_in_model(model, dict(tensors), place)
    return found


def _plan(model: Any) -> LoadStateDictConfig:
    mapping: Any = get_model_conversion_mapping(model)
    # Sizes that differ are refused afterwards, by name.
    return LoadStateDictConfig(dtype=torch.float32, weight_mapping=mapping, ignore_mismatched_sizes=True)


def _names_by_block(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """The checkpoint's names of each block's tensors, by the block's path."""
    paths = list(_block_paths(model))
    found: dict[str, list[str]] = {path: [] for path in paths}
    for name, place in find_places(model, names).items():
        path = _block_of(place.memory_name, found)
        if path is not None:
            found[path].append(name)
    return {path: members for path, members in found.items() if members}


def _block_of(memory_name: str, paths: Mapping[str, list[str]]) -> str | None:
    parts = memory_name.split(".")
    candidates = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((path for path in candidates if path in paths), None)


def _block_paths(module: nn.Module, path: str = "") -> Iterator[str]:
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            yield below
        else:
            yield from _block_paths(child, below)


def _refuse_limit(shapes: Shapes, blocks: Mapping[str, list[str]], limit_bytes: int) -> None:
    sizes = {path: bytes_in_memory(shapes[name] for name in names) for path, names in blocks.items()}
    resident = bytes_in_memory(shapes.values()) - sum(sizes.values())
    needed = resident + 2 * max(sizes.values(), default=0)
    if needed > limit_bytes:
        raise BadInput(
            f"the model's forward pass takes {needed} bytes of weights at once, block by block, and "
            f"CATMERGE_CALIBRATION_BYTES allows {limit_bytes}; allow more, or bring statistics instead of exemplars"
        )


@dataclass
class _Stream:
    """The blocks of a model, and where their tensors come from."""

    model: nn.Module
    read: Read
    device: torch.device | str
    blocks: dict[str, list[str]]
    streamed: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        self.streamed = frozenset(name for names in self.blocks.values() for name in names)

    def attach(self) -> None:
        for path, names in self.blocks.items():
            block = self.model.get_submodule(path)
            block.register_forward_pre_hook(self._reader_of(names))
            block.register_forward_hook(_let_go, always_call=True)

    def _reader_of(self, names: list[str]) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG001 (torch's signature)
            _fill(self.model, self.read(names), self.device)
            block.requires_grad_(False)

        return hook


def _let_go(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001 (torch's signature)
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
