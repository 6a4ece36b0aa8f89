"""Every merge method: its name, its paper and its parameters. A row here is a function in ``workers.methods``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from service.contract.base import Frozen
from service.contract.notices import Notice
from service.contract.treatments import PAPER, Keep, Moments, Projection, Role, ScaleMask, ShiftMask, Treatment

Proxy = Literal["task_vector", "covariance", "subspace"]
Scope = Literal["model", "tensor"]
Combine = Literal["linear", "ties"]
Rescale = Literal["density", "l1"]
Pieces = Literal["none", "entries", "rows"]

MATRICES = (Role.LINEAR, Role.CONVOLUTION, Role.GROUPED_CONVOLUTION, Role.EXPERTS)


class Method(Frozen):
    """What every method shares.

    ``trims`` says whether task vectors are treated before they are combined, ``combines`` which function of
    ``workers.methods`` combines them, ``any_order`` that the order of tasks does not matter beyond rounding,
    ``draws`` that random numbers are drawn (from the recipe's seed), ``task_limit`` how many tasks it takes at most,
    ``observes`` the roles whose inputs it wants statistics of in order to combine them, and ``without`` what becomes
    of such a parameter that has none, ``by_matrix`` that it looks at whole matrices, so that stacked ones are merged
    one by one. ``pieces`` says in which pieces a parameter is merged: entries in a row, whole rows of its matrices, or
    none, where the function needs the whole parameter; ``looks`` that it has to look at all pieces before it can merge
    the first; ``drops`` that an entry, were it NaN or infinite, could be left out unnoticed.
    """

    paper: ClassVar[str] = "none"
    trims: ClassVar[bool] = False
    combines: ClassVar[str] = ""
    any_order: ClassVar[bool] = True
    draws: ClassVar[bool] = False
    task_limit: ClassVar[int | None] = None
    observes: ClassVar[tuple[Role, ...]] = ()
    without: ClassVar[str] = ""
    by_matrix: ClassVar[bool] = False
    pieces: ClassVar[Pieces] = "none"
    looks: ClassVar[bool] = False
    drops: ClassVar[bool] = True

    @property
    def combining(self) -> Method:
        """The method that combines task vectors once they are trimmed: this one, unless it names another."""
        return self

    @property
    def needs_statistics(self) -> bool:
        """Whether every task must bring exemplars or statistics."""
        return bool(self.combining.observes)

    @property
    def entrywise(self) -> bool:
        """Whether an entry of the result depends on nothing but the same entry of what is merged, and its place."""
        return self.pieces == "entries" and not self.looks

    def sum_weights(self, weights: Sequence[float]) -> list[float] | None:  # noqa: ARG002 (sums look at them)
        """The factor on each task vector, from the tasks' weights, where the update is nothing but their sum."""
        return None

    @property
    def surveys(self) -> tuple[float, ...]:
        """Shares of the whole task vector, the largest entries, of which it must be known first where they end."""
        return ()

    @property
    def fixed(self) -> frozenset[str]:
        """Parameters that hold for the whole model, and can't be another for some parameters."""
        return frozenset({"name"})

    def treatment(self, role: Role) -> Treatment:  # noqa: ARG002 (methods that trim look at the role)
        """The treatment that this method gives a parameter of ``role``."""
        return Keep()

    def changed(self, parameters: Mapping[str, Any]) -> Self:
        """This method with other ``parameters``. Raises ValueError where one is unknown, unfit or fixed."""
        held = sorted(self.fixed & parameters.keys())
        if held:
            raise ValueError(f"{', '.join(held)} holds for the whole model and can't be overridden")
        return type(self).model_validate({**self.model_dump(), **parameters})


class TaskArithmetic(Method):
    """W = W0 + scaling * sum_k weight_k * T_k."""

    paper: ClassVar[str] = "Editing Models with Task Arithmetic, Ilharco et al., ICLR 2023, arXiv:2212.04089"
    combines: ClassVar[str] = "task_arithmetic"
    pieces: ClassVar[Pieces] = "entries"
    drops: ClassVar[bool] = False

    name: Literal["task_arithmetic"] = "task_arithmetic"
    scaling: float = Field(0.4, ge=0, le=100, description="Factor on the sum of task vectors")

    def sum_weights(self, weights: Sequence[float]) -> list[float]:
        return [self.scaling * weight for weight in weights]


class Average(Method):
    """The weighted mean of the checkpoints: W = W0 + sum_k weight_k * T_k / sum_k weight_k."""

    paper: ClassVar[str] = "Model soups, Wortsman et al., ICML 2022, arXiv:2203.05482"
    combines: ClassVar[str] = "average"
    pieces: ClassVar[Pieces] = "entries"
    drops: ClassVar[bool] = False

    name: Literal["average"] = "average"

    def sum_weights(self, weights: Sequence[float]) -> list[float]:
        return [weight / sum(weights) for weight in weights]


class Ties(Method):
    """Trim each task vector to its largest entries, elect a sign per entry, average the entries that agree with it.

    The paper trims over the whole task vector, which takes one more pass over the checkpoints; ``scope: tensor`` trims
    tensor by tensor, as mergekit does.
    """

    paper: ClassVar[str] = "TIES-Merging, Yadav et al., NeurIPS 2023, arXiv:2306.01708"
    combines: ClassVar[str] = "ties"
    pieces: ClassVar[Pieces] = "entries"
    looks: ClassVar[bool] = True

    name: Literal["ties"] = "ties"
    scaling: float = Field(1.0, ge=0, le=100, description="Factor on the merged task vector")
    density: float = Field(0.2, gt=0, le=1, description="Share of entries that are kept")
    scope: Scope = Field("model", description="Keep the largest of the whole task vector (model) or of each tensor")

    @property
    def surveys(self) -> tuple[float, ...]:
        return (self.density,) if self.scope == "model" and self.density < 1 else ()

    @property
    def fixed(self) -> frozenset[str]:
        return frozenset({"name", "scope", *(["density"] if self.scope == "model" else [])})


def _usual_scaling(known: dict[str, Any]) -> float:
    """A mean of agreeing entries is added whole; a sum is scaled down as task arithmetic's is."""
    return 1.0 if known.get("combine") == "ties" else 0.4


class Dare(Method):
    """Drop entries at random and make the others larger, so that the expectation stays; then combine.

    ``combine: ties`` elects a sign per entry and averages the entries that agree, without trimming any more. A mask
    depends on the seed, the parameter's name and the task's name alone.
    """

    paper: ClassVar[str] = "Language Models are Super Mario (DARE), Yu et al., ICML 2024, arXiv:2311.03099"
    combines: ClassVar[str] = "dare"
    pieces: ClassVar[Pieces] = "entries"
    looks: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    name: Literal["dare"] = "dare"
    combine: Combine = Field("linear", description="Add what is left (linear), or elect signs first (ties)")
    scaling: float = Field(
        default_factory=_usual_scaling, ge=0, le=100, description="Factor on the result; 0.4 if linear, 1 with ties"
    )
    density: float = Field(0.2, gt=0, le=1, description="Chance of an entry to be kept, in steps of 1/65536")
    rescale: Rescale = Field(
        "density", description="Divide by the density (the paper), or restore the tensor's L1 norm (mergekit)"
    )

    @property
    def entrywise(self) -> bool:
        return self.rescale == "density"


class Della(Method):
    """Drop entries at random, small ones of a row rather than large ones; rescale, elect signs, average.

    The chance to be kept rises with an entry's rank by magnitude within its row (output unit) from
    density - epsilon / 2 to density + epsilon / 2; mergekit's epsilon is half as wide for the same window.
    """

    paper: ClassVar[str] = "DELLA-Merging, Deep et al., 2024, arXiv:2406.11617"
    combines: ClassVar[str] = "della"
    pieces: ClassVar[Pieces] = "rows"
    looks: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    name: Literal["della"] = "della"
    combine: Combine = Field("ties", description="Elect signs and average what agrees (ties), or add (linear)")
    scaling: float = Field(
        default_factory=_usual_scaling, ge=0, le=100, description="Factor on the result; 0.4 if linear, 1 with ties"
    )
    density: float = Field(0.3, gt=0, le=1, description="Mean chance of an entry to be kept")
    epsilon: float = Field(0.2, ge=0, le=1, description="Width of the window of chances around the density")
    rescale: Rescale = Field(
        "density", description="Divide each entry by its chance (the paper), or restore the tensor's L1 norm (mergekit)"
    )

    @model_validator(mode="after")
    def _window_fits(self) -> Self:
        if self.epsilon / 2 >= self.density or self.density + self.epsilon / 2 > 1:
            raise ValueError(Notice("chances_outside"))
        return self


class Breadcrumbs(Method):
    """Drop the largest entries (outliers) and the smallest ones; combine what lies between.

    The paper masks layer by layer (``scope: tensor``); ``scope: model`` masks over the whole task vector.
    """

    paper: ClassVar[str] = "Model Breadcrumbs, Davari and Belilovsky, ECCV 2024, arXiv:2312.06795"
    combines: ClassVar[str] = "breadcrumbs"
    pieces: ClassVar[Pieces] = "entries"
    looks: ClassVar[bool] = True

    name: Literal["breadcrumbs"] = "breadcrumbs"
    combine: Combine = Field("linear", description="Add what is left (linear), or elect signs first (ties)")
    scaling: float = Field(
        default_factory=_usual_scaling, ge=0, le=100, description="Factor on the result; 0.4 if linear, 1 with ties"
    )
    density: float = Field(0.1, gt=0, le=1, description="Share of entries that are kept")
    gamma: float = Field(0.01, ge=0, lt=1, description="Share of entries, the largest ones, that are dropped")
    scope: Scope = Field("tensor", description="Rank entries within each tensor, or over the whole task vector (model)")

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        if self.density + self.gamma > 1:
            raise ValueError(Notice("shares_exceed"))
        return self

    @property
    def surveys(self) -> tuple[float, ...]:
        return (self.density + self.gamma, self.gamma) if self.scope == "model" else ()

    @property
    def fixed(self) -> frozenset[str]:
        return frozenset({"name", "scope", *(["density", "gamma"] if self.scope == "model" else [])})


class Slerp(Method):
    """Walk on the great circle from one checkpoint to another, tensor by tensor.

    Two tasks: from the first to the second. One task: from the base to it. For more there is ``karcher``.
    """

    paper: ClassVar[str] = "Animating Rotation with Quaternion Curves, Shoemake, SIGGRAPH 1985"
    combines: ClassVar[str] = "slerp"
    pieces: ClassVar[Pieces] = "entries"
    looks: ClassVar[bool] = True
    drops: ClassVar[bool] = False
    any_order: ClassVar[bool] = False
    task_limit: ClassVar[int | None] = 2

    name: Literal["slerp"] = "slerp"
    t: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Where between them; omitted, the second's share of the weights (1/2 for one task)",
    )


