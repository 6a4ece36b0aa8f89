"""Statistics, scores and features of tiny models, against plain recomputations; and one real model of the zoo."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.utils import logging as transformers_logging

from service.contract.errors import BadInput, Stopped, UnsupportedArchitecture
from tests.workers.tiny_models import IMAGE, TEXT, build, configuration, pixels, saved, shapes, tokens
from workers.forward import check_inputs, class_scores, load_model, pooled_features, watch_inputs
from workers.observing import Batch, Call, before_scale, observe, positions, unfolded
from workers.skeleton import read_skeleton
from workers.statistics import Statistic

CLIP = {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 8}
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20, "eos_token_id": 0}


def silent(done: int, total: int) -> None:
    """No progress is looked at."""


def watched(
    model: Any, folder: Path, inputs: dict[str, Tensor], batch_size: int = 4
) -> tuple[dict[str, Statistic], dict[str, str]]:
    """Statistics of every parameter of a model that went through a file, and the names in memory."""
    config, tensors = saved(model, folder)
    skeleton = read_skeleton(config, shapes(tensors))
    loaded = load_model(config, tensors, "cpu")
    statistics = watch_inputs(loaded, skeleton, inputs, batch_size, set(tensors), silent)
    return statistics, dict(skeleton.memory_names)


def seen_by(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first input of every module in one pass over all samples, by the module's path."""
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                seen[path] = args[0].detach().clone()

        return hook

    handles = [module.register_forward_pre_hook(keep(path)) for path, module in model.named_modules()]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def second_moment(statistic: Statistic) -> Tensor:
    assert statistic.factor is not None
    return statistic.factor.T @ statistic.factor


def diagonal(statistic: Statistic) -> Tensor:
    assert statistic.diagonal is not None
    return statistic.diagonal


