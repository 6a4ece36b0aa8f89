"""What a parameter is, told from its name and shape alone: for unknown models, and where torch may not be."""

from __future__ import annotations

import re
from dataclasses import dataclass

from service.contract.treatments import Role


@dataclass(frozen=True)
class Parameter:
    """What one tensor of a checkpoint is.

    ``transposed`` marks the layout [in, out] (embedding tables, GPT-2's ``Conv1D``). ``guessed`` says that the role
    comes from name and shape and not from the model's own modules. ``tied_to`` is the checkpoint name of the tensor
    this one must stay equal to. ``blocks`` is how many matrices with inputs of their own lie one after the other along
    the first dimension: stacked experts, groups of a convolution.
    """

    role: Role
    transposed: bool = False
    guessed: bool = False
    tied_to: str | None = None
    blocks: int = 1


# Each is searched in the last part of a name once ".weight" is taken off: "wte" of "h.wte.weight".
_EMBEDDING = re.compile(
    r"(^|_)(embeddings?|embeds?|embed_tokens|embed_positions|wte|wpe|shared)$|^relative_attention_bias$"
)
_TOKEN = re.compile(
    r"(^|_)(cls|class|mask|dist|distillation|reg|register|query|storage)_tokens?$|^class_embedding$|^masked_spec_embed$|^probe$|^sinks$"
)
_BUFFER = re.compile(r"_ids$|_table$|_mask$|^rel_pos|^running_|^num_batches_tracked$|^inv_freq$|^masked_bias$")
_SCALE = re.compile(r"^(weight|gamma|lambda1|g)$")
_SHIFT = re.compile(r"bias$|^beta$")


def guess_role(name: str, shape: tuple[int, ...]) -> Role:
    """The role that a parameter of this name and shape usually has; ``other`` where names say too little."""
    last = name.rsplit(".", 1)[-1]
    owner = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if _BUFFER.search(owner):
        return Role.OTHER
    if _TOKEN.search(owner):
        return Role.SHIFT
    if is_table(shape) and _EMBEDDING.search(owner):
        return Role.EMBEDDING
    return _from_rank(name, last, len(shape))


def guess_parameter(name: str, shape: tuple[int, ...]) -> Parameter:
    """As ``guess_role``, with the layout that goes with the role; a linear weight is taken to be [out, in]."""
    role = guess_role(name, shape)
    return Parameter(role, transposed=role is Role.EMBEDDING, guessed=True)


def is_table(shape: tuple[int, ...]) -> bool:
    """Whether a shape is [rows, d], or [1, rows, d] as bare position embeddings have it."""
    return len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)


def _from_rank(name: str, last: str, rank: int) -> Role:
    if rank == 1:
        return _vector(last)
    if rank == 2:
        return Role.LINEAR
    # Experts are stacked linear weights [experts, out, in]: no kernel slides over anything there.
    is_kernel = 3 <= rank <= 5 and last == "weight" and "expert" not in name
    return Role.CONVOLUTION if is_kernel else Role.OTHER


def _vector(last: str) -> Role:
    if _SHIFT.search(last):
        return Role.SHIFT
    return Role.SCALE if _SCALE.search(last) else Role.OTHER
