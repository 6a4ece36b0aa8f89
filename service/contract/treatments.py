"""Every parameter treatment: what may be removed from a task vector, by the role of the parameter it belongs to."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar, Literal

from pydantic import Field, TypeAdapter

from service.contract.base import Frozen

PAPER = "CAT Merging, Sun et al., ICML 2025, arXiv:2505.06977"


class Role(StrEnum):
    """What a parameter is to its module."""

    LINEAR = "linear"
    CONVOLUTION = "convolution"
    GROUPED_CONVOLUTION = "grouped_convolution"  # each group of channels has a kernel and inputs of its own
    EXPERTS = "experts"  # linear weights stacked as [experts, out, in]
    EMBEDDING = "embedding"
    SCALE = "scale"
    SHIFT = "shift"
    OTHER = "other"


class Statistic(StrEnum):
    """What a treatment needs to know about a parameter's inputs."""

    SECOND_MOMENT = "second_moment"  # S_k = X_k^T X_k / n_k, kept as a factor or, for one-hot inputs, a diagonal
    MEAN_SQUARE = "mean_square"  # q_k, the mean square per dimension
    NONE = "none"


Moments = Literal["mean", "sum"]


class Projection(Frozen):
    """Removes from every other task's vector the output directions in which it disturbs this task's outputs."""

    roles: ClassVar[tuple[Role, ...]] = (
        Role.LINEAR,
        Role.CONVOLUTION,
        Role.GROUPED_CONVOLUTION,
        Role.EXPERTS,
        Role.EMBEDDING,
    )
    statistic: ClassVar[Statistic] = Statistic.SECOND_MOMENT
    paper: ClassVar[str] = f"{PAPER}, eq. for linear weights"

    name: Literal["projection"] = "projection"
    rank: int = Field(4, ge=0, le=65536, description="Directions removed per task, at most")
    balance: float = Field(5.0, ge=0, description="Weight of a task's own response against the conflict it causes")
    moments: Moments = Field("mean", description="Divide a task's second moment by its rows (mean) or not (sum)")
    positive_only: bool = Field(True, description="Remove only directions with a positive eigenvalue")
    restore_norm: bool = Field(False, description="Rescale each trimmed vector to the norm it had (a public port does)")


class ScaleMask(Frozen):
    """Zeroes the entries of a normalization scale that disturb another task most."""

    roles: ClassVar[tuple[Role, ...]] = (Role.SCALE,)
    statistic: ClassVar[Statistic] = Statistic.MEAN_SQUARE
    paper: ClassVar[str] = f"{PAPER}, eq. for normalization scales"

    name: Literal["scale_mask"] = "scale_mask"
    rank: int = Field(4, ge=0, le=65536, description="Entries zeroed per task, at most")
    balance: float = Field(10.0, ge=0, description="Weight of a task's own response against the conflict it causes")
    moments: Moments = Field("mean", description="Divide a task's square sums by its rows (mean) or not (sum)")
    positive_only: bool = Field(True, description="Zero only entries with a positive score")
    restore_norm: bool = Field(False, description="Rescale each trimmed vector to the norm it had (a public port does)")


class ShiftMask(Frozen):
    """Zeroes the entries of a bias where the other tasks together moved most."""

    roles: ClassVar[tuple[Role, ...]] = (Role.SHIFT,)
    statistic: ClassVar[Statistic] = Statistic.NONE
    paper: ClassVar[str] = f"{PAPER}, eq. for shifts"

    name: Literal["shift_mask"] = "shift_mask"
    rank: int = Field(4, ge=0, le=65536, description="Entries zeroed per task, at most")
    restore_norm: bool = Field(False, description="Rescale each trimmed vector to the norm it had (a public port does)")


class Keep(Frozen):
    """Leaves the task vectors as they are: they are combined untrimmed."""

    roles: ClassVar[tuple[Role, ...]] = tuple(Role)
    statistic: ClassVar[Statistic] = Statistic.NONE
    paper: ClassVar[str] = "none"

    name: Literal["keep"] = "keep"


Treatment = Annotated[Projection | ScaleMask | ShiftMask | Keep, Field(discriminator="name")]

TREATMENTS: dict[str, type[Projection] | type[ScaleMask] | type[ShiftMask] | type[Keep]] = {
    "projection": Projection,
    "scale_mask": ScaleMask,
    "shift_mask": ShiftMask,
    "keep": Keep,
}

treatment_adapter: TypeAdapter[Treatment] = TypeAdapter(Treatment)