def assert_rows(statistic: Statistic, rows: Tensor) -> None:
    assert statistic.rows == len(rows)
    torch.testing.assert_close(second_moment(statistic), rows.T @ rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_bert_without_its_padding(tmp_path: Path, batch_size: int) -> None:
    model, inputs = build("BertForSequenceClassification", configuration("bert", **TEXT)), tokens()
    statistics, _ = watched(model, tmp_path, inputs, batch_size)
    seen, mask = seen_by(model, inputs), inputs["attention_mask"].bool()
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    for path in linear:
        x = seen[path]
        assert_rows(statistics[f"{path}.weight"], x[mask] if x.dim() == 3 else x)
    assert statistics["bert.pooler.dense.weight"].rows == statistics["classifier.weight"].rows == len(mask)
    norms = [path for path, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    for path in norms:
        x = seen[path][mask]
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-12).sqrt()
        torch.testing.assert_close(diagonal(statistics[f"{path}.weight"]).float(), x.square().sum(0))
    assert not any(name.endswith("bias") for name in statistics)
    assert len(statistics) == len(linear) + len(norms) + 3


def test_bert_tables_count_attended_tokens(tmp_path: Path) -> None:
    model, inputs = build("BertModel", configuration("bert", **TEXT)), tokens()
    statistics, _ = watched(model, tmp_path, inputs)
    mask = inputs["attention_mask"].bool()
    words = torch.bincount(inputs["input_ids"][mask], minlength=50).double()
    assert torch.equal(diagonal(statistics["embeddings.word_embeddings.weight"]), words)
    places = functional.pad(mask.sum(0), (0, 12)).double()
    assert torch.equal(diagonal(statistics["embeddings.position_embeddings.weight"]), places)
    kinds = torch.tensor([int(mask.sum()), 0]).double()
    assert torch.equal(diagonal(statistics["embeddings.token_type_embeddings.weight"]), kinds)
    assert {statistics[f"embeddings.{k}_embeddings.weight"].rows for k in ("word", "position", "token_type")} == {
        int(mask.sum())
    }


def test_padding_changes_nothing(tmp_path: Path) -> None:
    model, inputs = build("BertModel", configuration("bert", **TEXT)), tokens(length=8)
    longer = {name: functional.pad(values, (0, 5), value=0) for name, values in inputs.items()}
    longer["input_ids"][:, 8:] = 7
    short, _ = watched(model, tmp_path / "short", inputs)
    long, _ = watched(model, tmp_path / "long", longer)
    for name, statistic in short.items():
        assert statistic.rows == long[name].rows
        if statistic.factor is not None:
            torch.testing.assert_close(second_moment(statistic), second_moment(long[name]), rtol=1e-4, atol=1e-4)
        else:
            torch.testing.assert_close(statistic.diagonal, long[name].diagonal, rtol=1e-4, atol=1e-4)


def test_without_a_mask_every_position_is_a_row(tmp_path: Path) -> None:
    inputs = {"input_ids": tokens()["input_ids"]}
    statistics, _ = watched(build("BertModel", configuration("bert", **TEXT)), tmp_path, inputs)
    assert statistics["encoder.layer.0.output.dense.weight"].rows == inputs["input_ids"].numel()
    assert diagonal(statistics["embeddings.position_embeddings.weight"])[:8].tolist() == [6.0] * 8


def test_vit_under_its_names_in_the_file(tmp_path: Path) -> None:
    model, inputs = build("ViTForImageClassification", configuration("vit", **IMAGE)), pixels()
    statistics, memory_names = watched(model, tmp_path, inputs)
    seen = seen_by(model, inputs)
    for name, memory in memory_names.items():
        path, module = memory.removesuffix(".weight"), dict(model.named_modules()).get(memory.removesuffix(".weight"))
        if isinstance(module, nn.Linear) and memory.endswith(".weight"):
            assert_rows(statistics[name], seen[path].reshape(-1, module.in_features))
    assert any(name != memory for name, memory in memory_names.items())
    patches = functional.unfold(inputs["pixel_values"], 8, stride=8).mT.reshape(-1, 3 * 64)
    assert_rows(statistics["vit.embeddings.patch_embeddings.projection.weight"], patches)
    table = statistics["vit.embeddings.position_embeddings"]
    assert (table.rows, diagonal(table).tolist()) == (5 * 5, [5.0] * 5)
    assert "vit.embeddings.cls_token" not in statistics


def test_dinov2_with_renamed_packed_and_scaled_layers(tmp_path: Path) -> None:
    model = build("Dinov2Model", configuration("dinov2", **IMAGE, use_swiglu_ffn=True))
    statistics, _ = watched(model, tmp_path, pixels())
    seen = seen_by(model, pixels())
    layer = "encoder.layer.1"
    assert_rows(
        statistics[f"{layer}.attention.attention.query.weight"], seen[f"{layer}.attention.q_proj"].reshape(-1, 16)
    )
    assert_rows(statistics[f"{layer}.mlp.weights_in.weight"], seen[f"{layer}.mlp.gate_proj"].reshape(-1, 16))
    squares = seen[f"{layer}.layer_scale1"].reshape(-1, 16).square().sum(0)
    scale = statistics[f"{layer}.layer_scale1.lambda1"]
    torch.testing.assert_close(diagonal(scale).float(), squares, rtol=1e-4, atol=1e-6)


def test_clip_drops_padding_of_text_only(tmp_path: Path) -> None:
    inputs = {**tokens(5), **pixels(5)}
    statistics, _ = watched(build("CLIPModel", configuration("clip", **CLIP)), tmp_path, inputs)
    attended = int(inputs["attention_mask"].sum())
    assert statistics["text_model.encoder.layers.0.mlp.fc1.weight"].rows == attended
    assert statistics["text_model.embeddings.position_embedding.weight"].rows == attended
    assert statistics["vision_model.encoder.layers.0.mlp.fc1.weight"].rows == 5 * 5
    assert diagonal(statistics["vision_model.embeddings.position_embedding.weight"]).tolist() == [5.0] * 5


def test_gpt2_transposed_weights(tmp_path: Path) -> None:
    model, inputs = build("GPT2LMHeadModel", configuration("gpt2", **GPT2)), tokens()
    statistics, _ = watched(model, tmp_path, inputs)
    mask = inputs["attention_mask"].bool()
    rows = seen_by(model, inputs)["transformer.h.1.mlp.c_proj"][mask]
    assert_rows(statistics["transformer.h.1.mlp.c_proj.weight"], rows)
    assert diagonal(statistics["transformer.wte.weight"]).sum() == mask.sum()


def test_a_shared_table_counts_where_it_is_looked_up(tmp_path: Path) -> None:
    values = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    inputs = tokens()
    inputs["decoder_input_ids"] = inputs["input_ids"][:, :3]
    statistics, _ = watched(build("T5ForConditionalGeneration", configuration("t5", **values)), tmp_path, inputs)
    assert statistics["shared.weight"].rows == int(inputs["attention_mask"].sum()) + 6 * 3


def test_resnet_convolutions_and_batch_normalizations(tmp_path: Path) -> None:
    config = configuration("resnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    model, inputs = build("ResNetForImageClassification", config), pixels(3, 32)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(0.3)
    statistics, _ = watched(model, tmp_path, inputs, 2)
    seen, modules = seen_by(model, inputs), dict(model.named_modules())
    for path, module in modules.items():
        if isinstance(module, nn.BatchNorm2d):
            x = functional.batch_norm(seen[path], module.running_mean, module.running_var, eps=module.eps)
            squares = x.square().sum((0, 2, 3))
            torch.testing.assert_close(diagonal(statistics[f"{path}.weight"]).float(), squares, rtol=1e-4, atol=1e-4)
        if isinstance(module, nn.Conv2d):
            size, stride, padding = module.kernel_size, module.stride, module.padding
            assert not isinstance(padding, str)
            rows = functional.unfold(seen[path], size, stride=stride, padding=padding).mT.flatten(0, 1)
            assert_rows(statistics[f"{path}.weight"], rows)


@pytest.mark.parametrize(
    ("module", "size"),
    [
        (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (9, 8)),
        (nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), (6, 5)),
        (nn.Conv1d(3, 4, 5, stride=3, padding=2), (17,)),
        (nn.Conv3d(3, 4, (2, 3, 1), padding=1), (4, 5, 3)),
    ],
)
def test_unfolded_rows_times_the_matrix_is_the_convolution(module: Any, size: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    rows = unfolded(module, x)
    assert rows is not None
    with torch.no_grad():
        expected = module(x).movedim(1, -1).flatten(0, -2)
        torch.testing.assert_close(rows @ module.weight.flatten(1).T + module.bias, expected, rtol=1e-4, atol=1e-5)


def test_each_group_of_a_convolution_has_rows_of_its_own() -> None:
    x = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    module = nn.Conv2d(6, 9, 3, padding=1, groups=3)
    rows = unfolded(module, x)
    assert rows is not None
    assert rows.shape == (3, 2 * 25, 2 * 9)
    with torch.no_grad():
        answers = rows @ module.weight.reshape(3, 3, 18).mT
        expected = (module(x) - module.get_parameter("bias")[:, None, None]).movedim(1, -1).reshape(50, 3, 3)
        torch.testing.assert_close(answers.movedim(0, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.LayerNorm(6), (2, 3, 6)),
        (LlamaRMSNorm(6), (2, 3, 6)),
        (GemmaRMSNorm(6), (2, 3, 6)),
        (nn.BatchNorm2d(6), (2, 6, 3, 4)),
        (nn.BatchNorm1d(6), (2, 6)),
        (nn.GroupNorm(2, 6), (2, 6, 3)),
    ],
)
def test_what_a_scale_multiplies(module: nn.Module, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    module.eval()
    weight = module.get_parameter("weight")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(6, generator=generator))
        x = torch.randn(shape, generator=generator) * 3
        before, had = before_scale(Call(module, (x,), {}), "weight"), weight.clone()
        out = module(x) if len(shape) == 2 or shape[-1] == 6 else module(x).movedim(1, -1)
        factor = weight + 1 if isinstance(module, GemmaRMSNorm) else weight
        shift = dict(module.named_parameters()).get("bias", torch.zeros(6))
        torch.testing.assert_close(before * factor + shift, out, rtol=1e-4, atol=1e-5)
    assert torch.equal(weight, had)


def test_rows_of_flattened_positions_lose_their_padding_too() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    x = torch.arange(12.0).view(6, 2)
    assert torch.equal(positions(x, Batch(2, mask)), x[[0, 1, 3]])
    assert torch.equal(positions(x[:2], Batch(2, mask)), x[:2])
    assert torch.equal(positions(x.view(2, 3, 2), Batch(2, None)), x)


def test_a_table_that_counts_for_itself_has_no_statistic() -> None:
    class Learned(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(torch.arange(input.shape[1]) + 2)

    from service.contract.treatments import Role

    call = Call(Learned(9, 4), (torch.zeros(2, 3, dtype=torch.long),), {})
    assert observe(call, "weight", Role.EMBEDDING, Batch(2, None), None) is None


def test_only_what_is_wanted_is_watched_and_hooks_leave(tmp_path: Path) -> None:
    config, tensors = saved(build("BertModel", configuration("bert", **TEXT)), tmp_path)
    skeleton, model = read_skeleton(config, shapes(tensors)), load_model(config, tensors, "cpu")
    wanted = {"pooler.dense.weight", "pooler.dense.bias", "no.such.weight"}
    steps: list[tuple[int, int]] = []
    statistics = watch_inputs(model, skeleton, tokens(), 4, wanted, lambda done, total: steps.append((done, total)))
    assert set(statistics) == {"pooler.dense.weight"}
    assert steps == [(4, 6), (6, 6)]

    def stop(done: int, total: int) -> None:
        raise Stopped("cancelled")

    with pytest.raises(Stopped):
        watch_inputs(model, skeleton, tokens(), 4, wanted, stop)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("architecture", "model_type", "values", "inputs"),
    [
        ("BertForSequenceClassification", "bert", TEXT, tokens()),
        ("ViTForImageClassification", "vit", IMAGE, pixels()),
        ("Dinov2ForImageClassification", "dinov2", IMAGE, pixels()),
    ],
)
def test_a_loaded_model_answers_as_the_saved_one_did(
    architecture: str, model_type: str, values: dict[str, Any], inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    model = build(architecture, configuration(model_type, **values, num_labels=3))
    config, tensors = saved(model, tmp_path)
    before = torch.get_rng_state()
    loaded = load_model(config, {name: tensor.double() for name, tensor in tensors.items()}, "cpu")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert not loaded.training
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(class_scores(loaded, inputs, 2), expected)
    assert expected.shape == (len(next(iter(inputs.values()))), 3)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_default_dtype() is torch.float32


def test_half_precision_is_computed_in_float32(tmp_path: Path) -> None:
    config, tensors = saved(build("BertModel", configuration("bert", **TEXT)).bfloat16(), tmp_path)
    assert config["dtype"] == "bfloat16"
    loaded = load_model(config, tensors, "cpu")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "tensor", "sentence"),
    [
        (lambda t: t.pop("bert.pooler.dense.weight"), "bert.pooler.dense.weight", "needs the tensor"),
        (lambda t: t.update({"extra.weight": torch.zeros(2, 2)}), "extra.weight", "no place for"),
        (lambda t: t.update({"classifier.weight": torch.zeros(5, 16)}), "classifier.weight", r"\[5, 16\].*\[2, 16\]"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Tensor]], object], tensor: str, sentence: str, tmp_path: Path, capfd: Any
) -> None:
    config, tensors = saved(build("BertForSequenceClassification", configuration("bert", **TEXT)), tmp_path)
    capfd.readouterr()
    change(tensors)
    with pytest.raises(BadInput, match=sentence) as caught:
        load_model(config, tensors, "cpu")
    assert caught.value.tensor == tensor
    assert capfd.readouterr() == ("", "")


