"""Every tensor of every architecture has a role, and the inputs of every parameter that needs them are seen."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from service.contract.errors import BadInput
from service.contract.treatments import Role
from tests.workers.architectures import CASES, CHAT, T5, Case, targets
from tests.workers.tiny_models import build, configuration, pixels, saved, shapes, tokens
from workers.forward import check_inputs, load_model, watch_inputs
from workers.hooks import WATCHED_ROLES
from workers.observing import Batch, Call, observe
from workers.positions import padded_masks
from workers.skeleton import Skeleton, read_skeleton
from workers.statistics import Statistic

Statistics = Mapping[str, Statistic]


def silent(done: int, total: int) -> None:
    """No progress is looked at."""


def opened(architecture: str, case: Case, folder: Path) -> tuple[Any, Skeleton]:
    """A tiny model that went through a file, and what its tensors are."""
    config, tensors = saved(build(architecture, configuration(case.model_type, **case.values)), folder)
    return load_model(config, tensors, "cpu"), read_skeleton(config, shapes(tensors))


def watch(model: Any, skeleton: Skeleton, inputs: dict[str, Tensor], batch_size: int = 4) -> Statistics:
    return watch_inputs(model, skeleton, inputs, batch_size, set(skeleton.parameters), silent)


def moment(statistic: Statistic) -> Tensor:
    return statistic.held.mT @ statistic.held if statistic.factor is not None else statistic.held.float()


def is_named(name: str, parts: tuple[str, ...]) -> bool:
    return any(part in name for part in parts)


def repadded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same samples with other tokens where nothing is attended."""
    found = dict(inputs)
    for prefix in ("", "decoder_"):
        if f"{prefix}attention_mask" in inputs:
            ids, mask = inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"]
            found[f"{prefix}input_ids"] = torch.where(mask.bool(), ids, 3)
    return found


@pytest.mark.parametrize("architecture", list(CASES))
def test_every_tensor_has_its_role_and_every_parameter_is_seen(architecture: str, tmp_path: Path) -> None:
    case = CASES[architecture]
    model, skeleton = opened(architecture, case, tmp_path)
    assert skeleton.warnings == ()
    assert set(skeleton.memory_names) == set(skeleton.parameters)
    assert [name for name, parameter in skeleton.parameters.items() if parameter.guessed] == []
    other = [name for name, parameter in skeleton.parameters.items() if parameter.role is Role.OTHER]
    assert [name for name in other if not is_named(name, case.other)] == []

    check_inputs(model, case.inputs)
    statistics = watch(model, skeleton, case.inputs)
    wanted = {name for name, parameter in skeleton.parameters.items() if parameter.role in WATCHED_ROLES}
    assert [name for name in sorted(wanted - set(statistics)) if not is_named(name, case.unseen)] == []
    assert [name for name in statistics if is_named(name, case.unseen)] == []
    assert not any(module._forward_pre_hooks for module in model.modules())
    if padded_masks(case.inputs):
        assert_padding_is_no_input(statistics, watch(model, skeleton, repadded(case.inputs)))


def assert_padding_is_no_input(statistics: Statistics, again: Statistics) -> None:
    assert set(statistics) == set(again)
    for name, statistic in statistics.items():
        assert statistic.rows == again[name].rows, name
        torch.testing.assert_close(moment(statistic), moment(again[name]), rtol=1e-3, atol=1e-3, msg=name)


def test_as_many_patches_as_tokens_are_not_padding(tmp_path: Path) -> None:
    case = CASES["CLIPModel"]
    model, skeleton = opened("CLIPModel", case, tmp_path)
    statistics, attended = watch(model, skeleton, case.inputs), int(case.inputs["attention_mask"].sum())
    assert case.inputs["input_ids"].shape == (5, 5)
    for layer in ("mlp.fc1.weight", "self_attn.q_proj.weight", "layer_norm1.weight"):
        assert statistics[f"vision_model.encoder.layers.0.{layer}"].rows == 5 * 5
        assert statistics[f"text_model.encoder.layers.0.{layer}"].rows == attended


