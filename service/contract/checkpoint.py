"""A checkpoint on disk: which tensors its safetensors files hold and where, read strictly from their headers alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

LENGTH_BYTES = 8  # a little-endian unsigned integer: how long the JSON header after it is
ALIGNMENT_BYTES = 8
MAX_HEADER_BYTES = 25 * 2**20
MAX_TENSORS = 200_000
MAX_RANK = 8
MAX_NAME_CHARACTERS = 512
METADATA = "__metadata__"

DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "C64": 8,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
FLOATING = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

T = TypeVar("T")


class MalformedHeader(Exception):
    """A file is no valid safetensors file, or the files of a checkpoint contradict each other.

    Attributes:
        file: the file's address.
        tensor: the name of the tensor that is wrong, if it is one.
        problem: what is wrong.
    """

    def __init__(self, file: str, problem: str, *, tensor: str | None = None) -> None:
        where = file if tensor is None else f"{file}: tensor {tensor[:MAX_NAME_CHARACTERS]!r}"
        super().__init__(f"{where}: {problem}")
        self.file = file
        self.tensor = tensor
        self.problem = problem


class PickleRefused(MalformedHeader):
    """A pickle can run code when it is read, so it never is."""

    def __init__(self, file: str) -> None:
        super().__init__(
            file,
            "a pickle file can run code when it is loaded, so it is not read; convert it where you trust it: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors') "
            "(clone tensors that share memory first), or with transformers, "
            "model.save_pretrained(folder, safe_serialization=True)",
        )


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: bytes ``start`` to ``end`` (exclusive, from the beginning of the file) of ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    file: str

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_floating(self) -> bool:
        return self.dtype in FLOATING


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a tensor: scale * B A, with A ``[r, in]`` (``down``) and B ``[out, r]`` (``up``).

    ``transposed`` says that the tensor it is added to is ``[in, out]``.
    """

    down: TensorInfo
    up: TensorInfo
    scale: float
    transposed: bool