def test_a_misshaped_tensor_goes_by_its_name_in_the_file(tmp_path: Path) -> None:
    config, tensors = saved(build("Dinov2Model", configuration("dinov2", **IMAGE)), tmp_path)
    name = "encoder.layer.0.attention.attention.query.weight"
    tensors[name] = torch.zeros(3, 3)
    with pytest.raises(BadInput, match=r"attention\.attention\.query") as caught:
        load_model(config, tensors, "cpu")
    assert caught.value.tensor == name


def test_tied_tensors_may_be_absent(tmp_path: Path) -> None:
    config, tensors = saved(build("BertForMaskedLM", configuration("bert", **TEXT)), tmp_path)
    assert "cls.predictions.decoder.weight" not in tensors
    model: Any = load_model(config, tensors, "cpu")
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


def test_loading_is_silent_and_leaves_no_trace(tmp_path: Path, capfd: Any) -> None:
    config, tensors = saved(build("BertModel", configuration("bert", **TEXT)), tmp_path)
    capfd.readouterr()
    logger = logging.getLogger("transformers.modeling_utils")
    before = (list(logger.filters), transformers_logging.is_progress_bar_enabled())
    load_model(config, tensors, "cpu")
    assert capfd.readouterr() == ("", "")
    assert (list(logger.filters), transformers_logging.is_progress_bar_enabled()) == before


