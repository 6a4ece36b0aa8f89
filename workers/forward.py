"""Run samples through a checkpoint: to watch what flows into its parameters, or to see what it answers."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.utils import logging as transformers_logging

from service.contract.errors import BadInput, UnsupportedArchitecture
from service.contract.roles import Parameter
from service.contract.treatments import Role
from workers.exemplars import refuse_if_model_does, refuse_misfits
from workers.observing import Batch, Call, observe
from workers.skeleton import Skeleton, build_empty, building, owner_of, place, read_config, tied_source
from workers.statistics import Statistic

Progress = Callable[[int, int], None]

WATCHED_ROLES = frozenset({Role.LINEAR, Role.CONVOLUTION, Role.EMBEDDING, Role.SCALE})


def load_model(config: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device | str) -> nn.Module:
    """The model of a ``config.json`` with these tensors (checkpoint name -> values), in float32 and evaluation mode.

    Tensors that are float32 already are not copied: on the CPU the model shares their memory. Nothing is ever left
    randomly initialized: only tied tensors and what a model computes itself may be absent.

    Raises:
        UnsupportedArchitecture: transformers has no such model, or can't build it.
        BadInput: a tensor is missing, has no place in the model, or has the wrong shape.
    """
    model_class, model_config = read_config(config)
    try:
        with building, torch.random.fork_rng(devices=[]), _quiet():
            model, loading = model_class.from_pretrained(
                None,
                config=model_config,
                state_dict=dict(tensors),
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
            )
    except (RuntimeError, ValueError) as error:
        raise BadInput(f"the tensors can't be loaded into {model_class.__name__}: {error}") from error
    _refuse_misloaded(model, tensors, loading)
    loaded: nn.Module = model.requires_grad_(False).eval().to(device)
    return loaded


def _refuse_misloaded(model: nn.Module, tensors: Mapping[str, Tensor], loading: Mapping[str, Any]) -> None:
    kind = type(model).__name__
    names = {memory: name for name, memory in place(model, tensors).items()}
    for memory, found, expected in sorted(loading["mismatched_keys"]):
        name = names.get(memory, memory)
        raise BadInput(f"{name} has shape {list(found)}, and {kind} needs {list(expected)}", tensor=name)
    for name in sorted(loading["missing_keys"]):
        raise BadInput(f"{kind} needs the tensor {name}, which the checkpoint does not have", tensor=name)
    for name in sorted(loading["unexpected_keys"]):
        raise BadInput(f"{kind} has no place for the tensor {name}", tensor=name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no loading report from this thread; what is wrong is raised. Needs ``building`` held."""
    thread = threading.get_ident()
    logger = logging.getLogger("transformers.modeling_utils")

    def is_elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != thread

    had_bars = transformers_logging.is_progress_bar_enabled()
    logger.addFilter(is_elsewhere)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logger.removeFilter(is_elsewhere)
        if had_bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def check_inputs(model: nn.Module | Mapping[str, Any], inputs: Mapping[str, Tensor]) -> None:
    """Refuse samples (forward argument -> ``[n, ...]``) that are no inputs of ``model``, or of a ``config.json``.

    A loaded model is also tried on the first sample.

    Raises:
        BadInput: with a sentence that names the input and what was expected.
        UnsupportedArchitecture: transformers can't build the model of a ``config.json``.
    """
    subject = build_empty(model) if isinstance(model, Mapping) else model
    if not inputs:
        raise BadInput("there are no inputs: a file of samples holds tensors by the names of the model's inputs")
    refuse_misfits(subject, inputs)
    if not any(parameter.is_meta for parameter in subject.parameters()):
        first = {name: values[:1] for name, values in inputs.items()}
        refuse_if_model_does(subject, next(_batches(first, 1, _device(subject))))


def watch_inputs(
    model: nn.Module,
    skeleton: Skeleton,
    inputs: Mapping[str, Tensor],
    batch_size: int,
    wanted: set[str] | frozenset[str],
    on_progress: Progress,
) -> dict[str, Statistic]:
    """Send samples through ``model`` and gather the statistic that each wanted parameter's role needs.

    ``inputs`` are ``[n, ...]`` by forward argument, ``wanted`` names as the checkpoint has them. Rows are positions;
    where there is an ``attention_mask``, padding is none. ``on_progress`` gets the samples done and their number after
    every batch, and may raise. A parameter whose inputs were never seen, or whose kind of input can't be stated as a
    second moment (grouped convolutions), is absent from the result.
    """
    watcher = _Watcher(model, skeleton, wanted)
    total = len(next(iter(inputs.values())))
    done = 0
    with torch.no_grad(), watcher.hooked():
        for batch in _batches(inputs, batch_size, _device(model)):
            samples = len(next(iter(batch.values())))
            watcher.begin(Batch(samples, batch.get("attention_mask")))
            model(**batch)
            done += samples
            on_progress(done, total)
    return {name: _on_cpu(statistic) for name, statistic in watcher.statistics.items()}


