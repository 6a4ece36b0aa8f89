"""What one call of a module tells about the inputs of one of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from service.contract.treatments import Role
from workers.skeleton import CHANNELS_SECOND, CONVOLUTIONS
from workers.statistics import Statistic, observe_indices, observe_rows, observe_squares


@dataclass(frozen=True)
class Batch:
    """What is in flight: how many samples, and the attention mask ``[B, L]`` over their positions, if any."""

    samples: int
    mask: Tensor | None

    @property
    def attended(self) -> Tensor | None:
        """The mask as booleans, or None where it is no mask over positions."""
        return self.mask.bool() if self.mask is not None and self.mask.dim() == 2 else None


@dataclass(frozen=True)
class Call:
    """One call of a module, as its pre-hook sees it."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def input(self) -> Tensor | None:
        """The first tensor among the arguments."""
        return next((value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)), None)


def observe(call: Call, attribute: str, role: Role, batch: Batch, so_far: Statistic | None) -> Statistic | None:
    """The statistic of the module's parameter ``attribute`` with this call's inputs added; None: nothing is known.

    Rows are positions, one per token or patch; padding is none. The forms are those of ``workers.statistics``:
    a factor for linear and convolution weights, a diagonal for embeddings (counts) and scales (squares).
    """
    if role is Role.EMBEDDING:
        return _observe_table(call, attribute, batch, so_far)
    rows = _rows(call, attribute, role, batch)
    if rows is None or not len(rows):
        return so_far
    return observe_squares(rows, so_far) if role is Role.SCALE else observe_rows(rows, so_far)


def _rows(call: Call, attribute: str, role: Role, batch: Batch) -> Tensor | None:
    x = call.input
    if x is None or not x.is_floating_point():
        return None
    if role is Role.LINEAR and isinstance(call.module, nn.Linear | Conv1D):
        return positions(x, batch)
    if role is Role.CONVOLUTION and isinstance(call.module, CONVOLUTIONS):
        return unfolded(call.module, x)
    if role is Role.SCALE:
        return positions(before_scale(call, attribute), batch)
    return None


def positions(x: Tensor, batch: Batch) -> Tensor:
    """``x [..., d]`` as rows ``[n, d]``: the attended positions of ``[B, L, ..., d]`` or ``[B * L, d]``, or all."""
    mask = batch.attended
    if mask is not None and x.dim() >= 3 and x.shape[:2] == mask.shape:
        x = x[mask]
    elif mask is not None and x.dim() == 2 and len(x) == mask.numel():
        x = x[mask.flatten()]
    return x.reshape(-1, x.shape[-1])


def unfolded(module: nn.Module, x: Tensor) -> Tensor | None:
    """The patches of ``x [B, C, *size]`` that a convolution's kernel meets, ``[n, C * prod(kernel)]``, kernel last.

    None for grouped convolutions: each group has inputs of its own, and one second moment can't stand for all of them.
    """
    if not isinstance(module, CONVOLUTIONS) or module.groups != 1:
        return None
    spatial = len(module.kernel_size)
    if x.dim() == spatial + 1:  # a single unbatched sample
        x = x[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for axis in range(spatial):
        stride, dilation = module.stride[axis], module.dilation[axis]
        reach = dilation * (module.kernel_size[axis] - 1) + 1
        x = x.unfold(2 + axis, reach, stride)[..., ::dilation]
    order = (0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial))
    return x.permute(order).flatten(0, spatial).flatten(1)


def before_scale(call: Call, attribute: str) -> Tensor:
    """What the scale of a normalization (or a layer scale) multiplies, channels last.

    The module's output is affine in its scale, y = x * (w + c) + b, so x is y at w = 1 minus y at w = 0, whatever the
    module calls its epsilon, wherever its channels are, and whether or not it adds one to w.
    """
    own = dict(call.module.named_parameters(recurse=False))
    zeros = {name: torch.zeros_like(value) for name, value in own.items()}
    low = functional_call(call.module, zeros, call.args, dict(call.kwargs))
    ones = zeros | {attribute: torch.ones_like(own[attribute])}
    x: Tensor = functional_call(call.module, ones, call.args, dict(call.kwargs)) - low
    return x.movedim(1, -1) if _has_channels_second(call.module) else x


def _has_channels_second(module: nn.Module) -> bool:
    return isinstance(module, CHANNELS_SECOND) or getattr(module, "data_format", "") == "channels_first"


def _observe_table(call: Call, attribute: str, batch: Batch, so_far: Statistic | None) -> Statistic | None:
    if not isinstance(call.module, nn.Embedding):  # a bare table of positions: every one is met once by every sample
        length = getattr(call.module, attribute).shape[-2]
        counts = torch.full((length,), batch.samples)
        return observe_indices(counts, length * batch.samples, so_far)
    indices = call.input
    if indices is None or indices.is_floating_point() or not _looks_up_its_input(call.module):
        return so_far
    attended = _attended_indices(indices, batch)
    counts = torch.bincount(attended, minlength=call.module.num_embeddings)
    return observe_indices(counts, attended.numel(), so_far)


def _looks_up_its_input(module: nn.Embedding) -> bool:
    """Whether the module's input is the indices it looks up: some tables of positions take a mask and count for it."""
    kind = type(module)
    return kind.forward is nn.Embedding.forward or kind.__name__.endswith("ScaledWordEmbedding")


def _attended_indices(indices: Tensor, batch: Batch) -> Tensor:
    """Indices ``[B, L]`` without padding; positions ``[1, L]`` or ``[L]`` are looked up once for all samples."""
    mask = batch.attended
    if indices.dim() == 1 and (mask is None or len(indices) == mask.shape[1]):
        indices = indices[None]
    if indices.dim() == 2 and len(indices) == 1:
        indices = indices.expand(batch.samples, -1)
    if mask is not None and indices.shape == mask.shape:
        return indices[mask]
    return indices.reshape(-1)