class Karcher(Method):
    """The mean of the checkpoints on the sphere: slerp for any number of tasks, each tensor a point.

    The direction is the Riemannian center of mass of the checkpoints' directions, with the tasks' weights; the length
    is the weighted mean of their lengths.
    """

    paper: ClassVar[str] = "Riemannian Center of Mass and Mollifier Smoothing, Karcher, Comm. Pure Appl. Math. 1977"
    combines: ClassVar[str] = "karcher"
    pieces: ClassVar[Pieces] = "entries"
    looks: ClassVar[bool] = True
    drops: ClassVar[bool] = False

    name: Literal["karcher"] = "karcher"
    steps: int = Field(100, ge=1, le=10_000, description="Iterations at most")
    tolerance: float = Field(1e-10, gt=0, lt=1, description="Angle of a step, in radians, at which the mean is found")


class ModelStock(Method):
    """The mean of the checkpoints, drawn towards the base as far as their task vectors disagree, tensor by tensor.

    W = W0 + t * mean T_k with t = N cos / (1 + (N - 1) cos), cos being the mean cosine between two tasks' vectors,
    within [0, 1]. With unequal weights N is the effective number of tasks and both means are weighted.
    """

    paper: ClassVar[str] = "Model Stock, Jang et al., ECCV 2024, arXiv:2403.19522"
    combines: ClassVar[str] = "model_stock"
    pieces: ClassVar[Pieces] = "entries"
    looks: ClassVar[bool] = True
    drops: ClassVar[bool] = False

    name: Literal["model_stock"] = "model_stock"
    scaling: float = Field(1.0, ge=0, le=100, description="Factor on the result; the paper has none")


