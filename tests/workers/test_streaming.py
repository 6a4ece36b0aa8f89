"""A model whose blocks come and go answers, and is watched, as the whole one; and never holds more than it may."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from service.contract.errors import BadInput
from tests.workers.architectures import CASES
from tests.workers.tiny_models import build, configuration, saved, shapes
from workers.forward import check_inputs, watch_inputs
from workers.loading import load_model
from workers.skeleton import read_skeleton
from workers.streaming import bytes_in_memory, load_streamed

STREAMED = [
    "BertForSequenceClassification",
    "Dinov2ForImageClassification",
    "SwinForImageClassification",
    "ResNetForImageClassification",
    "ConvNextForImageClassification",
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "Gemma3ForCausalLM",
    "MixtralForCausalLM",
    "GptOssForCausalLM",
    "T5ForConditionalGeneration",
    "WhisperForConditionalGeneration",
    "BlipForImageTextRetrieval",
]


class Shelf:
    """Tensors that are given out by name; it notes how often."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.given: list[str] = []

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        found = {name: self.tensors[name].clone() for name in names}
        self.given += found
        return found


def held(model: nn.Module) -> int:
    """Bytes of weights that are there now."""
    return sum(parameter.nbytes for parameter in model.parameters() if not parameter.is_meta)


@pytest.mark.parametrize("architecture", STREAMED)
def test_a_streamed_model_shows_what_the_whole_one_does(architecture: str, tmp_path: Path) -> None:
    case = CASES[architecture]
    config, tensors = saved(build(architecture, configuration(case.model_type, **case.values)), tmp_path)
    skeleton, shelf = read_skeleton(config, shapes(tensors)), Shelf(tensors)
    whole = load_model(config, {name: tensor.clone() for name, tensor in tensors.items()}, "cpu")
    streamed: Any = load_streamed(config, shapes(tensors), shelf.read, "cpu", 1 << 30)
    at_rest = held(streamed)
    assert at_rest < held(whole)
    peaks: list[int] = []
    for module in streamed.modules():
        module.register_forward_pre_hook(lambda _module, _args: peaks.append(held(streamed)))

    check_inputs(streamed, case.inputs)
    found = watch_inputs(streamed, skeleton, case.inputs, 4, set(tensors), lambda _done, _of: None)
    expected = watch_inputs(whole, skeleton, case.inputs, 4, set(tensors), lambda _done, _of: None)
    assert set(found) == set(expected)
    for name, statistic in expected.items():
        assert (found[name].rows, found[name].block_rows) == (statistic.rows, statistic.block_rows)
        torch.testing.assert_close(found[name].held, statistic.held)
    assert held(streamed) == at_rest
    blocks = [held(whole) - at_rest]
    assert max(peaks) <= at_rest + max(blocks)
    assert max(shelf.given.count(name) for name in tensors) > min(shelf.given.count(name) for name in tensors) == 1


def test_a_limit_holds_or_is_refused(tmp_path: Path) -> None:
    case = CASES["LlamaForCausalLM"]
    values = {**case.values, "num_hidden_layers": 6}
    config, tensors = saved(build("LlamaForCausalLM", configuration("llama", **values)), tmp_path)
    block = bytes_in_memory(tuple(t.shape) for name, t in tensors.items() if ".layers.0." in name)
    outside = bytes_in_memory(tuple(t.shape) for name, t in tensors.items() if ".layers." not in name)
    limit = outside + 2 * block
    assert limit < bytes_in_memory(shapes(tensors).values())
    model = load_streamed(config, shapes(tensors), Shelf(tensors).read, "cpu", limit)
    peaks: list[int] = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda _module, _args: peaks.append(held(model)))
    with torch.no_grad():
        model(**case.inputs)
    assert max(peaks) == outside + block
    with pytest.raises(BadInput, match=f"takes {limit} bytes.*CATMERGE_CALIBRATION_BYTES allows {limit - 1}"):
        load_streamed(config, shapes(tensors), Shelf(tensors).read, "cpu", limit - 1)


def test_half_precision_is_read_as_it_is_and_computed_in_float32(tmp_path: Path) -> None:
    case = CASES["LlamaForCausalLM"]
    config, tensors = saved(build("LlamaForCausalLM", configuration("llama", **case.values)).bfloat16(), tmp_path)
    whole = load_model(config, dict(tensors), "cpu")
    streamed = load_streamed(config, shapes(tensors), Shelf(tensors).read, "cpu", 1 << 30)
    with torch.no_grad():
        torch.testing.assert_close(streamed(**case.inputs).logits, whole(**case.inputs).logits)


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        ("model.layers.0.mlp.up_proj.weight", None, "needs the tensor"),
        ("extra.weight", (2, 2), "no place for"),
        ("model.layers.0.mlp.up_proj.weight", (5, 16), r"\[5, 16\]"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, shape: Any, sentence: str, tmp_path: Path) -> None:
    case = CASES["LlamaForCausalLM"]
    config, tensors = saved(build("LlamaForCausalLM", configuration("llama", **case.values)), tmp_path)
    found = shapes(tensors)
    if shape is None:
        del found[name]
    else:
        found[name] = shape
    with pytest.raises(BadInput, match=sentence) as caught:
        load_streamed(config, found, Shelf(tensors).read, "cpu", 1 << 30)
    assert caught.value.tensor == name
