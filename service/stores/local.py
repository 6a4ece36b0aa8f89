"""Objects in folders: ``s3://bucket/key`` at ``folder/bucket/key``, and ``file:///path`` under the roots allowed."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from service.stores.base import (
    AccessDenied,
    Bookmark,
    ObjectChanged,
    ObjectInfo,
    ObjectMissing,
    StoreDown,
    StoreError,
    Unfinished,
    parse_address,
)

STAGING = ".catmerge-staging-"  # objects being written, beside their place so that renaming is atomic; never listed
BUFFER_BYTES = 64 << 10  # small writes are gathered; what is larger goes to the system without another copy
FLUSH_BYTES = 32 << 20  # written between two requests to bring what there is to the disk
STAGING_ATTEMPTS = 20
READING = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # the path is resolved; a pipe must not block


@dataclass(frozen=True)
class Place:
    """Where an address lies: ``root`` is the folder it must stay in, ``key`` the rest, ``mount`` the root's address."""

    mount: str
    root: Path
    key: str

    def path(self) -> Path:
        """The file, after following symbolic links, which must not lead out of the root."""
        root = _real(self.root)
        path = _real(root / self.key)
        if not path.is_relative_to(root):
            raise AccessDenied(f"{self.mount}{self.key} leads out of its folder by a symbolic link")
        return path


class LocalStore:
    """Objects as files.

    An ETag is made of modification time, size and inode: it changes when a file does, and means nothing elsewhere.
    A file and a folder can't share a name, so ``a`` and ``a/b`` can't both be objects here. Folders that are symbolic
    links can be read through but are not listed into.

    Args:
        buckets: the folder whose subfolders are the buckets of ``s3://`` addresses; None: there are no such addresses.
        roots: the folders under which ``file:///`` addresses may lie.
    """

    def __init__(self, *, buckets: Path | None = None, roots: tuple[Path, ...] = ()) -> None:
        self._buckets = buckets
        self._roots = sorted(roots, key=lambda root: len(root.parts), reverse=True)

    def head(self, address: str) -> ObjectInfo:
        place = self._object(address)
        with _errors(address):
            return _info(address, place.path().stat())

    def read(self, address: str, start: int, into: memoryview, *, etag: str | None = None) -> None:
        path = self._object(address).path()
        with _errors(address), _opened(path) as file:
            expected = etag or _info(address, os.fstat(file)).etag
            _fill(file, start, into.cast("B"), address)
            _refuse_change(address, file, expected)

    def near(self, address: str, etag: str) -> LocalObject:
        return LocalObject(address, self._object(address).path(), etag)

    def write(
        self,
        address: str,
        *,
        media_type: str = "application/octet-stream",  # noqa: ARG002
        bookmark: Bookmark | None = None,  # noqa: ARG002 (reading what is there takes as long as writing it again)
    ) -> LocalWriter:
        place = self._object(address)
        with _write_errors(address):
            return LocalWriter(address, place.path())

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        place = self._place(prefix)
        folder, _, _ = place.key.rpartition("/")
        start = Place(place.mount, place.root, folder).path()
        with _errors(prefix):
            for key, found in _walk(start, f"{folder}/" if folder else "", place):
                yield _info(place.mount + key, found)

    def delete(self, address: str) -> None:
        place = self._object(address)
        with _errors(address):
            path = place.path()
            path.unlink(missing_ok=True)
            _remove_empty(path.parent, _real(place.root))

    def link(self, address: str, *, seconds: int, filename: str) -> str | None:  # noqa: ARG002 (folders have no links)
        return None

    def unfinished(self, prefix: str) -> Iterator[Unfinished]:
        place = self._place(prefix)
        folder, _, _ = place.key.rpartition("/")
        with _errors(prefix):
            for path in sorted(_walk_staging(Place(place.mount, place.root, folder).path())):
                key = path.relative_to(_real(place.root)).as_posix()
                with suppress(FileNotFoundError):  # it has ended meanwhile
                    age = time.time() - path.stat().st_mtime
                    if key.startswith(place.key):
                        yield Unfinished(place.mount + key, str(path), max(age, 0.0))

    def abandon(self, found: Unfinished) -> None:
        path = Path(found.handle)
        with _errors(found.address):
            path.unlink(missing_ok=True)

    def _object(self, address: str) -> Place:
        place = self._place(address)
        if not place.key or place.key.endswith("/"):
            raise AccessDenied(f"{address!r} names a folder, not an object")
        return place

    def _place(self, address: str) -> Place:
        parsed = parse_address(address)
        segments = parsed.key.split("/")
        if "" in segments[:-1] or any(segment.startswith(STAGING) for segment in segments):
            raise AccessDenied(f"{address!r} contains an empty or reserved folder name")
        if parsed.scheme == "file":
            return self._under_root(address)
        if self._buckets is None:
            raise AccessDenied(f"{address!r} is not under any folder of this store")
        return Place(f"s3://{parsed.bucket}/", self._buckets / parsed.bucket, parsed.key)

    def _under_root(self, address: str) -> Place:
        for root in self._roots:
            mount = f"file://{root.as_posix().rstrip('/')}/"
            if address.startswith(mount):
                return Place(mount, root, address.removeprefix(mount))
        raise AccessDenied(f"{address!r} is under none of the folders allowed: CATMERGE_FILE_ROOTS names them")


