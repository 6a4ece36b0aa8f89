"""Methods with all their parameters under one name, for recipes that don't want to choose."""

from __future__ import annotations

from typing import Literal, get_args

from service.contract.base import Frozen
from service.contract.methods import AnyMethod, Cat, Shrinkage, TsvM

PresetName = Literal["auto", "paper"]


class Preset(Frozen):
    """A name that a recipe may give as its ``method``, and what it stands for.

    ``method`` holds where tasks bring exemplars or statistics, ``without_data`` where they bring neither.
    """

    name: PresetName
    method: AnyMethod
    without_data: AnyMethod
    why: str
    source: str


PUBLISHED = Cat(  # with its scaling of 0.4, which is left unset: whoever gives a name has not chosen a scaling
    rank=4,
    scale_rank=4,
    scale_balance=10.0,
    shift_rank=4,
    moments="mean",
    positive_only=True,
    restore_norm=False,
    features_at="task",
)
PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="auto",
            method=Shrinkage(),
            without_data=TsvM(),
            why="The best overall of what was measured here on text and vision models: shrinkage where tasks bring "
            "exemplars or statistics, TSV-M where they don't.",
            source="README, Measured: methods side by side",
        ),
        Preset(
            name="paper",
            method=PUBLISHED,
            without_data=PUBLISHED,
            why="Conflict-aware trimming exactly as published: four directions or entries a task, balance 5 and 10.",
            source=Cat.paper,
        ),
    )
}


def expanded(method: object, with_data: bool) -> object:
    """The method that a preset's name stands for; anything but a string as it is.

    Raises:
        ValueError: there is no preset of that name, or it is given as if it were a method.
    """
    if isinstance(method, dict) and method.get("name") in get_args(PresetName):
        preset = PRESETS[method["name"]]
        stands_for = (preset.method if with_data else preset.without_data).name
        raise ValueError(
            f'{preset.name!r} is a preset, given by its name alone: "method": "{preset.name}". To set parameters, name '
            f"the method that it stands for here, {stands_for!r}"
        )
    if not isinstance(method, str):
        return method
    if method not in PRESETS:
        raise ValueError(
            f"{method!r} is no preset; presets are {', '.join(PRESETS)}. A method is given as an object with its name"
        )
    return PRESETS[method].method if with_data else PRESETS[method].without_data