class Sce(Method):
    """Select the entries that vary most between tasks, weight each tensor by its energy, erase minority signs."""

    paper: ClassVar[str] = "FuseChat (SCE), Wan et al., 2024, arXiv:2408.07990"
    combines: ClassVar[str] = "sce"
    pieces: ClassVar[Pieces] = "entries"
    looks: ClassVar[bool] = True

    name: Literal["sce"] = "sce"
    scaling: float = Field(1.0, ge=0, le=100, description="Factor on the merged task vector; the paper has none")
    density: float = Field(0.1, gt=0, le=1, description="Share of entries, those of largest variance, that are kept")


class Consensus(Method):
    """Task arithmetic without the entries that too few tasks care for, by their TALL masks.

    Task k cares for an entry where |T_k| >= threshold * |sum_i T_i - T_k|.
    """

    paper: ClassVar[str] = (
        "Localizing Task Information for Improved Model Merging and Compression, Wang et al., ICML 2024, "
        "arXiv:2405.07813"
    )
    combines: ClassVar[str] = "consensus"
    pieces: ClassVar[Pieces] = "entries"

    name: Literal["consensus"] = "consensus"
    scaling: float = Field(0.4, ge=0, le=100, description="Factor on the masked sum")
    agreeing: int = Field(2, ge=1, le=64, description="Tasks that must care for an entry (k); no more than there are")
    threshold: float = Field(
        0.4, ge=0, le=10, description="How large an own entry must be against the others' (lambda)"
    )


