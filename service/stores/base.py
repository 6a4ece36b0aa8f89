"""What every object store promises: nine verbs, one way to write addresses, and four ways to say no."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self
from urllib.parse import unquote

BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")
MAX_ADDRESS_BYTES = 2048


class StoreError(Exception):
    """Something about a stored object; the message is a sentence that names the address."""


class ObjectMissing(StoreError):
    """There is no such object, or no such bucket."""


class ObjectChanged(StoreError):
    """The object is not, or no longer, the one that was asked for."""


class ObjectTooLarge(StoreError):
    """The object is larger than what its reader is ready to hold."""


class AccessDenied(StoreError):
    """The address may not be used: the service's rules or the store's say no."""


class BucketDenied(AccessDenied):
    """The bucket is not one the service may use."""


class StoreDown(StoreError):
    """The store did not do its part; the same request may succeed later."""


@dataclass(frozen=True)
class ObjectInfo:
    """One object as it is now. ``size`` in bytes, ``etag`` without quotes, ``modified`` in seconds since the epoch."""

    address: str
    size: int
    etag: str
    version_id: str | None
    modified: float


@dataclass(frozen=True)
class Unfinished:
    """An object whose writing began, or went on, ``age_seconds`` ago and never ended; by the store's clock.

    ``address`` is the object's where the store can tell, else of a file that stands for it; ``handle`` is the store's.
    """

    address: str
    handle: str
    age_seconds: float


@dataclass(frozen=True)
class Bookmark:
    """Where it is kept how far an object is, so that whoever writes it again sends only what is not there yet.

    ``find`` gives the store's handle of what was begun last, if anything was; ``note`` keeps that of what is begun now,
    or None where nobody is to go on with it.
    """

    find: Callable[[], str | None]
    note: Callable[[str | None], None]


class ObjectWriter(Protocol):
    """An object being written: a context manager, and until ``commit`` nobody sees anything of it.

    Leaving without a commit, by an exception or not, drops what was written, or leaves it where a bookmark says.
    """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def write(self, data: bytes | bytearray | memoryview) -> None: ...

    def commit(self) -> ObjectInfo: ...

    def abort(self) -> None: ...


class NearObject(Protocol):
    """An object on this machine, open until it is closed: cheap to read in pieces of any size, by many threads."""

    def expect(self, start: int, size: int) -> None:
        """Say that these bytes will be read soon."""
        ...

    def read(self, start: int, into: memoryview) -> None:
        """As ``ObjectStore.read``, of the object that was opened. Raises ObjectChanged where it has changed since."""
        ...

    def close(self) -> None: ...


class ObjectStore(Protocol):
    """Seven verbs over full addresses, and two more to clear away what was left half written.

    Every method may be called from several threads, and may raise any StoreError.
    """

    def head(self, address: str) -> ObjectInfo:
        """The object as it is now. Raises ObjectMissing."""
        ...

    def read(self, address: str, start: int, into: memoryview, *, etag: str | None = None) -> None:
        """Fill ``into`` with the object's bytes from offset ``start``, all of it or an error.

        Raises:
            ObjectChanged: the object has another ETag than ``etag``, or ends too early.
        """
        ...

    def near(self, address: str, etag: str) -> NearObject | None:
        """The object, opened, where it lies on this machine; None where reading in large spans is better.

        Raises:
            ObjectChanged: the object has another ETag than ``etag``.
        """
        ...

    def write(
        self, address: str, *, media_type: str = "application/octet-stream", bookmark: Bookmark | None = None
    ) -> ObjectWriter:
        """A writer that replaces the object when it commits.

        With a bookmark it goes on with what an earlier writer began, if the store still has that and can tell what it
        is; where bytes differ, it sends its own. Where a store is as fast to write to as to compare, none is noted.
        """
        ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """The objects whose addresses begin with ``prefix``, in the order of their keys' bytes."""
        ...

    def delete(self, address: str) -> None:
        """Remove the object; one that is not there is fine."""
        ...

    def unfinished(self, prefix: str) -> Iterator[Unfinished]:
        """What is being written under a prefix at this moment, or was by a process that is gone."""
        ...

    def abandon(self, found: Unfinished) -> None:
        """Drop what was written of it; no error where it has ended meanwhile."""
        ...

    def link(self, address: str, *, seconds: int, filename: str) -> str | None:
        """An address that anyone can download the object from for a while, or None where the store has none."""
        ...


@dataclass(frozen=True)
class Address:
    """An address taken apart. ``bucket`` is empty for a file, whose ``key`` is its path without the first slash."""

    scheme: str
    bucket: str
    key: str


def parse_address(text: str) -> Address:
    """Take apart ``s3://bucket/key`` or ``file:///path``; a prefix may end in a slash or have no key.

    Nothing here is ever percent-decoded; what would be dangerous if anything behind us decoded it is refused.

    Raises:
        AccessDenied: it is no such address, or climbs out of where it claims to be.
    """
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in ("s3", "file") or (scheme == "file" and not rest.startswith("/")):
        raise AccessDenied(f"{text!r} is no address: write s3://bucket/key or file:///path")
    if len(text.encode(errors="replace")) > MAX_ADDRESS_BYTES:
        raise AccessDenied(f"{text[:100]!r}... is longer than {MAX_ADDRESS_BYTES} bytes")
    _refuse_tricks(text, rest)
    bucket, _, key = rest.partition("/")
    if scheme == "s3" and not BUCKET.fullmatch(bucket):
        raise AccessDenied(f"{text!r} names no bucket: write s3://bucket/key")
    return Address(scheme, bucket, key)


def _refuse_tricks(text: str, rest: str) -> None:
    decoded = rest
    for _ in range(3):  # %252e is %2e once decoded
        decoded = unquote(decoded)
    if any(ord(character) < 32 or ord(character) == 127 for character in rest + decoded):
        raise AccessDenied(f"{text!r} contains control characters")
    for spelling in (rest, decoded):
        if not {"..", "."}.isdisjoint(spelling.replace("\\", "/").split("/")):
            raise AccessDenied(f"{text!r} contains '.' or '..' as a folder, encoded or not")
    if decoded.count("/") != rest.count("/") or "\\" in decoded:
        raise AccessDenied(f"{text!r} contains an encoded slash or a backslash")
