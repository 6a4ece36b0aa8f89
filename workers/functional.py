"""Sees parameters that are used by torch's functions directly, without their module being called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_PRODUCTS = frozenset({torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__})
_SCALINGS = frozenset({torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__})


@dataclass(frozen=True, eq=False)
class Multiplied:
    """``inputs [..., in]`` met a matrix along its axis ``axis``."""

    inputs: Tensor
    axis: int


@dataclass(frozen=True, eq=False)
class LookedUp:
    """Rows ``indices`` of a table were taken."""

    indices: Tensor


@dataclass(frozen=True, eq=False)
class Scaled:
    """``inputs [..., d]`` were multiplied by a vector, entry by entry."""

    inputs: Tensor


Use = Multiplied | LookedUp | Scaled
OnUse = Callable[[str, Use], None]


class FunctionalUses(TorchFunctionMode):
    """While entered, tells of every use of the given parameters by a function of torch.

    Parameters are known by their memory: a view of all their entries (a transpose) counts, a view of a part does not.
    """

    def __init__(self, parameters: Mapping[str, tuple[nn.Module, str]], on_use: OnUse) -> None:
        super().__init__()
        self._parameters = parameters
        self._by_memory: dict[int, list[str]] = {}
        self._sizes = {getattr(module, attribute).numel() for module, attribute in parameters.values()}
        self._on_use = on_use
        self.learn(parameters)

    def learn(self, names: Iterable[str]) -> None:
        """Look where these parameters lie now: they may come and go."""
        for name in names:
            parameter = self._now(name)
            known = self._by_memory.setdefault(parameter.data_ptr(), [])
            if not parameter.is_meta and name not in known:
                known.append(name)

    def _now(self, name: str) -> Tensor:
        module, attribute = self._parameters[name]
        parameter: Tensor = getattr(module, attribute)
        return parameter

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _READERS:
            for tensor, use_of in _READERS[func](args, kwargs or {}):
                self._tell(tensor, use_of)
        return func(*args, **(kwargs or {}))

    def _tell(self, tensor: Any, use_of: Callable[[Tensor], Use | None]) -> None:
        if not isinstance(tensor, Tensor) or tensor.numel() not in self._sizes or not _has_memory(tensor):
            return
        for name in self._by_memory.get(tensor.data_ptr(), ()):
            parameter = self._now(name)
            is_it = parameter.numel() == tensor.numel() and parameter.data_ptr() == tensor.data_ptr()
            use = use_of(parameter) if is_it else None
            if use is not None:
                self._on_use(name, use)


def _has_memory(tensor: Tensor) -> bool:
    return not tensor.is_meta and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


Reading = list[tuple[Any, Callable[[Tensor], Use | None]]]


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(name)


def _linear(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Reading:
    weight = _argument(args, kwargs, 1, "weight")
    return [(weight, _multiplied(_argument(args, kwargs, 0, "input"), weight, -1))]


def _product(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Reading:
    weight = _argument(args, kwargs, 1, "other") if len(args) > 1 or "other" in kwargs else kwargs.get("mat2")
    return [(weight, _multiplied(_argument(args, kwargs, 0, "input"), weight, -2))]


def _added_product(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Reading:
    weight = _argument(args, kwargs, 2, "mat2")
    return [(weight, _multiplied(_argument(args, kwargs, 1, "mat1"), weight, -2))]


def _multiplied(inputs: Any, weight: Any, axis: int) -> Callable[[Tensor], Use | None]:
    def use_of(parameter: Tensor) -> Use | None:
        if not isinstance(inputs, Tensor) or parameter.dim() != 2 or weight.dim() != 2:
            return None
        met = axis % 2
        is_turned = weight.shape != parameter.shape or weight.stride() != parameter.stride()
        return Multiplied(inputs, 1 - met if is_turned else met)

    return use_of


def _lookup(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Reading:
    indices = _argument(args, kwargs, 0, "input")
    return [(_argument(args, kwargs, 1, "weight"), lambda parameter: _looked_up(parameter, indices))]


def _indexed(args: Sequence[Any], _: Mapping[str, Any]) -> Reading:
    return [(args[0], lambda parameter: _looked_up(parameter, args[1]))]


def _looked_up(parameter: Tensor, index: Any) -> Use | None:
    if parameter.dim() != 2 or isinstance(index, tuple):
        return None
    if isinstance(index, Tensor):
        is_index = not index.is_floating_point() and index.dtype is not torch.bool
        return LookedUp(index) if is_index else None
    if not isinstance(index, slice):
        return None
    return LookedUp(torch.arange(len(parameter), device=parameter.device)[index])


def _scaling(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Reading:
    one, other = args[0], _argument(args, kwargs, 1, "other")
    return [(one, _scaled(one, other)), (other, _scaled(other, one))]


def _scaled(vector: Any, inputs: Any) -> Callable[[Tensor], Use | None]:
    def use_of(_: Tensor) -> Use | None:
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or not vector.dim():
            return None
        wide = [axis for axis in range(-vector.dim(), 0) if vector.shape[axis] == vector.numel()]
        if not wide or inputs.dim() < -wide[-1] or inputs.shape[wide[-1]] != vector.numel():
            return None
        return Scaled(inputs.movedim(wide[-1], -1))

    return use_of


_READERS: dict[Any, Callable[[Sequence[Any], Mapping[str, Any]], Reading]] = {
    functional.linear: _linear,
    torch.addmm: _added_product,
    functional.embedding: _lookup,
    Tensor.__getitem__: _indexed,
    **dict.fromkeys(_PRODUCTS, _product),
    **dict.fromkeys(_SCALINGS, _scaling),
}
