"""One suite over every object store, then what each of them has of its own."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import boto3
import pytest

from service.contract import errors
from service.contract.checkpoint import MalformedHeader
from service.contract.settings import Connections
from service.stores import local, s3
from service.stores.blocks import Blocks
from service.stores.local import LocalStore
from service.stores.objects import (
    AccessDenied,
    Bookmark,
    BucketDenied,
    ObjectChanged,
    ObjectInfo,
    ObjectMissing,
    Objects,
    ObjectTooLarge,
    ObjectWriter,
    StoreDown,
    failures,
    open_objects,
    parse_address,
    refusals,
)
from tests import faulty
from tests.faulty import StoreProxy, store_proxy
from tests.servers import S3Server, free_port, s3_server

KINDS = ("bucket-folder", "file-root", "moto", "rclone", "cached")
FIRST = b"the quick brown fox"


@dataclass(frozen=True)
class Shop:
    """A store to test and an address in it under which everything is free to use."""

    kind: str
    objects: Objects
    root: str
    server: S3Server | None = None


@dataclass
class Notes:
    """What a part's row keeps of one object; ``noted`` is all that was ever written there."""

    handle: str | None = None
    noted: list[str | None] = field(default_factory=list)

    @property
    def bookmark(self) -> Bookmark:
        return Bookmark(find=lambda: self.handle, note=self._note)

    def _note(self, handle: str | None) -> None:
        self.handle = handle
        self.noted.append(handle)


@pytest.fixture(scope="module")
def opened() -> Iterator[Callable[[str, Path], Shop]]:
    """Opens stores of any kind; a server is started once and serves the whole module."""
    servers: dict[str, S3Server] = {}
    with ExitStack() as stack:

        def open_shop(kind: str, folder: Path) -> Shop:
            environ = {"CATMERGE_OBJECT_STORE": f"file://{folder}"}
            if kind == "file-root":
                return Shop(kind, _open({**environ, "CATMERGE_FILE_ROOTS": str(folder)}), f"file://{folder}/")
            if kind == "bucket-folder":
                return Shop(kind, _open(environ), "s3://catmerge/tests/")
            behind = "moto" if kind == "cached" else kind
            if behind not in servers:
                servers[behind] = stack.enter_context(s3_server(behind))  # type: ignore[arg-type]
            server = servers[behind]
            blocks = Blocks(folder, 10**9) if kind == "cached" else None
            return Shop(kind, _open(server.environment(), blocks), f"s3://catmerge/{folder.name}/", server)

        yield open_shop


@pytest.fixture(params=KINDS)
def shop(request: pytest.FixtureRequest, opened: Callable[[str, Path], Shop], tmp_path: Path) -> Shop:
    return opened(request.param, tmp_path)


def _open(environ: dict[str, str], blocks: Blocks | None = None) -> Objects:
    return open_objects(Connections.from_environment(environ), blocks)


def _read(objects: Objects, address: str, start: int, length: int, etag: str | None = None) -> bytes:
    buffer = bytearray(length)
    objects.read(address, start, memoryview(buffer), etag=etag)
    return bytes(buffer)


def _put(shop: Shop, name: str, data: bytes = FIRST) -> str:
    shop.objects.put(shop.root + name, data, "text/plain")
    return shop.root + name


# --- every store ------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(shop: Shop) -> None:
    address = shop.root + "folder/a b+c=é.txt"
    written = shop.objects.put(address, FIRST, "text/plain")
    assert written.address == address
    assert written.size == len(FIRST)
    assert shop.objects.head(address).etag == written.etag
    assert written.etag
    assert '"' not in written.etag
    assert shop.objects.read_all(address, 100) == FIRST


def test_any_part_can_be_read(shop: Shop) -> None:
    address = _put(shop, "a")
    etag = shop.objects.head(address).etag
    assert _read(shop.objects, address, 0, 3) == b"the"
    assert _read(shop.objects, address, 4, 5, etag) == b"quick"
    assert _read(shop.objects, address, len(FIRST) - 3, 3, etag) == b"fox"
    assert _read(shop.objects, address, 5, 0) == b""


@pytest.mark.parametrize("start", [len(FIRST) - 3, len(FIRST), 10_000])
def test_a_read_past_the_end_is_an_error(shop: Shop, start: int) -> None:
    with pytest.raises(ObjectChanged):
        _read(shop.objects, _put(shop, "a"), start, 4)


def test_a_changed_object_is_not_read(shop: Shop) -> None:
    address = _put(shop, "a")
    etag = shop.objects.head(address).etag
    _put(shop, "a", FIRST.upper())
    with pytest.raises(ObjectChanged):
        _read(shop.objects, address, 0, 3, etag)
    assert _read(shop.objects, address, 0, 3) == b"THE"


