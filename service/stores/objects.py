"""One door to every object store: picks the store by the address, and lets only allowed addresses through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from service.contract import errors
from service.contract.checkpoint import MalformedHeader
from service.contract.settings import Connections
from service.stores.base import (
    AccessDenied,
    Address,
    Bookmark,
    BucketDenied,
    NearObject,
    ObjectChanged,
    ObjectInfo,
    ObjectMissing,
    ObjectStore,
    ObjectTooLarge,
    ObjectWriter,
    StoreDown,
    StoreError,
    Unfinished,
    parse_address,
)
from service.stores.blocks import Blocks
from service.stores.cached import CachedStore
from service.stores.local import LocalStore
from service.stores.s3 import S3Store

__all__ = [
    "AccessDenied",
    "Address",
    "Bookmark",
    "BucketDenied",
    "NearObject",
    "ObjectChanged",
    "ObjectInfo",
    "ObjectMissing",
    "ObjectStore",
    "ObjectTooLarge",
    "ObjectWriter",
    "Objects",
    "StoreDown",
    "StoreError",
    "Unfinished",
    "failures",
    "open_objects",
    "parse_address",
    "refusals",
]

OURS = ("cache/", "scratch/")  # folders of the workspace that no recipe may name


class Objects:
    """The stores by scheme, behind the rules on buckets.

    Args:
        stores: a store for each scheme, ``s3`` and ``file``.
        buckets: the buckets that may be used beside the workspace; None: any.
        workspace: the folder of the service's own objects, always allowed.
    """

    def __init__(self, stores: Mapping[str, ObjectStore], *, buckets: tuple[str, ...] | None, workspace: str) -> None:
        self._stores = dict(stores)
        self._buckets = buckets
        self._workspace = workspace

    def check(self, address: str) -> None:
        """Refuse, without a look into any store, an address that a recipe may not name.

        Raises:
            AccessDenied: it is malformed, out of bounds, or inside the service's own folders.
        """
        self._store(address)
        if f"{address}/".startswith(tuple(self._workspace + folder for folder in OURS)):
            raise AccessDenied(f"{address} lies where the service keeps its own files")

    def head(self, address: str) -> ObjectInfo:
        return self._store(address).head(address)

    def read(self, address: str, start: int, into: memoryview, *, etag: str | None = None) -> None:
        self._store(address).read(address, start, into, etag=etag)

    def near(self, address: str, etag: str) -> NearObject | None:
        return self._store(address).near(address, etag)

    def write(
        self, address: str, *, media_type: str = "application/octet-stream", bookmark: Bookmark | None = None
    ) -> ObjectWriter:
        return self._store(address).write(address, media_type=media_type, bookmark=bookmark)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self._store(prefix).list(prefix)

    def delete(self, address: str) -> None:
        self._store(address).delete(address)

    def link(self, address: str, *, seconds: int, filename: str) -> str | None:
        return self._store(address).link(address, seconds=seconds, filename=filename)

    def unfinished(self, prefix: str) -> Iterator[Unfinished]:
        return self._store(prefix).unfinished(prefix)

    def abandon(self, found: Unfinished) -> None:
        self._store(found.address).abandon(found)

    def exists(self, address: str) -> bool:
        """Whether there is such an object."""
        try:
            self.head(address)
        except ObjectMissing:
            return False
        return True

    def read_all(self, address: str, limit_bytes: int) -> bytes:
        """A whole object of at most ``limit_bytes``.

        Raises:
            ObjectTooLarge: it is larger.
        """
        info = self.head(address)
        if info.size > limit_bytes:
            raise ObjectTooLarge(f"{address} has {info.size} bytes, more than the {limit_bytes} expected at most")
        content = bytearray(info.size)
        self.read(address, 0, memoryview(content), etag=info.etag)
        return bytes(content)

    def put(self, address: str, data: bytes | bytearray | memoryview, media_type: str) -> ObjectInfo:
        """Write a whole object."""
        with self.write(address, media_type=media_type) as writer:
            writer.write(data)
            return writer.commit()

    def _store(self, address: str) -> ObjectStore:
        parsed = parse_address(address)
        if parsed.scheme == "s3" and not (self._allows(parsed.bucket) or address.startswith(self._workspace)):
            raise BucketDenied(f"{address}: the bucket {parsed.bucket!r} is not one this service may use")
        store = self._stores.get(parsed.scheme)
        if store is None:
            raise AccessDenied(f"{address}: {parsed.scheme}:// addresses are off here; CATMERGE_FILE_ROOTS allows them")
        return store

    def _allows(self, bucket: str) -> bool:
        return self._buckets is None or bucket in self._buckets


def open_objects(connections: Connections, blocks: Blocks | None = None) -> Objects:
    """The stores that the settings describe; what is read of checkpoints on a server is kept in ``blocks``."""
    stores: dict[str, ObjectStore] = {"s3": _open_s3(connections)}
    if blocks is not None:
        spare = tuple(connections.workspace + folder for folder in OURS)
        stores["s3"] = CachedStore(stores["s3"], blocks, origin=connections.s3_endpoint or "", spare=spare)
    roots = connections.file_roots
    if connections.workspace.startswith("file:///"):
        roots = (*roots, Path(connections.workspace.removeprefix("file://")))
    if roots:
        stores["file"] = LocalStore(roots=roots)
    return Objects(stores, buckets=connections.buckets, workspace=connections.workspace)


def _open_s3(connections: Connections) -> ObjectStore:
    if connections.object_store != "s3":
        return LocalStore(buckets=Path(connections.object_store.removeprefix("file://")))
    return S3Store.connect(connections)


@contextmanager
def failures() -> Iterator[None]:
    """Say what goes wrong with an object as a Failure of the job underway."""
    try:
        yield
    except ObjectMissing as error:
        raise errors.InputMissing(str(error)) from error
    except ObjectChanged as error:
        raise errors.InputChanged(str(error)) from error
    except (ObjectTooLarge, MalformedHeader) as error:
        raise errors.BadInput(str(error)) from error
    except AccessDenied as error:
        raise errors.AccessLost(str(error)) from error
    except StoreError as error:
        raise errors.StorageFailure(str(error)) from error


@contextmanager
def refusals() -> Iterator[None]:
    """Say what goes wrong with an object as a Refusal of the request."""
    try:
        yield
    except ObjectMissing as error:
        raise errors.CheckpointNotFound(str(error)) from error
    except (ObjectTooLarge, MalformedHeader) as error:
        raise errors.MalformedCheckpoint(str(error)) from error
    except BucketDenied as error:
        raise errors.BucketNotAllowed(str(error)) from error
    except AccessDenied as error:
        raise errors.Forbidden(str(error)) from error
    except StoreError as error:  # one that changed under our eyes is worth another try too
        raise errors.StoreUnavailable(str(error), retry_after_seconds=5) from error
