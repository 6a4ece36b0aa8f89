"""Objects' bytes on this machine's disk, block by block: bounded, shared by processes, and safe to be killed over."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import secrets
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

BLOCK_BYTES = 8 << 20  # about what is asked for at once: a request costs a server and us more than its bytes do
LAYOUT = 1  # of the folder; raised when blocks of an earlier version can't be read
TAIL = struct.Struct("<I")  # after each block's bytes: their CRC-32, begun with that of the block's name
ABOUT = "about.json"
STAGING = "new-"
LOCK = "lock"  # holds how many bytes there are, as far as is known: a scan corrects it
LOCK_PATIENCE_SECONDS = 0.5  # who waits for longer keeps nothing: the holder may stand still
OPENING_PATIENCE_SECONDS = 30.0
SLACK = 32  # a 32nd of the limit is freed at once, so that the folder need not be looked through for each block
READ_BYTES = 1 << 20
MARKS = 1 << 14  # blocks that this process has found to be sound
TOUCH_SECONDS = 1.0
KNOWN_SECONDS = 5.0  # how old what is said of the folder may be


class NoRoom(OSError):
    """A block can't be kept: the limit leaves no room, or the folder is locked for too long."""


@dataclass(frozen=True)
class Identity:
    """The content that an object had under an ETag.

    An ETag of an upload in parts is no digest of the content, but changes with it: beside the address, and the server
    it is on (``origin``), it names one content.
    """

    origin: str
    address: str
    etag: str
    size: int


@dataclass(frozen=True)
class Kept:
    """An object of which ``nbytes`` lie here, of all its ``size``."""

    address: str
    size: int
    nbytes: int


@dataclass(frozen=True)
class _Block:
    """A file in the folder, as it was seen."""

    used_at: float
    nbytes: int
    path: str


