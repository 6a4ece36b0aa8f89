"""Whether samples can be the inputs of a model, said in one sentence before anything is computed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from service.contract.errors import BadInput


@contextmanager
def naming(address: str) -> Iterator[None]:
    """Put the file's address before what is wrong with the samples in it."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{address}: {error.detail}", tensor=error.tensor) from error


def refuse_misfits(model: Any, inputs: Mapping[str, Tensor]) -> None:
    """Compare samples (forward argument -> ``[n, ...]``) with what ``model`` takes; weights are not looked at.

    Raises:
        BadInput: a name that ``forward`` does not have, no samples, unequal numbers of samples, or a shape, type or
            value that the model can't take; the sentence names the input and what was expected.
    """
    _check_names(model, inputs)
    _check_counts(inputs)
    for name, values in inputs.items():
        _check_values(name, values)
    if "input_ids" in inputs:
        _check_tokens(model, inputs)
    if "decoder_input_ids" in inputs:
        _check_decoder_tokens(model, inputs)
    if "pixel_values" in inputs:
        _check_pixels(model, inputs["pixel_values"])


def takes_choices(model: Any) -> bool:
    """Whether a model scores several answers to each sample, ``[n, choices, length]``, by a head of its own."""
    return type(model).__name__.endswith("ForMultipleChoice")


def _check_names(model: Any, inputs: Mapping[str, Tensor]) -> None:
    known = arguments(model)
    for name in inputs:
        if name not in known:
            raise BadInput(f"{type(model).__name__} has no input {name!r}; it takes {', '.join(known)}")
    if model.main_input_name not in inputs and "inputs_embeds" not in inputs:
        raise BadInput(f"the input {model.main_input_name!r}, which {type(model).__name__} needs, is missing")


def arguments(model: Any) -> list[str]:
    """The names of what a model's forward pass takes."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]


def _check_counts(inputs: Mapping[str, Tensor]) -> None:
    first = next(iter(inputs))
    for name, values in inputs.items():
        if values.dim() < 1 or not len(values):
            raise BadInput(f"the input {name!r} has shape {list(values.shape)} and so no samples; it must be [n, ...]")
        if len(values) != len(inputs[first]):
            raise BadInput(
                f"the input {name!r} has {len(values)} samples and {first!r} has {len(inputs[first])}; "
                "the first dimension must be the same"
            )


def _check_values(name: str, values: Tensor) -> None:
    if values.is_floating_point() and not bool(values.isfinite().all()):
        raise BadInput(f"the input {name!r} has values that are NaN or infinite")


def _check_tokens(model: Any, inputs: Mapping[str, Tensor]) -> None:
    ids, config = inputs["input_ids"], model.config.get_text_config()
    shape = "[n, choices, length]" if takes_choices(model) else "[n, length]"
    if ids.dim() != shape.count(",") + 1 or ids.is_floating_point() or not ids.shape[-1]:
        raise BadInput(f"the input 'input_ids' is {_described(ids)}; it must be integers of shape {shape}")
    _check_range("input_ids", ids, getattr(config, "vocab_size", None))
    longest = longest_sequence(model, config)
    if longest is not None and ids.shape[-1] > longest:
        raise BadInput(
            f"the input 'input_ids' has shape {list(ids.shape)}; "
            f"{type(model).__name__} takes {shape} with a length of at most {longest}"
        )
    if "token_type_ids" in inputs:
        _check_same_shape("token_type_ids", inputs["token_type_ids"], ids)
        _check_range("token_type_ids", inputs["token_type_ids"], getattr(config, "type_vocab_size", None))
    if "attention_mask" in inputs:
        _check_mask(inputs["attention_mask"], ids)


def _check_decoder_tokens(model: Any, inputs: Mapping[str, Tensor]) -> None:
    ids, config = inputs["decoder_input_ids"], model.config.get_text_config(decoder=True)
    if ids.dim() != 2 or ids.is_floating_point() or not ids.shape[1]:
        raise BadInput(f"the input 'decoder_input_ids' is {_described(ids)}; it must be integers of shape [n, length]")
    _check_range("decoder_input_ids", ids, getattr(config, "vocab_size", None))
    if "decoder_attention_mask" in inputs:
        _check_mask(inputs["decoder_attention_mask"], ids, "decoder_")


def _check_mask(mask: Tensor, ids: Tensor, prefix: str = "") -> None:
    name = f"{prefix}attention_mask"
    _check_same_shape(name, mask, ids, f"{prefix}input_ids")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise BadInput(f"the input {name!r} has values other than 0 and 1")
    empty = (mask != 0).sum(-1) == 0
    if bool(empty.any()):
        raise BadInput(f"sample {int(empty.nonzero()[0, 0])} has no attended position in {name!r}")


def _check_same_shape(name: str, values: Tensor, ids: Tensor, of: str = "input_ids") -> None:
    if values.shape != ids.shape:
        raise BadInput(f"the input {name!r} is {_described(values)}; it must have {of}' shape {list(ids.shape)}")


def _check_range(name: str, values: Tensor, size: int | None) -> None:
    low, high = int(values.min()), int(values.max())
    if low < 0 or (size is not None and high >= size):
        wrong = low if low < 0 else high
        raise BadInput(f"the input {name!r} has the value {wrong}; it must be from 0 to below {size}")


def longest_sequence(model: Any, config: Any) -> int | None:
    """The longest sequence with a position for every token; RoBERTa's kind spends the first rows on padding."""
    for path, module in model.named_modules():
        is_offset = isinstance(module, nn.Embedding) and path.endswith("position_embeddings")
        if is_offset and module.padding_idx is not None:
            return int(module.num_embeddings) - int(module.padding_idx) - 1
    return getattr(config, "max_position_embeddings", None)


