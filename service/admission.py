"""Do these checkpoints, samples and places fit each other? Headers only, and every disagreement in one answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from service.contract.adapter import apply_adapter
from service.contract.checkpoint import Checkpoint, Header
from service.contract.errors import (
    BucketNotAllowed,
    CheckpointNotFound,
    ExemplarsDoNotFit,
    Fault,
    Forbidden,
    IncompatibleCheckpoints,
    MalformedCheckpoint,
    OutputExists,
    RecipeUnfit,
    Refusal,
    ValidationError,
)
from service.contract.evaluation import TaskEvaluation, TextColumns, is_text
from service.contract.fit import fit
from service.contract.labeled import class_fault, labeled_faults, model_faults
from service.contract.plan import Plan
from service.contract.planning import make_plan
from service.contract.recipe import Recipe
from service.contract.roles import guess_parameter
from service.contract.samples import head_faults, input_faults, statistics_faults
from service.contract.search import FEATURES, PREDICTIONS
from service.contract.textfiles import HEAD_BYTES, LIMIT_BYTES, holds_tokenizer, label_names, text_faults
from service.stores.checkpoints import read_checkpoint, read_header
from service.stores.objects import Objects, refusals

READERS = 8


@dataclass(frozen=True)
class TextHead:
    """The beginning of a text file, and how many bytes the whole of it has."""

    address: str
    data: bytes
    size: int


FileHead = Header | TextHead
FileCheck = Callable[[Any, Checkpoint], list[str]]


@dataclass(frozen=True)
class Opened:
    """What a recipe's addresses hold, by JSON pointer; None where it could not be read."""

    base: Checkpoint | None
    tasks: tuple[Checkpoint | None, ...]
    files: Mapping[str, FileHead | None]


def admit(recipe: Recipe, objects: Objects) -> Plan:
    """Look at everything a recipe names, and return the plan as far as it can be told without its model.

    Roles are told from names and shapes here; the workers ask the model's own modules.

    Raises:
        Refusal: with a fault for everything that does not fit, each with a pointer into the recipe.
    """
    faults, output = list[Fault](), recipe.output
    if output.prefix is not None:
        inputs = _checkpoint_addresses(recipe) | file_addresses(recipe)
        faults += place_faults(output.prefix, inputs, objects, is_free=output.overwrite)
    opened = _open(recipe, objects, faults)
    faults += [*_file_faults(recipe, opened), *_prediction_faults(recipe, opened)]
    tasks = [task for task in opened.tasks if task is not None]
    if opened.base is None or len(tasks) < len(recipe.tasks):
        raise refusal_of(faults)
    found = fit(recipe, opened.base, tasks)
    faults += found.faults
    if faults:
        raise refusal_of(faults)
    return make_plan(
        recipe,
        recipe.output.prefix or "",
        opened.base,
        tasks,
        found,
        lambda info: guess_parameter(info.name, info.shape),
    )


def place_faults(prefix: str, inputs: Mapping[str, str], objects: Objects, *, is_free: bool) -> list[Fault]:
    """What is wrong with where a result is to go.

    ``inputs`` are the addresses that the recipe names, by JSON pointer; ``is_free`` says that what lies there may go.
    """
    pointer = "/output/prefix"
    faults: list[Fault] = []
    for where, address in inputs.items():
        place = address if address.endswith(("/", ".safetensors")) else address + "/"
        if prefix.startswith(place) or place.startswith(prefix):
            detail = (
                f"{prefix} lies inside the input {where} ({address}), or around it; a result never mixes with inputs"
            )
            faults.append(Fault(pointer, "validation_error", detail))
    with collecting(faults, pointer):
        objects.check(prefix + "x")
        first = next(iter(objects.list(prefix)), None)
        if first is not None and not is_free and not faults:
            detail = f"{first.address} exists; choose another prefix, or set output.overwrite"
            faults.append(Fault(pointer, OutputExists.code, detail))
    return faults


