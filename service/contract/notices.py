"""What a job warns of, and why trials fail: sentences that know their code and values, for other languages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# In the order in which a job may come upon them. A notice's values are what stands in braces.
SENTENCES: dict[str, str] = {
    "tensor_of_no_task": "{tensor}: no task has it; copied from the base",
    "more_tensors_of_no_task": "and {count} more tensors that no task has; copied from the base",
    "head": "{task}: {tensors} delivered as this task's head, not merged",
    "roles_guessed": "Roles are guessed from names and shapes, because {reason}.",
    "tensors_without_place": (
        "{model} has no place for {count} tensors, whose roles are guessed from names: {tensors}."
    ),
    "no_statistics": "{task}: no statistics for {count} parameters, which are {treated}: {parameters}",
    "no_statistics_in": "no statistics in {tasks}",
    "kept_untrimmed": "{parameter}: kept untrimmed, no statistics in {tasks}",
    "texts_cut": "{file}: {count} of {total} texts are longer than the {limit} tokens that fit, and were cut.",
    "words_unmeasured": "{file}: {count} of {total} words are not measured: they were cut, or have no token.",
    "right_texts_long": (
        "{file}: {count} of {total} right texts are longer than the {limit} tokens that are written at most; "
        "raise max_new_tokens."
    ),
    "leak": (
        "{count} samples of task {task!r} are in {validation} as well as in {labeled}; what a search chooses on the "
        "one is then not fairly measured on the other"
    ),
    "few_samples": "task {task!r} has only {count} labeled samples; with fewer than {enough}, intervals are rough",
    "nothing_to_keep": (
        "task {task!r}: no share of the expert's {metric} ({expert}) can be kept; mean and worst retention are "
        "those of the other tasks, and gates on them are not met"
    ),
    "within_noise": (
        "task {task!r}: {count} samples are too few to tell the merged model's {metric} ({merged}) from the "
        "expert's ({expert})"
    ),
    "nothing_to_keep_of": (
        "task {task!r}: no share of the {metric} of {reference} ({theirs}) can be kept; mean and worst retention of "
        "{model} are those of the other tasks, and gates on them are not met"
    ),
    "within_noise_of": (
        "task {task!r}: {count} samples are too few to tell the {metric} of {model} ({ours}) from that of {reference} "
        "({theirs})"
    ),
    "no_head": "{folder} has heads for {heads}, and none for {tasks}: there {model} is measured as its own weights are",
    "no_figure": "task {task!r}: {metrics} of {model} can't be computed, and is left out",
    # Why a trial of a search failed.
    "chances_outside": "chances must lie above 0 and up to 1: epsilon / 2 < density <= 1 - epsilon / 2",
    "shares_exceed": "density + gamma must not exceed 1: the largest entries are dropped, not kept",
    "merged_overflows": (
        "the merged {parameter!r} does not fit into {dtype}: it overflows. Lower method.scaling, or choose a wider "
        "output.dtype"
    ),
    "base_not_finite": "the base holds NaN or infinity in {parameter!r} ({checkpoint}); merge finite checkpoints",
    "task_not_finite": (
        "task {task!r} holds NaN or infinity in {parameter!r} ({checkpoint}); merge finite checkpoints"
    ),
    "answers_not_finite": "the model gives NaN or infinity on the labeled samples of task {task!r}",
    "tokens_not_finite": "the model gives NaN or infinity on the labeled samples",
    "features_not_finite": "the features of a {side} are NaN or infinite",
    "no_retention": "the retention of {tasks} on validation samples is no number",
    "no_likeness": "the likeness of {tasks} on exemplars is no number",
    "no_prediction_likeness": "the likeness of predictions of {tasks} on exemplars is no number",
    "not_factored": "a matrix can't be factored: {reason}",
    "out_of_memory": "the device has too little memory: {reason}",
}


class Notice(str):
    """A warning. It is the English sentence; ``code`` and ``values`` say the same to whoever speaks another language.

    Raises:
        KeyError: there is no sentence of that code, or it has a value that is not given.
    """

    code: str
    values: dict[str, Any]

    def __new__(cls, code: str, **values: Any) -> Notice:
        made = super().__new__(cls, SENTENCES[code].format(**values))
        made.code, made.values = code, values
        return made

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, Any]]:
        return (self.code,), self.values  # copies are made of what it says, not of the sentence


def as_rows(notices: Iterable[str]) -> list[dict[str, Any]]:
    """Notices as JSON keeps them: ``code``, ``values`` and the sentence as ``detail``; other sentences have no code."""
    return [
        {
            "code": notice.code if isinstance(notice, Notice) else None,
            "values": notice.values if isinstance(notice, Notice) else {},
            "detail": str(notice),
        }
        for notice in notices
    ]