def _check_pixels(model: Any, pixels: Tensor) -> None:
    """Channels always; height and width where the model has positions for one size only."""
    config = getattr(model.config, "vision_config", model.config)
    size = getattr(config, "image_size", None)
    is_fixed = "interpolate_pos_encoding" in arguments(model)
    sides = _sides(size) if is_fixed else (None, None)
    expected = [None, getattr(config, "num_channels", None), *sides]
    fits = pixels.dim() == 4 and all(want in (None, have) for want, have in zip(expected, pixels.shape, strict=True))
    if not fits or not pixels.is_floating_point():
        shown = [
            f"{want or letter}" for want, letter in zip(expected, ("n", "channels", "height", "width"), strict=True)
        ]
        raise BadInput(
            f"the input 'pixel_values' is {_described(pixels)}; "
            f"{type(model).__name__} takes numbers with a fraction of shape [{', '.join(shown)}]"
        )


def _sides(size: Any) -> tuple[int | None, int | None]:
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    return (size, size) if isinstance(size, int) else (None, None)


def _described(values: Tensor) -> str:
    return f"{str(values.dtype).removeprefix('torch.')} of shape {list(values.shape)}"


def refuse_if_model_does(model: nn.Module, sample: Mapping[str, Tensor]) -> None:
    """Send one sample through the model, for what only the model itself knows about its inputs.

    Raises:
        BadInput: the model raised; its own words are in the sentence.
    """
    try:
        with torch.no_grad():
            model(**sample)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise BadInput(
            f"{type(model).__name__} can't take only {', '.join(sample)} as they are: {error} "
            f"(its inputs are {', '.join(arguments(model))}){_hint(model, sample)}"
        ) from error


def _hint(model: nn.Module, sample: Mapping[str, Tensor]) -> str:
    """What a sequence-to-sequence model usually lacks: labels stay out of exemplars, so nothing stands in for them."""
    if "decoder_input_ids" not in arguments(model) or "decoder_input_ids" in sample:
        return ""
    return (
        ". Bring 'decoder_input_ids' [n, length] too: the decoder's start token, and the target's tokens where there "
        "are any; with 'decoder_attention_mask' where they are padded"
    )