def test_a_near_object_is_read_in_pieces_until_it_changes(shop: Shop) -> None:
    address = _put(shop, "a")
    etag = shop.objects.head(address).etag
    near = shop.objects.near(address, etag)
    if shop.server is not None:
        assert near is None, "a server is asked in large spans"
        return
    assert near is not None
    near.expect(0, len(FIRST))
    piece = bytearray(5)
    near.read(4, memoryview(piece))
    assert piece == b"quick"
    with pytest.raises(ObjectChanged):
        near.read(len(FIRST) - 3, memoryview(piece))
    _put(shop, "a", FIRST.upper())  # another file under the same name: this one is still what it was
    near.read(10, memoryview(piece))
    near.close()
    assert piece == b"brown"
    with pytest.raises(ObjectChanged):
        shop.objects.near(address, etag)


def test_a_missing_object_is_said_to_be_missing(shop: Shop) -> None:
    _put(shop, "folder/a")
    for name in ("nope", "folder", "nope/nope", "folder/a/b"):
        with pytest.raises(ObjectMissing):
            shop.objects.head(shop.root + name)
        with pytest.raises(ObjectMissing):
            _read(shop.objects, shop.root + name, 0, 1)
        assert not shop.objects.exists(shop.root + name)


def test_nothing_is_seen_before_the_commit(shop: Shop) -> None:
    address = shop.root + "new/a"
    with shop.objects.write(address) as writer:
        writer.write(b"half")
        assert not shop.objects.exists(address)
        assert list(shop.objects.list(shop.root)) == []
        writer.write(bytearray(b" and"))
        writer.write(memoryview(b" half"))
        info = writer.commit()
        writer.abort()
    assert info.size == 13
    assert shop.objects.read_all(address, 100) == b"half and half"


def test_an_abandoned_write_leaves_what_was_there(shop: Shop) -> None:
    address = _put(shop, "a")
    with shop.objects.write(address) as writer:
        writer.write(b"no commit")
    with suppress(ZeroDivisionError), shop.objects.write(address) as writer:
        writer.write(b"an error")
        raise ZeroDivisionError
    assert shop.objects.read_all(address, 100) == FIRST
    assert [info.address for info in shop.objects.list(shop.root)] == [address]


def test_an_empty_object_is_an_object(shop: Shop) -> None:
    address = _put(shop, "empty", b"")
    assert shop.objects.head(address).size == 0
    assert shop.objects.read_all(address, 0) == b""


def test_a_prefix_lists_in_order_what_begins_with_it(shop: Shop) -> None:
    names = ["Z", "a", "run-1.txt", "run-1/a/z", "run-1/x", "run-10/y", "run-2", "é"]
    for name in reversed(names):
        _put(shop, name)

    def listed(prefix: str) -> list[str]:
        return [info.address.removeprefix(shop.root) for info in shop.objects.list(shop.root + prefix)]

    assert listed("") == names
    assert listed("run-1") == names[2:6]
    assert listed("run-1/") == names[3:5]
    assert listed("run-1/a") == names[3:4]
    assert listed("run-1/a/") == names[3:4]
    assert listed("run-1/a/z/") == []
    assert listed("nope/") == []


def test_the_list_says_what_the_head_says(shop: Shop) -> None:
    address = _put(shop, "folder/a")
    (listed,) = shop.objects.list(shop.root)
    head = shop.objects.head(address)
    assert (listed.address, listed.size, listed.etag) == (head.address, head.size, head.etag)
    assert abs(listed.modified - head.modified) <= 1  # the head's clock may have whole seconds only


def test_deleting_twice_is_fine(shop: Shop) -> None:
    address = _put(shop, "folder/below/a")
    shop.objects.delete(address)
    shop.objects.delete(address)
    shop.objects.delete(shop.root + "never/was")
    assert not shop.objects.exists(address)
    assert list(shop.objects.list(shop.root)) == []


def test_a_large_object_goes_in_parts(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "FIRST_PART_BYTES", 5 << 20)  # the least S3 takes
    pattern = os.urandom(1 << 20)
    address = shop.root + "large"
    with shop.objects.write(address) as writer:
        for _ in range(21):
            writer.write(pattern)
        assert not shop.objects.exists(address)
        info = writer.commit()
    assert info.size == 21 << 20
    assert shop.objects.head(address) == info
    for start in (0, (5 << 20) - 1, (20 << 20) + 7):
        length = min(1 << 20, info.size - start)
        doubled = pattern + pattern
        assert _read(shop.objects, address, start, length, info.etag) == doubled[start % (1 << 20) :][:length]


