"""Tiny configurations of every architecture whose parameters must have a role and be seen, with inputs for each."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.workers.tiny_models import IMAGE, TEXT, pixels, tokens

CHAT: dict[str, Any] = {**TEXT, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CLIP_TEXT: dict[str, Any] = {**TEXT, "bos_token_id": 1, "eos_token_id": 2}
BLIP_TEXT: dict[str, Any] = {
    **TEXT,
    "encoder_hidden_size": 16,
    "projection_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
    "pad_token_id": 0,
}
BLIP: dict[str, Any] = {
    "text_config": BLIP_TEXT,
    "vision_config": IMAGE,
    "projection_dim": 8,
    "image_text_hidden_size": 8,
}
T5: dict[str, Any] = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
PAIR: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
WHISPER: dict[str, Any] = {
    **PAIR,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 20,
    "begin_suppress_tokens": None,
    "suppress_tokens": None,
}
EXPERTS: dict[str, Any] = {
    **CHAT,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}


NO_YARN: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


def whole(samples: int = 5) -> dict[str, Tensor]:
    """Random tokens without padding, for models that look at it: SigLIP by design, BLIP's answers by a missing mask."""
    return {"input_ids": tokens(samples)["input_ids"]}


def targets(samples: int = 5, length: int = 8) -> dict[str, Tensor]:
    """Random tokens for a decoder; their lengths are others than those of ``tokens``."""
    found = tokens(samples, length, seed=7)
    return {f"decoder_{name}": values for name, values in found.items()}


def sounds(samples: int = 5) -> dict[str, Tensor]:
    """Random spectrograms."""
    return {"input_features": torch.randn(samples, 8, 20, generator=torch.Generator().manual_seed(1))}


@dataclass(frozen=True)
class Case:
    """A configuration and inputs, and what is known not to be trimmed: parts of names, each with its reason."""

    model_type: str
    values: dict[str, Any]
    inputs: dict[str, Tensor]
    other: tuple[str, ...] = ()  # no treatment fits: scalars, running statistics, buffers
    unseen: tuple[str, ...] = ()  # inputs that no second moment describes, or that this forward pass has none of


TEMPERATURE = ("logit_scale", "logit_bias")
RUNNING = ("running_", "num_batches_tracked")
WHOLE_TABLE = ("rel_embeddings",)  # normalized as a whole and multiplied: no row is looked up
UNUSED_HEADS = ("text_proj", "vision_proj")  # the contrastive heads, which the matching head's pass leaves out
TWO_INPUTS = ("head.attention.in_proj_weight",)  # query from a probe, key and value from the image

CASES: dict[str, Case] = {
    "BertForMaskedLM": Case("bert", TEXT, tokens()),
    "BertForSequenceClassification": Case("bert", TEXT, tokens()),
    "RobertaForSequenceClassification": Case("roberta", {**TEXT, "pad_token_id": 0}, tokens()),
    "DebertaV2ForSequenceClassification": Case(
        "deberta-v2",
        {
            **TEXT,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 4,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
        },
        tokens(),
        unseen=WHOLE_TABLE,
    ),
    "DistilBertForSequenceClassification": Case(
        "distilbert",
        {"vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 20},
        tokens(),
    ),
    "ViTForImageClassification": Case("vit", IMAGE, pixels()),
    "CLIPModel": Case(
        "clip",
        {"text_config": CLIP_TEXT, "vision_config": IMAGE, "projection_dim": 8},
        {**tokens(5, 5), **pixels(5)},
        other=TEMPERATURE,
    ),
    "CLIPTextModelWithProjection": Case("clip_text_model", CLIP_TEXT, tokens()),
    "CLIPVisionModelWithProjection": Case("clip_vision_model", IMAGE, pixels()),
    "SiglipModel": Case(
        "siglip",
        {"text_config": {**CLIP_TEXT, "projection_size": 16}, "vision_config": IMAGE},
        {**whole(), **pixels(5)},
        other=TEMPERATURE,
        unseen=TWO_INPUTS,
    ),
    "Dinov2ForImageClassification": Case("dinov2", {**IMAGE, "use_swiglu_ffn": True}, pixels()),
    "SwinForImageClassification": Case(
        "swin",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4},
        pixels(),
    ),
    "ConvNextForImageClassification": Case(
        "convnext",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 16},
        pixels(),
    ),
    "ConvNextV2ForImageClassification": Case(
        "convnextv2",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 16},
        pixels(),
    ),
    "ResNetForImageClassification": Case(
        "resnet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}, pixels(3, 32), other=RUNNING
    ),
    "GPT2LMHeadModel": Case(
        "gpt2",
        {
            "vocab_size": 50,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 20,
            "bos_token_id": 1,
            "eos_token_id": 0,
        },
        tokens(),
    ),
    "GPTNeoXForCausalLM": Case("gpt_neox", TEXT, tokens()),
    "LlamaForCausalLM": Case("llama", {**CHAT, "tie_word_embeddings": True}, tokens()),
    "MistralForCausalLM": Case("mistral", CHAT, tokens()),
    "Qwen2ForCausalLM": Case("qwen2", CHAT, tokens()),
    "Qwen3ForCausalLM": Case("qwen3", {**CHAT, "head_dim": 8}, tokens()),
    "GemmaForCausalLM": Case("gemma", {**CHAT, "head_dim": 8}, tokens()),
    "Gemma3ForCausalLM": Case("gemma3_text", {**CHAT, "head_dim": 8}, tokens()),
    "Phi3ForCausalLM": Case("phi3", CHAT, tokens()),
    "MixtralForCausalLM": Case("mixtral", {**CHAT, "num_local_experts": 4, "num_experts_per_tok": 2}, tokens()),
    "Qwen2MoeForCausalLM": Case("qwen2_moe", EXPERTS, tokens()),
    "Qwen3MoeForCausalLM": Case("qwen3_moe", {**EXPERTS, "head_dim": 8}, tokens()),
    "GptOssForCausalLM": Case(
        "gpt_oss", {**CHAT, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **NO_YARN}, tokens()
    ),
    "T5ForConditionalGeneration": Case("t5", T5, {**tokens(5), **targets()}),
    "T5EncoderModel": Case("t5", T5, tokens()),
    "BartForConditionalGeneration": Case(
        "bart", {**PAIR, "max_position_embeddings": 20}, {**tokens(5), **targets()}, other=("final_logits_bias",)
    ),
    "WhisperForConditionalGeneration": Case("whisper", WHISPER, {**sounds(), **targets()}),
    "BlipForImageTextRetrieval": Case("blip", BLIP, {**tokens(5), **pixels(5)}, unseen=UNUSED_HEADS),
    "BlipForConditionalGeneration": Case("blip", BLIP, {**tokens(5, 5), **pixels(5)}),
    "BlipForQuestionAnswering": Case("blip", BLIP, {**whole(), **pixels(5), **targets()}),
}
