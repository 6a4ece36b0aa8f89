"""Blocks on a disk: bounded, shared by processes, and whole whatever happens to those that write them."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from service.stores.blocks import ABOUT, LOCK, STAGING, TAIL, Blocks, Identity

BLOCK = 1 << 16
WHOLE = BLOCK + TAIL.size  # what a block takes
CONTENT = os.urandom(3 * BLOCK + 100)
MODEL = Identity("", "s3://models/a.safetensors", "etag", len(CONTENT))
PATIENCE_SECONDS = 60.0

WRITER = """
import sys, pathlib
from service.stores.blocks import Blocks, Identity, NoRoom
folder, content = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]).read_bytes()
blocks = Blocks(folder, int(sys.argv[3]), block_bytes=1 << 16)
for turn in range(int(sys.argv[4])):
    for number in range(4):
        model = Identity("", f"s3://models/{turn}.safetensors", "etag", len(content))
        while True:
            try:
                blocks.keep(model, number, memoryview(content)[number << 16 : number + 1 << 16])
                break
            except NoRoom:  # the other process is being kept waiting, with the lock
                pass
        print(turn, number, flush=True)
"""


def opened(folder: Path, blocks: int = 100) -> Blocks:
    return Blocks(folder, blocks * WHOLE, block_bytes=BLOCK)


def bytes_of(number: int) -> bytes:
    return CONTENT[number * BLOCK : (number + 1) * BLOCK]


def keep(blocks: Blocks, *numbers: int, identity: Identity = MODEL) -> None:
    for number in numbers:
        blocks.keep(identity, number, memoryview(bytes_of(number)))


def found(blocks: Blocks, number: int, identity: Identity = MODEL) -> bytes | None:
    into = bytearray(len(bytes_of(number)))
    return bytes(into) if blocks.read(identity, number, 0, memoryview(into)) else None


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (ABOUT, LOCK))


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def age(folder: Path, name: str, seconds: float) -> None:
    """Say that all blocks of a number were last used so long ago."""
    for path in folder.rglob(name):
        os.utime(path, (time.time() - seconds,) * 2)


@contextmanager
def writer(folder: Path, *, limit_bytes: int = 10**9, turns: int = 10**6) -> Iterator[subprocess.Popen[str]]:
    """Another process that keeps blocks, model after model, and says so."""
    content = folder.parent / "content"
    content.write_bytes(CONTENT)
    command = [sys.executable, "-c", WRITER, str(folder), str(content), str(limit_bytes), str(turns)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_what_is_kept_is_found_by_any_process(tmp_path: Path) -> None:
    first = opened(tmp_path)
    assert found(first, 0) is None
    keep(first, 0, 3)
    for blocks in (first, opened(tmp_path)):
        assert [found(blocks, number) for number in range(4)] == [bytes_of(0), None, None, bytes_of(3)]
        into = bytearray(10)
        assert blocks.read(MODEL, 0, 77, memoryview(into))
        assert bytes(into) == CONTENT[77:87]
        assert not blocks.has_all(MODEL)
    keep(first, 1, 2)
    assert first.has_all(MODEL)


@pytest.mark.parametrize(
    "other",
    [
        replace(MODEL, etag="another"),
        replace(MODEL, address="s3://b/a.safetensors"),
        replace(MODEL, origin="http://b"),
        replace(MODEL, size=len(CONTENT) + 1),
    ],
)
def test_another_content_is_not_taken_for_it(tmp_path: Path, other: Identity) -> None:
    blocks = opened(tmp_path)
    keep(blocks, 0)
    assert found(blocks, 0, other) is None


def test_a_block_under_anothers_name_is_not_taken_for_it(tmp_path: Path) -> None:
    blocks = opened(tmp_path)
    keep(blocks, 0)
    (path,) = files(tmp_path)
    path.rename(path.with_name("1"))
    assert found(blocks, 1) is None


@pytest.mark.parametrize("harm", ["truncated", "longer", "flipped", "zeros", "empty"])
def test_a_block_that_was_harmed_is_dropped(tmp_path: Path, harm: str) -> None:
    keep(opened(tmp_path), 0, 1)
    path, _ = files(tmp_path)
    whole = path.read_bytes()
    flipped = whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:]
    harmed = {"truncated": whole[:-1], "longer": whole + b"x", "flipped": flipped, "zeros": bytes(len(whole))}
    path.write_bytes(harmed.get(harm, b""))
    blocks = opened(tmp_path)
    assert (found(blocks, 0), found(blocks, 1)) == (None, bytes_of(1))
    assert len(files(tmp_path)) == 1
    keep(blocks, 0)
    assert found(blocks, 0) == bytes_of(0)


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    blocks = opened(tmp_path, 3)
    keep(blocks, 0, 1, 2)
    for number, seconds in (("0", 300), ("1", 200), ("2", 100)):
        age(tmp_path, number, seconds)
    assert found(blocks, 0) == bytes_of(0), "which is a use"
    keep(blocks, 3)
    assert [found(blocks, number) is not None for number in range(4)] == [True, False, True, True]
    assert used(tmp_path) <= blocks.limit_bytes


def test_a_block_that_is_being_read_may_go(tmp_path: Path) -> None:
    blocks = opened(tmp_path, 1)
    keep(blocks, 0)
    file = os.open(files(tmp_path)[0], os.O_RDONLY)
    keep(blocks, 1)
    assert found(blocks, 0) is None
    assert os.pread(file, BLOCK, 0) == bytes_of(0)
    os.close(file)


def test_an_object_of_which_nothing_is_left_leaves_no_folder(tmp_path: Path) -> None:
    blocks = opened(tmp_path, 1)
    keep(blocks, 0)
    keep(blocks, 0, identity=replace(MODEL, etag="another"))
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
    assert [kept.nbytes for kept in blocks.kept()] == [BLOCK]


def test_a_limit_that_was_lowered_holds_at_once(tmp_path: Path) -> None:
    keep(opened(tmp_path), 0, 1, 2)
    assert used(tmp_path) == 3 * WHOLE
    blocks = opened(tmp_path, 2)
    assert used(tmp_path) == blocks.used_bytes == WHOLE, "and a little room is made for what comes next"


def test_a_block_larger_than_the_limit_takes_nobodys_place(tmp_path: Path) -> None:
    blocks = Blocks(tmp_path, WHOLE, block_bytes=BLOCK)
    keep(blocks, 0)
    with pytest.raises(OSError, match="does not fit"):
        blocks.keep(replace(MODEL, size=WHOLE), 0, memoryview(bytes(WHOLE)))
    assert found(blocks, 0) == bytes_of(0)


def test_what_is_counted_wrong_is_counted_anew_before_anything_goes(tmp_path: Path) -> None:
    blocks = opened(tmp_path, 4)
    keep(blocks, 0, 1)
    (tmp_path / LOCK).write_bytes(b"%020d" % (4 * WHOLE))  # as if processes had died with blocks half written
    keep(blocks, 2)
    assert [found(blocks, number) is not None for number in range(3)] == [True] * 3
    assert blocks.used_bytes == 3 * WHOLE
    (tmp_path / LOCK).write_bytes(b"nonsense")
    keep(blocks, 3)
    assert blocks.used_bytes == used(tmp_path)


def test_one_hears_what_is_kept(tmp_path: Path) -> None:
    blocks = opened(tmp_path)
    keep(blocks, 0, 3)
    keep(blocks, 0, identity=replace(MODEL, address="s3://models/b.safetensors"))
    (broken,) = [path for path in tmp_path.rglob(ABOUT) if b"b.safetensors" in path.read_bytes()]
    broken.write_bytes(b"{")
    assert [(kept.address, kept.size, kept.nbytes) for kept in blocks.kept()] == [
        (MODEL.address, len(CONTENT), 2 * BLOCK)
    ]


def test_processes_that_share_a_folder_stay_below_the_limit_together(tmp_path: Path) -> None:
    folder, limit = tmp_path / "cache", 10 * WHOLE
    with writer(folder, limit_bytes=limit, turns=40) as one, writer(folder, limit_bytes=limit, turns=40) as other:
        assert one.stdout is not None
        for _ in one.stdout:
            assert used_now(folder) <= limit
        other.communicate(timeout=PATIENCE_SECONDS)
        assert (one.wait(PATIENCE_SECONDS), other.returncode) == (0, 0)
    blocks = Blocks(folder, limit, block_bytes=BLOCK)
    last = replace(MODEL, address="s3://models/39.safetensors")
    assert [found(blocks, number, last) for number in range(4)] == [bytes_of(number) for number in range(4)]
    assert blocks.used_bytes == used(folder) <= limit


def used_now(folder: Path) -> int:
    """As ``used``, while files come and go: what is renamed while we look may count twice, so the least is taken."""

    def size(path: Path) -> int:
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return 0

    def once() -> int:
        every = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
        return sum(size(path) for path in every if path.name not in (ABOUT, LOCK))

    return min(once() for _ in range(3))


@pytest.mark.parametrize("seed", range(5))
def test_a_process_killed_while_it_writes_leaves_no_harm(tmp_path: Path, seed: int) -> None:
    folder = tmp_path / "cache"
    with writer(folder) as process:
        assert process.stdout is not None
        for _ in range(10 + seed):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE_SECONDS)
    blocks = Blocks(folder, 10**9, block_bytes=BLOCK)
    assert not list(folder.rglob(f"{STAGING}*")), "what it left half written is swept by who comes next"
    assert blocks.used_bytes == used(folder)
    for turn in range(3):
        model = replace(MODEL, address=f"s3://models/{turn}.safetensors")
        for number in range(4):
            assert found(blocks, number, model) in (bytes_of(number), None)


def test_what_a_dead_process_left_half_written_is_swept_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    blocks = opened(tmp_path)
    living, file = blocks._stage(MODEL, blocks._path(MODEL, 0).parent, WHOLE)
    dead = living.with_name(f"{STAGING}dead")
    dead.write_bytes(b"half")
    opened(tmp_path)
    assert (living.exists(), dead.exists()) == (True, False)
    os.close(file)
    opened(tmp_path)
    assert not living.exists()


def test_who_stands_still_with_the_lock_holds_nobody_up(tmp_path: Path) -> None:
    blocks = opened(tmp_path)
    keep(blocks, 0)
    with blocks._locked(), pytest.raises(OSError, match="locked"):
        keep(blocks, 1)
    assert found(blocks, 0) == bytes_of(0)
    keep(blocks, 1)
    assert found(blocks, 1) == bytes_of(1)


def test_a_file_that_may_not_grow_leaves_nothing_half_written(tmp_path: Path) -> None:
    blocks = opened(tmp_path)
    keep(blocks, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK // 2, hard))
    try:
        with pytest.raises(OSError, match="large"):
            keep(blocks, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(files(tmp_path)) == 1
    assert blocks.used_bytes == used(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two blocks and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={5 * BLOCK // 2}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root can make a small disk, and not everywhere")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full_keeps_what_it_has(small_disk: Path) -> None:
    blocks = opened(small_disk)
    keep(blocks, 0)
    with pytest.raises(OSError, match="space"):
        keep(blocks, 1, 2)
    left = used(small_disk)
    assert [found(blocks, number) is not None for number in range(3)] == [True, left == 2 * WHOLE, False]
    assert not list(small_disk.rglob(f"{STAGING}*"))
    assert blocks.used_bytes == left


def test_a_folder_that_was_removed_is_made_again(tmp_path: Path) -> None:
    blocks = opened(tmp_path / "cache")
    keep(blocks, 0)
    for path in sorted((tmp_path / "cache").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / "cache").rmdir()
    assert found(blocks, 0) is None
    keep(blocks, 0)
    assert found(blocks, 0) == bytes_of(0)