class LocalObject:
    """A file that stays open while it is read."""

    def __init__(self, address: str, path: Path, etag: str) -> None:
        self._address, self._etag = address, etag
        with _errors(address):
            self._file = os.open(path, READING)
        try:
            _refuse_change(address, self._file, etag)
        except BaseException:
            os.close(self._file)
            raise

    def expect(self, start: int, size: int) -> None:
        if sys.platform != "darwin":  # which has no such call
            os.posix_fadvise(self._file, start, size, os.POSIX_FADV_WILLNEED)

    def read(self, start: int, into: memoryview) -> None:
        try:  # not ``_errors``: a context takes as long as all that is not reading here
            _fill(self._file, start, into, self._address)
            found = os.fstat(self._file)
        except OSError as error:
            raise _store_error(self._address, error) from error
        if _etag(found) != self._etag:
            raise _changed(self._address, found, self._etag)

    def close(self) -> None:
        os.close(self._file)


class LocalWriter:
    """A file being written under a hidden name beside its place; the commit renames it.

    A thread brings it to the disk all along, so that the commit, which waits for the disk, has little left to wait for.
    """

    def __init__(self, address: str, path: Path) -> None:
        self._address = address
        self._path = path
        self._staging, self._file = _stage(path.parent)
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="flush")  # no thread until used
        self._flushing: Future[None] | None = None
        self._unflushed = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        with _write_errors(self._address):
            self._file.write(data)
            self._unflushed += memoryview(data).nbytes
            if self._unflushed >= FLUSH_BYTES and (self._flushing is None or self._flushing.done()):
                self._flush()

    def commit(self) -> ObjectInfo:
        with _write_errors(self._address):
            self._file.flush()
            self._wait_for_flush()
            self._flusher.shutdown()
            os.fsync(self._file.fileno())
            found = os.fstat(self._file.fileno())
            self._staging.replace(self._path)
            self._file.close()
            _sync_folder(self._path.parent)
        return _info(self._address, found)

    def abort(self) -> None:
        """Drop what was written; after a commit this does nothing."""
        if not self._file.closed:
            self._flusher.shutdown()  # waits: it must not meet another file under the same number
            self._staging.unlink(missing_ok=True)
            with suppress(OSError):  # closing writes what is buffered, and a full disk complains
                self._file.close()

    def _flush(self) -> None:
        self._wait_for_flush()
        self._flushing = self._flusher.submit(os.fsync, self._file.fileno())
        self._unflushed = 0

    def _wait_for_flush(self) -> None:
        """Raises what the disk said: it says so once only, so that the commit alone would not hear of it."""
        if self._flushing is not None:
            self._flushing.result()