@dataclass(frozen=True)
class Header:
    """What one file holds; tensors in the order in which they lie in it."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


@dataclass(frozen=True)
class CheckpointFile:
    """One file as it was when it was looked at."""

    address: str
    size: int
    etag: str
    version_id: str | None = None

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.address.rpartition("/")[2]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint by its headers.

    ``files`` hold weights, in the order of their names; ``tensors`` come file by file. ``config`` is ``config.json``,
    None for a lone file. ``side_files`` are what a copy needs beside the weights: config, tokenizer, processor.

    ``adapter`` is an adapter's own config, None for whole checkpoints. Put on its base (``contract.adapter``), it has
    the base's tensors, ``changes`` to some of them (a low-rank addition, or another tensor instead), and ``beside`` its
    own files those of the base.
    """

    address: str
    files: tuple[CheckpointFile, ...]
    tensors: dict[str, TensorInfo]
    config: dict[str, Any] | None = None
    side_files: tuple[CheckpointFile, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    adapter: dict[str, Any] | None = None
    changes: dict[str, LowRank | TensorInfo] = field(default_factory=dict)
    beside: tuple[CheckpointFile, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data in all files."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor of a known type."""
    return DTYPE_BYTES[dtype] * math.prod(shape)


def is_pickle_name(name: str) -> bool:
    """Whether a file's name is one that pickled weights have."""
    return name.lower().endswith(PICKLE_SUFFIXES)


def header_end(prefix: bytes | bytearray, file_size: int, file: str) -> int:
    """Where the header of a file ends and its data begins, in bytes from the beginning.

    Args:
        prefix: at least the file's first 16 bytes, or all of a smaller one.

    Raises:
        MalformedHeader: the file can't be a safetensors file.
        PickleRefused: it is a pickle, whatever its name.
    """
    if file_size < LENGTH_BYTES or len(prefix) < LENGTH_BYTES:
        raise MalformedHeader(file, f"it has {file_size} bytes, too few for a safetensors file")
    end = LENGTH_BYTES + int.from_bytes(prefix[:LENGTH_BYTES], "little")
    begins_as_json = prefix[LENGTH_BYTES : LENGTH_BYTES + 1] == b"{"
    if begins_as_json and end <= LENGTH_BYTES + MAX_HEADER_BYTES and end <= file_size:
        return end
    if prefix.startswith(PICKLE_MAGIC):
        raise PickleRefused(file)
    if not begins_as_json:
        raise MalformedHeader(file, "it is no safetensors file: no JSON header begins at byte 8")
    if end > file_size:
        raise MalformedHeader(file, f"its header claims to end at byte {end}, but the file has only {file_size} bytes")
    raise MalformedHeader(file, f"its header has {end - LENGTH_BYTES} bytes, more than the {MAX_HEADER_BYTES} accepted")


def parse_header(prefix: bytes | bytearray, file_size: int, file: str) -> Header:
    """The header of a safetensors file, held to every rule of the format and to some more.

    Stricter than the safetensors library: no name twice, names printable, rank at most 8, tensors that tile the data
    exactly, and no types smaller than a byte.

    Args:
        prefix: the file's beginning, at least to the end of its header.
        file_size: bytes in the whole file.
        file: its address, for messages and for the tensors' ``file``.

    Raises:
        MalformedHeader: with the file, the tensor if it is one, and what is wrong.
    """
    end = header_end(prefix, file_size, file)
    if len(prefix) < end:
        raise MalformedHeader(file, f"only {len(prefix)} of its header's {end} bytes were read")
    entries = _parse_json(prefix[LENGTH_BYTES:end], file)
    metadata = _parse_metadata(entries.pop(METADATA, {}), file)
    if len(entries) > MAX_TENSORS:
        raise MalformedHeader(file, f"it lists {len(entries)} tensors, more than the {MAX_TENSORS} accepted")
    tensors = [_parse_tensor(name, entry, end, file) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    _check_tiling(tensors, end, file_size, file)
    return Header({tensor.name: tensor for tensor in tensors}, metadata)


def write_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str] | None = None) -> bytes:
    """The beginning of a safetensors file whose tensors follow in this order without gaps, so it can be streamed out.

    Readers that view tensors in place are faster, or work at all, where wider types come first: see ``storage_order``.

    Args:
        tensors: name, dtype and shape of each.
        metadata: ``{"format": "pt"}`` if None, without which transformers does not load a file.
    """
    table: dict[str, object] = {METADATA: {"format": "pt"} if metadata is None else metadata}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + tensor_bytes(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def storage_order(tensors: Iterable[TensorInfo]) -> list[TensorInfo]:
    """Wider types first, else as they come: then every tensor begins at a multiple of its type's size."""
    return sorted(tensors, key=lambda tensor: -DTYPE_BYTES[tensor.dtype])


def _nbytes(tensor: Any) -> int:
    return int(tensor.nbytes)


def group_shards(tensors: Iterable[T], shard_bytes: int, *, size_of: Callable[[T], int] = _nbytes) -> list[list[T]]:
    """Split tensors into runs of at most ``shard_bytes`` each, in their order; a larger tensor gets a run of its own.

    Args:
        tensors: anything with ``nbytes``, or with a size by ``size_of``.
    """
    shards: list[list[T]] = []
    room = 0
    for tensor in tensors:
        size = size_of(tensor)
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= size
    return shards


def _parse_json(text: bytes | bytearray, file: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise MalformedHeader(file, f"its header has the key {twice[:MAX_NAME_CHARACTERS]!r} twice")
        return table

    def no_constant(name: str) -> NoReturn:
        raise MalformedHeader(file, f"its header contains {name}, which is no JSON")

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise MalformedHeader(file, f"its header is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise MalformedHeader(file, "its header is no JSON object")
    return parsed


def _parse_metadata(value: object, file: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise MalformedHeader(file, f"its {METADATA} is not a table of strings")
    return value


def _parse_tensor(name: str, entry: object, data: int, file: str) -> TensorInfo:
    problem = _name_problem(name)
    if problem:
        raise MalformedHeader(file, problem, tensor=name)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise MalformedHeader(file, "its entry must have dtype, shape and data_offsets, and nothing else", tensor=name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise MalformedHeader(file, f"its type {str(dtype)[:40]!r} is not one of {', '.join(DTYPE_BYTES)}", tensor=name)
    if not _is_counts(shape) or len(shape) > MAX_RANK:
        raise MalformedHeader(file, f"its shape must be at most {MAX_RANK} whole numbers", tensor=name)
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise MalformedHeader(file, "its data_offsets must be two whole numbers in order", tensor=name)
    needed, given = tensor_bytes(dtype, shape), offsets[1] - offsets[0]
    if needed != given:
        raise MalformedHeader(file, f"{dtype} {shape} needs {needed} bytes, its data_offsets give {given}", tensor=name)
    return TensorInfo(name, dtype, tuple(shape), data + offsets[0], data + offsets[1], file)


def _name_problem(name: str) -> str | None:
    if not name or len(name) > MAX_NAME_CHARACTERS:
        return f"a name has 1 to {MAX_NAME_CHARACTERS} characters"
    if not name.isprintable():
        return "a name must not contain unprintable characters"
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
        return "a name must not look like a path that climbs"
    return None


def _is_counts(value: object) -> bool:
    """Whether it is a list of whole numbers from 0; JSON's true is an int to Python."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_tiling(tensors: list[TensorInfo], data: int, file_size: int, file: str) -> None:
    expected = data
    for tensor in tensors:
        if tensor.start != expected:
            what = "overlaps" if tensor.start < expected else "leaves a gap after"
            raise MalformedHeader(file, f"its data {what} the tensor before it", tensor=tensor.name)
        expected = tensor.end
    if expected != file_size:
        what = "is cut short" if file_size < expected else "has more data than its header lists"
        first_cut = next((tensor.name for tensor in tensors if tensor.end > file_size), None)
        problem = f"the file {what}: {file_size} bytes where the header makes it {expected}"
        raise MalformedHeader(file, problem, tensor=first_cut)
