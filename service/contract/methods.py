"""Every merge method: its name, its paper and its parameters. A row here is a function in ``workers.methods``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from service.contract.base import Frozen
from service.contract.treatments import PAPER, Keep, Moments, Projection, Role, ScaleMask, ShiftMask, Treatment

Proxy = Literal["task_vector", "covariance", "subspace"]


class Method(Frozen):
    """What every method shares.

    ``trims`` says whether task vectors are treated before they are combined, ``combines`` which function of
    ``workers.methods`` combines them, ``any_order`` that the order of tasks does not matter beyond rounding.
    """

    paper: ClassVar[str] = "none"
    trims: ClassVar[bool] = False
    combines: ClassVar[str] = ""
    any_order: ClassVar[bool] = True

    def treatment(self, role: Role) -> Treatment:  # noqa: ARG002 (methods that trim look at the role)
        """The treatment that this method gives a parameter of ``role``."""
        return Keep()


class Cat(Method):
    """Conflict-aware trimming, then the sum: W = W0 + scaling * sum_k weight_k * trimmed T_k."""

    paper: ClassVar[str] = PAPER
    trims: ClassVar[bool] = True
    combines: ClassVar[str] = "task_arithmetic"

    name: Literal["cat"] = "cat"
    scaling: float = Field(0.4, ge=0, le=100, description="Factor on the sum of trimmed task vectors")
    rank: int = Field(4, ge=0, le=65536, description="Directions removed from a linear weight per task, at most")
    balance: float | None = Field(
        None, ge=0, description="Weight of the own response; 5 with exemplars or statistics, 0.5 with a proxy"
    )
    scale_rank: int = Field(4, ge=0, le=65536, description="Entries of a normalization scale zeroed per task, at most")
    scale_balance: float = Field(10.0, ge=0, description="The same weight for normalization scales")
    shift_rank: int = Field(4, ge=0, le=65536, description="Entries of a bias zeroed per task, at most")
    moments: Moments = Field("mean", description="Divide second moments by the number of rows (mean) or not (sum)")
    positive_only: bool = Field(True, description="Remove only what has a positive eigenvalue or score")
    restore_norm: bool = Field(False, description="Rescale each trimmed vector to the norm it had")
    features_at: Literal["task", "scaled"] = Field(
        "task", description="Take features at W0 + T_k (task) or at W0 + scaling * T_k (scaled)"
    )
    proxy: Proxy = Field("task_vector", description="What stands for features where no task brings any")
    proxy_rank: int = Field(8, ge=1, le=65536, description="Singular vectors kept by the proxy `subspace`")

    def treatment(self, role: Role) -> Treatment:
        """Projection for weights, masks for scales and shifts; a bare parameter is kept."""
        if role in Projection.roles:
            return Projection(
                rank=self.rank,
                balance=5.0 if self.balance is None else self.balance,
                moments=self.moments,
                positive_only=self.positive_only,
                restore_norm=self.restore_norm,
            )
        if role in ScaleMask.roles:
            return ScaleMask(
                rank=self.scale_rank,
                balance=self.scale_balance,
                moments=self.moments,
                positive_only=self.positive_only,
                restore_norm=self.restore_norm,
            )
        if role in ShiftMask.roles:
            return ShiftMask(rank=self.shift_rank, restore_norm=self.restore_norm)
        return Keep()


class TaskArithmetic(Method):
    """W = W0 + scaling * sum_k weight_k * T_k."""

    paper: ClassVar[str] = "Editing Models with Task Arithmetic, Ilharco et al., ICLR 2023, arXiv:2212.04089"
    combines: ClassVar[str] = "task_arithmetic"

    name: Literal["task_arithmetic"] = "task_arithmetic"
    scaling: float = Field(0.4, ge=0, le=100, description="Factor on the sum of task vectors")


class Average(Method):
    """The weighted mean of the checkpoints: W = W0 + sum_k weight_k * T_k / sum_k weight_k."""

    paper: ClassVar[str] = "Model soups, Wortsman et al., ICML 2022, arXiv:2203.05482"
    combines: ClassVar[str] = "average"

    name: Literal["average"] = "average"


class Ties(Method):
    """Trim each task vector to its largest entries, elect a sign per entry, average the entries that agree with it.

    Trimming is per tensor, as widespread implementations do it; the paper trims over the whole vector.
    """

    paper: ClassVar[str] = "TIES-Merging, Yadav et al., NeurIPS 2023, arXiv:2306.01708"
    combines: ClassVar[str] = "ties"

    name: Literal["ties"] = "ties"
    scaling: float = Field(1.0, ge=0, le=100, description="Factor on the merged task vector")
    density: float = Field(0.2, gt=0, le=1, description="Share of entries of each tensor that are kept")


AnyMethod = Annotated[Cat | TaskArithmetic | Average | Ties, Field(discriminator="name")]

METHODS: dict[str, type[Cat] | type[TaskArithmetic] | type[Average] | type[Ties]] = {
    "cat": Cat,
    "task_arithmetic": TaskArithmetic,
    "average": Average,
    "ties": Ties,
}
