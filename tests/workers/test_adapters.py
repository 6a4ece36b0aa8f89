"""LoRA adapters as tasks' checkpoints: what they add to the base, what of them is refused, and a merge of two."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from service.admission import admit
from service.contract.adapter import on_base
from service.contract.checkpoint import MalformedHeader
from service.contract.errors import BadInput, BadTensor, Refusal
from service.contract.recipe import Recipe
from service.contract.stages import Stage
from service.stores.checkpoints import read_checkpoint
from service.stores.local import LocalStore
from service.stores.objects import Objects
from tests.workers.stage_runs import Run
from tests.workers.tiny_models import TEXT, build, configuration, tokens
from workers.low_rank import LowRankVector, summed
from workers.tensors import TensorReader

RANK = 3
LAYERS: dict[str, Any] = {**TEXT, "num_hidden_layers": 4}
QUERY, DENSE = "encoder.layer.0.attention.self.query", "encoder.layer.1.output.dense"
GPT2 = {
    "vocab_size": 50,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 20,
    "bos_token_id": 1,
    "eos_token_id": 0,
}
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "bias": "none", "use_rslora": False}


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def pair(module: str, out: int, width: int, seed: int) -> dict[str, Tensor]:
    prefix = f"base_model.model.{module}"
    return {
        f"{prefix}.lora_A.weight": drawn(seed, RANK, width),
        f"{prefix}.lora_B.weight": drawn(seed + 50, out, RANK),
    }


def parts(seed: int = 1) -> dict[str, Tensor]:
    return {**pair(QUERY, 16, 16, seed), **pair(DENSE, 16, 32, seed + 1)}


def write_adapter(folder: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def objects(folder: Path) -> Objects:
    return Objects({"file": LocalStore(roots=(folder,))}, buckets=None, workspace=f"file://{folder}/workspace/")


def write_base(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    build("BertModel", configuration("bert", **LAYERS)).to(dtype).save_pretrained(folder / "base")
    return load_file(folder / "base" / "model.safetensors")


def read_all(folder: Path, adapter: str = "task") -> dict[str, Tensor]:
    """The fine-tuned weights, as a stage reads them."""
    with TensorReader(objects(folder)) as reader:
        base = reader.open(f"file://{folder}/base/", ())
        checkpoint = reader.open(f"file://{folder}/{adapter}/", (), base)
        return reader.read(checkpoint, checkpoint.tensors)


def product(tensors: dict[str, Tensor], module: str) -> Tensor:
    prefix = f"base_model.model.{module}"
    return tensors[f"{prefix}.lora_B.weight"].double() @ tensors[f"{prefix}.lora_A.weight"].double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("changes", "query_scale", "dense_scale"),
    [
        ({}, 6 / RANK, 6 / RANK),
        ({"use_rslora": True}, 6 / math.sqrt(RANK), 6 / math.sqrt(RANK)),
        ({"alpha_pattern": {"output.dense": 9}}, 6 / RANK, 9 / RANK),
        ({"alpha_pattern": {r"encoder\.layer\.0\..*": 1}}, 1 / RANK, 6 / RANK),
    ],
)
def test_a_pair_adds_its_scaled_product(
    changes: dict[str, Any], query_scale: float, dense_scale: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    base, tensors = write_base(tmp_path, dtype), parts()
    write_adapter(tmp_path / "task", tensors, **changes)
    found = read_all(tmp_path)
    assert set(found) == set(base)
    for module, scale in ((QUERY, query_scale), (DENSE, dense_scale)):
        name = f"{module}.weight"
        torch.testing.assert_close(found[name].double(), base[name].double() + scale * product(tensors, module))
    untouched = [name for name in base if name not in (f"{QUERY}.weight", f"{DENSE}.weight")]
    assert all(found[name].equal(base[name]) for name in untouched)


def test_a_transposed_layer(tmp_path: Path) -> None:
    build("GPT2LMHeadModel", configuration("gpt2", **GPT2)).save_pretrained(tmp_path / "base")
    base = load_file(tmp_path / "base" / "model.safetensors")
    module = "transformer.h.0.attn.c_attn"
    tensors = pair(module, 48, 16, 1)
    write_adapter(tmp_path / "task", tensors, fan_in_fan_out=True)
    found = read_all(tmp_path)[f"{module}.weight"]
    torch.testing.assert_close(found.double(), base[f"{module}.weight"].double() + 2 * product(tensors, module).T)


@pytest.mark.parametrize("spelling", ["pooler.dense.weight", "pooler.modules_to_save.default.weight"])
def test_whole_tensors_stand_in_for_the_bases(spelling: str, tmp_path: Path) -> None:
    base, whole = write_base(tmp_path, torch.bfloat16), drawn(9, 16, 16)
    name = spelling if "modules" not in spelling else "pooler.modules_to_save.default.dense.weight"
    tensors = {**parts(), f"base_model.model.{name}": whole, "base_model.model.classifier.weight": drawn(8, 3, 16)}
    write_adapter(tmp_path / "task", tensors, modules_to_save=["pooler", "classifier"])
    found = read_all(tmp_path)
    assert found["pooler.dense.weight"].equal(whole)
    assert found["classifier.weight"].shape == (3, 16)
    assert set(found) == {*base, "classifier.weight"}


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_a_model_with_a_head_has_one_more_word_in_its_names(prefix: str, tmp_path: Path) -> None:
    base = write_base(tmp_path)
    if not prefix:
        save_file({f"bert.{name}": tensor for name, tensor in base.items()}, tmp_path / "base" / "model.safetensors")
    tensors = pair(f"{prefix}{QUERY}", 16, 16, 1)
    write_adapter(tmp_path / "task", tensors)
    name = f"{QUERY}.weight" if prefix else f"bert.{QUERY}.weight"
    expected = base[f"{QUERY}.weight"].double() + 2 * product(tensors, f"{prefix}{QUERY}")
    torch.testing.assert_close(read_all(tmp_path)[name].double(), expected)


Change = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("changes", "change", "sentence"),
    [
        ({"peft_type": "IA3"}, None, "peft_type is 'IA3'"),
        ({"use_dora": True}, None, "use_dora makes it another kind"),
        ({"trainable_token_indices": [1]}, None, "trainable_token_indices"),
        ({}, lambda t: t.update({"base_model.model.x.lora_magnitude_vector": drawn(1, 3)}), "can't be merged"),
        ({}, lambda t: t.update({"base_model.model.x.lora_embedding_A": drawn(1, 3)}), "can't be merged"),
        ({}, lambda t: t.pop(f"base_model.model.{QUERY}.lora_B.weight"), "other half"),
        ({}, lambda t: t.update(pair("no.such", 16, 16, 1)), "has no tensor no.such.weight"),
        ({}, lambda t: t.update(pair(QUERY, 16, 17, 1)), r"make no \[16, 16\]"),
        ({"fan_in_fan_out": True}, None, r"make no \[16, 32\]"),
    ],
)
def test_what_is_no_sum_of_products_is_refused(
    changes: dict[str, Any], change: Change | None, sentence: str, tmp_path: Path
) -> None:
    write_base(tmp_path)
    tensors = parts()
    if change is not None:
        change(tensors)
    write_adapter(tmp_path / "task", tensors, **changes)
    base = read_checkpoint(objects(tmp_path), f"file://{tmp_path}/base/")
    with pytest.raises(MalformedHeader, match=sentence):
        on_base(base, read_checkpoint(objects(tmp_path), f"file://{tmp_path}/task/"))
    with pytest.raises(Refusal) as caught:
        admit(Recipe.model_validate(recipe(tmp_path, ["task"])), objects(tmp_path))
    assert [fault.pointer for fault in caught.value.faults] == ["/tasks/0/checkpoint"]


def recipe(folder: Path, tasks: list[str], **changes: Any) -> dict[str, Any]:
    rows = [
        {"name": task, "checkpoint": f"file://{folder}/{task}/", "exemplars": f"file://{folder}/exemplars.safetensors"}
        for task in tasks
    ]
    save_file(tokens(), folder / "exemplars.safetensors")
    method = {"name": "cat", "balance": 0.5, "scaling": 0.5}
    return {"base": f"file://{folder}/base/", "tasks": rows, "method": method, **changes}


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    write_base(tmp_path)
    write_adapter(tmp_path / "task", parts())
    asked = recipe(tmp_path, ["task"], base=f"file://{tmp_path}/task/")
    with pytest.raises(Refusal, match="is an adapter"):
        admit(Recipe.model_validate(asked), objects(tmp_path))
    with TensorReader(objects(tmp_path)) as reader, pytest.raises(BadInput, match="is an adapter"):
        reader.open(f"file://{tmp_path}/task/", ())


@pytest.mark.parametrize("limit", [None, 36_000])
@pytest.mark.parametrize("method", ["task_arithmetic", "average", "ties", "tsv_m", "cat"])
def test_adapters_merge_as_the_whole_checkpoints_they_stand_for(method: str, limit: int | None, tmp_path: Path) -> None:
    base = write_base(tmp_path)
    for seed, task in ((1, "one"), (2, "two")):
        tensors = parts(10 * seed)
        write_adapter(tmp_path / task, tensors)
        whole = dict(base)
        for module in (QUERY, DENSE):
            whole[f"{module}.weight"] = (whole[f"{module}.weight"].double() + 2 * product(tensors, module)).float()
        (tmp_path / f"whole-{task}").mkdir()
        save_file(whole, tmp_path / f"whole-{task}" / "model.safetensors")
        (tmp_path / f"whole-{task}" / "config.json").write_text((tmp_path / "base" / "config.json").read_text())
    merged = []
    for tasks in (["one", "two"], ["whole-one", "whole-two"]):
        asked = recipe(tmp_path, tasks, output={"overwrite": True})
        asked["method"] = asked["method"] if method == "cat" else {"name": method}
        assert admit(Recipe.model_validate(asked), objects(tmp_path)).warnings == ()
        run = Run(tmp_path, Recipe.model_validate(asked), limit)
        run.go()
        assert run.warnings(max(run.done)) == []
        merged.append(run.merged())
    assert not merged[0][f"{QUERY}.weight"].equal(base[f"{QUERY}.weight"])
    for name, tensor in merged[0].items():
        torch.testing.assert_close(tensor, merged[1][name], rtol=1e-4, atol=1e-5)


def test_a_sum_of_adapters_reads_the_base_once_and_of_each_adapter_its_own(tmp_path: Path) -> None:
    write_base(tmp_path)
    for seed, task in ((1, "one"), (2, "two")):
        write_adapter(tmp_path / task, parts(10 * seed))
    asked = recipe(tmp_path, ["one", "two"], method={"name": "task_arithmetic"})
    run = Run(tmp_path, Recipe.model_validate(asked))
    run.go()
    adapters = sum(tensor.nbytes for task in (1, 2) for tensor in parts(10 * task).values())
    floats = sum(tensor.nbytes for tensor in run.merged().values())
    assert run.bytes_read[Stage.MERGE] == floats + adapters


def test_adapters_sum_in_one_product_as_one_by_one_in_double_precision() -> None:
    vectors = [
        LowRankVector(drawn(seed, RANK, 5).double(), drawn(seed + 9, 7, RANK).double(), seed / 3, True, (5, 7))
        for seed in (1, 2, 3)
    ]
    expected = sum(f * v.scale * (v.up @ v.down).T for f, v in zip((0.5, 2.0, -1.0), vectors, strict=True))
    torch.testing.assert_close(summed(vectors, (0.5, 2.0, -1.0), torch.float64), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(("spoiled", "said"), [("lora_B", "task 'two' holds NaN"), ("huge", "does not fit into F16")])
def test_what_an_adapter_makes_infinite_is_named(spoiled: str, said: str, tmp_path: Path) -> None:
    write_base(tmp_path, torch.float16)
    write_adapter(tmp_path / "one", parts(1))
    tensors = parts(2)
    name = f"base_model.model.{QUERY}.lora_B.weight"
    tensors[name] = torch.full_like(tensors[name], torch.nan if spoiled == "lora_B" else 1e7)
    write_adapter(tmp_path / "two", tensors)
    asked = recipe(tmp_path, ["one", "two"], method={"name": "task_arithmetic"})
    with pytest.raises(BadTensor, match=said):
        Run(tmp_path, Recipe.model_validate(asked)).go()
