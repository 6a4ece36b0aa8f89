"""Makes checkpoints to measure with: a Llama-type base in bf16 with random weights, and experts a little away from it.

python tests/benchmarks/checkpoints.py /tmp/llama --layers 24 --width 1024
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Size:
    """How large a model is."""

    layers: int
    width: int
    vocabulary: int
    shards: int

    @property
    def inner(self) -> int:
        """Width between the two halves of a feed-forward block."""
        return self.width * 11 // 4

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": max(1, self.width // 64),
            "num_key_value_heads": max(1, self.width // 64),
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "hidden_act": "silu",
        }

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "model.embed_tokens.weight", (self.vocabulary, self.width)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield f"{prefix}input_layernorm.weight", (self.width,)
            yield f"{prefix}mlp.down_proj.weight", (self.width, self.inner)
            yield f"{prefix}mlp.gate_proj.weight", (self.inner, self.width)
            yield f"{prefix}mlp.up_proj.weight", (self.inner, self.width)
            yield f"{prefix}post_attention_layernorm.weight", (self.width,)
            for name in "kqvo":
                yield f"{prefix}self_attn.{name}_proj.weight", (self.width, self.width)
        yield "model.norm.weight", (self.width,)
        yield "lm_head.weight", (self.vocabulary, self.width)


def make_family(folder: Path, size: Size, experts: int) -> None:
    """``base`` and ``e0``, ``e1`` and so on in a folder."""
    generator = torch.Generator().manual_seed(0)
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in size.shapes()}
    base = {name: tensor.bfloat16() for name, tensor in base.items()}
    save(folder / "base", size, base)
    for index in range(experts):
        generator.manual_seed(index + 1)
        moved = {n: t.float() + 0.002 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        save(folder / f"e{index}", size, {name: tensor.bfloat16() for name, tensor in moved.items()})


def save(folder: Path, size: Size, tensors: dict[str, Tensor]) -> None:
    """A Hugging Face folder of ``size.shards`` files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(size.config()))
    names = list(tensors)
    each = -(-len(names) // size.shards)
    groups = [names[first : first + each] for first in range(0, len(names), each)]
    files = [f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors" for index in range(len(groups))]
    for file, group in zip(files, groups, strict=True):
        save_file({name: tensors[name] for name in group}, folder / file, metadata={"format": "pt"})
    places = {name: file for file, group in zip(files, groups, strict=True) for name in group}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--experts", type=int, default=4)
    options = parser.parse_args()
    size = Size(options.layers, options.width, options.vocabulary, options.shards)
    make_family(options.folder, size, options.experts)


if __name__ == "__main__":
    main()