def test_an_unknown_architecture_is_no_model() -> None:
    with pytest.raises(UnsupportedArchitecture, match="NopeModel"):
        load_model({"architectures": ["NopeModel"], "model_type": "bert"}, {}, "cpu")


def ids(*shape: int, value: int = 3) -> Tensor:
    return torch.full(shape, value)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({}, "no inputs"),
        ({"pixel_values": torch.zeros(2, 3, 16, 16)}, "no input 'pixel_values'; it takes input_ids"),
        ({"attention_mask": ids(2, 4, value=1)}, "'input_ids', which BertModel needs, is missing"),
        ({"input_ids": ids(0, 4)}, "no samples"),
        ({"input_ids": ids(2, 4), "attention_mask": ids(3, 4, value=1)}, "3 samples and 'input_ids' has 2"),
        ({"input_ids": ids(2, 4, 1)}, r"integers of shape \[n, length\]"),
        ({"input_ids": torch.zeros(2, 4)}, r"float32 of shape \[2, 4\]; it must be integers"),
        ({"input_ids": ids(2, 4, value=50)}, "the value 50; it must be from 0 to below 50"),
        ({"input_ids": ids(2, 4, value=-1)}, "the value -1"),
        ({"input_ids": ids(2, 21)}, "at most 20"),
        ({"input_ids": ids(2, 4), "attention_mask": ids(2, 5, value=1)}, r"input_ids' shape \[2, 4\]"),
        ({"input_ids": ids(2, 4), "attention_mask": ids(2, 4, value=2)}, "other than 0 and 1"),
        ({"input_ids": ids(2, 4), "attention_mask": ids(2, 4, value=0)}, "sample 0 has no attended position"),
        ({"input_ids": ids(2, 4), "token_type_ids": ids(2, 4, value=2)}, "'token_type_ids' has the value 2"),
    ],
)
def test_samples_that_are_no_text_are_refused(inputs: dict[str, Tensor], sentence: str) -> None:
    config = {"architectures": ["BertModel"], "model_type": "bert", **TEXT}
    for model in (config, build("BertModel", configuration("bert", **TEXT))):
        with pytest.raises(BadInput, match=sentence):
            check_inputs(model, inputs)


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((2, 1, 16, 16), r"shape \[2, 1, 16, 16\].*shape \[n, 3, 16, 16\]"),
        ((2, 3, 32, 32), r"shape \[n, 3, 16, 16\]"),
        ((2, 3, 16), r"shape \[n, 3, 16, 16\]"),
    ],
)
def test_samples_that_are_no_images_are_refused(shape: tuple[int, ...], sentence: str) -> None:
    config = {"architectures": ["ViTModel"], "model_type": "vit", **IMAGE}
    with pytest.raises(BadInput, match=sentence):
        check_inputs(config, {"pixel_values": torch.zeros(shape)})


