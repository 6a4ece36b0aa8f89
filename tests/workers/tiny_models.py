"""Tiny models with random weights, saved and read back as a checkpoint's config and tensors."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

TRUNK: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
TEXT: dict[str, Any] = {**TRUNK, "vocab_size": 50, "max_position_embeddings": 20}
IMAGE: dict[str, Any] = {**TRUNK, "image_size": 16, "patch_size": 8}


def configuration(model_type: str, **values: Any) -> Any:
    """A transformers configuration."""
    return transformers.CONFIG_MAPPING[model_type](**values)


def build(architecture: str, config: Any, seed: int = 0) -> Any:
    """A model with random weights; normalizations and biases are random too, so that mistakes show."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, architecture)(config).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def saved(model: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The ``config.json`` and the tensors, as ``save_pretrained`` writes them."""
    model.save_pretrained(folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config, load_file(folder / "model.safetensors")


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes, as a file's header has them."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def tokens(samples: int = 6, length: int = 8, seed: int = 1) -> dict[str, Tensor]:
    """Random token ids; every sample has another length, the rest is padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (samples, length), generator=generator)
    mask = (torch.arange(length) < torch.randint(2, length + 1, (samples, 1), generator=generator)).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def pixels(samples: int = 5, size: int = 16, seed: int = 1) -> dict[str, Tensor]:
    """Random images."""
    return {"pixel_values": torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(seed))}
