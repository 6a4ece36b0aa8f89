"""What models answer beyond one class per sample: a tag per token, the likelihood of text, and text itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig

from service.contract.errors import BadInput, UnsupportedArchitecture
from service.contract.notices import Notice
from workers.exemplars import longest_sequence
from workers.forward import unpadded_places

LOGIT_BYTES = 256 << 20  # of one batch: a vocabulary is large, and a batch size is chosen with classes in mind
IGNORED = -100
MAX_NEW_TOKENS = 64
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id")

OnBatch = Callable[[], None]


def token_classes(model: nn.Module, inputs: Mapping[str, Tensor], batch_size: int, on_batch: OnBatch) -> Tensor:
    """The class ``[n, length]`` that the model gives each token, on the CPU; what it gives to padding says nothing.

    Raises:
        BadInput: a token's scores are NaN or infinite.
        UnsupportedArchitecture: the model has no head that scores classes per token.
    """
    found = []
    for batch, kept in unpadded_places(model, inputs, batch_size):
        logits = _logits(model, batch)
        if logits is None or logits.shape[:2] != batch["input_ids"].shape:
            raise UnsupportedArchitecture(f"{type(model).__name__} has no head that scores classes per token")
        _refuse_unbounded(logits[_attended(batch)])
        found.append(_padded(logits.argmax(-1), kept, inputs))
        on_batch()
    return torch.cat(found)


def token_losses(model: nn.Module, inputs: Mapping[str, Tensor], batch_size: int, on_batch: OnBatch) -> Tensor:
    """-log p of each token given those before it, ``[n, length]`` float64 on the CPU; first tokens and padding have 0.

    Raises:
        BadInput: the likelihood of a token is NaN or infinite.
        UnsupportedArchitecture: the model does not foretell a text's next token.
    """
    refuse_unless_causal(model)
    losses = []
    for batch, kept in unpadded_places(model, inputs, _rows(model, inputs, batch_size)):
        logits = _logits(model, batch)
        if logits is None or logits.shape[:2] != batch["input_ids"].shape:
            raise UnsupportedArchitecture(f"{type(model).__name__} gives no scores of the next token")
        losses.append(_padded(_losses(logits.float(), batch["input_ids"], _attended(batch)), kept, inputs))
        on_batch()
    return torch.cat(losses)


def refuse_unless_causal(model: Any) -> None:
    """Refuse models that see a whole text at once, and those that read one text and write another.

    Raises:
        UnsupportedArchitecture: ``model`` is one of them.
    """
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise UnsupportedArchitecture(
            f"{type(model).__name__} does not foretell a text's next token from those before it; "
            "likelihoods need a causal language model"
        )


def choice_scores(model: nn.Module, inputs: Mapping[str, Tensor], batch_size: int, on_batch: OnBatch) -> Tensor:
    """What a head for multiple choice scores ``[n, choices, length]`` inputs: ``[n, choices]`` float64 on the CPU.

    Raises:
        BadInput: a score is NaN or infinite.
        UnsupportedArchitecture: the model has no such head.
    """
    scores = []
    for batch, _ in unpadded_places(model, inputs, batch_size):
        logits = _logits(model, batch)
        if logits is None or logits.shape != batch["input_ids"].shape[:2]:
            raise UnsupportedArchitecture(f"{type(model).__name__} has no head that scores choices")
        _refuse_unbounded(logits)
        scores.append(logits.double().cpu())
        on_batch()
    return torch.cat(scores)


def written_texts(
    model: Any,
    inputs: Mapping[str, Tensor],
    batch_size: int,
    tokenizer: Any,
    max_new_tokens: int | None,
    on_batch: OnBatch,
    stated: Mapping[str, Any] | None = None,
) -> list[str]:
    """The text that the model writes to each sample, token by token the likeliest one (greedily); prompts left out.

    Without ``max_new_tokens`` there are 64 at most, or as many as the model has positions left for. ``stated`` is the
    checkpoint's ``generation_config.json``: which tokens begin, end and pad a text is taken from it, and nothing else.

    Raises:
        BadInput: prompts of a causal model are padded at their end or leave no room, or the model gives NaN.
        UnsupportedArchitecture: the model writes no text.
    """
    refuse_unless_writing(model)
    repeats_prompt = not model.config.is_encoder_decoder and "input_ids" in inputs
    if repeats_prompt:
        _refuse_ended(model, inputs)
    model.generation_config = _special_tokens(model, tokenizer, stated or {})
    new_tokens = _room(model, inputs, max_new_tokens, repeats_prompt=repeats_prompt)
    greedy: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": new_tokens}
    texts: list[str] = []
    for batch, _ in unpadded_places(model, inputs, batch_size):
        try:
            with torch.no_grad():
                written = model.generate(**batch, **greedy, logits_processor=[_refuse_nan])
        except (IndexError, TypeError, ValueError) as error:
            raise UnsupportedArchitecture(f"{type(model).__name__} can't write text: {error}") from error
        prompt = batch["input_ids"].shape[1] if repeats_prompt else 0
        texts += tokenizer.batch_decode(written[:, prompt:].cpu(), skip_special_tokens=True)
        on_batch()
    return texts


def refuse_unless_writing(model: Any) -> None:
    """Refuse models that write no text. Raises UnsupportedArchitecture."""
    if not model.can_generate():
        raise UnsupportedArchitecture(f"{type(model).__name__} writes no text")


def _padded(values: Tensor, kept: slice, inputs: Mapping[str, Tensor]) -> Tensor:
    """Values ``[n, kept]`` at their places among all positions, on the CPU; zeros elsewhere."""
    padded = torch.zeros(len(values), inputs["input_ids"].shape[-1], dtype=values.dtype)
    padded[:, kept] = values.cpu()
    return padded


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor | None:
    with torch.no_grad():
        logits = getattr(model(**batch), "logits", None)
    return logits if isinstance(logits, Tensor) else None


def _attended(batch: Mapping[str, Tensor]) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _refuse_unbounded(values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise BadInput(Notice("tokens_not_finite"))


def _refuse_nan(_: Tensor, scores: Tensor) -> Tensor:
    """A step of ``generate`` that changes nothing: -inf only forbids a token, but NaN would write one at random."""
    if bool(scores.isnan().any()):
        raise BadInput(Notice("tokens_not_finite"))
    return scores


def _rows(model: Any, inputs: Mapping[str, Tensor], batch_size: int) -> int:
    """As many samples at a time as give logits of ``LOGIT_BYTES``; the same on every machine."""
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", None) or 1)
    return max(1, min(batch_size, LOGIT_BYTES // (4 * vocabulary * max(1, inputs["input_ids"].shape[-1]))))


def _losses(logits: Tensor, ids: Tensor, attended: Tensor) -> Tensor:
    losses = torch.zeros_like(ids, dtype=torch.float64)
    foretold = attended[:, 1:] & attended[:, :-1]
    following = functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    _refuse_unbounded(following[foretold])
    losses[:, 1:] = torch.where(foretold, following, 0.0).double()
    return losses


def _refuse_ended(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Refuse prompts with padding where the model is to go on."""
    ended = inputs["attention_mask"][:, -1] == 0 if "attention_mask" in inputs else torch.zeros(1, dtype=torch.bool)
    if bool(ended.any()):
        raise BadInput(
            f"sample {int(ended.nonzero()[0])} ends in padding; {type(model).__name__} goes on where its input ends, "
            "so pad at the beginning"
        )


