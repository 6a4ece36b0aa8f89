"""Run samples through a checkpoint: to watch what flows into its parameters, or to see what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from service.contract.errors import BadInput, UnsupportedArchitecture
from workers.exemplars import refuse_if_model_does, refuse_misfits
from workers.hooks import Watcher
from workers.loading import load_model as load_model
from workers.positions import masks_of_calls
from workers.skeleton import Skeleton, build_empty
from workers.statistics import Statistic

Progress = Callable[[int, int], None]
TOKENS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")  # what ends in [..., length]


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
    if not all(parameter.is_meta for parameter in subject.parameters()):
        first = {name: values[:1] for name, values in inputs.items()}
        refuse_if_model_does(subject, next(batches(first, 1, device_of(subject))))


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
    where there is an ``attention_mask`` or a ``decoder_attention_mask``, the positions it leaves out are none.
    ``on_progress`` gets the samples done and their number after every batch, and may raise. A parameter whose inputs
    were never seen, or have no one second moment (one matrix for query and key whose inputs differ), is absent from
    the result.
    """
    watcher = Watcher(model, skeleton, wanted)
    total = len(next(iter(inputs.values())))
    done = 0
    with torch.no_grad(), watcher.hooked():
        masks = masks_of_calls(inputs, lambda sample: watcher.measure(_fitted(sample, device_of(model))))
        for batch in batches(inputs, 1 if lacks_padding(model, inputs) else batch_size, device_of(model)):
            watcher.run(batch, masks)
            done += len(next(iter(batch.values())))
            on_progress(done, total)
    return {name: _on_cpu(statistic) for name, statistic in watcher.statistics.items()}


def class_scores(model: nn.Module, inputs: Mapping[str, Tensor], batch_size: int) -> Tensor:
    """The logits ``[n, classes]`` of the model's own classification head, in float32 on the CPU.

    A causal model that does not know what padding is gets one sample at a time, without its padding.

    Raises:
        UnsupportedArchitecture: the model has no head that gives one row of logits per sample.
    """
    scores = []
    given = (
        unpadded(model, inputs, 1) if lacks_padding(model, inputs) else batches(inputs, batch_size, device_of(model))
    )
    for batch in given:
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
    for batch in batches(inputs, batch_size, device_of(model)):
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


def batches(inputs: Mapping[str, Tensor], batch_size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Samples ``[n, ...]`` by forward argument, some at a time, on ``device`` and of the types that models take."""
    total = len(next(iter(inputs.values())))
    for start in range(0, total, batch_size):
        yield _fitted({name: values[start : start + batch_size] for name, values in inputs.items()}, device)


def lacks_padding(model: Any, inputs: Mapping[str, Tensor]) -> bool:
    """Whether a model scores text at its last token, and can't tell which that is among several samples.

    transformers looks for the last token that is no padding; a checkpoint whose config.json has no ``pad_token_id``
    leaves it no way to, and then it takes one sample at a time only.
    """
    is_classifier = type(model).__name__.endswith("ForSequenceClassification") and "input_ids" in inputs
    return is_classifier and getattr(model.config.get_text_config(), "pad_token_id", None) is None


def unpadded(model: nn.Module, inputs: Mapping[str, Tensor], batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Batches without the positions that none of their samples attends to."""
    return (batch for batch, _ in unpadded_places(model, inputs, batch_size))


def unpadded_places(
    model: nn.Module, inputs: Mapping[str, Tensor], batch_size: int
) -> Iterator[tuple[dict[str, Tensor], slice]]:
    """Batches without the positions that none of their samples attends to, and which are kept."""
    for batch in batches(inputs, batch_size, device_of(model)):
        mask = batch.get("attention_mask")
        if mask is None:
            yield batch, slice(None)
            continue
        used = mask.flatten(0, -2).any(0).nonzero()[:, 0].tolist()
        kept = slice(used[0], used[-1] + 1) if used else slice(None)
        yield {name: values[..., kept] if name in TOKENS else values for name, values in batch.items()}, kept


def _fitted(inputs: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: _fit(values).to(device) for name, values in inputs.items()}


def _fit(values: Tensor) -> Tensor:
    """Float32 and int64 are what the models take."""
    if values.is_floating_point():
        return values.float()
    return values if values.dtype is torch.bool else values.long()


def device_of(model: nn.Module) -> torch.device:
    """Where a loaded model computes."""
    return next(parameter.device for parameter in model.parameters() if not parameter.is_meta)


def _on_cpu(statistic: Statistic) -> Statistic:
    if statistic.factor is not None:
        return replace(statistic, factor=statistic.factor.cpu())
    if statistic.diagonal is not None:
        return replace(statistic, diagonal=statistic.diagonal.cpu())
    return statistic