class _Watcher:
    """Hooks on the modules that own the wanted parameters, and what they have seen so far."""

    def __init__(self, model: nn.Module, skeleton: Skeleton, wanted: set[str] | frozenset[str]) -> None:
        self.statistics: dict[str, Statistic] = {}
        self._model = model
        self._skeleton = skeleton
        self._wanted = sorted(wanted)
        self._batch = Batch(0, None)
        self._is_looking = False
        self._latest: tuple[Tensor, int, Statistic | None, Statistic | None] | None = None

    def begin(self, batch: Batch) -> None:
        """The next calls belong to ``batch``."""
        self._batch = batch
        self._latest = None

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Watches while entered."""
        with contextlib.ExitStack() as stack:
            for name in self._wanted:
                for module, attribute in self._owners(name):
                    hook = self._hook(name, attribute, self._skeleton.parameters[name])
                    stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield

    def _owners(self, name: str) -> list[tuple[nn.Module, str]]:
        """The modules whose inputs meet this parameter in this role: several where a table is shared."""
        memory = self._skeleton.memory_names.get(name)
        parameter = self._skeleton.parameters.get(name)
        if memory is None or parameter is None or parameter.role not in WATCHED_ROLES:
            return []
        _, attribute, source = owner_of(self._model, tied_source(self._model, memory))
        values = getattr(source, attribute)
        return [
            (module, attribute)
            for module in self._model.modules()
            if module is source or (type(module) is type(source) and getattr(module, attribute, None) is values)
        ]

    def _hook(self, name: str, attribute: str, parameter: Parameter) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._is_looking:  # finding the input of a scale calls the module again
                return
            self._is_looking = True
            try:
                self._see(name, attribute, parameter.role, Call(module, args, kwargs))
            finally:
                self._is_looking = False

        return see

    def _see(self, name: str, attribute: str, role: Role, call: Call) -> None:
        before = self.statistics.get(name)
        after = self._shared(call.input, before) if role is Role.LINEAR else None
        if after is None:
            after = observe(call, attribute, role, self._batch, before)
        if role is Role.LINEAR and call.input is not None:
            self._latest = (call.input, call.input._version, before, after)
        if after is not None:
            self.statistics[name] = after

    def _shared(self, x: Tensor | None, before: Statistic | None) -> Statistic | None:
        """The last answer, where the last linear layer had the very same input and past: query, key and value do."""
        if self._latest is None or x is None:
            return None
        seen, version, past, after = self._latest
        return after if seen is x and version == x._version and past is before else None


def class_scores(model: nn.Module, inputs: Mapping[str, Tensor], batch_size: int) -> Tensor:
    """The logits ``[n, classes]`` of the model's own classification head, in float32 on the CPU.

    Raises:
        UnsupportedArchitecture: the model has no head that gives one row of logits per sample.
    """
    scores = []
    for batch in _batches(inputs, batch_size, _device(model)):
        with torch.no_grad():
            logits = getattr(model(**batch), "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise UnsupportedArchitecture(f"{type(model).__name__} has no head that scores classes per sample")
        scores.append(logits.float().cpu())
    return torch.cat(scores)


def pooled_features(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    batch_size: int,
    pooling: Literal["cls", "mean"],
    normalize: bool,
) -> Tensor:
    """One feature vector per sample, ``[n, d]``, in float32 on the CPU.

    Features are the base model's ``last_hidden_state``: its first position (``cls``), or the mean over attended
    positions (``mean``); ``normalize`` scales them to unit length.

    Raises:
        UnsupportedArchitecture: the base model gives no ``last_hidden_state``.
    """
    base: Any = model.base_model
    features = []
    for batch in _batches(inputs, batch_size, _device(model)):
        with torch.no_grad():
            hidden = getattr(base(**batch), "last_hidden_state", None)
        if not isinstance(hidden, Tensor):
            raise UnsupportedArchitecture(f"{type(base).__name__} gives no last_hidden_state to take features from")
        pooled = _pooled(hidden, batch.get("attention_mask"), pooling)
        features.append((functional.normalize(pooled, dim=-1) if normalize else pooled).float().cpu())
    return torch.cat(features)


def _pooled(hidden: Tensor, mask: Tensor | None, pooling: Literal["cls", "mean"]) -> Tensor:
    if hidden.dim() == 4:  # feature maps [B, C, H, W]
        hidden = hidden.flatten(2).mT
    if pooling == "cls":
        return hidden[:, 0]
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden.mean(1)
    share = mask.to(hidden)[..., None]
    return (hidden * share).sum(1) / share.sum(1)


def _batches(inputs: Mapping[str, Tensor], batch_size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    total = len(next(iter(inputs.values())))
    for start in range(0, total, batch_size):
        yield {name: _fit(values[start : start + batch_size]).to(device) for name, values in inputs.items()}


def _fit(values: Tensor) -> Tensor:
    """Float32 and int64 are what the models take."""
    if values.is_floating_point():
        return values.float()
    return values if values.dtype is torch.bool else values.long()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _on_cpu(statistic: Statistic) -> Statistic:
    if statistic.factor is not None:
        return Statistic(statistic.rows, factor=statistic.factor.cpu())
    if statistic.diagonal is not None:
        return Statistic(statistic.rows, diagonal=statistic.diagonal.cpu())
    return statistic
