"""Roles guessed from names and shapes alone."""

import pytest

from service.contract.roles import guess_parameter, guess_role
from service.contract.treatments import Role


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("encoder.layer.0.attention.self.query.weight", (16, 16), Role.LINEAR),
        ("encoder.embedding_hidden_mapping_in.weight", (16, 8), Role.LINEAR),
        ("attn.in_proj_weight", (48, 16), Role.LINEAR),
        ("embeddings.word_embeddings.weight", (50, 16), Role.EMBEDDING),
        ("model.embed_tokens.weight", (50, 16), Role.EMBEDDING),
        ("transformer.wte.weight", (50, 16), Role.EMBEDDING),
        ("transformer.wpe.weight", (20, 16), Role.EMBEDDING),
        ("text_model.embeddings.token_embedding.weight", (50, 16), Role.EMBEDDING),
        ("shared.weight", (50, 16), Role.EMBEDDING),
        ("embeddings.position_embeddings", (1, 5, 16), Role.EMBEDDING),
        ("positional_embedding", (5, 16), Role.EMBEDDING),
        ("visual.pos_embed", (1, 5, 16), Role.EMBEDDING),
        ("encoder.LayerNorm.weight", (16,), Role.SCALE),
        ("encoder.LayerNorm.gamma", (16,), Role.SCALE),
        ("model.norm.weight", (16,), Role.SCALE),
        ("encoder.LayerNorm.beta", (16,), Role.SHIFT),
        ("encoder.layer.0.output.dense.bias", (16,), Role.SHIFT),
        ("attention.q_bias", (16,), Role.SHIFT),
        ("embeddings.cls_token", (1, 1, 16), Role.SHIFT),
        ("embeddings.class_embedding", (16,), Role.SHIFT),
        ("embeddings.mask_token", (1, 16), Role.SHIFT),
        ("embeddings.patch_embeddings.projection.weight", (16, 3, 8, 8), Role.CONVOLUTION),
        ("feature_extractor.conv_layers.0.conv.weight", (8, 1, 3), Role.CONVOLUTION),
        ("bn.running_mean", (16,), Role.OTHER),
        ("bn.num_batches_tracked", (), Role.OTHER),
        ("embeddings.position_ids", (1, 20), Role.OTHER),
        ("logit_scale", (), Role.OTHER),
        ("h.0.attn.bias", (1, 1, 20, 20), Role.OTHER),
        ("mlp.experts.gate_up_proj", (4, 32, 16), Role.OTHER),
        ("mlp.experts.weight", (4, 32, 16), Role.OTHER),
    ],
)
def test_names_and_shapes_tell_the_role(name: str, shape: tuple[int, ...], role: Role) -> None:
    assert guess_role(name, shape) is role


def test_a_guess_says_that_it_is_one_and_which_layout_it_takes() -> None:
    table = guess_parameter("wte.weight", (50, 16))
    assert (table.role, table.transposed, table.guessed, table.tied_to) == (Role.EMBEDDING, True, True, None)
    assert not guess_parameter("dense.weight", (50, 16)).transposed
