"""Reads a checkpoint by its headers: which files it has, which tensors they hold, and what lies beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

from service.contract.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from service.contract.artifacts import CONFIG, INDEX
from service.contract.checkpoint import (
    Checkpoint,
    CheckpointFile,
    Header,
    MalformedHeader,
    PickleRefused,
    TensorInfo,
    header_end,
    is_pickle_name,
    parse_header,
)
from service.stores.base import ObjectInfo, ObjectMissing, ObjectTooLarge
from service.stores.objects import Objects

SUFFIX = ".safetensors"
SINGLE = "model.safetensors"
FIRST_READ_BYTES = 128 << 10  # holds the whole header of nearly every file
MAX_CONFIG_BYTES = 4 << 20
MAX_INDEX_BYTES = 64 << 20
MAX_OBJECTS = 20_000  # in a folder and below it
READERS = 16

SIDE_FILES = (
    CONFIG,
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "chat_template*",
    "*.spm",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
)


def read_checkpoint(objects: Objects, address: str) -> Checkpoint:
    """What a checkpoint holds, from a few small reads of each file.

    Args:
        address: a Hugging Face directory, with a slash at its end or not, or one ``.safetensors`` file.

    Raises:
        ObjectMissing: there is nothing there.
        MalformedHeader: a file is malformed, or the files contradict each other.
        PickleRefused: the weights are pickled.
        StoreError: anything else that a store says.
    """
    if is_pickle_name(address):
        raise PickleRefused(address)
    if address.endswith(SUFFIX):
        return _read_files(objects, address, [objects.head(address)])
    return _read_folder(objects, address if address.endswith("/") else f"{address}/")


def _read_folder(objects: Objects, folder: str) -> Checkpoint:
    present = _list_folder(objects, folder)
    if {ADAPTER_CONFIG, ADAPTER_WEIGHTS} <= present and not {SINGLE, INDEX} & present:
        return _read_adapter(objects, folder)
    if CONFIG not in present and (SINGLE in present or INDEX in present):
        raise MalformedHeader(f"{folder}{CONFIG}", "a checkpoint folder needs this file beside its weights")
    if SINGLE in present:
        weights, index = [SINGLE], None
    elif INDEX in present:
        index = _read_index(objects, folder)
        weights = sorted(set(index.values()))
        _check_present(folder, index, present)
    else:
        raise _no_weights(folder, present)
    side = [name for name in sorted(present) if _is_side_file(name)]
    with ThreadPoolExecutor(READERS) as pool:
        pinned = list(pool.map(lambda name: objects.head(folder + name), [*weights, *side]))
    checkpoint = _read_files(objects, folder, pinned[: len(weights)])
    if index is not None:
        _check_index(folder, index, checkpoint.tensors)
    return Checkpoint(
        address=folder,
        files=checkpoint.files,
        tensors=checkpoint.tensors,
        config=read_json(objects, folder + CONFIG, MAX_CONFIG_BYTES),
        side_files=tuple(map(as_file, pinned[len(weights) :])),
        metadata=checkpoint.metadata,
    )


def _read_adapter(objects: Objects, folder: str) -> Checkpoint:
    """An adapter by itself: its tensors have names of their own until it is put on its base."""
    weights, settings = objects.head(folder + ADAPTER_WEIGHTS), objects.head(folder + ADAPTER_CONFIG)
    found = _read_files(objects, folder, [weights])
    config = read_json(objects, folder + ADAPTER_CONFIG, MAX_CONFIG_BYTES)
    return replace(found, files=(*found.files, as_file(settings)), adapter=config)


def _read_files(objects: Objects, address: str, infos: list[ObjectInfo]) -> Checkpoint:
    with ThreadPoolExecutor(READERS) as pool:
        headers = list(pool.map(lambda info: _read_header(objects, info), infos))
    tensors = _all_tensors(headers)
    if not tensors:
        raise MalformedHeader(address, "it holds no tensors")
    return Checkpoint(address, tuple(map(as_file, infos)), tensors, metadata=headers[0].metadata)


def read_header(objects: Objects, address: str) -> tuple[CheckpointFile, Header]:
    """One ``.safetensors`` file and what it holds, whatever it is for: exemplars, statistics, a head.

    Raises:
        ObjectMissing, MalformedHeader, PickleRefused, StoreError: as ``read_checkpoint``.
    """
    info = objects.head(address)
    return as_file(info), _read_header(objects, info)


def _read_header(objects: Objects, info: ObjectInfo) -> Header:
    prefix = bytearray(min(FIRST_READ_BYTES, info.size))
    objects.read(info.address, 0, memoryview(prefix), etag=info.etag)
    end = header_end(prefix, info.size, info.address)
    read = len(prefix)
    if end > read:
        prefix.extend(bytes(end - read))
        objects.read(info.address, read, memoryview(prefix)[read:], etag=info.etag)
    return parse_header(prefix, info.size, info.address)


def _all_tensors(headers: Iterable[Header]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise MalformedHeader(tensor.file, f"the file {tensors[name].file} has it too", tensor=name)
            tensors[name] = tensor
    return tensors


def _list_folder(objects: Objects, folder: str) -> frozenset[str]:
    """Names of the files directly in a folder."""
    below = [info.address.removeprefix(folder) for info in islice(objects.list(folder), MAX_OBJECTS + 1)]
    if not below:
        raise ObjectMissing(f"{folder} does not exist or is empty")
    if len(below) > MAX_OBJECTS:
        raise MalformedHeader(
            folder, f"more than {MAX_OBJECTS} files lie in and below it; name the checkpoint's folder"
        )
    return frozenset(name for name in below if "/" not in name)


def _no_weights(folder: str, present: frozenset[str]) -> MalformedHeader:
    """Why a folder without weights that we read is refused."""
    pickled = sorted(name for name in present if is_pickle_name(name) and not name.startswith(("training_", "optim")))
    if pickled:
        return PickleRefused(folder + pickled[0])
    if "adapter_model.safetensors" in present:
        return MalformedHeader(
            f"{folder}adapter_model.safetensors",
            "this is an adapter, not a whole model; add it to its base first (peft: model.merge_and_unload())",
        )
    others = [name for name in sorted(present) if name.endswith(SUFFIX)]
    hint = f"; it has {others[0]}, which can be named itself" if others else ""
    return MalformedHeader(folder, f"it has neither {SINGLE} nor {INDEX}{hint}")


def read_json(objects: Objects, address: str, limit_bytes: int) -> dict[str, Any]:
    """A file that holds a JSON object. Raises MalformedHeader, ObjectMissing, StoreError."""
    try:
        value = json.loads(objects.read_all(address, limit_bytes))
    except (ValueError, RecursionError, ObjectTooLarge) as error:
        raise MalformedHeader(address, f"it can't be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise MalformedHeader(address, "it is no JSON object")
    return value


def _read_index(objects: Objects, folder: str) -> dict[str, str]:
    """Which file each tensor is in, as the index says."""
    table = read_json(objects, folder + INDEX, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise MalformedHeader(folder + INDEX, "its weight_map is missing, empty or no table")
    for name, file in table.items():
        if not isinstance(file, str) or "/" in file or "\\" in file or not file.endswith(SUFFIX):
            raise MalformedHeader(folder + INDEX, f"it names {file!r}, which is no {SUFFIX} file here", tensor=name)
    return table


def _check_present(folder: str, index: dict[str, str], present: frozenset[str]) -> None:
    for name, file in index.items():
        if file not in present:
            raise MalformedHeader(folder + INDEX, f"it is in {file}, says the index, but that is missing", tensor=name)


def _check_index(folder: str, index: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    """A tensor that the index leaves out is fine: transformers loads all that its files hold."""
    for name, file in index.items():
        found = tensors.get(name)
        if found is None or found.file != folder + file:
            raise MalformedHeader(folder + INDEX, f"it is not in {file}, where the index says it is", tensor=name)


def _is_side_file(name: str) -> bool:
    if name.endswith((SUFFIX, ".py")) or is_pickle_name(name):
        return False
    return any(fnmatchcase(name, pattern) for pattern in SIDE_FILES)


def as_file(info: ObjectInfo) -> CheckpointFile:
    """What a store says of a file, as a checkpoint has it."""
    return CheckpointFile(info.address, info.size, info.etag, info.version_id)