def test_samples_with_nan_are_refused() -> None:
    config = {"architectures": ["ViTModel"], "model_type": "vit", **IMAGE}
    with pytest.raises(BadInput, match="NaN or infinite"):
        check_inputs(config, {"pixel_values": torch.full((2, 3, 16, 16), torch.nan)})


def test_samples_that_fit_pass() -> None:
    check_inputs(build("BertModel", configuration("bert", **TEXT)), tokens())
    check_inputs(build("ViTModel", configuration("vit", **IMAGE)), pixels())
    dinov2 = configuration("dinov2", **IMAGE)
    check_inputs(build("Dinov2Model", dinov2), pixels(size=32))  # interpolates its positions
    check_inputs(
        {**configuration("clip", **CLIP).to_dict(), "architectures": ["CLIPModel"]}, {**tokens(5), **pixels(5)}
    )


def test_roberta_spends_positions_on_padding() -> None:
    config = {"architectures": ["RobertaModel"], "model_type": "roberta", **TEXT, "pad_token_id": 1}
    check_inputs(config, {"input_ids": ids(1, 18)})
    with pytest.raises(BadInput, match="at most 18"):
        check_inputs(config, {"input_ids": ids(1, 19)})


def test_what_only_the_model_knows_is_said_in_its_words() -> None:
    model = build("CLIPModel", configuration("clip", **CLIP))
    with pytest.raises(BadInput, match=r"CLIPModel can't take only input_ids, attention_mask .*pixel_values"):
        check_inputs(model, tokens(5))