def _stage(folder: Path) -> tuple[Path, BinaryIO]:
    """A new hidden file in ``folder``, which is made; a delete beside us may remove the empty folder meanwhile."""
    path = folder / f"{STAGING}{secrets.token_hex(8)}"
    failed: OSError = FileNotFoundError()
    for _ in range(STAGING_ATTEMPTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return path, path.open("xb", buffering=BUFFER_BYTES)
        except (FileNotFoundError, FileExistsError) as error:  # mkdir says "exists" of what is gone a moment later
            failed = error
    raise failed


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _remove_empty(folder: Path, root: Path) -> None:
    while folder != root and folder.is_relative_to(root):
        try:
            folder.rmdir()
        except OSError:  # not empty, or gone
            return
        folder = folder.parent


def _real(path: Path) -> Path:
    """The path without symbolic links; unlike Path.resolve it leaves links that lead to themselves to the next call."""
    return Path(os.path.realpath(path))


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    file = os.open(path, READING)
    try:
        yield file
    finally:
        os.close(file)


def _fill(file: int, start: int, into: memoryview, address: str) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(file, [into[done:]], start + done)
        if count == 0:
            raise ObjectChanged(f"{address} ends at byte {start + done}, before byte {start + len(into)}")
        done += count


def _refuse_change(address: str, file: int, etag: str) -> None:
    found = os.fstat(file)
    if _etag(found) != etag:
        raise _changed(address, found, etag)


def _changed(address: str, found: os.stat_result, expected: str) -> ObjectChanged:
    return ObjectChanged(f"{address} has changed: its ETag is {_info(address, found).etag}, expected {expected}")


def _info(address: str, found: os.stat_result) -> ObjectInfo:
    if not stat.S_ISREG(found.st_mode):
        raise ObjectMissing(f"{address} is not a file")
    return ObjectInfo(address, found.st_size, _etag(found), None, found.st_mtime)


def _etag(found: os.stat_result) -> str:
    return f"{found.st_mtime_ns:x}-{found.st_size:x}-{found.st_ino:x}"


def _walk(folder: Path, key: str, place: Place) -> Iterator[tuple[str, os.stat_result]]:
    """Files below ``folder``, whose own key is ``key``, with keys that begin with the place's, in order of bytes."""
    for entry in _entries(folder):
        name = key + entry.name
        if entry.name.startswith(STAGING) or not _may_match(name, place.key):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), f"{name}/", place)
        elif name.startswith(place.key):
            found = _inside(entry, place)
            if found is not None:
                yield name, found


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, a folder's name with its slash, as its keys begin with it; none if it is gone."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda e: os.fsencode(e.name + "/" * e.is_dir(follow_symlinks=False)))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _walk_staging(folder: Path) -> Iterator[Path]:
    """Files that are being written, at any depth."""
    for entry in _entries(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from _walk_staging(Path(entry.path))
        elif entry.name.startswith(STAGING):
            yield Path(entry.path)


def _may_match(name: str, prefix: str) -> bool:
    return name.startswith(prefix) or prefix.startswith(f"{name}/")


def _inside(entry: os.DirEntry[str], place: Place) -> os.stat_result | None:
    """What a regular file looks like; None for anything else, and for a link that leads out of the root."""
    if entry.is_symlink() and not _real(Path(entry.path)).is_relative_to(_real(place.root)):
        return None
    try:
        found = entry.stat()
    except OSError:  # deleted meanwhile, or a link to nowhere or to itself
        return None
    return found if stat.S_ISREG(found.st_mode) else None


@contextmanager
def _errors(address: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _store_error(address, error) from error


def _store_error(address: str, error: OSError) -> StoreError:
    match error:
        case FileNotFoundError() | NotADirectoryError() | IsADirectoryError():
            return ObjectMissing(f"{address} does not exist")
        case PermissionError():
            return AccessDenied(f"{address} may not be used by this process: {error.strerror}")
        case OSError(errno=errno.ELOOP | errno.ENAMETOOLONG):
            return ObjectMissing(f"{address} does not exist: {error.strerror}")
    return StoreDown(f"{address}: {error.strerror}")


@contextmanager
def _write_errors(address: str) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise AccessDenied(f"{address} can't be written: {error.strerror}") from error
    except OSError as error:
        raise StoreDown(f"{address} can't be written: {error.strerror}") from error