def _open(recipe: Recipe, objects: Objects, faults: list[Fault]) -> Opened:
    """Read all headers, several at a time; what can't be read becomes a fault."""
    checkpoints = _checkpoint_addresses(recipe)
    files = file_addresses(recipe)

    def checkpoint(pointer: str) -> Checkpoint | None:
        with collecting(faults, pointer):
            objects.check(checkpoints[pointer])
            return read_checkpoint(objects, checkpoints[pointer])
        return None

    with ThreadPoolExecutor(READERS) as pool:
        read = dict(zip(checkpoints, pool.map(checkpoint, checkpoints), strict=True))
        headers = dict(zip(files, pool.map(lambda at: read_head(objects, at, files[at], faults), files), strict=True))
    base = read["/base"]
    if base is not None and base.adapter is not None:
        detail = f"{base.address} is an adapter; the base must be a whole model, the one that the adapters are for"
        faults.append(Fault("/base", MalformedCheckpoint.code, detail))
        base = None
    tasks = tuple(_whole(base, read[pointer], pointer, faults) for pointer in checkpoints if pointer != "/base")
    return Opened(base, tasks, headers)


def read_head(objects: Objects, pointer: str, address: str, faults: list[Fault]) -> FileHead | None:
    """The beginning of a file of samples, which says what is in it; what can't be read becomes a fault."""
    with collecting(faults, pointer):
        objects.check(address)
        return _text_head(objects, address) if is_text(address) else read_header(objects, address)[1]
    return None


def _text_head(objects: Objects, address: str) -> TextHead:
    info = objects.head(address)
    data = bytearray(min(HEAD_BYTES, info.size))
    objects.read(address, 0, memoryview(data), etag=info.etag)
    return TextHead(address, bytes(data), info.size)


def _whole(base: Checkpoint | None, task: Checkpoint | None, pointer: str, faults: list[Fault]) -> Checkpoint | None:
    """A task's checkpoint; an adapter is put on the base."""
    if task is None or task.adapter is None:
        return task
    with collecting(faults, pointer):
        return apply_adapter(base, task) if base is not None else None
    return None


def _checkpoint_addresses(recipe: Recipe) -> dict[str, str]:
    """The checkpoints that a recipe names, by JSON pointer."""
    tasks = {f"/tasks/{i}/checkpoint": task.checkpoint for i, task in enumerate(recipe.tasks)}
    return {"/base": recipe.base, **tasks}


def file_addresses(recipe: Recipe) -> dict[str, str]:
    """The files that a recipe names beside its checkpoints, by JSON pointer."""
    found: dict[str, str] = {}
    for i, task in enumerate(recipe.tasks):
        if task.exemplars:
            found[f"/tasks/{i}/exemplars"] = task.exemplars
        if task.statistics:
            found[f"/tasks/{i}/statistics"] = task.statistics
    for i, row in enumerate(recipe.evaluation.tasks if recipe.evaluation else ()):
        found[f"/evaluation/tasks/{i}/labeled"] = row.labeled
        if row.validation:
            found[f"/evaluation/tasks/{i}/validation"] = row.validation
        if row.head:
            found[f"/evaluation/tasks/{i}/head/weight"] = row.head.weight
    return found


def _file_faults(recipe: Recipe, opened: Opened) -> list[Fault]:
    """What is wrong with exemplars, statistics, labeled samples and heads."""
    names = [task.name for task in recipe.tasks]
    checks: dict[str, tuple[Checkpoint | None, FileCheck]] = {}
    for i, checkpoint in enumerate(opened.tasks):
        checks[f"/tasks/{i}/exemplars"] = checkpoint, _exemplar_faults
        checks[f"/tasks/{i}/statistics"] = checkpoint, _statistics_faults
    for i, row in enumerate(recipe.evaluation.tasks if recipe.evaluation else ()):
        checkpoint = opened.tasks[names.index(row.task)]
        for which in ("labeled", "validation"):
            checks[f"/evaluation/tasks/{i}/{which}"] = checkpoint, partial(_labeled_faults, row, opened.base)
        checks[f"/evaluation/tasks/{i}/head/weight"] = checkpoint, _head_faults
    faults: list[Fault] = []
    for pointer, address in file_addresses(recipe).items():
        header = opened.files[pointer]
        checkpoint, check = checks[pointer]
        if header is not None and checkpoint is not None:
            sentences = check(header, checkpoint)
            faults += [Fault(pointer, ExemplarsDoNotFit.code, f"{address}: {sentence}") for sentence in sentences]
    return faults