def test_features_are_means_over_attended_positions_or_the_first(tmp_path: Path) -> None:
    config, tensors = saved(build("BertForSequenceClassification", configuration("bert", **TEXT)), tmp_path)
    model, inputs = load_model(config, tensors, "cpu"), tokens()
    base: Any = model.base_model
    with torch.no_grad():
        hidden = base(**inputs).last_hidden_state
    lengths = inputs["attention_mask"].sum(1).tolist()
    means = torch.stack([row[:length].mean(0) for row, length in zip(hidden, lengths, strict=True)])
    torch.testing.assert_close(pooled_features(model, inputs, 4, "mean", False), means)
    torch.testing.assert_close(pooled_features(model, inputs, 4, "cls", False), hidden[:, 0])
    unit = means / means.norm(dim=1, keepdim=True)
    torch.testing.assert_close(pooled_features(model, inputs, 4, "mean", True), unit)


def test_a_model_without_a_head_has_no_scores() -> None:
    model = build("BertModel", configuration("bert", **TEXT))
    with pytest.raises(UnsupportedArchitecture, match="no head"):
        class_scores(model, tokens(), 4)


@pytest.mark.slow
@pytest.mark.skipif("CATMERGE_ZOO" not in os.environ, reason="CATMERGE_ZOO names no folder")
def test_an_expert_of_the_zoo_scores_as_it_does_in_transformers(tmp_path: Path) -> None:
    from transformers import BertModel

    unpack = Path(os.environ["CATMERGE_ZOO"]) / "unpack.py"
    subprocess.run([sys.executable, str(unpack), str(tmp_path)], check=True, stdout=subprocess.DEVNULL)
    folder = tmp_path / "news20"
    inputs, head = load_file(folder / "test.safetensors"), load_file(folder / "head.safetensors")
    inputs = {name: values[:128] for name, values in inputs.items()}
    labels = inputs.pop("labels")
    config = json.loads((folder / "config.json").read_text())
    model = load_model(config, load_file(folder / "model.safetensors"), "cpu")
    check_inputs(model, inputs)
    features = pooled_features(model, inputs, 32, "mean", True)

    transformer = BertModel.from_pretrained(folder)
    with torch.no_grad():
        hidden = transformer(**{name: values.long() for name, values in inputs.items()}).last_hidden_state
    mask = inputs["attention_mask"][..., None].float()
    expected = functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    accuracy, direct = (
        ((f @ head["weight"].float().T).argmax(1) == labels).float().mean() for f in (features, expected)
    )
    assert accuracy == direct
    assert accuracy > 0.5