class Pcb(Method):
    """Let parameters compete within and between tasks; drop the losers, average the others by their scores.

    As published, scores compare the entries of a whole model; here those of each tensor.
    """

    paper: ClassVar[str] = (
        "Parameter Competition Balancing for Model Merging, Du et al., NeurIPS 2024, arXiv:2410.02396"
    )
    combines: ClassVar[str] = "pcb"
    pieces: ClassVar[Pieces] = "entries"
    looks: ClassVar[bool] = True

    name: Literal["pcb"] = "pcb"
    scaling: float = Field(1.0, ge=0, le=100, description="Factor on the merged task vector")
    density: float = Field(0.1, gt=0, le=1, description="Share of a task's entries that win")
    clip: float = Field(1e-4, ge=0, lt=0.5, description="Share of entries, the largest ones, cut to the next in size")


class TsvM(Method):
    """Keep each task's leading singular vectors, an equal share of the rank each, and decorrelate them.

    For linear weights and convolutions. Biases, scales and all else are averaged, tables of tokens and positions too:
    their rows are separate vectors, which singular directions only mix.
    """

    paper: ClassVar[str] = "Task Singular Vectors (TSV-M), Gargiulo et al., CVPR 2025, arXiv:2412.00081"
    combines: ClassVar[str] = "tsv_m"
    by_matrix: ClassVar[bool] = True

    name: Literal["tsv_m"] = "tsv_m"
    scaling: float = Field(1.4, ge=0, le=100, description="Factor on the merged task vector")


class IsoC(Method):
    """Sum the task vectors and make all singular values of the sum equal to their mean.

    For linear weights and convolutions; all else is averaged, tables of tokens and positions too.
    """

    paper: ClassVar[str] = "No Task Left Behind (Iso-C), Marczak et al., ICML 2025, arXiv:2502.04959"
    combines: ClassVar[str] = "iso_c"
    by_matrix: ClassVar[bool] = True

    name: Literal["iso_c"] = "iso_c"
    scaling: float = Field(1.7, ge=0, le=100, description="Factor on the merged task vector")