class Blocks:
    """A folder of blocks; of those that were not read for the longest time some go when it is full.

    Every process may be killed at any time, and any number may share the folder. A block is written under another name
    and renamed; what a dead process left half written is told by its lock, which died with it. A block that is not
    what was written, after a power cut or on a bad disk, is dropped. Nothing is ever brought to the disk by force.

    Args:
        folder: made where it is missing.
        limit_bytes: of all blocks, those being written included.

    Raises:
        OSError: the folder can't be made or written to.
    """

    def __init__(self, folder: Path, limit_bytes: int, *, block_bytes: int = BLOCK_BYTES) -> None:
        self._folder = folder
        self._marks: dict[str, int] = {}
        self._known: tuple[float, list[Kept]] | None = None
        self._lock = threading.Lock()
        self._looking = threading.Lock()
        self._counted: Counter[str] = Counter()
        self.limit_bytes = limit_bytes
        self.block_bytes = block_bytes
        with self._locked(OPENING_PATIENCE_SECONDS) as lock:
            _note(lock, self._make_room(0))

    def length(self, identity: Identity, number: int) -> int:
        """Bytes of one of an object's blocks: the last may be shorter."""
        return min(self.block_bytes, identity.size - number * self.block_bytes)

    def read(self, identity: Identity, number: int, start: int, into: memoryview) -> bool:
        """Fill ``into`` from offset ``start`` of a block; False where it is not here, or not sound."""
        path = self._path(identity, number)
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError:
            return False
        try:
            if self._is_sound(file, path, self.length(identity, number)):
                _fill(file, start, into)
                return True
            logger.warning("%s is not what was written; it is read from the store again", path)
        except OSError as error:
            logger.warning("%s can't be read (%s); it is read from the store again", path, error)
        finally:
            os.close(file)
        with suppress(OSError):
            path.unlink()
        return False

    def expect(self, identity: Identity, number: int) -> None:
        """Say that a block will be read soon."""
        with suppress(OSError, AttributeError):  # not every system has such a call
            file = os.open(self._path(identity, number), os.O_RDONLY)
            try:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)

    def has_all(self, identity: Identity) -> bool:
        """Whether the whole object is here."""
        folder = self._path(identity, 0).parent
        blocks = -(-identity.size // self.block_bytes)
        return sum(entry.isdecimal() for entry in _names(folder)) == blocks

    def keep(self, identity: Identity, number: int, content: memoryview) -> None:
        """Keep a block. Raises OSError where it can't be."""
        path = self._path(identity, number)
        nbytes = len(content) + TAIL.size
        staged, file = self._stage(identity, path.parent, nbytes)
        try:
            _write(file, content)
            _write(file, memoryview(TAIL.pack(zlib.crc32(content, _seed(path)))))
            staged.rename(path)
            self._mark(path, os.fstat(file).st_ino)
        except OSError:
            staged.unlink(missing_ok=True)
            self._give_back(nbytes)
            raise
        finally:
            os.close(file)  # only now may others take it for what a dead process left

    def count(self, *, found: int = 0, missed: int = 0) -> None:
        """Count bytes that somebody asked for: those that were here, and those that were not."""
        with self._lock:
            self._counted.update(found=found, missed=missed)

    @property
    def counted(self) -> tuple[int, int]:
        """Bytes found and missed by this process."""
        with self._lock:
            return self._counted["found"], self._counted["missed"]

    @property
    def used_bytes(self) -> int:
        """What all blocks take, as far as is known."""
        return used_bytes(self._folder)

    def kept(self) -> list[Kept]:
        """The objects of which there is something, as they were a moment ago; those with most bytes come first."""
        with self._looking:
            if self._known is None or time.monotonic() > self._known[0] + KNOWN_SECONDS:
                self._known = time.monotonic(), self._look()
            return self._known[1]

    def _look(self) -> list[Kept]:
        found = []
        for folder in _folders(self._folder):
            with suppress(OSError, ValueError, KeyError, TypeError):
                about = Identity(**json.loads((folder / ABOUT).read_bytes()))
                blocks = sum(name.isdecimal() for name in _names(folder))
                found.append(Kept(about.address, about.size, min(blocks * self.block_bytes, about.size)))
        return sorted((kept for kept in found if kept.nbytes), key=lambda kept: (-kept.nbytes, kept.address))

    def _path(self, identity: Identity, number: int) -> Path:
        named = (LAYOUT, self.block_bytes, identity.origin, identity.address, identity.etag, identity.size)
        text = json.dumps(named)
        return self._folder / hashlib.sha256(text.encode()).hexdigest() / str(number)

    def _is_sound(self, file: int, path: Path, length: int) -> bool:
        """Whether a block is as it was written: looked at once by each process that did not write it."""
        found = os.fstat(file)
        if time.time() - found.st_mtime > TOUCH_SECONDS:
            with suppress(PermissionError):  # another user's
                os.utime(file)
        if self._marks.get(str(path)) == found.st_ino:
            return True
        if found.st_size != length + TAIL.size or not _matches(file, length, _seed(path)):
            return False
        self._mark(path, found.st_ino)
        return True

    def _mark(self, path: Path, file: int) -> None:
        """Note that a block is sound: this process wrote it, or has looked at all of it."""
        if len(self._marks) >= MARKS:
            self._marks.clear()
        self._marks[str(path)] = file

    def _stage(self, identity: Identity, folder: Path, nbytes: int) -> tuple[Path, int]:
        """A file of so many bytes under another name, locked, for which there is room. Raises OSError."""
        with self._locked() as lock:
            used = _noted(os.pread(lock, 64, 0))
            if used is None or used + nbytes > self.limit_bytes:
                used = self._make_room(nbytes)
            folder.mkdir(mode=0o700, exist_ok=True)
            _describe(folder, identity)
            staged = folder / f"{STAGING}{secrets.token_hex(8)}"
            file = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(file, nbytes)
                _note(lock, used + nbytes)
            except OSError:
                os.close(file)
                staged.unlink(missing_ok=True)
                raise
            return staged, file

    def _give_back(self, nbytes: int) -> None:
        with suppress(OSError), self._locked() as lock:
            used = _noted(os.pread(lock, 64, 0))
            if used is not None:
                _note(lock, max(used - nbytes, 0))

    def _make_room(self, nbytes: int) -> int:
        """Drop what was not used for longest until so many bytes more may come; what is left. The folder is locked."""
        if nbytes > self.limit_bytes:
            raise NoRoom(f"a block of {nbytes} bytes does not fit into {self.limit_bytes}")
        blocks, used = self._scan()
        if used + nbytes > self.limit_bytes:
            least = self.limit_bytes - nbytes - self.limit_bytes // SLACK
            for block in blocks:
                if used <= max(least, 0):
                    break
                with suppress(FileNotFoundError):
                    Path(block.path).unlink()
                used -= block.nbytes
        for folder in _folders(self._folder):
            if set(_names(folder)) <= {ABOUT}:
                (folder / ABOUT).unlink(missing_ok=True)
                folder.rmdir()
        if used + nbytes > self.limit_bytes:
            raise NoRoom(f"{nbytes} bytes more don't fit beside what others are writing")
        return used

    def _scan(self) -> tuple[list[_Block], int]:
        """The blocks, what was used longest ago first, and the bytes of all, those being written included."""
        blocks, used = [], 0
        for folder in _folders(self._folder):
            for name in _names(folder):
                path = os.path.join(folder, name)  # noqa: PTH118 (there may be a hundred thousand)
                if name == ABOUT or (name.startswith(STAGING) and _is_left_behind(path)):
                    continue
                with suppress(FileNotFoundError):
                    found = os.stat(path)  # noqa: PTH116
                    used += found.st_size
                    if name.isdecimal():
                        blocks.append(_Block(found.st_mtime, found.st_size, path))
        return sorted(blocks, key=lambda block: (block.used_at, block.path)), used

    @contextmanager
    def _locked(self, patience_seconds: float = LOCK_PATIENCE_SECONDS) -> Iterator[int]:
        """The lock of the whole folder, which dies with its holder; nobody writes or reads blocks under it."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            until = time.monotonic() + patience_seconds
            while not _try_lock(lock):
                if time.monotonic() > until:
                    raise NoRoom(f"{self._folder} is locked by another process for longer than a moment")
                time.sleep(0.005)
            yield lock
        finally:
            os.close(lock)


def used_bytes(folder: Path) -> int:
    """What all blocks in a folder take, as far as is known; nothing is made or changed."""
    try:
        return _noted((folder / LOCK).read_bytes()) or 0
    except OSError:
        return 0


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_left_behind(path: str) -> bool:
    """Whether a file was being written by a process that is gone; it is removed then."""
    with suppress(FileNotFoundError):
        file = os.open(path, os.O_RDONLY)
        try:
            if not _try_lock(file):
                return False
            Path(path).unlink()
        finally:
            os.close(file)
    return True


def _describe(folder: Path, identity: Identity) -> None:
    """Leave beside the blocks what they are of, for people and for what workers say of themselves."""
    about = folder / ABOUT
    if not about.exists():
        staged = folder / f"{STAGING}about"
        staged.write_text(json.dumps(asdict(identity)))
        staged.rename(about)


def _folders(folder: Path) -> Iterator[Path]:
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield Path(entry.path)


def _names(folder: Path) -> Sequence[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 (names are all that is wanted, of many files)
    except FileNotFoundError:
        return ()


def _noted(text: bytes) -> int | None:
    return int(text) if text.isdigit() else None


def _note(lock: int, used: int) -> None:
    os.pwrite(lock, b"%020d" % used, 0)


def _seed(path: Path) -> int:
    """Begins a block's checksum, so that a block under another's name is not taken for it."""
    return zlib.crc32(f"{path.parent.name}/{path.name}".encode())


def _matches(file: int, length: int, seed: int) -> bool:
    buffer = memoryview(bytearray(min(READ_BYTES, length)))
    for start in range(0, length, READ_BYTES):
        piece = buffer[: min(READ_BYTES, length - start)]
        _fill(file, start, piece)
        seed = zlib.crc32(piece, seed)
    return os.pread(file, TAIL.size, length) == TAIL.pack(seed)


def _fill(file: int, start: int, into: memoryview) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(file, [into[done:]], start + done)
        if count == 0:
            raise OSError(f"it ends at byte {start + done}")
        done += count


def _write(file: int, content: memoryview) -> None:
    while content:
        content = content[os.write(file, content) :]