@pytest.mark.parametrize("length", [8, 6])
def test_each_text_of_a_pair_has_its_own_padding(length: int, tmp_path: Path) -> None:
    inputs = {**tokens(5), **targets(5, length)}
    model, skeleton = opened("T5ForConditionalGeneration", Case("t5", T5, inputs), tmp_path)
    statistics = watch(model, skeleton, inputs)
    source, target = (int(inputs[f"{prefix}attention_mask"].sum()) for prefix in ("", "decoder_"))
    assert source != target
    block = "decoder.block.0.layer"
    rows = {
        "encoder.block.0.layer.0.SelfAttention.q.weight": source,
        f"{block}.0.SelfAttention.q.weight": target,
        f"{block}.1.EncDecAttention.q.weight": target,
        f"{block}.1.EncDecAttention.k.weight": source,
        f"{block}.2.DenseReluDense.wo.weight": target,
        "shared.weight": source + target,
    }
    assert {name: statistics[name].rows for name in rows} == rows


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_on_either_side(side: str, tmp_path: Path) -> None:
    inputs = tokens()
    if side == "left":
        inputs = {name: values.flip(1) for name, values in inputs.items()}
    model, skeleton = opened("LlamaForCausalLM", Case("llama", CHAT, inputs), tmp_path)
    statistics = watch(model, skeleton, inputs)
    assert statistics["model.layers.1.mlp.down_proj.weight"].rows == int(inputs["attention_mask"].sum())


