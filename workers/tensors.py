"""Reads tensors by name in large spans, or leaves them to be read piece by piece."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self, TypeVar

import torch
from torch import Tensor

from service.contract.adapter import on_base
from service.contract.checkpoint import DTYPE_BYTES, Checkpoint, CheckpointFile, LowRank, TensorInfo
from service.contract.errors import BadInput, InputChanged
from service.contract.plan import Pinned
from service.stores.checkpoints import read_checkpoint
from service.stores.objects import NearObject, Objects, failures
from workers.buffers import Buffers, bytes_of
from workers.low_rank import LowRankVector
from workers.unread import Unread

T = TypeVar("T")
R = TypeVar("R")

SPAN_BYTES = 16 << 20  # one read: larger costs memory, smaller costs requests
GAP_BYTES = 256 << 10  # reading over a gap this small is cheaper than another request
READERS = 8
OPEN_FILES = 200  # of those that are read piece by piece; few systems allow a process less than a thousand
KEEP_BYTES = 64 << 20  # of memory that was read into and is free again
COPY_BYTES = 8 << 20

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Span:
    """Neighboring tensors of one file that are read together."""

    file: str
    start: int
    end: int
    tensors: tuple[TensorInfo, ...]


class TensorReader:
    """Reads tensors of pinned checkpoints; a file that changed since it was pinned is a Failure."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="read")
        self._buffers = Buffers(KEEP_BYTES)
        self._files: dict[str, NearObject] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._close_files()

    def open(self, address: str, pinned: Sequence[Pinned], base: Checkpoint | None = None) -> Checkpoint:
        """A checkpoint's headers, once it is certain that its files are those that were planned with.

        Adapters are put on ``base``.

        Raises:
            BadInput: it is an adapter, and there is no base for it.
            InputChanged, InputMissing, StorageFailure.
        """
        with failures():
            checkpoint = read_checkpoint(self._objects, address)
            if base is not None:
                checkpoint = on_base(base, checkpoint)
        if checkpoint.adapter is not None and base is None:
            raise BadInput(f"{address} is an adapter, not a whole model; add it to its base first (merge_and_unload)")
        found = {file.address: file.etag for file in checkpoint.files}
        for pin in pinned:
            if found.get(pin.address) != pin.etag:
                raise InputChanged(f"{pin.address} changed after the job was planned; submit the merge again")
        return checkpoint

    def start(self, checkpoint: Checkpoint, names: Iterable[str], entries: slice | None = None) -> Reading:
        """Begin to read tensors; ``Reading.wait`` gives them.

        With ``entries``, which names the first and the one after the last, only those of each tensor, ``[n]``; what an
        adapter adds to can't be read so.
        """
        etags = {file.address: file.etag for file in (*checkpoint.files, *checkpoint.beside)}
        wanted = list(names)
        infos = [info for name in wanted for info in _parts(checkpoint, name)]
        spans = plan_spans(infos if entries is None else [_cut(info, entries) for info in infos])
        additions = {name: change for name in wanted if isinstance(change := checkpoint.changes.get(name), LowRank)}
        return Reading([self._read_span(span, etags[span.file]) for span in spans], additions)

    def are_near(self, checkpoints: Sequence[Checkpoint]) -> bool:
        """Whether all lie on this machine, as whole models, so that they may stay ``unread`` until they are needed."""
        if any(checkpoint.adapter is not None for checkpoint in checkpoints):
            return False
        return all(self._is_near(file) for checkpoint in checkpoints for file in checkpoint.files)

    def _is_near(self, file: CheckpointFile) -> bool:
        with failures():
            opened = self._objects.near(file.address, file.etag)
        if opened is not None:
            opened.close()
        return opened is not None

    def unread(self, checkpoints: Sequence[Checkpoint], name: str, entries: slice) -> list[Unread]:
        """Some entries of each one's tensor of a name, ``[n]``, to be read by the caller. All must be near.

        They can be read until this is called again. Raises InputChanged, StorageFailure.
        """
        if len(self._files) > OPEN_FILES:
            self._close_files()
        found = [self._unread(checkpoint, _cut(checkpoint.tensors[name], entries)) for checkpoint in checkpoints]
        for each in found:
            each.expect()
        return found

    def _unread(self, checkpoint: Checkpoint, info: TensorInfo) -> Unread:
        file = self._files.get(info.file)
        if file is None:
            etags = {file.address: file.etag for file in checkpoint.files}
            with failures():
                near = self._objects.near(info.file, etags[info.file])
            file = near or _Far(self._objects, info.file, etags[info.file])
            self._files[info.file] = file
        return Unread(file, info.start, DTYPES[info.dtype], info.shape)

    def _close_files(self) -> None:
        while self._files:
            _, file = self._files.popitem()
            file.close()

    def start_factors(self, checkpoint: Checkpoint, names: Iterable[str]) -> FactorsReading:
        """Begin to read what an adapter adds to tensors, without these; ``FactorsReading.wait`` gives it."""
        etags = {file.address: file.etag for file in checkpoint.files}
        changes = {name: change for name in names if isinstance(change := checkpoint.changes.get(name), LowRank)}
        spans = plan_spans([info for change in changes.values() for info in (change.down, change.up)])
        shapes = {name: checkpoint.tensors[name].shape for name in changes}
        return FactorsReading(Reading([self._read_span(span, etags[span.file]) for span in spans]), changes, shapes)

    def read(self, checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name, in host memory, with the types the file has. Raises InputChanged, StorageFailure."""
        return self.start(checkpoint, names).wait()

    def _read_span(self, span: Span, etag: str) -> SpanReading:
        buffer = self._buffers.lend(span.end - span.start)
        view = bytes_of(buffer)
        pieces = [
            self._pool.submit(self._read_piece, span, etag, view, offset) for offset in range(0, len(view), SPAN_BYTES)
        ]
        return SpanReading(span, buffer, pieces)

    def _read_piece(self, span: Span, etag: str, view: memoryview, offset: int) -> None:
        with failures():
            piece = view[offset : offset + SPAN_BYTES]
            self._objects.read(span.file, span.start + offset, piece, etag=etag)


@dataclass(frozen=True)
class _Far:
    """A file that was near, read from its store: what is kept of a store's objects may go meanwhile."""

    objects: Objects
    address: str
    etag: str

    def expect(self, start: int, size: int) -> None:
        """A store has no use for it."""

    def read(self, start: int, into: memoryview) -> None:
        self.objects.read(self.address, start, into, etag=self.etag)

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True)
class SpanReading:
    """A span that is being read."""

    span: Span
    buffer: Tensor
    pieces: list[Future[None]]


