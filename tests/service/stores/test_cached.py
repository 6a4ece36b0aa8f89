"""A store whose objects are kept on this machine: fewer requests, the same bytes, and none of those before a change."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from service.contract.settings import Connections
from service.stores.base import NearObject
from service.stores.blocks import TAIL, Blocks
from service.stores.cached import WINDOW, CachedStore, _Pace, open_blocks
from service.stores.objects import BucketDenied, ObjectChanged, ObjectMissing, Objects, StoreDown, open_objects
from tests import faulty
from tests.faulty import StoreProxy, store_proxy
from tests.servers import S3Server, s3_server

BLOCK = 1 << 16
MODEL = "s3://catmerge/models/a.safetensors"
CONTENT = os.urandom(4 * BLOCK + 100)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server("moto", buckets=("catmerge", "secret")) as found:
        yield found


@pytest.fixture
def proxy(server: S3Server) -> Iterator[StoreProxy]:
    with store_proxy(server.url) as found:
        yield found


@dataclass
class Machine:
    """Where workers run: a folder of blocks before a server."""

    connections: Connections
    proxy: StoreProxy
    folder: Path
    limit_bytes: int = 10**9

    def start(self) -> Objects:
        """What a worker process that starts now has."""
        self.blocks = Blocks(self.folder, self.limit_bytes, block_bytes=BLOCK)
        return open_objects(self.connections, self.blocks)

    def requests(self, method: str = "GET") -> int:
        """So many requests for objects were there since this was last asked."""
        seen, self.proxy.seen = self.proxy.seen, []
        return sum(bool(re.match(rf"{method} /catmerge/\S+\.safetensors", line)) for line in seen)


@pytest.fixture
def machine(server: S3Server, proxy: StoreProxy, tmp_path: Path) -> Machine:
    environ = {**server.environment(), "CATMERGE_S3_ENDPOINT": proxy.url, "CATMERGE_BUCKETS": "catmerge"}
    connections = Connections.from_environment(environ)
    open_objects(connections).put(MODEL, CONTENT, "application/octet-stream")
    return Machine(connections, proxy, tmp_path)


def etag_of(objects: Objects, address: str = MODEL) -> str:
    return objects.head(address).etag


def read(objects: Objects, start: int = 0, length: int = len(CONTENT), etag: str | None = None) -> bytes:
    into = bytearray(length)
    objects.read(MODEL, start, memoryview(into), etag=etag or etag_of(objects))
    return bytes(into)


def test_what_was_read_once_is_not_asked_for_again(machine: Machine) -> None:
    assert read(machine.start()) == CONTENT
    assert machine.requests() == 5
    objects = machine.start()
    assert read(objects) == CONTENT
    assert read(objects, 77, 3 * BLOCK) == CONTENT[77 : 77 + 3 * BLOCK]
    assert machine.requests() == 0
    assert machine.blocks.counted == (len(CONTENT) + 3 * BLOCK, 0)


def test_neighbors_share_the_blocks_between_them(machine: Machine) -> None:
    objects, step = machine.start(), BLOCK + BLOCK // 2
    etag = etag_of(objects)
    found = b"".join(
        read(objects, start, min(step, len(CONTENT) - start), etag) for start in range(0, len(CONTENT), step)
    )
    assert found == CONTENT
    assert machine.requests() == 5, "each block once"


def test_threads_that_want_one_block_fetch_it_once(machine: Machine) -> None:
    objects = machine.start()
    etag, held = etag_of(objects), machine.proxy.hold(r"GET .*a\.safetensors")
    with ThreadPoolExecutor(8) as pool:
        reading = [pool.submit(read, objects, index * BLOCK // 8, BLOCK // 8, etag) for index in range(8)]
        held.hit.wait(60)
        held.release()
        assert b"".join(piece.result() for piece in reading) == CONTENT[:BLOCK]
    assert machine.requests() == 1


def test_a_header_fetches_no_block(machine: Machine) -> None:
    objects = machine.start()
    assert read(objects, 0, 100) == CONTENT[:100]
    assert machine.blocks.kept() == []
    read(objects, 0, BLOCK)
    machine.requests()
    assert read(machine.start(), 0, 100) == CONTENT[:100]
    assert machine.requests() == 0, "but is found where one is there"


def test_small_ends_between_kept_blocks_are_read_in_one_request(machine: Machine) -> None:
    objects = machine.start()
    read(objects, BLOCK, BLOCK)
    machine.requests()
    assert read(objects, BLOCK - 50, BLOCK + 100) == CONTENT[BLOCK - 50 : 2 * BLOCK + 50]
    assert machine.requests() == 2, "one for each end"


def test_only_checkpoints_are_kept_and_nothing_of_our_own(machine: Machine) -> None:
    objects = machine.start()
    others = ["models/config.json", "cache/statistics/a.safetensors", "scratch/mrg_1/a.safetensors"]
    for name in others:
        objects.put(f"s3://catmerge/{name}", CONTENT, "application/octet-stream")
        etag = objects.head(f"s3://catmerge/{name}").etag
        objects.read(f"s3://catmerge/{name}", 0, memoryview(bytearray(len(CONTENT))), etag=etag)
    objects.read(MODEL, 0, memoryview(bytearray(len(CONTENT))))
    assert machine.blocks.kept() == [], "nor what is read as it may be"


def test_an_object_that_was_replaced_is_not_what_it_was(machine: Machine) -> None:
    objects = machine.start()
    old = etag_of(objects)
    assert read(objects, etag=old) == CONTENT
    other = CONTENT[::-1]
    objects.put(MODEL, other, "application/octet-stream")
    new = etag_of(objects)
    assert new != old
    assert read(objects, etag=new) == other
    with pytest.raises(ObjectChanged):
        read(machine.start(), etag=old)
    assert read(machine.start()) == other


def test_a_change_under_the_eyes_of_a_reader_is_noticed(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = machine.start()
    old = etag_of(objects)
    read(objects, etag=old)
    near = objects.near(MODEL, old)
    assert near is not None
    open_objects(machine.connections).put(MODEL, CONTENT[::-1], "application/octet-stream")
    assert read(objects, etag=old) == CONTENT, "what the job was planned with"
    monkeypatch.setattr("service.stores.cached.LOOK_SECONDS", 0.0)
    with pytest.raises(ObjectChanged, match="has changed"):
        read(objects, etag=old)
    with pytest.raises(ObjectChanged, match="has changed"):
        near.read(0, memoryview(bytearray(10)))


def test_an_object_that_is_gone_is_missing(machine: Machine) -> None:
    read(machine.start())
    etag = etag_of(open_objects(machine.connections))
    open_objects(machine.connections).delete(MODEL)
    with pytest.raises(ObjectMissing):
        machine.start().head(MODEL)
    with pytest.raises(ObjectMissing):
        read(machine.start(), etag=etag)


def test_what_may_not_be_read_is_not_read_from_the_disk(machine: Machine, server: S3Server) -> None:
    secret = "s3://secret/a.safetensors"
    everywhere = Connections.from_environment(server.environment())
    objects = open_objects(everywhere, Blocks(machine.folder, 10**9, block_bytes=BLOCK))
    objects.put(secret, CONTENT, "application/octet-stream")
    etag = objects.head(secret).etag
    objects.read(secret, 0, memoryview(bytearray(len(CONTENT))), etag=etag)
    for ask in (machine.start().read, lambda *_, **__: machine.start().near(secret, etag)):
        with pytest.raises(BucketDenied):
            ask(secret, 0, memoryview(bytearray(10)), etag=etag)


def test_an_object_that_is_whole_here_is_near(machine: Machine) -> None:
    objects = machine.start()
    etag = etag_of(objects)
    assert objects.near(MODEL, etag) is None
    read(objects, 0, 3 * BLOCK)
    assert objects.near(MODEL, etag) is None
    read(objects)
    near = objects.near(MODEL, etag)
    assert near is not None
    machine.requests()
    near.expect(10, 2 * BLOCK)
    assert pieces(near) == CONTENT
    assert machine.requests() == 0
    near.close()


def test_what_goes_while_it_is_near_comes_from_the_store(machine: Machine) -> None:
    objects = machine.start()
    etag = etag_of(objects)
    read(objects)
    near = objects.near(MODEL, etag)
    assert near is not None
    for path in machine.folder.rglob("[123]"):
        path.unlink()
    near.expect(0, len(CONTENT))
    assert pieces(near) == CONTENT


def pieces(near: NearObject) -> bytes:
    step, found = 9999, bytearray(len(CONTENT))
    with ThreadPoolExecutor(4) as pool:
        starts = range(0, len(found), step)
        list(pool.map(lambda start: near.read(start, memoryview(found)[start : start + step]), starts))
    return bytes(found)


def test_a_harmed_block_is_fetched_again(machine: Machine) -> None:
    read(machine.start())
    (path,) = machine.folder.rglob("2")
    path.write_bytes(bytes(BLOCK + TAIL.size))
    machine.requests()
    assert read(machine.start()) == CONTENT
    assert machine.requests() == 1
    assert read(machine.start()) == CONTENT
    assert machine.requests() == 0


def test_where_nothing_can_be_kept_everything_is_read_all_the_same(machine: Machine) -> None:
    machine.limit_bytes = BLOCK // 2
    objects = machine.start()
    assert read(objects) == CONTENT
    assert [read(objects, start, 100) for start in (0, BLOCK)] == [CONTENT[:100], CONTENT[BLOCK : BLOCK + 100]]
    machine.requests()
    assert read(objects) == CONTENT
    assert machine.requests() == 1, "and asked for as before, while nothing is kept"
    assert [kept.nbytes for kept in machine.blocks.kept()] in ([], [100])


def test_a_cache_that_is_too_small_for_a_model_stays_within_its_limit(machine: Machine) -> None:
    machine.limit_bytes = 3 * (BLOCK + TAIL.size)
    objects = machine.start()
    for _ in range(3):
        assert read(objects) == CONTENT
    assert sum(path.stat().st_size for path in machine.folder.rglob("[0-9]")) <= machine.limit_bytes


def test_two_machines_processes_read_and_lose_blocks_at_once(machine: Machine) -> None:
    machine.limit_bytes = 3 * (BLOCK + TAIL.size)
    stores = [machine.start() for _ in range(2)]
    etag, wrong = etag_of(stores[0]), threading.Event()

    def look(turn: int) -> None:
        start = turn * 7919 % (3 * BLOCK)
        if read(stores[turn % 2], start, BLOCK + 50, etag) != CONTENT[start : start + BLOCK + 50]:
            wrong.set()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(look, range(120)))
    assert not wrong.is_set()


HARM = {
    "failing": faulty.failing(503),
    "cut": faulty.cut_after(1000),
    "truncated": faulty.truncated,
    "refused": faulty.refused,
}


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM)
def test_an_answer_that_breaks_off_is_never_kept(machine: Machine, harm: faulty.Harm) -> None:
    objects = machine.start()
    etag = etag_of(objects)
    machine.proxy.harm(r"GET .*a\.safetensors", harm)
    try:
        read(objects, etag=etag)
    except (StoreDown, ObjectChanged):
        assert machine.blocks.kept() == []
    machine.proxy.heal()
    assert read(objects, etag=etag) == CONTENT
    assert read(machine.start(), etag=etag) == CONTENT


def test_settings_say_whether_anything_is_kept(server: S3Server, tmp_path: Path) -> None:
    keeping = {"CATMERGE_INPUT_CACHE": str(tmp_path / "cache"), "CATMERGE_INPUT_CACHE_BYTES": "1000000000"}
    connections = Connections.from_environment({**server.environment(), **keeping})
    blocks = open_blocks(connections)
    assert blocks is not None
    assert blocks.limit_bytes == 10**9
    assert open_blocks(Connections.from_environment(server.environment())) is None
    assert open_blocks(Connections.from_environment(keeping)) is None, "folders are on this machine already"
    (tmp_path / "file").write_bytes(b"")
    unusable = {**keeping, "CATMERGE_INPUT_CACHE": str(tmp_path / "file" / "cache")}
    assert open_blocks(Connections.from_environment({**server.environment(), **unusable})) is None


def test_a_disk_slower_than_the_store_holds_nobody_back() -> None:
    pace = _Pace()
    for _ in range(WINDOW):
        pace.note(1.0, 0.5)
    assert not pace.is_paused
    for _ in range(WINDOW):
        assert not pace.is_paused
        pace.note(1.0, 1.5)
    assert pace.is_paused


def test_a_store_before_another_has_all_its_verbs(machine: Machine) -> None:
    objects = machine.start()
    assert [info.address for info in objects.list("s3://catmerge/models/a")] == [MODEL]
    assert objects.link(MODEL, seconds=10, filename="a") is not None
    assert list(objects.unfinished("s3://catmerge/models/")) == []
    objects.delete(MODEL)
    assert not objects.exists(MODEL)
    assert isinstance(objects._store(MODEL), CachedStore)