def test_a_large_object_is_what_was_written_whatever_the_pieces(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of parts is used again, and a folder's file goes to the disk meanwhile: no byte may be another's."""
    monkeypatch.setattr(s3, "FIRST_PART_BYTES", 5 << 20)
    monkeypatch.setattr(local, "FLUSH_BYTES", 3 << 20)
    data = memoryview(os.urandom(38 << 20))
    with shop.objects.write(shop.root + "large") as writer:
        for start in range(0, len(data), 1_234_567):
            piece = bytearray(data[start : start + 1_234_567])
            writer.write(piece)
            piece[:] = bytes(len(piece))  # the writer may not look at it any more
        info = writer.commit()
    found = b"".join(
        _read(shop.objects, info.address, start, min(4 << 20, info.size - start), info.etag)
        for start in range(0, info.size, 4 << 20)
    )
    assert found == data


def test_writes_abandoned_while_they_are_flushed_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "FLUSH_BYTES", 1 << 10)
    store = LocalStore(roots=(tmp_path,))
    for _ in range(20):
        with store.write(f"file://{tmp_path}/a") as writer:
            writer.write(bytes(5 << 20))
    assert list(tmp_path.iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("flush")]


def test_an_abandoned_large_write_leaves_nothing(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "FIRST_PART_BYTES", 5 << 20)
    with shop.objects.write(shop.root + "large") as writer:
        writer.write(bytes(11 << 20))
    assert list(shop.objects.list(shop.root)) == []
    if shop.server is not None and shop.kind == "moto":
        assert "Uploads" not in _client(shop.server).list_multipart_uploads(Bucket="catmerge")


def test_what_a_killed_writer_left_is_found_and_dropped(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "FIRST_PART_BYTES", 5 << 20)
    with shop.objects.write(shop.root + "folder/large") as writer, shop.objects.write(shop.root + "other") as second:
        for each in (writer, second):
            each.write(bytes(6 << 20))
        assert len(list(shop.objects.unfinished(shop.root))) == 2
        (found,) = shop.objects.unfinished(shop.root + "folder/")
        assert found.age_seconds >= 0
        for _ in range(2):
            shop.objects.abandon(found)
        assert list(shop.objects.unfinished(shop.root + "folder/")) == []
        assert list(shop.objects.unfinished(shop.root + "nothing/")) == []
        with pytest.raises(StoreDown):  # it finds out, and does not pretend
            writer.commit()
        second.commit()
    assert list(shop.objects.unfinished(shop.root)) == []
    assert [info.address for info in shop.objects.list(shop.root)] == [shop.root + "other"]


def test_what_was_written_before_a_writer_left_is_gone_or_of_use(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "FIRST_PART_BYTES", 5 << 20)
    notes, data = Notes(), os.urandom(17 << 20)
    address = shop.root + "large"
    with shop.objects.write(address, bookmark=notes.bookmark) as writer:
        writer.write(data[: 11 << 20])
    begun = [found.handle for found in shop.objects.unfinished(shop.root)]
    assert begun == ([] if shop.server is None else [notes.handle])
    with shop.objects.write(address, bookmark=notes.bookmark) as writer:
        writer.write(data)
        writer.commit()
    assert shop.objects.read_all(address, len(data)) == data
    assert list(shop.objects.unfinished(shop.root)) == []
    assert len(notes.noted) == len(begun)


def test_several_threads_read_at_once(shop: Shop) -> None:
    data = os.urandom(1 << 16)
    address = _put(shop, "a", data)
    etag = shop.objects.head(address).etag
    with ThreadPoolExecutor(8) as pool:
        spans = pool.map(lambda i: _read(shop.objects, address, i << 12, 1 << 12, etag), range(16))
    assert b"".join(spans) == data


def test_a_link_downloads_under_the_name_given(shop: Shop) -> None:
    address = _put(shop, "a")
    link = shop.objects.link(address, seconds=60, filename='mödel "1".safetensors')
    if shop.server is None:
        assert link is None
        return
    assert link is not None
    assert "X-Amz-Signature" in link
    with urlopen(link) as answer:
        assert answer.read() == FIRST
        if shop.kind == "moto":  # rclone ignores the wish
            assert answer.headers["Content-Disposition"].endswith("UTF-8''m%C3%B6del%20%221%22.safetensors")


def test_an_object_larger_than_expected_is_not_read(shop: Shop) -> None:
    with pytest.raises(ObjectTooLarge, match="19 bytes, more than the 18"):
        shop.objects.read_all(_put(shop, "a"), 18)


@pytest.mark.parametrize(
    "name", ["a/../b", "../b", "a/./b", "a/%2e%2e/b", "a/%252E%252e/b", "a%2fb", "a\\b", "a\0b", "a\nb"]
)
def test_tricks_are_refused(shop: Shop, name: str) -> None:
    for verb in (shop.objects.head, shop.objects.delete, shop.objects.write, shop.objects.list, shop.objects.check):
        with pytest.raises(AccessDenied):
            verb(shop.root + name)


@pytest.mark.parametrize("name", ["", "folder/"])
def test_a_folder_is_no_object(shop: Shop, name: str) -> None:
    with pytest.raises(AccessDenied, match="folder"):
        shop.objects.head(shop.root + name)


# --- the door ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address", ["", "catmerge/a", "http://a/b", "s3:/a/b", "s3:///key", "s3://-/key", "file://host/a"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(AccessDenied):
        parse_address(address)


def test_only_allowed_buckets_and_the_workspace_are_used(tmp_path: Path) -> None:
    objects = _open(
        {
            "CATMERGE_OBJECT_STORE": f"file://{tmp_path}",
            "CATMERGE_BUCKETS": "models",
            "CATMERGE_WORKSPACE": "s3://ours/team/",
        }
    )
    objects.put("s3://models/a", FIRST, "text/plain")
    objects.put("s3://ours/team/cache/a", FIRST, "text/plain")
    for address in ("s3://other/a", "s3://ours/a", "s3://ours/teams/a"):
        with pytest.raises(BucketDenied):
            objects.put(address, FIRST, "text/plain")


def test_recipes_may_not_name_the_services_own_files(tmp_path: Path) -> None:
    objects = _open({"CATMERGE_OBJECT_STORE": f"file://{tmp_path}"})
    objects.check("s3://catmerge/merges/mrg_1/")
    objects.check("s3://catmerge/models/")
    for folder in ("cache/statistics/a.safetensors", "scratch/mrg_1/", "cache"):
        with pytest.raises(AccessDenied, match="its own files"):
            objects.check(f"s3://catmerge/{folder}")


def test_files_are_off_until_roots_are_named(tmp_path: Path) -> None:
    with pytest.raises(AccessDenied, match="CATMERGE_FILE_ROOTS"):
        _open({"CATMERGE_OBJECT_STORE": f"file://{tmp_path}"}).head(f"file://{tmp_path}/a")


def test_a_workspace_may_be_a_folder(tmp_path: Path) -> None:
    objects = _open({"CATMERGE_WORKSPACE": f"file://{tmp_path}/work/"})
    objects.put(f"file://{tmp_path}/work/a", FIRST, "text/plain")
    assert (tmp_path / "work" / "a").read_bytes() == FIRST
    with pytest.raises(AccessDenied):
        objects.head(f"file://{tmp_path}/a")


@pytest.mark.parametrize(
    ("error", "failure", "refusal"),
    [
        (ObjectMissing("a"), errors.InputMissing, errors.CheckpointNotFound),
        (ObjectChanged("a"), errors.InputChanged, errors.StoreUnavailable),
        (ObjectTooLarge("a"), errors.BadInput, errors.MalformedCheckpoint),
        (MalformedHeader("a", "b"), errors.BadInput, errors.MalformedCheckpoint),
        (AccessDenied("a"), errors.AccessLost, errors.Forbidden),
        (BucketDenied("a"), errors.AccessLost, errors.BucketNotAllowed),
        (StoreDown("a"), errors.StorageFailure, errors.StoreUnavailable),
    ],
)
def test_errors_become_failures_or_refusals(
    error: Exception, failure: type[errors.Failure], refusal: type[errors.Refusal]
) -> None:
    with pytest.raises(failure) as failed, failures():
        raise error
    with pytest.raises(refusal) as refused, refusals():
        raise error
    assert type(failed.value) is failure
    assert type(refused.value) is refusal


# --- folders ----------------------------------------------------------------------------------------------------------


def test_links_may_not_lead_out_of_their_root(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    for folder in (outside, root):
        folder.mkdir()
        (folder / "a").write_bytes(FIRST)
    (root / "file").symlink_to(outside / "a")
    (root / "folder").symlink_to(outside)
    (root / "inside").symlink_to(root / "a")
    (root / "broken").symlink_to(root / "nothing")
    (root / "loop").symlink_to(root / "loop")
    store = LocalStore(roots=(root,))
    for name in ("file", "folder/a"):
        for verb in (store.head, store.write, store.delete):
            with pytest.raises(AccessDenied, match="symbolic link"):
                verb(f"file://{root}/{name}")
    with pytest.raises(AccessDenied, match="symbolic link"):
        list(store.list(f"file://{root}/folder/"))
    assert [info.address for info in store.list(f"file://{root}/")] == [f"file://{root}/a", f"file://{root}/inside"]
    assert store.head(f"file://{root}/inside").size == len(FIRST)
    assert (outside / "a").read_bytes() == FIRST


def test_a_link_from_one_bucket_into_another_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "a").write_bytes(FIRST)
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "a").symlink_to(tmp_path / "secret" / "a")
    with pytest.raises(AccessDenied):
        LocalStore(buckets=tmp_path).head("s3://open/a")


def test_a_neighbor_whose_name_begins_alike_is_outside(tmp_path: Path) -> None:
    for name in ("data", "data-private"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_bytes(FIRST)
    store = LocalStore(roots=(tmp_path / "data",))
    assert store.head(f"file://{tmp_path}/data/a").size == len(FIRST)
    with pytest.raises(AccessDenied, match="CATMERGE_FILE_ROOTS"):
        store.head(f"file://{tmp_path}/data-private/a")


@pytest.mark.parametrize("key", ["a//b", "/a", "a/.catmerge-staging-0123/b", ".catmerge-staging-0123"])
def test_names_that_a_folder_can_not_keep_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(AccessDenied, match="empty or reserved"):
        LocalStore(buckets=tmp_path).write(f"s3://bucket/{key}")


def test_a_file_and_a_folder_can_not_share_a_name(tmp_path: Path) -> None:
    store = LocalStore(buckets=tmp_path)
    for name in ("a", "b/c"):
        with store.write(f"s3://bucket/{name}") as writer:
            writer.commit()
    for name in ("a/b", "b"):
        with pytest.raises(AccessDenied, match="can't be written"), store.write(f"s3://bucket/{name}") as writer:
            writer.commit()
    assert [info.address for info in store.list("s3://bucket/")] == ["s3://bucket/a", "s3://bucket/b/c"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "bucket", "c"]


def test_what_is_no_regular_file_is_missing(tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    os.mkfifo(tmp_path / "bucket" / "pipe")
    store = LocalStore(buckets=tmp_path)
    with pytest.raises(ObjectMissing):
        store.read("s3://bucket/pipe", 0, memoryview(bytearray(1)))
    assert list(store.list("s3://bucket/")) == []


def test_writing_and_deleting_beside_each_other_loses_nothing(tmp_path: Path) -> None:
    """A delete removes folders that have become empty, which a writer beside it may be about to use."""
    store = LocalStore(buckets=tmp_path)

    def write_and_delete(name: int) -> None:
        for _ in range(50):
            address = f"s3://bucket/deep/er/{name}"
            with store.write(address) as writer:
                writer.write(FIRST)
                writer.commit()
            assert store.head(address).size == len(FIRST)
            store.delete(address)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_and_delete, range(4)))
    assert list(tmp_path.rglob("*")) == [tmp_path / "bucket"]


# --- S3 ---------------------------------------------------------------------------------------------------------------


def _client(server: S3Server):  # type: ignore[no-untyped-def]  # boto3 makes its clients' classes as it runs
    return boto3.client(
        "s3",
        endpoint_url=server.url,
        region_name=server.region,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
    )


def test_ten_thousand_parts_hold_the_largest_object() -> None:
    sizes = [s3.part_bytes(before) for before in range(10_000)]
    assert sum(sizes) >= 5 << 40
    assert sizes[0] == 16 << 20
    assert sum(sizes[:3000]) > 100 << 30  # a hundred gigabytes never need more than 64 MiB at a time
    assert max(sizes[:3000]) == 64 << 20


def test_wrong_keys_are_no_outage(opened: Callable[[str, Path], Shop], tmp_path: Path) -> None:
    server = opened("rclone", tmp_path).server
    assert server is not None
    objects = _open({**server.environment(), "CATMERGE_S3_SECRET_KEY": "wrong"})
    with pytest.raises(AccessDenied):
        objects.read_all("s3://catmerge/a", 10)


@pytest.mark.parametrize("kind", ["moto", "rclone"])
def test_a_missing_bucket_is_missing(opened: Callable[[str, Path], Shop], tmp_path: Path, kind: str) -> None:
    objects = opened(kind, tmp_path).objects
    with pytest.raises(ObjectMissing):
        objects.head("s3://nowhere/a")
    with pytest.raises(ObjectMissing):
        list(objects.list("s3://nowhere/"))
    with pytest.raises(ObjectMissing):
        objects.put("s3://nowhere/a", FIRST, "text/plain")
    objects.delete("s3://nowhere/a")


def test_links_carry_the_public_host_and_end(opened: Callable[[str, Path], Shop], tmp_path: Path) -> None:
    shop = opened("rclone", tmp_path)
    assert shop.server is not None
    _put(shop, "a")
    public = f"http://localhost:{shop.server.port}"
    link = _open({**shop.server.environment(), "CATMERGE_S3_PUBLIC_ENDPOINT": public}).link(
        shop.root + "a", seconds=60, filename="a"
    )
    assert link is not None
    assert link.startswith(public)
    with urlopen(link) as answer:
        assert answer.read() == FIRST
    with pytest.raises(HTTPError, match="403"):
        urlopen(link.replace("localhost", "127.0.0.1"))


@pytest.fixture
def proxied(opened: Callable[[str, Path], Shop], tmp_path: Path) -> Iterator[tuple[StoreProxy, Objects]]:
    """A store behind a proxy that does harm."""
    server = opened("moto", tmp_path).server
    assert server is not None
    with store_proxy(server.url) as proxy:
        yield proxy, _open({**server.environment(), "CATMERGE_S3_ENDPOINT": proxy.url})


@pytest.mark.parametrize("harm", [faulty.doubled, faulty.unanswered, faulty.failing(500)], ids=["twice", "mute", "500"])
def test_a_large_upload_is_whole_however_its_completion_is_answered(
    proxied: tuple[StoreProxy, Objects], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: faulty.Harm
) -> None:
    monkeypatch.setattr(s3, "FIRST_PART_BYTES", 5 << 20)
    proxy, objects = proxied
    rule = proxy.harm("POST .*uploadId=", harm)
    data = os.urandom(11 << 20)
    address = f"s3://catmerge/{tmp_path.name}/large"
    objects.put(address, data, "application/octet-stream")
    assert rule.hits == 1
    assert objects.read_all(address, 12 << 20) == data


def test_an_upload_that_is_gone_and_is_not_the_object_is_no_success(
    proxied: tuple[StoreProxy, Objects], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when another writer's object of the same size lies there: its parts have other digests."""
    monkeypatch.setattr(s3, "FIRST_PART_BYTES", 5 << 20)
    _, objects = proxied
    address = f"s3://catmerge/{tmp_path.name}/large"
    with objects.write(address) as writer:
        writer.write(bytes(11 << 20))
        objects.put(address, os.urandom(11 << 20), "application/octet-stream")
        (found,) = objects.unfinished(address)
        objects.abandon(found)
        with pytest.raises(StoreDown):
            writer.commit()


@dataclass
class Upload:
    """A large object whose writing was broken off after ``sent`` parts of 5 MiB, behind a proxy that counts."""

    kind: str
    proxy: StoreProxy
    objects: Objects
    address: str
    data: bytes
    notes: Notes

    def write(self, data: bytes | None = None) -> list[int]:
        """Write it, whole, and return which parts were sent for it."""
        before = len(self.proxy.seen)
        with self.objects.write(self.address, bookmark=self.notes.bookmark) as writer:
            writer.write(self.data if data is None else data)
            writer.commit()
        return self.proxy.parts_sent(before)

    def check(self, data: bytes | None = None) -> None:
        """The object is what was written last, and nothing lies about."""
        assert self.objects.read_all(self.address, 100 << 20) == (self.data if data is None else data)
        assert list(self.objects.unfinished(self.address)) == []


@pytest.fixture(params=["moto", "rclone"])
def upload(
    request: pytest.FixtureRequest,
    opened: Callable[[str, Path], Shop],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Upload]:
    """Three of four parts are there."""
    monkeypatch.setattr(s3, "FIRST_PART_BYTES", 5 << 20)
    shop = opened(request.param, tmp_path)
    assert shop.server is not None
    with store_proxy(shop.server.url) as proxy:
        objects = _open({**shop.server.environment(), "CATMERGE_S3_ENDPOINT": proxy.url})
        begun = Upload(shop.kind, proxy, objects, shop.root + "large", os.urandom(19 << 20), Notes())
        with objects.write(begun.address, bookmark=begun.notes.bookmark) as writer:
            writer.write(begun.data[: 15 << 20])
        assert proxy.parts_sent() == [1, 2, 3]
        yield begun


def test_a_writer_sends_what_an_earlier_one_did_not(upload: Upload) -> None:
    begun = upload.notes.handle
    assert upload.write() == [4]
    assert upload.notes.noted == [begun]
    upload.check()


def test_parts_that_are_others_are_sent_anew(upload: Upload) -> None:
    data = upload.data[: 6 << 20] + os.urandom(5 << 20) + upload.data[11 << 20 :]
    assert _write_over(upload, data, replaced=[2, 3, 4])
    upload.check(data)


def test_a_shorter_object_leaves_nothing_of_the_longer_one(upload: Upload) -> None:
    data = upload.data[: 11 << 20]
    assert _write_over(upload, data, replaced=[3])
    upload.check(data)


def _write_over(upload: Upload, data: bytes, replaced: list[int]) -> bool:
    """rclone replaces no parts: what it was sent is given up, and the next writer begins anew."""
    if upload.kind == "moto":
        return upload.write(data) == replaced
    with pytest.raises(StoreDown, match="cannot be replaced"):
        upload.write(data)
    assert upload.notes.handle is None
    (left,) = upload.objects.unfinished(upload.address)
    upload.objects.abandon(left)
    return upload.write(data) == list(range(1, -(-len(data) // (5 << 20)) + 1))


def test_digests_that_are_none_are_not_trusted(upload: Upload) -> None:
    """Where a store encrypts with keys of its own, its ETags look like digests and are not."""
    rule = upload.proxy.harm("GET .*uploadId=", _with_other_etags)
    assert upload.write() == [1, 2, 3, 4]
    assert rule.hits == 1
    upload.check()


def _with_other_etags(request: faulty.Request, forward: faulty.Forward) -> faulty.Answer:
    answer = forward(request)
    digests = re.sub(rb"[0-9a-f]{32}", b"0" * 32, answer.body)
    return faulty.Answer(answer.status, answer.headers, digests)


def test_a_store_that_does_not_list_parts_is_sent_all_of_them(upload: Upload) -> None:
    upload.proxy.harm("GET .*uploadId=", faulty.failing(500), times=4)
    assert upload.write() == [1, 2, 3, 4]
    assert len(upload.notes.noted) == 2
    (left,) = upload.objects.unfinished(upload.address)
    assert left.handle == upload.notes.noted[0], "the service drops it when the job has ended"
    upload.objects.abandon(left)
    upload.check()


def test_an_upload_that_has_vanished_is_begun_anew(upload: Upload) -> None:
    """As by a rule of the bucket that ends old uploads."""
    _abandon(upload)
    assert upload.write() == [1, 2, 3, 4]
    assert len(upload.notes.noted) == 2
    upload.check()


def test_an_upload_that_vanishes_underway_is_an_error_and_then_begun_anew(upload: Upload) -> None:
    with upload.objects.write(upload.address, bookmark=upload.notes.bookmark) as writer:
        writer.write(upload.data[: 6 << 20])
        _abandon(upload)
        with pytest.raises(StoreDown):
            _end(writer, upload.data[6 << 20 :])
    assert not upload.objects.exists(upload.address)
    assert upload.write() == [1, 2, 3, 4]
    upload.check()


def _end(writer: ObjectWriter, data: bytes) -> ObjectInfo:
    writer.write(data)
    return writer.commit()


def _abandon(upload: Upload) -> None:
    (found,) = upload.objects.unfinished(upload.address)
    assert found.handle == upload.notes.handle
    upload.objects.abandon(found)


def test_an_upload_that_the_store_can_not_put_together_is_not_gone_on_with(upload: Upload) -> None:
    body = b"<?xml version='1.0'?><Error><Code>InvalidPart</Code><Message>on purpose</Message></Error>"
    said = faulty.Answer(400, [("Content-Type", "application/xml")], body)
    upload.proxy.harm("POST .*uploadId=", lambda *_: said)
    with pytest.raises(StoreDown, match="InvalidPart"):
        upload.write()
    assert upload.notes.handle is None
    assert upload.write() == [1, 2, 3, 4]
    assert upload.objects.read_all(upload.address, 100 << 20) == upload.data


def test_two_writers_of_one_upload_make_one_object(upload: Upload) -> None:
    """The first one was taken for dead and was not; the second one goes on with its upload. Both may end it."""
    data = upload.data + bytes(1 << 20)  # whole parts
    first = upload.objects.write(upload.address, bookmark=upload.notes.bookmark)
    with first, upload.objects.write(upload.address, bookmark=upload.notes.bookmark) as second:
        for start in range(0, len(data), 3 << 20):
            for writer in (first, second):
                writer.write(data[start : start + (3 << 20)])
        info = first.commit()
        if upload.kind == "moto":
            assert second.commit() == info
        else:  # its ETags do not tell what an object was made of: better to write it again
            with pytest.raises(StoreDown, match="knows nothing of its upload"):
                second.commit()
    upload.check(data)


def test_a_late_writer_ends_the_upload_that_another_goes_on_with(upload: Upload) -> None:
    """What it made is whole, and of the same bytes; the other one finds its upload gone, and does it again."""
    with upload.objects.write(upload.address, bookmark=upload.notes.bookmark) as second:
        second.write(upload.data[: 11 << 20])
        assert upload.write() == [4]
        with pytest.raises(StoreDown):
            _end(second, upload.data[11 << 20 :])
    upload.check()
    assert upload.write() == [1, 2, 3, 4]
    upload.check()


def test_a_late_writer_that_gives_up_takes_nothing_from_the_one_that_goes_on(upload: Upload) -> None:
    with upload.objects.write(upload.address, bookmark=upload.notes.bookmark) as late:
        late.write(upload.data[: 6 << 20])
    assert upload.write() == [4]
    upload.check()


def test_an_upload_that_could_not_be_noted_is_dropped(upload: Upload) -> None:
    """Its writer was fenced off in that moment, so that nobody would find it."""
    _abandon(upload)

    def refuse(_: str | None) -> None:
        raise ZeroDivisionError

    fenced = Bookmark(find=lambda: None, note=refuse)
    with pytest.raises(ZeroDivisionError), upload.objects.write(upload.address, bookmark=fenced) as writer:
        writer.write(upload.data)
    assert list(upload.objects.unfinished(upload.address)) == []


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (faulty.cut_after(7), None),
        (faulty.truncated, "bytes where"),
        (faulty.whole_for_a_range, None),
        (faulty.failing(503), None),
        (faulty.refused, None),
        (faulty.another_etag, "has changed"),
        (faulty.without_conditions, None),
    ],
    ids=["cut", "truncated", "200-for-range", "503", "refused", "another-etag", "no-conditions"],
)
def test_a_read_through_a_harmful_proxy_is_right_or_an_error(
    proxied: tuple[StoreProxy, Objects], tmp_path: Path, harm: faulty.Harm, says: str | None
) -> None:
    proxy, objects = proxied
    address = f"s3://catmerge/{tmp_path.name}/a"
    etag = objects.put(address, FIRST, "text/plain").etag
    rule = proxy.harm("GET", harm)
    if says is None:
        assert _read(objects, address, 4, 15, etag) == FIRST[4:19]
    else:
        with pytest.raises((StoreDown, ObjectChanged), match=says):
            _read(objects, address, 4, 15, etag)
    assert rule.hits == 1


def test_marks_of_empty_folders_are_not_listed(opened: Callable[[str, Path], Shop], tmp_path: Path) -> None:
    shop = opened("moto", tmp_path)
    assert shop.server is not None
    _client(shop.server).put_object(Bucket="catmerge", Key=f"{tmp_path.name}/folder/", Body=b"")
    assert list(shop.objects.list(shop.root)) == []


def test_a_silent_server_is_an_outage() -> None:
    objects = _open(
        {
            "CATMERGE_OBJECT_STORE": "s3",
            "CATMERGE_S3_ENDPOINT": f"http://127.0.0.1:{free_port()}",
            "CATMERGE_S3_ACCESS_KEY": "key",
            "CATMERGE_S3_SECRET_KEY": "secret",
        }
    )
    with pytest.raises(StoreDown, match="does not answer"):
        objects.head("s3://catmerge/a")


@contextmanager
def _odd_server(answer: Callable[[BaseHTTPRequestHandler, int], None]) -> Iterator[Objects]:
    """An S3 server that holds FIRST under every name and answers GET in its own way; calls are counted from 0."""
    calls = iter(range(100))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer(self, next(calls))

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield _open(
            {
                "CATMERGE_OBJECT_STORE": "s3",
                "CATMERGE_S3_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                "CATMERGE_S3_ACCESS_KEY": "key",
                "CATMERGE_S3_SECRET_KEY": "secret",
            }
        )
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _answer(
    handler: BaseHTTPRequestHandler,
    status: int,
    body: bytes,
    content_range: str | None = None,
    length: int | None = None,
) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.send_header("ETag", '"v1"')
    if content_range is not None:
        handler.send_header("Content-Range", content_range)
    handler.end_headers()
    handler.wfile.write(body)
    handler.close_connection = True


def test_a_server_that_ignores_ranges_is_read_from_the_start() -> None:
    with _odd_server(lambda handler, _: _answer(handler, 200, FIRST)) as objects:
        assert _read(objects, "s3://catmerge/a", 4, 5, "v1") == b"quick"
        with pytest.raises(ObjectChanged, match="ends at byte 19"):
            _read(objects, "s3://catmerge/a", 17, 5)


def test_a_server_that_ignores_conditions_is_found_out() -> None:
    with (
        _odd_server(lambda handler, _: _answer(handler, 206, b"quick", "bytes 4-8/19")) as objects,
        pytest.raises(ObjectChanged, match="expected v0"),
    ):
        _read(objects, "s3://catmerge/a", 4, 5, "v0")


@pytest.mark.parametrize(
    ("content_range", "body"), [("bytes 0-4/19", b"the q"), (None, b"quick"), ("bytes 4-8/19", b"quick brown")]
)
def test_a_wrong_range_is_no_answer(content_range: str | None, body: bytes) -> None:
    with (
        _odd_server(lambda handler, _: _answer(handler, 206, body, content_range)) as objects,
        pytest.raises(StoreDown, match="the server"),
    ):
        _read(objects, "s3://catmerge/a", 4, 5)


def test_an_answer_that_breaks_off_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PAUSES_SECONDS", (0.0, 0.0))

    def break_off(whole_at: int) -> Callable[[BaseHTTPRequestHandler, int], None]:
        return lambda handler, call: _answer(
            handler, 206, b"quick" if call == whole_at else b"qui", "bytes 4-8/19", length=5
        )

    with _odd_server(break_off(whole_at=2)) as objects:
        assert _read(objects, "s3://catmerge/a", 4, 5) == b"quick"
    with _odd_server(break_off(whole_at=3)) as objects, pytest.raises(StoreDown, match="broke off"):
        _read(objects, "s3://catmerge/a", 4, 5)