@dataclass(frozen=True)
class Reading:
    """Tensors that are being read."""

    spans: list[SpanReading]
    additions: Mapping[str, LowRank] = field(default_factory=dict)

    def wait(self) -> dict[str, Tensor]:
        """The tensors, once all of them are there. Raises what the reading raised."""
        tensors = {}
        for reading in self.spans:
            for piece in reading.pieces:
                piece.result()
            for info in reading.span.tensors:
                tensors[info.name] = _carve(reading.buffer, info, reading.span.start)
        for name, change in self.additions.items():
            down, up = tensors.pop(change.down.name), tensors.pop(change.up.name)
            tensors[name] = _added(tensors[name], down, up, change)
        return tensors


@dataclass(frozen=True)
class FactorsReading:
    """Parts of an adapter that are being read."""

    reading: Reading
    changes: Mapping[str, LowRank]
    shapes: Mapping[str, tuple[int, ...]]

    def wait(self) -> dict[str, LowRankVector]:
        """What is added to each tensor, once all of it is there. Raises what the reading raised."""
        read = self.reading.wait()
        return {
            name: LowRankVector(
                read[change.down.name], read[change.up.name], change.scale, change.transposed, self.shapes[name]
            )
            for name, change in self.changes.items()
        }


def _parts(checkpoint: Checkpoint, name: str) -> list[TensorInfo]:
    """What must be read for a tensor: itself, what stands in for it, or itself and what is added to it."""
    change = checkpoint.changes.get(name)
    if isinstance(change, LowRank):
        return [checkpoint.tensors[name], change.down, change.up]
    return [checkpoint.tensors[name] if change is None else change]


