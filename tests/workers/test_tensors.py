"""Reading tensors in spans and writing them as a stream, on real files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from service.contract.checkpoint import TensorInfo, write_header
from service.contract.errors import InputChanged, InputMissing, WorkerError
from service.contract.plan import Pinned
from service.stores.local import LocalStore
from service.stores.objects import Objects
from workers import tensors
from workers.tensors import DTYPES, GAP_BYTES, SPAN_BYTES, TensorReader, batches, chunks, plan_spans
from workers.writing import TensorWriter, as_bytes, write_artifact


@pytest.fixture
def objects(tmp_path: Path) -> Objects:
    return Objects({"file": LocalStore(roots=(tmp_path,))}, buckets=(), workspace="s3://none/")


def info(name: str, start: int, end: int, file: str = "a") -> TensorInfo:
    return TensorInfo(name, "U8", (end - start,), start, end, file)


def spans(*infos: TensorInfo) -> list[list[str]]:
    return [[tensor.name for tensor in span.tensors] for span in plan_spans(infos)]


def test_neighbors_are_read_together_in_the_order_of_the_file() -> None:
    (span,) = plan_spans([info("b", 10, 20), info("a", 0, 10)])
    assert (span.start, span.end, [tensor.name for tensor in span.tensors]) == (0, 20, ["a", "b"])


def test_a_small_gap_is_read_over_and_a_large_one_is_not() -> None:
    assert spans(info("a", 0, 10), info("b", 10 + GAP_BYTES, 20 + GAP_BYTES)) == [["a", "b"]]
    assert spans(info("a", 0, 10), info("b", 11 + GAP_BYTES, 20 + GAP_BYTES)) == [["a"], ["b"]]


def test_a_span_ends_where_it_would_grow_too_long() -> None:
    assert spans(info("a", 0, SPAN_BYTES - 1), info("b", SPAN_BYTES - 1, SPAN_BYTES)) == [["a", "b"]]
    assert spans(info("a", 0, SPAN_BYTES - 1), info("b", SPAN_BYTES - 1, SPAN_BYTES + 1)) == [["a"], ["b"]]
    assert spans(info("a", 0, 3 * SPAN_BYTES), info("b", 3 * SPAN_BYTES, 3 * SPAN_BYTES + 1)) == [["a"], ["b"]]


def test_spans_do_not_cross_files() -> None:
    assert spans(info("a", 0, 10), info("b", 0, 10, "b"), info("c", 10, 20)) == [["a", "c"], ["b"]]
    assert spans() == []


def test_tensors_without_elements() -> None:
    assert spans(info("a", 5, 5), info("b", 5, 6)) == [["a", "b"]]


def read(objects: Objects, file: Path, *names: str) -> dict[str, Tensor]:
    with TensorReader(objects) as reader:
        checkpoint = reader.open(f"file://{file}", ())
        return reader.read(checkpoint, names or checkpoint.tensors)


def test_what_safetensors_wrote_is_read_as_it_is(objects: Objects, tmp_path: Path) -> None:
    written = {
        name: (torch.arange(24).reshape(2, 3, 4) % 2).to(dtype)
        for name, dtype in DTYPES.items()
        if not name.startswith("U") or name == "U8"
    }
    written |= {"scalar": torch.tensor(3.5), "nothing": torch.zeros(0, 4)}
    save_file(written, tmp_path / "t.safetensors")
    found = read(objects, tmp_path / "t.safetensors")
    assert found.keys() == written.keys()
    for name, tensor in written.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert as_bytes(found[name]) == as_bytes(tensor), name


@pytest.mark.parametrize("before", [1, 2, 3, 5])
def test_tensors_on_odd_offsets(objects: Objects, tmp_path: Path, before: int) -> None:
    values = torch.tensor([1.5, -2.0], dtype=torch.float64)
    header = write_header([("pad", "U8", (before,)), ("values", "F64", (2,)), ("last", "BF16", (1,))])
    raw = header + bytes(before) + bytes(as_bytes(values)) + bytes(as_bytes(torch.tensor([7.0], dtype=torch.bfloat16)))
    (tmp_path / "odd.safetensors").write_bytes(raw)
    found = read(objects, tmp_path / "odd.safetensors")
    assert found["values"].equal(values)
    assert found["last"].item() == 7.0


def test_a_tensor_longer_than_a_span(objects: Objects, tmp_path: Path) -> None:
    long = torch.randint(0, 256, (SPAN_BYTES + 12345,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_file({"long": long, "short": torch.ones(3)}, tmp_path / "t.safetensors")
    assert read(objects, tmp_path / "t.safetensors")["long"].equal(long)


def test_only_what_is_asked_for(objects: Objects, tmp_path: Path) -> None:
    save_file({name: torch.full((2,), float(k)) for k, name in enumerate("abc")}, tmp_path / "t.safetensors")
    found = read(objects, tmp_path / "t.safetensors", "c", "a")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"a": [0.0, 0.0], "c": [2.0, 2.0]}


def test_some_entries_of_a_tensor(objects: Objects, tmp_path: Path) -> None:
    save_file({"a": torch.arange(100.0).reshape(4, 25), "b": torch.ones(3).half()}, tmp_path / "t.safetensors")
    with TensorReader(objects) as reader:
        checkpoint = reader.open(f"file://{tmp_path}/t.safetensors", ())
        found = reader.start(checkpoint, ["a"], slice(30, 70)).wait()
        assert found["a"].tolist() == list(range(30, 70))
        assert reader.start(checkpoint, ["a"], slice(0, 100)).wait()["a"].tolist() == list(range(100))


def test_a_tensor_written_in_parts(objects: Objects, tmp_path: Path) -> None:
    header = {"a": ("F32", (2, 3)), "b": ("F32", (1,))}
    with TensorWriter(objects, f"file://{tmp_path}/", "out.safetensors", header) as writer:
        for part in (torch.arange(4.0), torch.arange(4.0, 6.0)):
            writer.add_entries("a", part)
        writer.add("b", torch.ones(1))
        writer.commit()
    found = load_file(tmp_path / "out.safetensors")
    assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["b"].tolist() == [1]


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([("a", torch.zeros(4)), ("a", torch.zeros(3))], "more than"),
        ([("a", torch.zeros(4)), ("b", torch.zeros(1))], "'b' where 'a'"),
        ([("a", torch.zeros(4).double())], "are not F32"),
        ([("a", torch.zeros(4))], "2 tensors were never written"),
        ([("a", torch.zeros(4)), (None, torch.zeros(2, 3))], "as its header says"),
    ],
)
def test_parts_that_do_not_make_the_tensor(
    objects: Objects, tmp_path: Path, parts: list[tuple[str | None, Tensor]], says: str
) -> None:
    with pytest.raises(WorkerError, match=says):
        write_parts(objects, tmp_path, parts)
    assert list(tmp_path.iterdir()) == []


def write_parts(objects: Objects, folder: Path, parts: list[tuple[str | None, Tensor]]) -> None:
    header = {"a": ("F32", (2, 3)), "b": ("F32", (1,))}
    with TensorWriter(objects, f"file://{folder}/", "out.safetensors", header) as writer:
        for name, part in parts:
            if name is None:
                writer.add("a", part)
            else:
                writer.add_entries(name, part)
        writer.commit()


def test_a_file_that_changed_since_it_was_pinned(objects: Objects, tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    save_file({"a": torch.ones(3)}, file)
    found = objects.head(f"file://{file}")
    pin = Pinned(address=found.address, size=found.size, etag=found.etag)
    with TensorReader(objects) as reader:
        checkpoint = reader.open(f"file://{file}", [pin])
        file.write_bytes(file.read_bytes())
        with pytest.raises(InputChanged, match=r"t\.safetensors"):
            reader.read(checkpoint, ["a"])
        with pytest.raises(InputChanged, match="submit the merge again"):
            reader.open(f"file://{file}", [pin])
        file.unlink()
        with pytest.raises(InputMissing):
            reader.open(f"file://{file}", [pin])


def write(objects: Objects, folder: Path, written: dict[str, Tensor], **header: tuple[str, tuple[int, ...]]) -> None:
    with TensorWriter(objects, f"file://{folder}/", "out.safetensors", header) as writer:
        for name, tensor in written.items():
            writer.add(name, tensor)
        writer.commit()


def test_a_written_file_is_what_it_says(objects: Objects, tmp_path: Path) -> None:
    turned = torch.arange(6.0).reshape(2, 3).T
    header = {"turned": ("F32", (3, 2)), "half": ("BF16", (2,)), "none": ("F16", (0, 3)), "flag": ("BOOL", ())}
    with TensorWriter(objects, f"file://{tmp_path}/", "out.safetensors", header) as writer:
        writer.add("turned", turned)
        writer.add("half", torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
        writer.add("none", torch.zeros(0, 3, dtype=torch.float16))
        writer.add("flag", torch.tensor(True))
        assert not (tmp_path / "out.safetensors").exists()
        artifact = writer.commit()
    raw = (tmp_path / "out.safetensors").read_bytes()
    assert (artifact.size, artifact.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())
    found = load_file(tmp_path / "out.safetensors")
    assert found["turned"].equal(turned)
    assert found["half"].tolist() == [1.0, 2.0]
    assert found["flag"].item() is True


ONE = ("F32", (2,))


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ({"b": torch.zeros(2), "a": torch.zeros(2)}, "'b' where 'a'"),
        ({"a": torch.zeros(2).double()}, "'a' is not F32"),
        ({"a": torch.zeros(1, 2)}, r"\(2,\)"),
        ({"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2)}, "one tensor too many: 'c'"),
        ({"a": torch.zeros(2)}, "1 tensors were never written"),
    ],
)
def test_a_writer_refuses_what_its_header_does_not_say(
    objects: Objects, tmp_path: Path, written: dict[str, Tensor], says: str
) -> None:
    with pytest.raises(WorkerError, match=says):
        write(objects, tmp_path, written, a=ONE, b=ONE)
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_a_commit_writes_nothing(objects: Objects, tmp_path: Path) -> None:
    with TensorWriter(objects, f"file://{tmp_path}/", "out.safetensors", {"a": ONE}) as writer:
        writer.add("a", torch.zeros(2))
    assert list(tmp_path.iterdir()) == []


def test_a_small_file(objects: Objects, tmp_path: Path) -> None:
    artifact = write_artifact(objects, f"file://{tmp_path}/", "merge/report.json", b"{}")
    assert (tmp_path / "merge/report.json").read_bytes() == b"{}"
    assert (artifact.role, artifact.media_type, artifact.size) == ("report", "application/json", 2)
    assert artifact.sha256 == hashlib.sha256(b"{}").hexdigest()


@pytest.mark.parametrize("size", [0, 1, 10, 11])
def test_a_file_piece_by_piece(objects: Objects, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "COPY_BYTES", 5)
    (tmp_path / "x").write_bytes(bytes(range(size)))
    found = objects.head(f"file://{tmp_path}/x")
    pin = Pinned(address=found.address, size=found.size, etag=found.etag)
    assert b"".join(bytes(piece) for piece in chunks(objects, pin)) == bytes(range(size))


def test_groups_of_a_limited_size() -> None:
    sized = [("a", 3), ("b", 3), ("c", 9), ("d", 1), ("e", 5)]
    assert list(batches(sized, 6)) == [["a", "b"], ["c"], ["d", "e"]]
    assert list(batches([], 6)) == []