class IsoCts(Method):
    """As Iso-C, with the least of the common directions replaced by directions of single tasks.

    For linear weights and convolutions; all else is averaged, tables of tokens and positions too.
    """

    paper: ClassVar[str] = "No Task Left Behind (Iso-CTS), Marczak et al., ICML 2025, arXiv:2502.04959"
    combines: ClassVar[str] = "iso_cts"
    by_matrix: ClassVar[bool] = True

    name: Literal["iso_cts"] = "iso_cts"
    scaling: float = Field(1.7, ge=0, le=100, description="Factor on the merged task vector")
    common: float = Field(0.8, ge=0, le=1, description="Share of directions that is taken from the sum")


class Lot(Method):
    """The task vector that changes the tasks' own features least: T = (sum_k T_k S_k) (sum_k S_k)^+.

    Scales are averaged entry by entry with the mean squares of their inputs, everything else plainly.
    """

    paper: ClassVar[str] = (
        "Towards Minimizing Feature Drift in Model Merging (LOT Merging), Sun et al., NeurIPS 2025, arXiv:2505.23859"
    )
    combines: ClassVar[str] = "lot"
    by_matrix: ClassVar[bool] = True
    observes: ClassVar[tuple[Role, ...]] = (*MATRICES, Role.EMBEDDING, Role.SCALE)
    without: ClassVar[str] = "averaged"

    name: Literal["lot"] = "lot"
    scaling: float = Field(1.0, ge=0, le=100, description="Factor on the merged task vector")
    moments: Moments = Field("mean", description="Divide a task's second moment by its rows (mean) or not (sum)")
    cutoff: float = Field(1e-5, ge=0, lt=1, description="Eigenvalues of the sum below this share of the largest are 0")


class Regmean(Method):
    """The weights that answer the tasks' own inputs as the experts do: LOT's solution with damped correlations.

    W = (sum_k W_k S_k) (sum_k S_k)^-1, for linear weights and convolutions, with what is off the diagonal of each S_k
    reduced; solved for the task vector, so that directions that no task has seen stay the base's. All else is averaged.
    """

    paper: ClassVar[str] = (
        "Dataless Knowledge Fusion by Merging Weights of Language Models (RegMean), Jin et al., ICLR 2023, "
        "arXiv:2212.09849"
    )
    combines: ClassVar[str] = "regmean"
    by_matrix: ClassVar[bool] = True
    observes: ClassVar[tuple[Role, ...]] = MATRICES
    without: ClassVar[str] = "averaged"

    name: Literal["regmean"] = "regmean"
    off_diagonal: float = Field(0.9, ge=0, le=1, description="Factor on each second moment's off-diagonal entries")
    moments: Moments = Field("mean", description="Divide a task's second moment by its rows (mean) or not (sum)")
    cutoff: float = Field(1e-5, ge=0, lt=1, description="Eigenvalues of the sum below this share of the largest are 0")


class Wudi(Method):
    """The task vector that interferes least with any task in the inputs which that task's own vector stands for.

    Minimizes sum_k ||(T - T_k) T_k^T||^2 / ||T_k||^2 for linear weights and convolutions: by Adam from the sum of task
    vectors (the paper), or in closed form. All else is averaged.
    """

    paper: ClassVar[str] = (
        "Whoever Started the Interference Should End It (WUDI-Merging), Cheng et al., ICML 2025, arXiv:2503.08099"
    )
    combines: ClassVar[str] = "wudi"
    by_matrix: ClassVar[bool] = True

    name: Literal["wudi"] = "wudi"
    scaling: float = Field(1.0, ge=0, le=100, description="Factor on the merged task vector")
    solver: Literal["iterative", "closed"] = Field("iterative", description="Adam's steps, or the minimum itself")
    steps: int = Field(300, ge=1, le=10_000, description="Steps of the iterative solver")
    learning_rate: float = Field(1e-5, gt=0, le=1, description="Adam's step size")
    cutoff: float = Field(
        1e-5, ge=0, lt=1, description="Closed form: eigenvalues below this share of the largest are 0"
    )