def _room(model: Any, inputs: Mapping[str, Tensor], max_new_tokens: int | None, *, repeats_prompt: bool) -> int:
    """How many tokens to write at most. Raises BadInput where the model has no positions for so many."""
    config = model.config.get_text_config(decoder=True)
    longest = (
        getattr(config, "max_position_embeddings", None) if not repeats_prompt else longest_sequence(model, config)
    )
    if not isinstance(longest, int):
        return max_new_tokens or MAX_NEW_TOKENS
    begun = _longest_prompt(inputs) if repeats_prompt else 1  # the token that a decoder starts with
    wanted = max_new_tokens or min(MAX_NEW_TOKENS, longest - begun)
    if wanted < 1 or begun + wanted > longest:
        new = f"{max_new_tokens} new ones (max_new_tokens)" if max_new_tokens else "a new one"
        raise BadInput(
            f"{type(model).__name__} has {longest} positions: too few for {begun} tokens to go on from and {new}; "
            "shorten the prompts, or ask for fewer"
        )
    return wanted


def _longest_prompt(inputs: Mapping[str, Tensor]) -> int:
    """The tokens of the longest prompt, padding at its beginning left out."""
    mask = inputs.get("attention_mask")
    return int(inputs["input_ids"].shape[1] if mask is None else mask.long().sum(1).max())


def _special_tokens(model: Any, tokenizer: Any, stated: Mapping[str, Any]) -> GenerationConfig:
    """What the checkpoint and its tokenizer say about beginning, end and padding, and nothing else they may ask for.

    What generation_config.json states stands before what transformers takes from config.json.
    """
    known = GenerationConfig(**_stated_tokens(model.generation_config, stated))  # type: ignore[no-untyped-call]
    ends = sorted({*_listed(known.eos_token_id), *_listed(tokenizer.eos_token_id)})
    padding = (number for number in (known.pad_token_id, tokenizer.pad_token_id, *ends) if number is not None)
    return GenerationConfig(  # type: ignore[no-untyped-call]
        pad_token_id=next(padding, 0),
        bos_token_id=tokenizer.bos_token_id if known.bos_token_id is None else known.bos_token_id,
        eos_token_id=ends or None,
        decoder_start_token_id=known.decoder_start_token_id,
        forced_bos_token_id=known.forced_bos_token_id,
    )


def _stated_tokens(known: GenerationConfig, stated: Mapping[str, Any]) -> dict[str, Any]:
    return {name: stated.get(name, getattr(known, name)) for name in SPECIAL}


def _listed(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]
