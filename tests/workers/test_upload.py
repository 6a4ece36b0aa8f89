"""Tensors on their way to a device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.upload import Uploader

GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


def tensors(index: int) -> dict[str, Tensor]:
    return {"weight": torch.full((300, 200), float(index)), "bias": torch.full((7,), -float(index))}


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_every_item_comes_with_its_own_tensors_in_order(device: str) -> None:
    arrived = []
    for index, (named,) in Uploader(device).ahead(range(5), lambda index: [tensors(index)]):
        arrived.append(index)
        for name, tensor in tensors(index).items():
            assert named[name].device.type == device
            assert torch.equal(named[name].cpu(), tensor)
    assert arrived == list(range(5))


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_nothing_is_read_for_nothing(device: str) -> None:
    assert list(Uploader(device).ahead([], lambda index: [tensors(index)])) == []


def test_on_the_cpu_nothing_is_copied_and_no_item_is_waited_for_early() -> None:
    waited = []

    def wait(index: int) -> list[dict[str, Tensor]]:
        waited.append(index)
        return [kept[index]]

    kept = [tensors(0), tensors(1)]
    index, arrived = next(Uploader("cpu").ahead(range(2), wait))
    assert (index, waited) == (0, [0])
    assert arrived[0]["weight"] is kept[0]["weight"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gets_the_next_tensors_before_the_present_ones_are_used() -> None:
    waited = []

    def wait(index: int) -> list[dict[str, Tensor]]:
        waited.append(index)
        return [tensors(index)]

    next(Uploader("cuda").ahead(range(3), wait))
    assert waited == [0, 1]
