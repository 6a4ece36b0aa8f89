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
from workers.skeleton import CHANNELS_SECOND, CONVOLUTIONS, is_experts, is_scaling_module
from workers.statistics import Statistic, observe_indices, observe_rows, observe_squares


@dataclass(frozen=True)
class Batch:
    """What is in flight: how many samples, and the mask ``[B, L]`` over positions along ``axis``, if there is any."""

    samples: int
    mask: Tensor | None
    axis: int = 1

    @property
    def attended(self) -> Tensor | None:
        """The mask as booleans, or None where it is no mask over positions."""
        return self.mask.bool() if self.mask is not None and self.mask.dim() == 2 else None


@dataclass(frozen=True)
class Call:
    """One call of a module, as its pre-hook sees it; ``expert`` is whose part of stacked experts is looked at."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    expert: int | None = None

    @property
    def input(self) -> Tensor | None:
        """The first tensor among the arguments, batch first (torch's attention may be called with ``[L, B, d]``)."""
        x = next((value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)), None)
        return _batch_first(self.module, x) if isinstance(self.module, nn.MultiheadAttention) else x

    def argument(self, position: int, name: str) -> Any:
        """An argument of the module's forward."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name)

    def tells(self, attribute: str, role: Role) -> bool:
        """Whether modules of this kind tell the inputs of such a parameter by their own."""
        if role in (Role.CONVOLUTION, Role.GROUPED_CONVOLUTION):
            return isinstance(self.module, CONVOLUTIONS)
        if role is Role.EXPERTS:
            return is_experts(self.module)
        if role is Role.SCALE:
            return is_scaling_module(self.module)
        if role is Role.EMBEDDING:
            return not isinstance(self.module, nn.Embedding) or _looks_up_its_input(self.module)
        if isinstance(self.module, nn.MultiheadAttention):
            return attribute in ("in_proj_weight", "out_proj.weight")
        return isinstance(self.module, nn.Linear | Conv1D) or (is_experts(self.module) and self.expert is not None)


def observe(call: Call, attribute: str, role: Role, batch: Batch, so_far: Statistic | None) -> Statistic | None:
    """The statistic of the module's parameter ``attribute`` with this call's inputs added; None: nothing is known.

    Rows are positions, one per token or patch; padding is none. The forms are those of ``workers.statistics``:
    a factor for linear and convolution weights, a diagonal for embeddings (counts) and scales (squares).
    """
    if role is Role.EMBEDDING:
        return _observe_table(call, attribute, batch, so_far)
    rows = input_rows(call, attribute, role, batch)
    return so_far if rows is None else add_rows(rows, role, so_far)


def add_rows(rows: Tensor, role: Role, so_far: Statistic | None) -> Statistic | None:
    """The statistic with the inputs ``rows [n, in]`` of a matrix, or ``[n, d]`` of a scale, added."""
    if not len(rows):
        return so_far
    return observe_squares(rows, so_far) if role is Role.SCALE else observe_rows(rows, so_far)


def add_indices(indices: Tensor, size: int, batch: Batch, so_far: Statistic | None) -> Statistic:
    """The statistic of a table of ``size`` rows with a look-up of ``indices`` added."""
    attended = _attended_indices(indices, batch)
    return observe_indices(torch.bincount(attended, minlength=size), attended.numel(), so_far)


def input_rows(call: Call, attribute: str, role: Role, batch: Batch) -> Tensor | None:
    """The rows that this call sends into a matrix ``[n, in]`` or a scale ``[n, d]``; None: they can't be told.

    A convolution of several groups gets ``[groups, n, in]``.
    """
    x = call.input
    if x is None or not x.is_floating_point():
        return None
    if role in (Role.CONVOLUTION, Role.GROUPED_CONVOLUTION) and isinstance(call.module, CONVOLUTIONS):
        return unfolded(call.module, x)
    if role is Role.SCALE:
        return positions(before_scale(call, attribute), batch)
    if role is not Role.LINEAR:
        return None
    if isinstance(call.module, nn.MultiheadAttention):
        return _attention_rows(call, attribute, x, batch)
    if call.expert is not None:
        return expert_rows(call, attribute, call.expert, batch)
    return positions(x, batch) if isinstance(call.module, nn.Linear | Conv1D) else None


def _attention_rows(call: Call, attribute: str, query: Tensor, batch: Batch) -> Tensor | None:
    """The inputs of torch's own attention, which uses its matrices without calling a module for them.

    With the identity as its output layer, the attention's output is what the output layer's input is. Query, key and
    value in one matrix have one second moment only where they have one input.
    """
    if attribute == "out_proj.weight":
        weight = call.module.get_parameter(attribute)
        plain = {attribute: torch.eye(len(weight), dtype=weight.dtype, device=weight.device)}
        plain |= {
            name: torch.zeros_like(bias) for name, bias in call.module.named_parameters() if name == "out_proj.bias"
        }
        mixed = functional_call(call.module, plain, call.args, dict(call.kwargs))[0]
        return positions(_batch_first(call.module, mixed), batch)
    sources = [call.argument(position, name) for position, name in enumerate(("query", "key", "value"))]
    return positions(query, batch) if all(source is sources[0] for source in sources) else None


def _batch_first(attention: nn.Module, x: Tensor | None) -> Any:
    is_turned = x is not None and x.dim() == 3 and not vars(attention)["batch_first"]
    return x.transpose(0, 1) if is_turned and x is not None else x


def expert_rows(call: Call, attribute: str, expert: int, batch: Batch) -> Tensor | None:
    """The rows ``[n, in]`` of the attended positions that the router sends to one of stacked experts.

    What its last matrix gets never leaves the module: it is computed here once more, as transformers' own experts do.
    """
    module: Any = call.module
    x, routes = call.argument(0, "hidden_states"), call.argument(1, "top_k_index")
    if not isinstance(x, Tensor) or not isinstance(routes, Tensor) or x.dim() != 2 or len(routes) != len(x):
        return None
    chosen = (routes == expert).any(-1)
    if batch.attended is not None and batch.attended.numel() == len(x):
        chosen &= batch.attended.flatten()
    rows = x[chosen]
    if attribute != "down_proj":
        return rows
    name = "gate_up_proj" if module.has_gate else "up_proj"
    weight = getattr(module, name)[expert]
    rows = rows @ weight if module.is_transposed else functional.linear(rows, weight)
    if module.has_bias:
        rows = rows + getattr(module, f"{name}_bias")[expert]
    inner: Tensor = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    return inner


def positions(x: Tensor, batch: Batch) -> Tensor:
    """``x [..., d]`` as rows ``[n, d]``: the attended positions of ``[B, L, ..., d]`` or ``[B * L, d]``, or all."""
    mask = batch.attended
    if 1 < batch.axis < x.dim() - 1:  # [B, heads, L, d]
        x = x.movedim(batch.axis, 1)
    if mask is not None and x.dim() >= 3 and x.shape[:2] == mask.shape:
        x = x[mask]
    elif mask is not None and x.dim() == 2 and len(x) == mask.numel():
        x = x[mask.flatten()]
    return x.reshape(-1, x.shape[-1])


def unfolded(module: nn.Module, x: Tensor) -> Tensor | None:
    """The patches of ``x [B, C, *size]`` that a convolution's kernel meets, ``[n, C * prod(kernel)]``, kernel last.

    With several groups, each has inputs of its own: ``[groups, n, C / groups * prod(kernel)]``.
    """
    if not isinstance(module, CONVOLUTIONS):
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
    patches = x.permute(order).flatten(0, spatial)
    if module.groups == 1:
        return patches.flatten(1)
    return torch.stack([part.flatten(1) for part in patches.chunk(module.groups, dim=1)])


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
    return add_indices(indices, call.module.num_embeddings, batch, so_far)


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