class Shrinkage(Method):
    """Change the tasks' outputs least, on the inputs that were seen and on those that the task vectors stand for.

    Minimizes sum_k tr((T - T_k) M_k (T - T_k)^T) for linear weights and convolutions, M_k being the second moment of
    task k's inputs, of trace 1, shrunk towards T_k^T T_k: LOT at proxy 0, WUDI's closed form at proxy 1, both damped. A
    few exemplars leave most directions unseen; the rows of a task vector are sums of the inputs that it was trained on.
    Without exemplars or statistics the task vectors do alone. All else is averaged.
    """

    paper: ClassVar[str] = (
        "This project, from LOT Merging (arXiv:2505.23859), WUDI-Merging (arXiv:2503.08099) and shrinkage of "
        "covariances (Ledoit and Wolf, J. Multivariate Analysis 2004)"
    )
    combines: ClassVar[str] = "shrinkage"
    by_matrix: ClassVar[bool] = True
    observes: ClassVar[tuple[Role, ...]] = MATRICES
    without: ClassVar[str] = "merged by their task vectors alone"

    name: Literal["shrinkage"] = "shrinkage"
    scaling: float = Field(1.3, ge=0, le=100, description="Factor on the merged task vector")
    proxy: float = Field(0.75, ge=0, le=1, description="Share of T_k^T T_k in M_k; 1 where no inputs were seen")
    damping: float = Field(0.0025, ge=1e-6, le=1, description="Ridge, as a share of the mean eigenvalue of sum_k M_k")

    @property
    def needs_statistics(self) -> bool:
        return False


Combining = Annotated[
    TaskArithmetic
    | Average
    | Ties
    | Dare
    | Della
    | Breadcrumbs
    | Slerp
    | Karcher
    | ModelStock
    | Sce
    | Consensus
    | Pcb
    | TsvM
    | IsoC
    | IsoCts
    | Lot
    | Regmean
    | Wudi
    | Shrinkage,
    Field(discriminator="name"),
]


class Cat(Method):
    """Conflict-aware trimming, then the sum: W = W0 + scaling * sum_k weight_k * trimmed T_k.

    ``then`` combines the trimmed task vectors by another method in place of the sum.
    """

    paper: ClassVar[str] = PAPER
    trims: ClassVar[bool] = True
    combines: ClassVar[str] = "task_arithmetic"
    pieces: ClassVar[Pieces] = "entries"
    drops: ClassVar[bool] = False

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
    then: Combining | None = Field(
        None, description="Method that combines the trimmed task vectors, with a scaling of its own; omitted, the sum"
    )

    @field_validator("then")
    @classmethod
    def _within_tensors(cls, then: Combining | None) -> Combining | None:
        """Trimmed task vectors are never whole in one place, so no threshold can be taken over them."""
        if not isinstance(then, Ties | Breadcrumbs) or then.scope == "tensor":
            return then
        if "scope" in then.model_fields_set:
            raise ValueError("after trimming, entries are only ranked within a tensor; use scope: tensor")
        return then.model_copy(update={"scope": "tensor"})

    @property
    def combining(self) -> Method:
        return self if self.then is None else self.then

    @property
    def fixed(self) -> frozenset[str]:
        return frozenset({"name", "features_at"})

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


AnyMethod = Annotated[
    Cat
    | TaskArithmetic
    | Average
    | Ties
    | Dare
    | Della
    | Breadcrumbs
    | Slerp
    | Karcher
    | ModelStock
    | Sce
    | Consensus
    | Pcb
    | TsvM
    | IsoC
    | IsoCts
    | Lot
    | Regmean
    | Wudi
    | Shrinkage,
    Field(discriminator="name"),
]

METHODS: dict[str, type[AnyMethod]] = {
    "cat": Cat,
    "task_arithmetic": TaskArithmetic,
    "average": Average,
    "ties": Ties,
    "dare": Dare,
    "della": Della,
    "breadcrumbs": Breadcrumbs,
    "slerp": Slerp,
    "karcher": Karcher,
    "model_stock": ModelStock,
    "sce": Sce,
    "consensus": Consensus,
    "pcb": Pcb,
    "tsv_m": TsvM,
    "iso_c": IsoC,
    "iso_cts": IsoCts,
    "lot": Lot,
    "regmean": Regmean,
    "wudi": Wudi,
    "shrinkage": Shrinkage,
}
