"""Finds out which inputs of a model's parameters are positions of a text, so that its padding can be left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

Shapes = Mapping[tuple[str, int], tuple[int, ...]]
Measure = Callable[[Mapping[str, Tensor]], Shapes]


@dataclass(frozen=True)
class Along:
    """Which mask's positions a call's input has, and along which axis."""

    mask: str
    axis: int


# What has one entry per position of the text that a mask belongs to.
TEXTS: dict[str, tuple[str, ...]] = {
    "attention_mask": ("input_ids", "token_type_ids", "position_ids", "inputs_embeds"),
    "decoder_attention_mask": ("decoder_input_ids", "decoder_position_ids", "decoder_inputs_embeds"),
}


def padded_masks(inputs: Mapping[str, Tensor]) -> list[str]:
    """The masks ``[n, length]`` among the inputs that leave out a position somewhere."""
    return [
        name
        for name in TEXTS
        if name in inputs and inputs[name].dim() == 2 and inputs[name].shape[1] > 1 and not bool(inputs[name].all())
    ]


def masks_of_calls(inputs: Mapping[str, Tensor], measure: Measure) -> dict[tuple[str, int], Along]:
    """Which mask's positions each call has, by parameter and number of the call within a forward pass.

    A call belongs to a text where its input gets one position shorter when one padded position is taken out of the
    text. Lengths that merely coincide (as many patches as tokens, question and answer of one length) are not confused.
    ``measure`` sends one sample through the model and gives the shape that every call's input has.
    """
    found: dict[tuple[str, int], Along] = {}
    for mask in padded_masks(inputs):
        sample = _padded_sample(inputs, mask)
        before, after = measure(sample), measure(_shortened(sample, mask))
        for call, shape in before.items():
            axis = _shortened_axis(shape, after.get(call))
            if axis is not None:
                found[call] = Along(mask, axis)
    return found


def _padded_sample(inputs: Mapping[str, Tensor], mask: str) -> dict[str, Tensor]:
    index = int((inputs[mask] == 0).any(1).nonzero()[0])
    return {name: values[index : index + 1] for name, values in inputs.items()}


def _shortened(sample: Mapping[str, Tensor], mask: str) -> dict[str, Tensor]:
    length = sample[mask].shape[1]
    gap = int((sample[mask][0] == 0).nonzero()[0])
    kept = [position for position in range(length) if position != gap]
    return {
        name: values[:, kept] if name in (mask, *TEXTS[mask]) and values.shape[1] == length else values
        for name, values in sample.items()
    }


def _shortened_axis(before: Sequence[int], after: Sequence[int] | None) -> int | None:
    """The axis that alone is shorter by one: L in [1, L, ...] or [1, heads, L, d], in [L] and in a flattened [L, d]."""
    if after is None or len(before) != len(after):
        return None
    changed = [axis for axis, (long, short) in enumerate(zip(before, after, strict=True)) if long != short]
    is_one = len(changed) == 1 and before[changed[0]] == after[changed[0]] + 1
    return changed[0] if is_one and (changed[0] > 0 or len(before) <= 2) else None
