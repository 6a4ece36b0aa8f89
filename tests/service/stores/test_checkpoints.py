"""Checkpoints by their headers: folders, shards, lone files, and everything that contradicts itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.contract.checkpoint import MalformedHeader, PickleRefused, write_header
from service.contract.settings import Connections
from service.stores.checkpoints import read_checkpoint, read_header
from service.stores.objects import ObjectMissing, Objects, open_objects
from tests.servers import s3_server

FOLDER = "s3://models/vit/"


@pytest.fixture
def objects(tmp_path: Path) -> Objects:
    return open_objects(Connections(object_store=f"file://{tmp_path}"))


def _weights(*names: str) -> bytes:
    """A file of tensors F32 [2, 3], as many as there are names."""
    return write_header((name, "F32", (2, 3)) for name in names) + bytes(24 * len(names))


def _put(objects: Objects, files: dict[str, bytes | dict[str, object]]) -> None:
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        objects.put(FOLDER + name, data, "application/octet-stream")


def _index(**weight_map: str) -> dict[str, object]:
    return {"metadata": {}, "weight_map": weight_map}


def test_a_folder_with_one_file(objects: Objects) -> None:
    _put(
        objects,
        {
            "config.json": {"model_type": "vit"},
            "model.safetensors": _weights("a", "b"),
            "preprocessor_config.json": {},
            "tokenizer.json": {},
            "tokenizer_config.json": {},
            "vocab.txt": b"a",
            "chat_template.jinja": b"",
            "README.md": b"not copied",
            "modeling_custom.py": b"never",
            "tokenizer.bin": b"never",
            "optimizer.pt": b"never",
            "checkpoint-5/model.safetensors": b"not this checkpoint",
        },
    )
    found = read_checkpoint(objects, FOLDER)
    assert found == read_checkpoint(objects, FOLDER.rstrip("/"))
    assert found.address == FOLDER
    assert found.config == {"model_type": "vit"}
    assert found.metadata == {"format": "pt"}
    assert [file.name for file in found.files] == ["model.safetensors"]
    assert found.files[0].etag == objects.head(FOLDER + "model.safetensors").etag
    assert [file.name for file in found.side_files] == [
        "chat_template.jinja",
        "config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ]
    tensor = found.tensors["b"]
    assert (tensor.dtype, tensor.shape, tensor.file) == ("F32", (2, 3), FOLDER + "model.safetensors")
    assert (tensor.end, found.nbytes) == (found.files[0].size, 48)


def test_a_folder_with_shards(objects: Objects) -> None:
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    _put(
        objects,
        {
            "config.json": {},
            one: _weights("a", "c"),
            two: _weights("b"),
            "model.safetensors.index.json": _index(a=one, b=two),  # "c" is left out: its file counts
        },
    )
    found = read_checkpoint(objects, FOLDER)
    assert [file.name for file in found.files] == [one, two]
    assert {name: tensor.file for name, tensor in found.tensors.items()} == {
        "a": FOLDER + one,
        "c": FOLDER + one,
        "b": FOLDER + two,
    }


def test_a_lone_file(objects: Objects) -> None:
    _put(objects, {"task.safetensors": _weights("a")})
    found = read_checkpoint(objects, FOLDER + "task.safetensors")
    assert (found.config, found.side_files, list(found.tensors)) == (None, (), ["a"])
    file, header = read_header(objects, FOLDER + "task.safetensors")
    assert ((file,), header.tensors) == (found.files, found.tensors)


def test_a_header_longer_than_the_first_read(objects: Objects) -> None:
    names = [f"layers.{index}.weight" for index in range(5000)]
    _put(objects, {"large.safetensors": _weights(*names)})
    assert list(read_checkpoint(objects, FOLDER + "large.safetensors").tensors) == names


def test_files_that_the_safetensors_library_writes(objects: Objects, tmp_path: Path) -> None:
    numpy, library = pytest.importorskip("numpy"), pytest.importorskip("safetensors.numpy")
    arrays = {"a": numpy.arange(6, dtype="f4").reshape(2, 3), "b": numpy.ones((), "i8"), "c": numpy.zeros((0, 4), "u1")}
    (tmp_path / "models").mkdir()
    library.save_file(arrays, tmp_path / "models" / "a.safetensors", metadata={"format": "np"})
    tensors = read_checkpoint(objects, "s3://models/a.safetensors").tensors
    assert {name: (t.dtype, t.shape) for name, t in tensors.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("I64", ()),
        "c": ("U8", (0, 4)),
    }
    data = bytearray(24)
    objects.read("s3://models/a.safetensors", tensors["a"].start, memoryview(data))
    assert bytes(data) == arrays["a"].tobytes()


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"model.safetensors": _weights("a")}, r"config\.json: a checkpoint folder needs this file"),
        ({"config.json": b"[1]", "model.safetensors": _weights("a")}, r"config\.json: it is no JSON object"),
        ({"config.json": b"\xff{", "model.safetensors": _weights("a")}, r"config\.json: it can't be read as JSON"),
        ({"config.json": {}, "model.safetensors": _weights()}, "holds no tensors"),
        (
            {"config.json": {}, "model.safetensors": _weights("a")[:-1]},
            r"tensor 'a': the file is cut short",
        ),
        ({"config.json": {}, "model.safetensors": b""}, "has 0 bytes"),
        ({"config.json": {}}, r"neither model\.safetensors nor"),
        ({"config.json": {}, "x.safetensors": _weights("a")}, r"it has x\.safetensors, which can be named"),
        ({"adapter_model.safetensors": _weights("a")}, "an adapter, not a whole model"),
    ],
)
def test_folders_that_are_no_checkpoint(
    objects: Objects, files: dict[str, bytes | dict[str, object]], says: str
) -> None:
    _put(objects, files)
    with pytest.raises(MalformedHeader, match=says):
        read_checkpoint(objects, FOLDER)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        (_index(a="one.safetensors", b="three.safetensors"), r"'b': it is in three\.safetensors, .* missing"),
        (_index(a="two.safetensors", b="two.safetensors"), r"'a': it is not in two\.safetensors"),
        (_index(a="one.safetensors", z="two.safetensors"), r"'z': it is not in two\.safetensors"),
        (_index(a="../one.safetensors"), r"'a': it names '\.\./one\.safetensors'"),
        (_index(a="one.bin"), r"'a': it names 'one\.bin'"),
        (_index(a="one.safetensors", c="copy.safetensors"), r"'a': the file .*copy\.safetensors has it too"),
        (_index(), "weight_map is missing, empty"),
        ({}, "weight_map is missing, empty"),
    ],
)
def test_an_index_that_its_files_contradict(objects: Objects, index: dict[str, object], says: str) -> None:
    files = {"one.safetensors": _weights("a"), "two.safetensors": _weights("b"), "copy.safetensors": _weights("a", "c")}
    _put(objects, {"config.json": {}, **files, "model.safetensors.index.json": index})
    with pytest.raises(MalformedHeader, match=says):
        read_checkpoint(objects, FOLDER)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.ckpt", "model.pth"])
def test_pickled_weights_are_refused_with_the_way_out(objects: Objects, name: str) -> None:
    _put(objects, {"config.json": {}, "training_args.bin": b"", name: b"PK\x03\x04"})
    for address in (FOLDER, FOLDER + name):
        with pytest.raises(PickleRefused, match=f"{name}: .*weights_only=True"):
            read_checkpoint(objects, address)


def test_a_pickle_under_a_safe_name_is_refused(objects: Objects) -> None:
    _put(objects, {"config.json": {}, "model.safetensors": b"PK\x03\x04" + bytes(100)})
    with pytest.raises(PickleRefused):
        read_checkpoint(objects, FOLDER)


@pytest.mark.parametrize("address", [FOLDER, FOLDER.rstrip("/"), FOLDER + "model.safetensors"])
def test_nothing_there(objects: Objects, address: str) -> None:
    with pytest.raises(ObjectMissing):
        read_checkpoint(objects, address)


def test_over_s3() -> None:
    with s3_server("rclone", buckets=("models",)) as server:
        objects = open_objects(Connections.from_environment(server.environment()))
        _put(objects, {"config.json": {}, "model.safetensors": _weights("a"), "tokenizer.json": {}})
        found = read_checkpoint(objects, FOLDER)
        assert list(found.tensors) == ["a"]
        assert [file.name for file in found.side_files] == ["config.json", "tokenizer.json"]