def _cut(info: TensorInfo, entries: slice) -> TensorInfo:
    """Some of a tensor's entries, in row order, as a tensor of its own."""
    width = DTYPE_BYTES[info.dtype]
    first, last = info.start + entries.start * width, info.start + entries.stop * width
    return replace(info, shape=(entries.stop - entries.start,), start=first, end=last)


def _added(tensor: Tensor, down: Tensor, up: Tensor, change: LowRank) -> Tensor:
    """W + scale * B A, in float32 (float64 where W is): rounded to W's own type, small additions would be lost."""
    compute = torch.promote_types(tensor.dtype, torch.float32)
    vector = LowRankVector(down, up, change.scale, change.transposed, tuple(tensor.shape))
    return vector.dense(compute).add_(tensor)


def plan_spans(tensors: Sequence[TensorInfo]) -> list[Span]:
    """Group tensors into reads: neighbors together, up to SPAN_BYTES, over gaps of at most GAP_BYTES."""
    spans: list[list[TensorInfo]] = []
    for info in sorted(tensors, key=lambda info: (info.file, info.start)):
        last = spans[-1] if spans else None
        if last and _joins(last, info):
            last.append(info)
        else:
            spans.append([info])
    return [Span(group[0].file, group[0].start, max(info.end for info in group), tuple(group)) for group in spans]


def _joins(group: list[TensorInfo], info: TensorInfo) -> bool:
    last = group[-1]
    return info.file == last.file and info.start - last.end <= GAP_BYTES and info.end - group[0].start <= SPAN_BYTES


def _carve(buffer: Tensor, info: TensorInfo, start: int) -> Tensor:
    """A tensor's bytes as a tensor: without a copy, unless they lie on an odd offset."""
    raw = buffer[info.start - start : info.end - start]
    if raw.storage_offset() % DTYPE_BYTES[info.dtype]:
        raw = raw.clone()
    return raw.view(DTYPES[info.dtype]).reshape(info.shape)


def chunks(objects: Objects, file: Pinned) -> Iterator[memoryview]:
    """A pinned file, piece by piece; each piece is overwritten by the next. Raises InputChanged, StorageFailure."""
    buffer = bytearray(min(COPY_BYTES, file.size) or 1)
    for start in range(0, file.size, COPY_BYTES):
        piece = memoryview(buffer)[: min(COPY_BYTES, file.size - start)]
        with failures():
            objects.read(file.address, start, piece, etag=file.etag)
        yield piece


def batches(tensors: Sequence[tuple[str, int]], limit_bytes: int) -> Iterator[list[str]]:
    """Names in order, in groups of at most ``limit_bytes``, or of one where a single tensor is larger."""
    group: list[str] = []
    held = 0
    for name, size in tensors:
        if group and held + size > limit_bytes:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group


def read_ahead(
    items: Sequence[T], start: Callable[[T], R], size: Callable[[T], int], limit_bytes: int
) -> Iterator[tuple[T, R]]:
    """Items in order with what ``start`` returned for each, which was called as far ahead as ``limit_bytes`` allow.

    What is ahead of the item that the caller has does not exceed the limit; an item that is larger by itself is
    started when it is its turn. So the memory in use is at most the largest item's and the limit.
    """
    waiting, ahead, held = deque(items), deque[tuple[T, R]](), 0
    while ahead or waiting:
        if ahead:
            turn = ahead.popleft()
            held -= size(turn[0])
        else:
            turn = (waiting[0], start(waiting.popleft()))
        while waiting and held + size(waiting[0]) <= limit_bytes:
            held += size(waiting[0])
            ahead.append((waiting[0], start(waiting.popleft())))
        yield turn
        del turn  # or it would be held until the next one is there
