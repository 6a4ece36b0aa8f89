"""A store before another one: what is read of checkpoints stays on this machine's disk for whoever reads it next."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from service.contract.settings import Connections
from service.contract.workers import InputCache
from service.stores.base import (
    Bookmark,
    NearObject,
    ObjectChanged,
    ObjectInfo,
    ObjectStore,
    ObjectWriter,
    Unfinished,
)
from service.stores.blocks import Blocks, Identity

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
LOOK_SECONDS = 30.0  # how long an object is taken to be what it was when the store was last asked
KNOWN_OBJECTS = 4096
LEAST_SHARE = 16  # who wants less than this part of a block reads just that: headers don't fetch blocks
WINDOW = 16  # blocks by which the disk is judged
PAUSE_FACTOR = 10  # a disk that is slower than the store takes a tenth of the time at most
PAUSE_SECONDS = 10.0  # after a block could not be written
LOCKS = 64
SPARE_BUFFERS = 4
SHOWN = 20
OF_A_FOLDER = ("model.", "model-", "adapter_model.")  # how files begin whose folder is the checkpoint


@dataclass(frozen=True)
class _Piece:
    """Part of one block that somebody wants: ``into`` from offset ``start`` of the block."""

    number: int
    start: int
    into: memoryview


class CachedStore:
    """Another store whose checkpoints are kept in blocks as they are read.

    Only files that are read as they were under a known ETag are kept. The blocks that a read touches are fetched whole
    where it wants a fair part of them: its neighbors find the rest. What is kept under an ETag is never anything else,
    and the store is asked from time to time whether that is still the object's.

    Args:
        store: where everything is.
        blocks: what is kept.
        origin: tells this store from others whose objects have the same addresses.
        spare: folders of which nothing is kept.
    """

    def __init__(self, store: ObjectStore, blocks: Blocks, *, origin: str, spare: tuple[str, ...] = ()) -> None:
        self._store = store
        self._blocks = blocks
        self._origin = origin
        self._spare = spare
        self._seen: dict[tuple[str, str], tuple[Identity, float]] = {}
        self._locks = [threading.Lock() for _ in range(LOCKS)]
        self._buffers: deque[bytearray] = deque(maxlen=SPARE_BUFFERS)
        self._pace = _Pace()

    def head(self, address: str) -> ObjectInfo:
        info = self._store.head(address)
        if len(self._seen) >= KNOWN_OBJECTS:
            self._seen.clear()
        identity = Identity(self._origin, address, info.etag, info.size)
        self._seen[address, info.etag] = identity, time.monotonic()
        return info

    def read(self, address: str, start: int, into: memoryview, *, etag: str | None = None) -> None:
        into = into.cast("B")
        identity = None if etag is None or not self._keeps(address) else self._identity(address, etag)
        if identity is None or start + len(into) > identity.size:
            self._store.read(address, start, into, etag=etag)
            return
        done = behind = 0  # of what was asked for; bytes of it that are still to be read from the store as they are
        for piece in self._pieces(start, into):
            if self._find(identity, piece) or self._fill(identity, piece):
                self._read_behind(identity, start, into, done, behind)
                behind = 0
            else:
                behind += len(piece.into)
            done += len(piece.into)
        self._read_behind(identity, start, into, done, behind)

    def near(self, address: str, etag: str) -> NearObject | None:
        """An object of which everything is here, or what the other store says.

        Should a block go while it is read, that is read from the other store.
        """
        if self._keeps(address):
            identity = self._identity(address, etag)
            if self._blocks.has_all(identity):
                return CachedObject(self, self._blocks, identity)
        return self._store.near(address, etag)

    def write(
        self, address: str, *, media_type: str = "application/octet-stream", bookmark: Bookmark | None = None
    ) -> ObjectWriter:
        return self._store.write(address, media_type=media_type, bookmark=bookmark)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self._store.list(prefix)

    def delete(self, address: str) -> None:
        self._store.delete(address)

    def link(self, address: str, *, seconds: int, filename: str) -> str | None:
        return self._store.link(address, seconds=seconds, filename=filename)

    def unfinished(self, prefix: str) -> Iterator[Unfinished]:
        return self._store.unfinished(prefix)

    def abandon(self, found: Unfinished) -> None:
        self._store.abandon(found)

    def _keeps(self, address: str) -> bool:
        return address.endswith(SUFFIX) and not address.startswith(self._spare)

    def _identity(self, address: str, etag: str) -> Identity:
        """Raises ObjectChanged."""
        identity, seen_at = self._seen.get((address, etag), (None, 0.0))
        if identity is None or time.monotonic() > seen_at + LOOK_SECONDS:
            info = self.head(address)
            if info.etag != etag:
                raise ObjectChanged(f"{address} has changed: its ETag is {info.etag}, expected {etag}")
            identity = Identity(self._origin, address, etag, info.size)
        return identity

    def _pieces(self, start: int, into: memoryview) -> Iterator[_Piece]:
        size, done = self._blocks.block_bytes, 0
        while done < len(into):
            number, offset = divmod(start + done, size)
            count = min(size - offset, len(into) - done)
            yield _Piece(number, offset, into[done : done + count])
            done += count

    def _find(self, identity: Identity, piece: _Piece) -> bool:
        found = self._blocks.read(identity, piece.number, piece.start, piece.into)
        if found:
            self._blocks.count(found=len(piece.into))
        return found

    def _fill(self, identity: Identity, piece: _Piece) -> bool:
        """Fetch and keep the block that a piece lies in, where it is worth it. Raises StoreError."""
        length = self._blocks.length(identity, piece.number)
        if self._pace.is_paused or LEAST_SHARE * len(piece.into) < length:
            return False
        with self._locks[hash((identity, piece.number)) % LOCKS]:
            if self._find(identity, piece):  # another thread was faster
                return True
            if len(piece.into) == length:
                self._fetch(identity, piece.number, piece.into)
            else:
                with self._lent(length) as block:
                    self._fetch(identity, piece.number, block)
                    piece.into[:] = block[piece.start : piece.start + len(piece.into)]
        self._blocks.count(missed=len(piece.into))
        return True

    def _fetch(self, identity: Identity, number: int, block: memoryview) -> None:
        began = time.monotonic()
        self._store.read(identity.address, number * self._blocks.block_bytes, block, etag=identity.etag)
        self._keep(identity, number, block, time.monotonic() - began)

    @contextmanager
    def _lent(self, length: int) -> Iterator[memoryview]:
        """Memory for a block, to be used over and over: fresh memory would have to be touched first."""
        try:
            buffer = self._buffers.pop()
        except IndexError:
            buffer = bytearray(self._blocks.block_bytes)
        try:
            yield memoryview(buffer)[:length]
        finally:
            self._buffers.append(buffer)

    def _keep(self, identity: Identity, number: int, block: memoryview, fetching_seconds: float) -> None:
        began = time.monotonic()
        try:
            self._blocks.keep(identity, number, block)
        except OSError as error:
            logger.warning("Nothing is kept on this machine's disk for %d s: %s", PAUSE_SECONDS, error)
            self._pace.pause(PAUSE_SECONDS)
            return
        self._pace.note(fetching_seconds, time.monotonic() - began)

    def _read_behind(self, identity: Identity, start: int, into: memoryview, done: int, behind: int) -> None:
        """Read what was passed over just before ``done``, in one request."""
        if behind:
            first = done - behind
            self._store.read(identity.address, start + first, into[first:done], etag=identity.etag)
            self._blocks.count(missed=behind)


class CachedObject:
    """An object that lies in blocks on this machine's disk."""

    def __init__(self, store: CachedStore, blocks: Blocks, identity: Identity) -> None:
        self._store, self._blocks, self._identity = store, blocks, identity

    def expect(self, start: int, size: int) -> None:
        each = self._blocks.block_bytes
        for number in range(start // each, -(-(start + size) // each)):
            self._blocks.expect(self._identity, number)

    def read(self, start: int, into: memoryview) -> None:
        self._store.read(self._identity.address, start, into, etag=self._identity.etag)

    def close(self) -> None:
        """Nothing stays open between two reads."""


class _Pace:
    """Whether blocks are being kept: a disk that is slower than the store must not hold back who reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until = 0.0
        self._count, self._fetching, self._writing = 0, 0.0, 0.0

    @property
    def is_paused(self) -> bool:
        return time.monotonic() < self._until

    def pause(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def note(self, fetching_seconds: float, writing_seconds: float) -> None:
        """Note how long a block took to come, and how long to be written."""
        with self._lock:
            self._count += 1
            self._fetching += fetching_seconds
            self._writing += writing_seconds
            if self._count >= WINDOW:
                if self._writing > self._fetching:
                    self.pause(PAUSE_FACTOR * self._writing)
                self._count, self._fetching, self._writing = 0, 0.0, 0.0


def input_cache(blocks: Blocks) -> InputCache:
    """What there is in blocks, as workers say it: files of one checkpoint together, the largest checkpoints only."""
    checkpoints: Counter[str] = Counter()
    for kept in blocks.kept():
        checkpoints[_checkpoint(kept.address)] += kept.nbytes
    found, missed = blocks.counted
    return InputCache(blocks.limit_bytes, blocks.used_bytes, found, missed, tuple(checkpoints.most_common(SHOWN)))


def _checkpoint(address: str) -> str:
    """The checkpoint that a file belongs to: a folder, or the file itself."""
    folder, _, name = address.rpartition("/")
    return f"{folder}/" if name.startswith(OF_A_FOLDER) else address


def open_blocks(connections: Connections) -> Blocks | None:
    """What this machine keeps of the objects of an S3 server, where the settings say so; folders are near already.

    A folder that can't be used is no reason not to work.
    """
    folder, limit = connections.input_cache, connections.input_cache_bytes
    if folder is None or limit is None or connections.object_store != "s3":
        return None
    try:
        return Blocks(folder, limit)
    except OSError as error:
        logger.warning("Inputs are not kept in %s: %s", folder, error)
        return None
