"""A file of statistics: what one task's exemplars say about every parameter's inputs, without a sample in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from service.contract.checkpoint import Checkpoint
from service.contract.errors import BadInput, BadTensor
from service.contract.job import Artifact
from service.contract.plan import Pinned
from service.contract.samples import DIAGONAL, FACTOR, ROWS
from service.stores.objects import Objects
from workers.finite import is_finite
from workers.statistics import Statistic
from workers.tensors import NAMES, Reading, TensorReader
from workers.writing import TensorWriter


def named_tensors(statistics: Mapping[str, Statistic]) -> dict[str, Tensor]:
    """The tensors of a statistics file: ``<parameter>.rows`` [], and ``.factor`` [r, in] or ``.diagonal`` [d].

    Stacked matrices have ``.rows`` [blocks] and ``.factor`` [blocks, r, in].
    """
    rows = {name + ROWS: torch.tensor(s.block_rows or s.rows, dtype=torch.int64) for name, s in statistics.items()}
    held = {name + (DIAGONAL if s.factor is None else FACTOR): s.held for name, s in statistics.items()}
    wide_first = sorted(held.items(), key=lambda item: -item[1].element_size())
    return {**rows, **dict(wide_first)}


def write_statistics(objects: Objects, prefix: str, name: str, statistics: Mapping[str, Statistic]) -> Artifact:
    """Write a statistics file at ``prefix`` + ``name``. Raises StorageFailure."""
    tensors = named_tensors(statistics)
    header = {key: (NAMES[tensor.dtype], tuple(tensor.shape)) for key, tensor in tensors.items()}
    with TensorWriter(objects, prefix, name, header) as writer:
        for key, tensor in tensors.items():
            writer.add(key, tensor)
        return writer.commit()


@dataclass(frozen=True)
class StatisticsReading:
    """Statistics of some parameters that are being read."""

    address: str
    reading: Reading
    rows: Mapping[str, tuple[int, ...]]

    def wait(self) -> dict[str, Statistic]:
        """The statistics by parameter. Raises BadTensor where one holds NaN or infinity."""
        found = {}
        for key, tensor in self.reading.wait().items():
            parameter, _, kind = key.rpartition(".")
            if not is_finite(tensor):
                detail = f"{self.address}: the statistics of {parameter!r} hold NaN or infinity"
                raise BadTensor(detail, tensor=parameter)
            counts = self.rows[parameter]
            blocks = counts if tensor.dim() == 3 else ()
            if f".{kind}" == FACTOR:
                found[parameter] = Statistic(rows=sum(counts), factor=tensor, block_rows=blocks)
            else:
                found[parameter] = Statistic(rows=sum(counts), diagonal=tensor, block_rows=blocks)
        return found


class StatisticsFile:
    """A statistics file, read parameter by parameter. Row counts are read at once: they are small and lie together."""

    def __init__(self, reader: TensorReader, address: str, pinned: tuple[Pinned, ...] = ()) -> None:
        self._reader = reader
        self._file = reader.open(address, pinned)
        self._rows = _read_rows(reader, self._file)

    @property
    def parameters(self) -> frozenset[str]:
        """Names of the parameters it knows about."""
        return frozenset(self._rows)

    def start(self, parameters: Iterable[str]) -> StatisticsReading:
        """Begin to read what there is about these parameters."""
        keys = [name + form for name in parameters if name in self._rows for form in (FACTOR, DIAGONAL)]
        present = [key for key in keys if key in self._file.tensors]
        return StatisticsReading(self._file.address, self._reader.start(self._file, present), self._rows)


def _read_rows(reader: TensorReader, file: Checkpoint) -> dict[str, tuple[int, ...]]:
    keys = [key for key in file.tensors if key.endswith(ROWS)]
    read = reader.read(file, keys)
    rows = {key.removesuffix(ROWS): tuple(int(count) for count in tensor.flatten()) for key, tensor in read.items()}
    without = next((name for name, counts in rows.items() if min(counts, default=-1) < 0), None)
    if without is not None:
        raise BadInput(f"{file.address}: {without}{ROWS} is negative", tensor=without)
    return rows
