"""Makes a model of a checkpoint's tensors, or says which tensor stands in the way."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from service.contract.errors import BadInput
from workers.skeleton import building, find_places, read_config


def load_model(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    device: torch.device | str,
    spare: Collection[str] = (),
) -> nn.Module:
    """The model of a ``config.json`` with these tensors (checkpoint name -> values), in float32 and evaluation mode.

    Tensors that are float32 already are not copied: on the CPU the model shares their memory. Nothing is ever left
    randomly initialized: only tied tensors and what a model computes itself may be absent. Tensors that are ``spare``
    may have no place in the model.

    Raises:
        UnsupportedArchitecture: transformers has no such model, or can't build it.
        BadInput: a tensor is missing, has no place in the model, or has the wrong shape.
    """
    model_class, model_config = read_config(config)
    try:
        with building, torch.random.fork_rng(devices=[]), quiet():
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
    refuse_misloaded(model, tensors, loading, spare)
    loaded: nn.Module = model.requires_grad_(False).eval().to(device)
    return loaded


def refuse_misloaded(
    model: nn.Module, tensors: Iterable[str], loading: Mapping[str, Any], spare: Collection[str] = ()
) -> None:
    """Refuse, by the name it has in the checkpoint, what transformers says is missing, left over or misshaped.

    Of what is left over, ``spare`` tensors are let be.

    Raises:
        BadInput: there is any.
    """
    kind = type(model).__name__
    names = {place.memory_name: name for name, place in find_places(model, tensors).items()}
    for memory, found, expected in sorted(loading["mismatched_keys"]):
        name = names.get(memory, memory)
        raise BadInput(f"{name} has shape {list(found)}, and {kind} needs {list(expected)}", tensor=name)
    for name in sorted(loading["missing_keys"]):
        raise BadInput(f"{kind} needs the tensor {name}, which the checkpoint does not have", tensor=name)
    for name in sorted(set(loading["unexpected_keys"]) - set(spare)):
        raise BadInput(f"{kind} has no place for the tensor {name}", tensor=name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
