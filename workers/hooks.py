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
from workers.observing import Batch, Call, add_indices, add_rows, expert_rows, input_rows, observe, positions
from workers.positions import Along
from workers.row_sums import RowSum
from workers.skeleton import Skeleton, owner_of, tied_source
from workers.statistics import Statistic, stack_statistics

MATRICES = frozenset({Role.LINEAR, Role.CONVOLUTION, Role.GROUPED_CONVOLUTION, Role.EXPERTS})
WATCHED_ROLES = MATRICES | {Role.EMBEDDING, Role.SCALE}

Shapes = dict[tuple[str, int], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class _Latest:
    """The last matrix that was watched: its input, and its statistic before and after."""

    inputs: Tensor
    version: int
    mask: Tensor | None
    before: RowSum | None
    after: RowSum

    def answers(self, inputs: Tensor, mask: Tensor | None, before: RowSum | None) -> bool:
        """Whether another matrix with this input and past has the same statistic: query, key and value do."""
        is_same = self.inputs is inputs and self.version == inputs._version and self.mask is mask
        return is_same and self.before is before


class Watcher:
    """Hooks on the modules that own the wanted parameters and on torch's functions, and what they have seen so far.

    A parameter whose module tells what its inputs are is seen there. Any other is seen where a function of torch
    uses it. What neither sees is absent from ``statistics``.
    """

    def __init__(self, model: nn.Module, skeleton: Skeleton, wanted: set[str] | frozenset[str]) -> None:
        self._sums: dict[str, Statistic | RowSum | list[RowSum]] = {}
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

    @property
    def statistics(self) -> dict[str, Statistic]:
        """The statistic of every parameter that was seen; layers with the same inputs share one."""
        roots: dict[int, Statistic] = {}
        found: dict[str, Statistic] = {}
        for name, seen in self._sums.items():
            if isinstance(seen, RowSum):
                roots[id(seen)] = roots.get(id(seen)) or seen.statistic()
                found[name] = roots[id(seen)]
            elif isinstance(seen, list):
                stacked = stack_statistics([part.statistic() if part.rows else None for part in seen])
                found |= {name: stacked} if stacked is not None else {}
            else:
                found[name] = seen
        return found

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Watches while entered."""
        with contextlib.ExitStack() as stack:
            for name in self._wanted:
                for module, attribute in self._visible_owners(name):
                    hook = self._hook(name, attribute)
                    stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
            owners = {name: (module, attribute) for name, (_, attribute, module) in self._sources.items()}
            uses = FunctionalUses(
                {name: owners[name] for name in owners if name not in self._skeleton.experts}, self._see_use
            )
            for module, names in self._arriving().items():
                stack.enter_context(module.register_forward_pre_hook(_learning(uses, names)))
            stack.enter_context(uses)
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

    def _arriving(self) -> dict[nn.Module, list[str]]:
        """The modules around parameters that are not there yet: when one of them is called, they may have come."""
        found: dict[nn.Module, list[str]] = {}
        for name, (path, _, _) in self._sources.items():
            if self._tensors[name].is_meta and name not in self._skeleton.experts:
                parts = path.split(".")
                for length in range(1, len(parts) + 1):
                    found.setdefault(self._model.get_submodule(".".join(parts[:length])), []).append(name)
        return found

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
        if is_bare_table and name not in self._assumed and name in self._sums:
            return  # a function of torch has told which of its rows are used
        self._seen_by_module.add(name)
        batch = self._batch(name, call.input)
        if batch is None:
            return
        if is_bare_table:
            self._assumed.add(name)
        if call.input is not None and isinstance(call.module, nn.Linear | Conv1D):
            self._add_plain(name, call.input, batch)
        elif role is Role.EXPERTS:
            self._add_experts(name, attribute, call, batch)
        elif role in MATRICES:
            self._add_rows(name, input_rows(call, attribute, role, batch))
        else:
            self._keep(name, observe(call, attribute, role, batch, self._known(name)))

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
                del self._sums[name]
            self._add_use(name, parameter.role, use, batch)

    def _add_use(self, name: str, role: Role, use: Use, batch: Batch) -> None:
        if isinstance(use, Multiplied):
            self._add_plain(name, use.inputs, batch)
        elif isinstance(use, Scaled):
            self._keep(name, add_rows(positions(use.inputs, batch), role, self._known(name)))
        else:
            size = len(self._tensors[name])
            self._keep(name, add_indices(use.indices, size, batch, self._known(name)))

    def _add_rows(self, name: str, rows: Tensor | None) -> None:
        known = self._sums.get(name)
        if rows is not None and rows.shape[-2]:
            self._sums[name] = (known if isinstance(known, RowSum) else RowSum()).add(rows)

    def _add_experts(self, name: str, attribute: str, call: Call, batch: Batch) -> None:
        known = self._sums.get(name)
        sums = known if isinstance(known, list) else [RowSum()] * self._skeleton.parameters[name].blocks
        rows = [expert_rows(call, attribute, expert, batch) for expert in range(len(sums))]
        self._sums[name] = [
            before if new is None or not len(new) else before.add(new) for before, new in zip(sums, rows, strict=True)
        ]

    def _add_plain(self, name: str, x: Tensor, batch: Batch) -> None:
        """Add the inputs ``x [..., in]`` of a matrix, once where several matrices in a row have the same."""
        known = self._sums.get(name)
        before = known if isinstance(known, RowSum) else None
        if self._latest is not None and self._latest.answers(x, batch.mask, before):
            self._sums[name] = self._latest.after
            return
        rows = positions(x, batch)
        if len(rows):
            after = (before or RowSum()).add(rows)
            self._latest = _Latest(x, x._version, batch.mask, before, after)
            self._sums[name] = after

    def _known(self, name: str) -> Statistic | None:
        known = self._sums.get(name)
        return known if isinstance(known, Statistic) else None

    def _keep(self, name: str, statistic: Statistic | None) -> None:
        if statistic is not None:
            self._sums[name] = statistic

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


def _learning(uses: FunctionalUses, names: list[str]) -> Callable[..., None]:
    def learn(module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG001 (torch's signature)
        uses.learn(names)

    return learn


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
