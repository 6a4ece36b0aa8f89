"""The plan: the recipe as the workers will do it, tensor by tensor."""

from __future__ import annotations

from pydantic import Field

from service.contract.base import Frozen
from service.contract.checkpoint import tensor_bytes
from service.contract.methods import AnyMethod
from service.contract.treatments import Role, Treatment


class Pinned(Frozen):
    """One input file as it was when the job was planned; a read that meets another is a Failure."""

    address: str
    size: int
    etag: str
    version_id: str | None = None


class TensorPlan(Frozen):
    """What happens to one output tensor.

    ``source`` says whether it is merged, or copied from the base (integers, and what no task has). ``transposed``
    marks the layout [in, out], ``blocks`` counts stacked matrices with inputs of their own. ``method`` is given where
    an override changes the recipe's for this tensor; ``observed`` says that the method must know the tensor's inputs
    in order to combine task vectors.
    """

    name: str
    dtype: str
    base_dtype: str
    shape: tuple[int, ...]
    role: Role
    guessed: bool
    transposed: bool
    source: str = Field(pattern="^(merged|base)$")
    treatment: Treatment
    blocks: int = 1
    method: AnyMethod | None = None
    observed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return tensor_bytes(self.dtype, self.shape)

    @property
    def nbytes_in(self) -> int:
        """Bytes in the base, and in each task's checkpoint where the tensor is merged."""
        return tensor_bytes(self.base_dtype, self.shape)


class ShardPlan(Frozen):
    """One output file and its tensors, in the order they are written."""

    file: str
    tensors: tuple[TensorPlan, ...]
    bytes_in: int
    bytes_out: int


class HeadPlan(Frozen):
    """The tensors that belong to one task alone."""

    task: str
    tensors: tuple[str, ...]
    bytes: int


class Plan(Frozen):
    """The recipe as the workers will do it."""

    prefix: str
    shards: tuple[ShardPlan, ...]
    heads: tuple[HeadPlan, ...]
    side_files: tuple[Pinned, ...]
    inputs: dict[str, tuple[Pinned, ...]]
    tied: dict[str, str]
    bytes_in: int
    bytes_out: int
    peak_memory_bytes: int
    warnings: tuple[str, ...]

    def wanted(self) -> frozenset[str]:
        """Names of the parameters whose treatment or method needs to know their inputs."""
        return frozenset(
            tensor.name
            for shard in self.shards
            for tensor in shard.tensors
            if tensor.source == "merged" and (tensor.observed or type(tensor.treatment).statistic != "none")
        )

    def summary(self) -> dict[str, object]:
        """Counts a person can read before agreeing: shards, roles, treatments, bytes, memory, warnings."""
        tensors = [tensor for shard in self.shards for tensor in shard.tensors]
        return {
            "shards": [
                {"file": shard.file, "tensors": len(shard.tensors), "bytes": shard.bytes_out} for shard in self.shards
            ],
            "tensors": len(tensors),
            "merged": sum(tensor.source == "merged" for tensor in tensors),
            "copied_from_base": sum(tensor.source == "base" for tensor in tensors),
            "roles": _counted([tensor.role.value for tensor in tensors]),
            "treatments": _counted([t.treatment.name for t in tensors if t.source == "merged"]),
            "guessed_roles": sum(tensor.guessed for tensor in tensors),
            "heads": {head.task: list(head.tensors) for head in self.heads},
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "peak_memory_bytes": self.peak_memory_bytes,
            "warnings": list(self.warnings),
        }


def _counted(values: list[str]) -> dict[str, int]:
    return {value: values.count(value) for value in sorted(set(values))}