def routed(model: Any, inputs: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """What each module of experts got in one pass over all samples: hidden states, routes and weights."""
    seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[path] = args

        return hook

    handles = [
        module.register_forward_pre_hook(keep(path))
        for path, module in model.named_modules()
        if path.endswith(".experts")
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def test_an_expert_of_mixtral_sees_the_rows_that_are_routed_to_it(tmp_path: Path) -> None:
    case = CASES["MixtralForCausalLM"]
    model, skeleton = opened("MixtralForCausalLM", case, tmp_path)
    statistics, mask = watch(model, skeleton, case.inputs), case.inputs["attention_mask"].bool().flatten()
    experts = model.model.layers[1].mlp.experts
    x, routes, _ = routed(model, case.inputs)["model.layers.1.mlp.experts"]
    prefix = "model.layers.1.block_sparse_moe.experts"
    for expert in range(4):
        rows = x[(routes == expert).any(1) & mask]
        gate, up = functional.linear(rows, experts.gate_up_proj[expert]).chunk(2, -1)
        for matrix, inner in {"w1": rows, "w3": rows, "w2": functional.silu(gate) * up}.items():
            statistic = statistics[f"{prefix}.{expert}.{matrix}.weight"]
            assert statistic.rows == len(rows)
            torch.testing.assert_close(moment(statistic), inner.T @ inner, rtol=1e-4, atol=1e-4)
    assert sum(statistics[f"{prefix}.{expert}.w1.weight"].rows for expert in range(4)) == 2 * int(mask.sum())
    assert statistics["model.layers.1.block_sparse_moe.gate.weight"].rows == int(mask.sum())


def test_stacked_experts_have_one_factor_each(tmp_path: Path) -> None:
    case = CASES["GptOssForCausalLM"]
    model, skeleton = opened("GptOssForCausalLM", case, tmp_path)
    statistics, mask = watch(model, skeleton, case.inputs), case.inputs["attention_mask"].bool().flatten()
    experts = model.model.layers[0].mlp.experts
    x, routes, _ = routed(model, case.inputs)["model.layers.0.mlp.experts"]
    prefix = "model.layers.0.mlp.experts"
    parameter = skeleton.parameters[f"{prefix}.gate_up_proj"]
    assert (parameter.role, parameter.transposed, parameter.blocks) == (Role.EXPERTS, True, 4)
    for expert in range(4):
        rows = x[(routes == expert).any(1) & mask]
        inner = experts._apply_gate(rows @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert])
        for matrix, seen in {"gate_up_proj": rows, "down_proj": inner}.items():
            statistic = statistics[f"{prefix}.{matrix}"].block(expert)
            assert statistic.rows == len(rows)
            torch.testing.assert_close(moment(statistic), seen.T @ seen, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_own_attention(batch_first: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first).eval()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(3, 5, 8, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    given = x if batch_first else x.transpose(0, 1)
    call = Call(attention, (given, given, given), {"key_padding_mask": mask == 0, "need_weights": False})
    with torch.no_grad():
        packed = observe(call, "in_proj_weight", Role.LINEAR, Batch(3, mask), None)
        mixed = observe(call, "out_proj.weight", Role.LINEAR, Batch(3, mask), None)
        q, k, v = (
            part.reshape(3, 5, 2, 4).transpose(1, 2)
            for part in functional.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
        )
        answer = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.bool()[:, None, None])
        rows = answer.transpose(1, 2).flatten(2)[mask.bool()]
    assert packed is not None
    assert mixed is not None
    torch.testing.assert_close(moment(packed), x[mask.bool()].T @ x[mask.bool()], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moment(mixed), rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_query_and_key_of_different_inputs_have_no_one_statistic() -> None:
    x, y = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    call = Call(nn.MultiheadAttention(8, 2, batch_first=True), (x, y, y), {})
    assert observe(call, "in_proj_weight", Role.LINEAR, Batch(2, None), None) is None


def test_swin_counts_how_often_each_offset_is_used(tmp_path: Path) -> None:
    case = CASES["SwinForImageClassification"]
    model, skeleton = opened("SwinForImageClassification", case, tmp_path)
    statistic = watch(model, skeleton, case.inputs)[
        "swin.encoder.layers.0.blocks.0.attention.self.relative_position_bias_table"
    ]
    assert statistic.diagonal is not None
    counts = statistic.diagonal.view(7, 7) / statistic.diagonal.min()  # offsets -3 to 3 in a window of 4 by 4
    along = 4 - torch.arange(-3, 4).abs().double()
    torch.testing.assert_close(counts, along[:, None] * along)


def test_whisper_counts_the_positions_it_slices(tmp_path: Path) -> None:
    case = CASES["WhisperForConditionalGeneration"]
    model, skeleton = opened("WhisperForConditionalGeneration", case, tmp_path)
    statistic = watch(model, skeleton, case.inputs)["model.decoder.embed_positions.weight"]
    mask = case.inputs["decoder_attention_mask"]
    assert statistic.diagonal is not None
    assert statistic.diagonal.tolist() == [*mask.sum(0).double().tolist(), *[0.0] * 12]


def test_convnext_layer_scales_multiply_the_branch(tmp_path: Path) -> None:
    model, skeleton = opened("ConvNextForImageClassification", CASES["ConvNextForImageClassification"], tmp_path)
    seen: list[Tensor] = []
    layer = model.convnext.encoder.stages[0].layers[0]
    layer.pwconv2.register_forward_hook(lambda _module, _args, out: seen.append(out))
    statistic = watch(model, skeleton, pixels(), 5)["convnext.encoder.stages.0.layers.0.layer_scale_parameter"]
    squares = seen[-1].reshape(-1, 8).double().square().sum(0)
    torch.testing.assert_close(statistic.diagonal, squares, rtol=1e-4, atol=1e-8)


def test_a_decoder_without_its_tokens_is_refused(tmp_path: Path) -> None:
    model, _ = opened("T5ForConditionalGeneration", Case("t5", T5, {}), tmp_path)
    with pytest.raises(BadInput, match="Bring 'decoder_input_ids'"):
        check_inputs(model, tokens())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"decoder_input_ids": torch.full((5, 4), 50)}, "'decoder_input_ids' has the value 50"),
        ({"decoder_input_ids": torch.ones(5, 4)}, "integers of shape"),
        ({"decoder_attention_mask": torch.ones(5, 3).long()}, r"decoder_input_ids' shape \[5, 8\]"),
        ({"decoder_attention_mask": torch.zeros(5, 8).long()}, "no attended position in 'decoder_attention_mask'"),
    ],
)
def test_what_is_no_decoder_input_is_refused(change: dict[str, Tensor], sentence: str) -> None:
    config = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", **T5}
    with pytest.raises(BadInput, match=sentence):
        check_inputs(config, {**tokens(5), **targets(), **change})
