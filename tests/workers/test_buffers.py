"""Buffers are lent again only when nobody can see them any more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from service.contract.errors import InputChanged
from service.stores.base import Bookmark, ObjectChanged
from service.stores.local import LocalStore, LocalWriter
from service.stores.objects import Objects
from workers import tensors, writing
from workers.buffers import SMALLEST_BYTES, Buffers
from workers.tensors import TensorReader, read_ahead
from workers.writing import TensorWriter, as_bytes

MANY = 1 << 30


def view(tensor: Tensor) -> object:
    return tensor[4:10].view(torch.int16)


def array(tensor: Tensor) -> object:
    return tensor.numpy()[5:]


def memory(tensor: Tensor) -> object:
    return as_bytes(tensor)[2:4]


@pytest.mark.parametrize("keep", [view, array, memory])
def test_memory_comes_back_after_the_last_that_refers_to_it(keep: Callable[[Tensor], object]) -> None:
    buffers = Buffers(MANY)
    tensor = buffers.lend(100)
    address = tensor.data_ptr()
    kept = keep(tensor)
    del tensor
    assert buffers.idle_bytes() == 0
    assert buffers.lend(100).data_ptr() != address
    del kept
    assert address in {each.data_ptr() for each in [buffers.lend(100) for _ in range(3)]}


def test_sizes_that_are_alike_share_memory_and_others_do_not() -> None:
    buffers = Buffers(MANY)
    address = buffers.lend(SMALLEST_BYTES + 1).data_ptr()
    assert buffers.lend(SMALLEST_BYTES).data_ptr() != address
    assert buffers.lend(2 * SMALLEST_BYTES).data_ptr() == address


def test_no_more_is_kept_than_allowed() -> None:
    buffers = Buffers(2 * SMALLEST_BYTES)
    lent = [buffers.lend(1) for _ in range(5)]
    assert buffers.idle_bytes() == 0
    del lent
    assert buffers.idle_bytes() == 2 * SMALLEST_BYTES


def test_memory_may_come_back_from_any_thread() -> None:
    buffers = Buffers(MANY)

    def work() -> None:
        for value in range(200):
            lent = buffers.lend(64)
            lent.fill_(value)
            assert int(lent.sum(dtype=torch.int64)) == 64 * value

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Each thread holds its last buffer until the next one is lent to it.
    assert 1 <= buffers.idle_bytes() // SMALLEST_BYTES <= 8


def test_reading_ahead_is_bounded_and_in_order() -> None:
    started: list[int] = []

    def start(item: int) -> int:
        started.append(item)
        return -item

    seen = []
    for item, result in read_ahead([3, 4, 2, 20, 1, 1, 1], start, lambda item: item, 6):
        seen.append((item, result, list(started)))
    assert [(item, result) for item, result, _ in seen] == [(item, -item) for item in (3, 4, 2, 20, 1, 1, 1)]
    ahead = [begun[index + 1 :] for index, (_, _, begun) in enumerate(seen)]
    assert ahead == [[4, 2], [2], [], [1, 1, 1], [1, 1], [1], []]
    assert list(read_ahead([], start, lambda item: item, 6)) == []


class SlowWriter(LocalWriter):
    """Writes a while after it was asked to."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        time.sleep(0.002)
        super().write(data)


class SlowStore(LocalStore):
    """A folder whose answers come late, the first ones last, so that whoever does not wait reads what was there."""

    def __init__(self, root: Path) -> None:
        super().__init__(roots=(root,))
        self.reads = 0
        self.fail_at = -1

    def read(self, address: str, start: int, into: memoryview, *, etag: str | None = None) -> None:
        self.reads += 1
        if self.reads == self.fail_at:
            raise ObjectChanged(f"{address} has changed")
        time.sleep(0.004 * (self.reads % 3))
        super().read(address, start, into, etag=etag)

    def write(
        self,
        address: str,
        *,
        media_type: str = "application/octet-stream",  # noqa: ARG002
        bookmark: Bookmark | None = None,  # noqa: ARG002
    ) -> LocalWriter:
        return SlowWriter(address, Path(address.removeprefix("file://")))


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """A file of tensors of many sizes, read in tiny spans."""
    monkeypatch.setattr(tensors, "SPAN_BYTES", 1 << 16)
    monkeypatch.setattr(writing, "WRITE_BEHIND_BYTES", 1 << 17)
    monkeypatch.setattr(writing, "WRITE_BYTES", 1 << 14)
    generator = torch.Generator().manual_seed(3)
    sizes = [70_000, 10, 20_000, 33_333, 1, 150_000, 8_000, 40_000, 40_000, 12_345]
    made = {f"t{index}": torch.randn(size, generator=generator) for index, size in enumerate(sizes)}
    save_file(made, tmp_path / "in.safetensors")
    return made


def test_slow_stores_and_tiny_budgets_copy_the_same_bytes(family: dict[str, Tensor], tmp_path: Path) -> None:
    """Tensors go from reader to writer as they are, so every buffer is written from while others are read into."""
    objects = Objects({"file": SlowStore(tmp_path)}, buckets=(), workspace="s3://none/")
    names = list(family)
    header = {name: ("F32", tuple(tensor.shape)) for name, tensor in family.items()}
    with TensorReader(objects) as reader, TensorWriter(objects, f"file://{tmp_path}/", "out", header) as writer:
        checkpoint = reader.open(f"file://{tmp_path}/in.safetensors", ())

        def size(name: str) -> int:
            return family[name].nbytes

        for name, reading in read_ahead(names, lambda name: reader.start(checkpoint, [name]), size, 400_000):
            writer.add(name, reading.wait().pop(name))
        writer.commit()
    assert (tmp_path / "out").read_bytes().endswith(b"".join(bytes(as_bytes(family[name])) for name in names))


def test_an_error_in_a_reader_reaches_whoever_waits_and_leaves_nothing(
    family: dict[str, Tensor], tmp_path: Path
) -> None:
    store = SlowStore(tmp_path)
    objects = Objects({"file": store}, buckets=(), workspace="s3://none/")
    before = {thread.name for thread in threading.enumerate()}
    with pytest.raises(InputChanged, match="has changed"):
        read_until_it_fails(objects, store, list(family), tmp_path)
    left = {thread.name for thread in threading.enumerate()} - before
    assert not {name for name in left if name.startswith(("read", "write", "flush"))}
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def read_until_it_fails(objects: Objects, store: SlowStore, names: list[str], folder: Path) -> None:
    header = dict.fromkeys(names, ("F32", (1,)))
    with TensorReader(objects) as reader, TensorWriter(objects, f"file://{folder}/", "out", header):
        checkpoint = reader.open(f"file://{folder}/in.safetensors", ())
        store.fail_at = store.reads + 7
        for _, reading in read_ahead(names, lambda name: reader.start(checkpoint, [name]), lambda _: 1, 4):
            reading.wait()