def _prediction_faults(recipe: Recipe, opened: Opened) -> Iterator[Fault]:
    """Tasks that predict no classes, where a search compares predictions."""
    if recipe.search is None or recipe.search.objective != PREDICTIONS:
        return
    for task, checkpoint in zip(recipe.tasks, opened.tasks, strict=True):
        row = recipe.evaluation.row(task.name) if recipe.evaluation else None
        config = checkpoint.config if checkpoint is not None else None
        found = class_fault(config) if config is not None and not (row and row.head) else None
        if found is not None:
            advice = (
                f"{PREDICTIONS} compares predictions of classes; {FEATURES} compares features, which every task has"
            )
            yield Fault("/search/objective", ExemplarsDoNotFit.code, f"{task.name}: {found}; {advice}")


def _exemplar_faults(header: Header, checkpoint: Checkpoint) -> list[str]:
    if checkpoint.config is None:
        return [
            f"exemplars need the model to run, but {checkpoint.address} has no config.json; bring statistics instead"
        ]
    return input_faults(header.tensors, checkpoint.config)


def _statistics_faults(header: Header, checkpoint: Checkpoint) -> list[str]:
    return statistics_faults(header.tensors, checkpoint.tensors)


def _head_faults(header: Header, _checkpoint: Checkpoint) -> list[str]:
    return head_faults(header.tensors)


def _labeled_faults(row: TaskEvaluation, base: Checkpoint | None, file: FileHead, checkpoint: Checkpoint) -> list[str]:
    if checkpoint.config is None:
        return [f"an evaluation needs the model to run, but {checkpoint.address} has no config.json beside it"]
    return model_faults(checkpoint.config, row) + file_faults(row, base, file, checkpoint)


def file_faults(
    row: TaskEvaluation, base: Checkpoint | None, file: FileHead | None, checkpoint: Checkpoint
) -> list[str]:
    """What is wrong with a task's labeled samples for a checkpoint with a configuration; nothing of an unread file."""
    if file is None:
        return []
    if isinstance(file, TextHead):
        return _text_faults(row, base, file, checkpoint)
    return labeled_faults(file, checkpoint.config, row)


def _text_faults(row: TaskEvaluation, base: Checkpoint | None, file: TextHead, checkpoint: Checkpoint) -> list[str]:
    names = None if row.head else label_names(checkpoint.config)
    is_whole = len(file.data) == file.size
    faults = text_faults(file.address, file.data, is_whole, row.kind, row.columns or TextColumns(), names)
    if file.size > LIMIT_BYTES:
        faults.append(f"it has {file.size} bytes, more than the {LIMIT_BYTES} that a text file may have")
    beside = (*checkpoint.side_files, *(base.side_files if base is not None else ()))
    if not holds_tokenizer(side.name for side in beside):
        faults.append(f"text needs a tokenizer, but {checkpoint.address} has no tokenizer.json beside it")
    return faults


@contextmanager
def collecting(faults: list[Fault], pointer: str) -> Iterator[None]:
    """Turn a Refusal about one address into a fault, so that all are looked at; an outage ends the looking."""
    try:
        with refusals():
            yield
    except Refusal as refusal:
        if refusal.retryable:
            raise
        faults.append(Fault(pointer, refusal.code, refusal.detail))


KINDS: Sequence[type[Refusal]] = (
    BucketNotAllowed,
    Forbidden,
    CheckpointNotFound,
    MalformedCheckpoint,
    IncompatibleCheckpoints,
    ExemplarsDoNotFit,
    OutputExists,
    ValidationError,
)


def refusal_of(faults: Sequence[Fault]) -> Refusal:
    """One refusal for all faults: of their kind where they agree, else of the general one."""
    faults = sorted(faults, key=lambda fault: fault.pointer)  # headers are read in parallel: no order of their own
    codes = {fault.code for fault in faults}
    kind = next((kind for kind in KINDS if codes == {kind.code}), RecipeUnfit)
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return kind(f"{faults[0].detail}{more}", tuple(faults))
