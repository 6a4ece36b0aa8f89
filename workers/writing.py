"""Writes one file of tensors as a stream, hashed on the way, and small files whole."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from service.contract.artifacts import media_type, role
from service.contract.checkpoint import write_header
from service.contract.errors import WorkerError
from service.contract.job import Artifact
from service.stores.objects import Bookmark, Objects, ObjectWriter, failures
from workers.buffers import bytes_of
from workers.tensors import NAMES

WRITE_BEHIND_BYTES = 32 << 20  # merged tensors that wait to be written, beside the one being written
WRITE_BYTES = 1 << 20  # written and hashed one after the other, so that hashing finds them in the cache


class TensorWriter:
    """Streams tensors into one safetensors file in the order of its header; a thread hashes and writes.

    Nothing is visible before ``commit``; leaving without it writes nothing, or with a bookmark what the next attempt
    need not send again.
    """

    def __init__(
        self,
        objects: Objects,
        address: str,
        name: str,
        tensors: Mapping[str, tuple[str, tuple[int, ...]]],
        bookmark: Bookmark | None = None,
    ) -> None:
        self._expected = deque(tensors.items())
        self._writer = _opened(objects, address + name, media_type(name), bookmark)
        self._name = name
        self._sha256 = hashlib.sha256()
        self._size = 0
        self._behind = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._entries = 0  # of the tensor that comes first in what is expected
        self._pending: deque[tuple[Future[None], int]] = deque()
        self._pending_bytes = 0
        self._send(memoryview(write_header([(name, dtype, shape) for name, (dtype, shape) in self._expected])))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._behind.shutdown(cancel_futures=True)
        self._writer.abort()

    def add(self, name: str, tensor: Tensor) -> None:
        """Take the next tensor; it must be the one that the header names next, with its type and shape.

        The tensor must not be changed afterwards. Raises what writing an earlier one raised.
        """
        dtype, shape = self._next(name)
        if self._entries or (NAMES[tensor.dtype], tuple(tensor.shape)) != (dtype, shape):
            raise WorkerError(f"{self._name}: {name!r} is not {dtype}, {shape}, as its header says", tensor=name)
        self._expected.popleft()
        self._send(as_bytes(tensor))

    def add_entries(self, name: str, entries: Tensor) -> None:
        """Take the next entries of a tensor, in row order. As ``add`` otherwise."""
        dtype, shape = self._next(name)
        self._entries += entries.numel()
        if NAMES[entries.dtype] != dtype or self._entries > math.prod(shape):
            raise WorkerError(f"{self._name}: entries of {name!r} are not {dtype}, or more than {shape}", tensor=name)
        if self._entries == math.prod(shape):
            self._expected.popleft()
            self._entries = 0
        self._send(as_bytes(entries))

    def commit(self) -> Artifact:
        """Make the file visible, whole. Raises WorkerError where tensors are missing, StorageFailure."""
        if self._expected:
            raise WorkerError(f"{self._name}: {len(self._expected)} tensors were never written")
        self._wait(leave_bytes=0)
        with failures():
            self._writer.commit()
        return Artifact(
            name=self._name,
            role=role(self._name),
            media_type=media_type(self._name),
            size=self._size,
            sha256=self._sha256.hexdigest(),
        )

    def _next(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Type and shape of the tensor that comes next, which must be this one."""
        if not self._expected:
            raise WorkerError(f"{self._name}: one tensor too many: {name!r}", tensor=name)
        expected, (dtype, shape) = self._expected[0]
        if name != expected:
            raise WorkerError(f"{self._name}: {name!r} where {expected!r}, {dtype}, {shape} was to come", tensor=name)
        return dtype, tuple(shape)

    def _send(self, data: memoryview) -> None:
        self._wait(leave_bytes=WRITE_BEHIND_BYTES)
        self._pending.append((self._behind.submit(self._write, data), len(data)))
        self._pending_bytes += len(data)

    def _wait(self, *, leave_bytes: int) -> None:
        while self._pending and self._pending_bytes > leave_bytes:
            written, size = self._pending.popleft()
            written.result()
            self._pending_bytes -= size

    def _write(self, data: memoryview) -> None:
        for first in range(0, len(data), WRITE_BYTES):
            piece = data[first : first + WRITE_BYTES]
            with failures():
                self._writer.write(piece)
            self._sha256.update(piece)
        self._size += len(data)


def _opened(objects: Objects, address: str, kind: str, bookmark: Bookmark | None) -> ObjectWriter:
    with failures():
        return objects.write(address, media_type=kind, bookmark=bookmark)


def as_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes, little-endian and in row order, without a copy where it lies so already."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return bytes_of(flat.view(torch.uint8)) if flat.numel() else memoryview(b"")


def write_artifact(objects: Objects, address: str, name: str, data: bytes) -> Artifact:
    """Write a small file whole. Raises StorageFailure."""
    with failures():
        objects.put(address + name, data, media_type=media_type(name))
    return Artifact(
        name=name,
        role=role(name),
        media_type=media_type(name),
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )
