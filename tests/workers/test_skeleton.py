"""What each tensor of a checkpoint is, for architectures that transformers knows and for others."""

from pathlib import Path
from typing import Any

import pytest
import torch

from service.contract.roles import Parameter
from service.contract.treatments import Role
from tests.workers.tiny_models import IMAGE, TEXT, build, configuration, saved, shapes
from workers.skeleton import Skeleton, read_skeleton

CASES = {
    "BertModel": ("bert", TEXT),
    "BertForSequenceClassification": ("bert", TEXT),
    "BertForMaskedLM": ("bert", TEXT),
    "ViTModel": ("vit", IMAGE),
    "ViTForImageClassification": ("vit", IMAGE),
    "RobertaForSequenceClassification": ("roberta", TEXT),
    "DistilBertForSequenceClassification": (
        "distilbert",
        {"vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 20},
    ),
    "DeiTForImageClassification": ("deit", IMAGE),
    "Dinov2Model": ("dinov2", IMAGE),
    "Dinov2ForImageClassification": ("dinov2", {**IMAGE, "use_swiglu_ffn": True}),
    "CLIPModel": ("clip", {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 8}),
    "CLIPVisionModelWithProjection": ("clip_vision_model", IMAGE),
    "GPT2LMHeadModel": (
        "gpt2",
        {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20, "eos_token_id": 0},
    ),
    "LlamaForCausalLM": ("llama", {**TEXT, "tie_word_embeddings": True}),
    "ResNetForImageClassification": ("resnet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}),
}


def skeleton_of(architecture: str, folder: Path) -> tuple[Skeleton, dict[str, tuple[int, ...]]]:
    model_type, values = CASES[architecture]
    config, tensors = saved(build(architecture, configuration(model_type, **values)), folder)
    return read_skeleton(config, shapes(tensors)), shapes(tensors)


@pytest.mark.parametrize("architecture", list(CASES))
def test_every_tensor_of_a_known_architecture_is_placed(architecture: str, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    skeleton, tensors = skeleton_of(architecture, tmp_path)
    assert skeleton.warnings == ()
    assert set(skeleton.parameters) == set(skeleton.memory_names) == set(tensors)
    assert not any(parameter.guessed for parameter in skeleton.parameters.values())
    unclear = [n for n, p in skeleton.parameters.items() if p.role is Role.OTHER and "num_batches" not in n]
    assert [name for name in unclear if name != "logit_scale" and "running_" not in name] == []
    assert torch.equal(before, torch.get_rng_state())


def test_bert(tmp_path: Path) -> None:
    skeleton, _ = skeleton_of("BertForSequenceClassification", tmp_path)
    layer = "bert.encoder.layer.0"
    expected = {
        "bert.embeddings.word_embeddings.weight": Parameter(Role.EMBEDDING, transposed=True),
        "bert.embeddings.position_embeddings.weight": Parameter(Role.EMBEDDING, transposed=True),
        "bert.embeddings.LayerNorm.weight": Parameter(Role.SCALE),
        "bert.embeddings.LayerNorm.bias": Parameter(Role.SHIFT),
        f"{layer}.attention.self.query.weight": Parameter(Role.LINEAR),
        f"{layer}.attention.self.query.bias": Parameter(Role.SHIFT),
        "bert.pooler.dense.weight": Parameter(Role.LINEAR),
        "classifier.weight": Parameter(Role.LINEAR),
    }
    assert {name: skeleton.parameters[name] for name in expected} == expected


def test_vit_is_renamed_in_memory(tmp_path: Path) -> None:
    skeleton, _ = skeleton_of("ViTModel", tmp_path)
    assert skeleton.parameters["embeddings.cls_token"] == Parameter(Role.SHIFT)
    assert skeleton.parameters["embeddings.position_embeddings"] == Parameter(Role.EMBEDDING, transposed=True)
    assert skeleton.parameters["embeddings.patch_embeddings.projection.weight"] == Parameter(Role.CONVOLUTION)
    query = "encoder.layer.0.attention.attention.query.weight"
    assert skeleton.parameters[query] == Parameter(Role.LINEAR)
    assert skeleton.memory_names[query] != query


def test_packed_weights_go_by_the_first_part_and_layer_scales_are_scales(tmp_path: Path) -> None:
    skeleton, _ = skeleton_of("Dinov2ForImageClassification", tmp_path)
    packed = "dinov2.encoder.layer.0.mlp.weights_in.weight"
    assert skeleton.parameters[packed] == Parameter(Role.LINEAR)
    assert skeleton.memory_names[packed] == "dinov2.encoder.layer.0.mlp.gate_proj.weight"
    assert skeleton.parameters["dinov2.encoder.layer.0.layer_scale1.lambda1"] == Parameter(Role.SCALE)


def test_gpt2_weights_are_transposed(tmp_path: Path) -> None:
    skeleton, _ = skeleton_of("GPT2LMHeadModel", tmp_path)
    assert skeleton.parameters["transformer.h.0.attn.c_attn.weight"] == Parameter(Role.LINEAR, transposed=True)
    assert skeleton.parameters["transformer.h.0.ln_1.weight"] == Parameter(Role.SCALE)


def test_a_tied_tensor_is_what_its_source_is(tmp_path: Path) -> None:
    config, tensors = saved(build("BertForMaskedLM", configuration("bert", **TEXT)), tmp_path)
    words, decoder = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    assert decoder not in tensors
    both = {**shapes(tensors), decoder: (50, 16), "cls.predictions.decoder.bias": (50,)}
    parameters = read_skeleton(config, both).parameters
    assert parameters[decoder] == Parameter(Role.EMBEDDING, transposed=True, tied_to=words)
    assert parameters["cls.predictions.decoder.bias"] == Parameter(Role.SHIFT, tied_to="cls.predictions.bias")
    assert parameters[words].tied_to is None
    alone = {name: shape for name, shape in both.items() if name != words}
    assert read_skeleton(config, alone).parameters[decoder] == Parameter(Role.EMBEDDING, transposed=True)


@pytest.mark.parametrize(
    ("architecture", "in_file", "in_memory"),
    [
        ("BertForSequenceClassification", "pooler.dense.weight", "bert.pooler.dense.weight"),
        ("BertModel", "bert.pooler.dense.weight", "pooler.dense.weight"),
        ("BertModel", "encoder.layer.0.output.LayerNorm.gamma", "encoder.layer.0.output.LayerNorm.weight"),
    ],
)
def test_prefixes_and_old_spellings(architecture: str, in_file: str, in_memory: str) -> None:
    config = {"architectures": [architecture], "model_type": "bert", **TEXT}
    assert read_skeleton(config, {in_file: (16,)}).memory_names == {in_file: in_memory}


def test_old_clip_prefix() -> None:
    config = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", **IMAGE}
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    skeleton = read_skeleton(config, {name: (32, 16)})
    assert skeleton.parameters[name] == Parameter(Role.LINEAR)


def test_what_has_no_place_or_another_rank_is_guessed() -> None:
    config = {"architectures": ["BertModel"], "model_type": "bert", **TEXT}
    skeleton = read_skeleton(config, {"adapter.down.weight": (4, 16), "pooler.dense.weight": (16, 16, 1)})
    assert skeleton.parameters["adapter.down.weight"] == Parameter(Role.LINEAR, guessed=True)
    assert skeleton.parameters["pooler.dense.weight"].guessed
    assert "adapter.down.weight" not in skeleton.memory_names
    assert "no place for 1 tensors" in skeleton.warnings[0]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, "no config.json"),
        ({"model_type": "bert"}, "names no architecture"),
        ({"architectures": ["NopeModel"], "model_type": "bert"}, "'NopeModel'"),
        ({"architectures": ["AutoModel"], "model_type": "bert"}, "'AutoModel'"),
        ({"architectures": ["BertModel"], "model_type": "nope"}, "'nope'"),
        ({"architectures": ["BertModel"], "model_type": "vit"}, "BertModel and model_type 'vit'"),
        ({"architectures": ["BertModel"], "model_type": "bert", "hidden_size": "x"}, "no bert configuration"),
        ({"architectures": ["BertModel"], "model_type": "bert", "num_attention_heads": 0}, "can't be built"),
        ({"architectures": ["BertModel"], "model_type": "bert", "quantization_config": {"bits": 4}}, "quantized"),
    ],
)
def test_without_a_known_architecture_everything_is_guessed(config: dict[str, Any], reason: str) -> None:
    skeleton = read_skeleton(config, {"layer.weight": (4, 4), "layer.bias": (4,)})
    assert skeleton.parameters["layer.weight"] == Parameter(Role.LINEAR, guessed=True)
    assert skeleton.parameters["layer.bias"] == Parameter(Role.SHIFT, guessed=True)
    assert skeleton.memory_names == {}
    assert reason in skeleton.warnings[0]


def test_code_and_kernels_named_in_a_config_are_ignored() -> None:
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        **TEXT,
        "auto_map": {"AutoModel": "somewhere/else--modeling.Evil"},
        "attn_implementation": "somewhere/kernel",
        "_attn_implementation": "flash_attention_2",
    }
    assert read_skeleton(config, {"pooler.dense.weight": (16, 16)}).warnings == ()
