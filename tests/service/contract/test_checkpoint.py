"""Safetensors headers: what is written is read, and nothing that breaks a rule is."""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.contract.checkpoint import (
    DTYPE_BYTES,
    MAX_HEADER_BYTES,
    MalformedHeader,
    PickleRefused,
    TensorInfo,
    group_shards,
    header_end,
    parse_header,
    storage_order,
    tensor_bytes,
    write_header,
)

FILE = "s3://models/model.safetensors"
NAMES = st.text(st.characters(categories=["L", "N"], include_characters="._- "), min_size=1, max_size=20)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
TENSORS = st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), SHAPES), max_size=8)


def _file(header: Any, data: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def _entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


def _parse(content: bytes) -> dict[str, TensorInfo]:
    return parse_header(content, len(content), FILE).tensors


@given(TENSORS)
def test_what_is_written_is_read(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    rows = [(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    header = write_header(rows, {"format": "pt", "key": "välue"})
    size = len(header) + sum(tensor_bytes(dtype, shape) for _, dtype, shape in rows)
    parsed = parse_header(header, size, FILE)
    assert len(header) % 8 == 0
    assert parsed.metadata == {"format": "pt", "key": "välue"}
    assert {name: (t.dtype, t.shape) for name, t in parsed.tensors.items()} == tensors
    assert all(t.nbytes == tensor_bytes(t.dtype, t.shape) for t in parsed.tensors.values())
    spans = [(t.start, t.end) for t in parsed.tensors.values()]
    assert [start for start, _ in spans] == [len(header), *(end for _, end in spans)][: len(spans)]


@given(st.binary(max_size=200), st.integers(0, 300))
def test_noise_is_refused_or_read_but_never_crashes(content: bytes, size: int) -> None:
    with suppress(MalformedHeader):
        parse_header(content, size, FILE)


@given(TENSORS.filter(len), st.data())
def test_a_changed_byte_never_crashes(tensors: dict[str, tuple[str, tuple[int, ...]]], data: st.DataObject) -> None:
    rows = [(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    header = bytearray(write_header(rows))
    size = len(header) + sum(tensor_bytes(dtype, shape) for _, dtype, shape in rows)
    header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    try:
        parsed = parse_header(header, size, FILE)
    except MalformedHeader:
        return
    assert sum(t.nbytes for t in parsed.tensors.values()) == size - header_end(header, size, FILE)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"short", "too few"),
        (b"\x10\0\0\0\0\0\0\0[1,2]", "no JSON header"),
        ((1000).to_bytes(8, "little") + b"{}", "claims to end at byte 1008"),
        (_file(b'{"a": '), "not valid JSON"),
        (_file(b'{"a": \xff}'), "not valid JSON"),
        (_file(b'{"a": NaN}'), "NaN"),
        (_file(b'{"a":' + b"[" * 100_000), "not valid JSON"),
        (_file(b'{"a":' + b"1" * 5000 + b"}"), "not valid JSON"),
        (_file(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "'dtype' twice"),
        (_file(b'{"w": 1, "v": 2, "w": 3}'), "'w' twice"),
        (_file({"__metadata__": {"a": 1}}), "table of strings"),
        (_file({"__metadata__": "pt"}), "table of strings"),
        (_file({"w": 3}), "dtype, shape and data_offsets"),
        (_file({"w": _entry(more=1)}, 8), "nothing else"),
        (_file({"w": _entry(dtype="F33")}, 8), "type 'F33'"),
        (_file({"w": _entry(dtype=["F32"])}, 8), "type"),
        (_file({"w": _entry(shape=[1] * 8 + [2])}, 8), "at most 8"),
        (_file({"w": _entry(shape=[True, 2])}, 8), "whole numbers"),
        (_file({"w": _entry(shape=[-1, -2])}, 8), "whole numbers"),
        (_file({"w": _entry(shape=[2.0])}, 8), "whole numbers"),
        (_file({"w": _entry(shape=2)}, 8), "whole numbers"),
        (_file({"w": _entry(data_offsets=[8, 0])}, 8), "in order"),
        (_file({"w": _entry(data_offsets=[0, 8, 16])}, 8), "two whole numbers"),
        (_file({"w": _entry(shape=[3])}, 8), "needs 12 bytes"),
        (_file({"w": _entry(shape=[2**62, 2**62])}, 8), "needs"),
        (_file({"w": _entry()}, 7), "cut short"),
        (_file({"w": _entry()}, 9), "more data"),
        (_file({"w": _entry(data_offsets=[8, 16])}, 16), "leaves a gap"),
        (_file({"v": _entry(), "w": _entry(data_offsets=[4, 12])}, 12), "overlaps"),
        (_file({"v": _entry(), "w": _entry()}, 8), "overlaps"),
        (_file({"": _entry()}, 8), "1 to 512"),
        (_file({"w" * 513: _entry()}, 8), "1 to 512"),
        (_file({"a\nb": _entry()}, 8), "unprintable"),
        (_file({"\ud800": _entry()}, 8), "unprintable"),
        (_file({"../w": _entry()}, 8), "climbs"),
        (_file({"a\\..\\w": _entry()}, 8), "climbs"),
        (_file({"/w": _entry()}, 8), "climbs"),
    ],
)
def test_broken_rules_are_named(content: bytes, says: str) -> None:
    with pytest.raises(MalformedHeader, match=says) as caught:
        _parse(content)
    assert str(caught.value).startswith(FILE)


def test_the_tensor_is_named() -> None:
    with pytest.raises(MalformedHeader, match=r"tensor 'encoder\.w'") as caught:
        _parse(_file({"encoder.w": _entry(shape=[3])}, 8))
    assert caught.value.tensor == "encoder.w"


def test_a_large_header_is_refused_before_it_is_read() -> None:
    prefix = (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{"
    with pytest.raises(MalformedHeader, match="more than the 26214400 accepted"):
        header_end(prefix, 2**40, FILE)


def test_many_duplicates_are_found_fast() -> None:
    names = [f'"w{index}":1' for index in range(100_000)]
    with pytest.raises(MalformedHeader, match="'w99999' twice"):
        _parse(_file(("{" + ",".join([*names, names[-1]]) + "}").encode()))


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04" + bytes(60), b"\x80\x02}q\x00" + bytes(60), b"\x80\x04\x95" + bytes(9)]
)
def test_a_pickle_is_refused_whatever_its_name(content: bytes) -> None:
    with pytest.raises(PickleRefused, match="weights_only=True"):
        header_end(content, len(content), FILE)


def test_a_header_whose_length_looks_like_a_pickle_is_read() -> None:
    text = json.dumps({"w": _entry()}).encode().ljust(0x280)  # 80 02: a pickle of protocol 2 begins so
    assert _parse(_file(text, 8))["w"].shape == (2,)


def test_empty_tensors_and_scalars_lie_where_they_should() -> None:
    content = write_header([("a", "F32", (0, 3)), ("b", "I64", ()), ("c", "F16", (0,))])
    tensors = parse_header(content, len(content) + 8, FILE).tensors
    assert [tensors[name].nbytes for name in "abc"] == [0, 8, 0]
    assert tensors["b"].numel == 1


def test_tensors_come_in_the_order_of_the_file() -> None:
    content = _file({"z": _entry(data_offsets=[8, 16]), "a": _entry()}, 16)
    assert list(_parse(content)) == ["a", "z"]


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 100))
def test_shards_keep_the_order_and_fit(sizes: list[int], limit: int) -> None:
    shards = group_shards(sizes, limit, size_of=lambda size: size)
    assert [size for shard in shards for size in shard] == sizes
    assert all(shard and (sum(shard) <= limit or len(shard) == 1) for shard in shards)
    assert all(sum(first) + second[0] > limit for first, second in pairwise(shards))


@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), SHAPES), max_size=10))
def test_storage_order_aligns_every_tensor(rows: list[tuple[str, tuple[int, ...]]]) -> None:
    tensors = [TensorInfo(f"w{i}", dtype, shape, 0, 0, FILE) for i, (dtype, shape) in enumerate(rows)]
    ordered = storage_order(tensors)
    header = write_header((t.name, t.dtype, t.shape) for t in ordered)
    size = len(header) + sum(tensor_bytes(t.dtype, t.shape) for t in ordered)
    assert all(t.start % DTYPE_BYTES[t.dtype] == 0 for t in parse_header(header, size, FILE).tensors.values())
