"""Sees the inputs of every wanted parameter in a forward pass, where its module is called and where it is not."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from service.contract.roles import Parameter
from service.contract.treatments import Role
from workers.functional import FunctionalUses, LookedUp, Multiplied, Scaled, Use
from workers.observing import Batch, Call, add_indices, add_rows, observe, positions
from workers.positions import Along
from workers.skeleton import Skeleton, owner_of, tied_source
from workers.statistics import Statistic

WATCHED_ROLES = frozenset({Role.LINEAR, Role.CONVOLUTION, Role.EMBEDDING, Role.SCALE})

Shapes = dict[tuple[str, int], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class _Latest:
    """The last matrix that was watched: its input, and its statistic before and after."""

    inputs: Tensor
    version: int
    mask: Tensor | None
    before: Statistic | None
    after: Statistic | None

    def answers(self, inputs: Tensor, mask: Tensor | None, before: Statistic | None) -> bool:
        """Whether another matrix with this input and past has the same statistic: query, key and value do."""
        is_same = self.inputs is inputs and self.version == inputs._version and self.mask is mask
        return is_same and self.before is before


class Watcher:
    """Hooks on the modules that own the wanted parameters and on torch's functions, and what they have seen so far.

    A parameter whose module tells what its inputs are is seen there. Any other is seen where a function of torch
    uses it. What neither sees is absent from ``statistics``.
    """

    def __init__(self, model: nn.Module, skeleton: Skeleton, wanted: set[str] | frozenset[str]) -> None:
        self.statistics: dict[str, Statistic] = {}
        self._model = model
        self._skeleton = skeleton
        self._wanted = [name for name in sorted(wanted) if self._is_watched(name)]
        self._sources = {
            name: owner_of(model, tied_source(model, skeleton.memory_names[name])) for name in self._wanted
        }
        self._tensors = {name: getattr(module, attribute) for name, (_, attribute, module) in self._sources.items()}
        self._holders = _holders(model)
        self._seen_by_module: set[str] = set()
        self._assumed: set[str] = set()
        self._masks: Mapping[tuple[str, int], Along] = {}
        self._inputs: Mapping[str, Tensor] = {}
        self._calls: Counter[str] = Counter()
        self._shapes: Shapes | None = None
        self._is_looking = False
        self._latest: _Latest | None = None

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Watches while entered."""
        with contextlib.ExitStack() as stack:
            for name in self._wanted:
                for module, attribute in self._visible_owners(name):
                    hook = self._hook(name, attribute)
                    stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
            whole = {name: tensor for name, tensor in self._tensors.items() if name not in self._skeleton.experts}
            stack.enter_context(FunctionalUses(whole, self._see_use))
            yield

    def run(self, inputs: Mapping[str, Tensor], masks: Mapping[tuple[str, int], Along]) -> None:
        """Send a batch through the model; ``masks`` says which mask leaves out positions of which call."""
        self._inputs, self._masks = inputs, masks
        self._calls.clear()
        self._latest = None
        self._model(**inputs)

    def measure(self, inputs: Mapping[str, Tensor]) -> Shapes:
        """Send a batch through the model, and learn nothing but the shape of every call's input."""
        self._shapes = {}
        try:
            self.run(inputs, {})
            return self._shapes
        finally:
            self._shapes = None

    def _is_watched(self, name: str) -> bool:
        parameter = self._skeleton.parameters.get(name)
        return parameter is not None and parameter.role in WATCHED_ROLES and name in self._skeleton.memory_names

    def _visible_owners(self, name: str) -> list[tuple[nn.Module, str]]:
        """The modules that tell the inputs of this parameter when they are called: several where a table is shared."""
        path, attribute, source = self._sources[name]
        parent = self._model.get_submodule(path.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):  # it uses its output layer's weight without calling the layer
            return [(parent, f"out_proj.{attribute}")]
        holders = self._holders.get(id(getattr(source, attribute)), [])
        return [(module, own) for module, own in holders if own == attribute and type(module) is type(source)]

    def _hook(self, name: str, attribute: str) -> Callable[..., None]:
        role = self._skeleton.parameters[name].role
        expert = self._skeleton.experts.get(name)

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = Call(module, args, kwargs, expert)
            if not self._is_looking and call.tells(attribute, role):
                with self._looking():  # finding the input of a scale calls the module again
                    self._see_call(name, attribute, role, call)

        return see

    def _see_call(self, name: str, attribute: str, role: Role, call: Call) -> None:
        is_bare_table = role is Role.EMBEDDING and not isinstance(call.module, nn.Embedding)
        if is_bare_table and name not in self._assumed and name in self.statistics:
            return  # a function of torch has told which of its rows are used
        self._seen_by_module.add(name)
        batch = self._batch(name, call.input)
        if batch is None:
            return
        if is_bare_table:
            self._assumed.add(name)
        is_plain = role is Role.LINEAR and isinstance(call.module, nn.Linear | Conv1D)
        if is_plain and call.input is not None:
            self._add_plain(name, call.input, batch)
        else:
            self._keep(name, observe(call, attribute, role, batch, self.statistics.get(name)))

    def _see_use(self, name: str, use: Use) -> None:
        if self._is_looking or (name in self._seen_by_module and name not in self._assumed):
            return
        parameter = self._skeleton.parameters[name]
        if not _fits(use, parameter):
            return
        with self._looking():
            batch = self._batch(name, use.indices if isinstance(use, LookedUp) else use.inputs)
            if batch is None:
                return
            if name in self._assumed:  # that every row of a bare table is used was an assumption
                self._assumed.remove(name)
                self._seen_by_module.remove(name)
                del self.statistics[name]
            self._add_use(name, parameter.role, use, batch)

    def _add_use(self, name: str, role: Role, use: Use, batch: Batch) -> None:
        if isinstance(use, Multiplied):
            self._add_plain(name, use.inputs, batch)
        elif isinstance(use, Scaled):
            self._keep(name, add_rows(positions(use.inputs, batch), role, self.statistics.get(name)))
        else:
            size = len(self._tensors[name])
            self._keep(name, add_indices(use.indices, size, batch, self.statistics.get(name)))

    def _add_plain(self, name: str, x: Tensor, batch: Batch) -> None:
        """Add the inputs of a matrix, once where several matrices in a row have the same."""
        before = self.statistics.get(name)
        if self._latest is None or not self._latest.answers(x, batch.mask, before):
            after = add_rows(positions(x, batch), Role.LINEAR, before)
            self._latest = _Latest(x, x._version, batch.mask, before, after)
        self._keep(name, self._latest.after)

    def _keep(self, name: str, statistic: Statistic | None) -> None:
        if statistic is not None:
            self.statistics[name] = statistic

    @contextlib.contextmanager
    def _looking(self) -> Iterator[None]:
        self._is_looking = True
        try:
            yield
        finally:
            self._is_looking = False

    def _batch(self, name: str, x: Tensor | None) -> Batch | None:
        """The batch as this call has it; None while only shapes are wanted."""
        call = (name, self._calls[name])
        self._calls[name] += 1
        if self._shapes is not None:
            self._shapes[call] = tuple(x.shape) if x is not None else ()
            return None
        along = self._masks.get(call)
        samples = len(next(iter(self._inputs.values())))
        return Batch(samples, self._inputs[along.mask], along.axis) if along else Batch(samples, None)


def _holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """The modules that hold each parameter, and its name there, by the parameter's identity."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, attribute))
    return found


def _fits(use: Use, parameter: Parameter) -> bool:
    """Whether the use is the one that a parameter of this role and layout has."""
    if isinstance(use, Multiplied):
        return parameter.role is Role.LINEAR and use.axis == (0 if parameter.transposed else 1)
    if isinstance(use, Scaled):
        return parameter.role is Role.SCALE
    return parameter.role is Role.EMBEDDING
