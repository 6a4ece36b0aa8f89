"""One tensor merged: by hand, in every layout, and with what must not be merged named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from service.contract.errors import BadInput, BadTensor
from service.contract.plan import TensorPlan
from service.contract.recipe import Recipe
from service.contract.treatments import Role
from workers.context import Context
from workers.merging import Merged, merge_by_pieces, merge_tensor
from workers.statistics import Statistic, observe_indices, observe_rows, observe_squares
from workers.tensors import DTYPES, NAMES

GENERATOR = torch.Generator().manual_seed(0)
TASKS = ("cars", "pets", "food")
ARITHMETIC = {"name": "task_arithmetic", "scaling": 0.5}
CAT = {"name": "cat", "scaling": 0.5, "rank": 2, "scale_rank": 2, "shift_rank": 2, "balance": 1.0}


def recipe_of(method: dict[str, Any], *, weights: tuple[float, ...] = (1.0, 1.0, 1.0), features: bool = True) -> Recipe:
    tasks = [
        {"name": name, "checkpoint": f"s3://models/{name}/", "weight": weight}
        | ({"exemplars": f"s3://data/{name}.safetensors"} if features else {})
        for name, weight in zip(TASKS, weights, strict=False)
    ]
    return Recipe.model_validate({"base": "s3://models/base/", "tasks": tasks, "method": method})


def plan_of(
    recipe: Recipe, base: Tensor, role: Role = Role.LINEAR, *, transposed: bool = False, dtype: str | None = None
) -> TensorPlan:
    return TensorPlan(
        name="layer.weight",
        dtype=dtype or NAMES[base.dtype],
        base_dtype=NAMES[base.dtype],
        shape=tuple(base.shape),
        role=role,
        guessed=False,
        transposed=transposed,
        source="merged",
        treatment=recipe.method.treatment(role),
    )


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64).to(dtype)


def merge(
    method: dict[str, Any],
    base: Tensor,
    experts: list[Tensor],
    statistics: list[Statistic | None] | None = None,
    role: Role = Role.LINEAR,
    *,
    transposed: bool = False,
    features: bool = True,
    **recipe: Any,
) -> Merged:
    made = recipe_of(method, features=features, **recipe)
    plan = plan_of(made, base, role, transposed=transposed)
    return merge_tensor(plan, made, base, experts, statistics or [None] * len(TASKS), "cpu")


def in_pieces(plan: TensorPlan, recipe: Recipe, base: Tensor, experts: list[Tensor], entries: int) -> Tensor:
    context = Context(plan.name, plan.role, plan.transposed, base, TASKS, [None] * len(TASKS), recipe.seed)
    return merge_by_pieces(plan, recipe, context, experts, "cpu", entries=entries)


@pytest.mark.parametrize("combine", ["linear", "ties"])
def test_dare_in_pieces_is_dare_of_the_whole(combine: str) -> None:
    base, experts = randn(13, 11), [randn(13, 11) for _ in TASKS]
    recipe = recipe_of({"name": "dare", "combine": combine})
    plan = plan_of(recipe, base)
    whole = in_pieces(plan, recipe, base, experts, 1 << 20)
    for chunk in (1, 7, 64):
        assert in_pieces(plan, recipe, base, experts, chunk).equal(whole)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_the_largest_number_of_a_type_does_not_overflow_it(dtype: str) -> None:
    largest = float(torch.finfo(DTYPES[dtype]).max)
    base = torch.full((3,), largest)
    experts = [base.clone() for _ in TASKS]
    recipe = recipe_of(ARITHMETIC)
    merged = merge_tensor(plan_of(recipe, base, dtype=dtype), recipe, base, experts, [None] * len(TASKS), "cpu")
    assert merged.tensor.float().tolist() == [largest] * 3


def test_task_arithmetic_by_hand() -> None:
    base = torch.tensor([1.0, 2.0])
    experts = [torch.tensor([2.0, 2.0]), torch.tensor([1.0, 6.0]), torch.tensor([3.0, 2.0])]
    merged = merge(ARITHMETIC, base, experts, weights=(1.0, 0.5, 2.0), features=False)
    assert merged.tensor.tolist() == [1 + 0.5 * (1 + 2 * 2), 2 + 0.5 * 0.5 * 4]
    assert (merged.rows, merged.removed) == ([], {})


@pytest.mark.parametrize("method", [ARITHMETIC, {"name": "average"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_of_the_pieces_changes_no_byte(method: dict[str, Any], dtype: torch.dtype) -> None:
    base, experts = randn(13, 11, dtype=dtype), [randn(13, 11, dtype=dtype) for _ in TASKS]
    recipe = recipe_of(method)
    plan = plan_of(recipe, base)
    whole = in_pieces(plan, recipe, base, experts, 1 << 20)
    for chunk in (1, 7, 64):
        assert in_pieces(plan, recipe, base, experts, chunk).equal(whole)
    weights = [1.0] * 3 if method is ARITHMETIC else [1 / 3] * 3
    scaling = 0.5 if method is ARITHMETIC else 1.0
    start = base.double()
    expected = start + scaling * sum(
        (w * (e.double() - start) for w, e in zip(weights, experts, strict=True)), start * 0
    )
    torch.testing.assert_close(whole.double(), expected, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-2)


def test_float64_is_merged_in_float64() -> None:
    base = torch.tensor([1.0], dtype=torch.float64)
    merged = merge(ARITHMETIC, base, [base + 2**-40, base, base], features=False)
    assert merged.tensor.dtype == torch.float64
    assert merged.tensor.item() == 1 + 2**-41


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    base, experts = randn(40, dtype=dtype), [randn(40, dtype=dtype) for _ in TASKS]
    merged = merge(ARITHMETIC, base, experts, features=False)
    exact = base.double() + 0.5 * torch.stack([expert.double() - base.double() for expert in experts]).sum(0)
    assert merged.tensor.dtype == dtype
    assert merged.tensor.equal(exact.to(dtype))  # sums of so few such numbers are all but exact in float32


def test_inputs_are_left_alone() -> None:
    base, experts = randn(6, 4), [randn(6, 4) for _ in TASKS]
    before = [tensor.clone() for tensor in (base, *experts)]
    merge(CAT, base, experts, factors(4))
    assert all(torch.equal(a, b) for a, b in zip(before, (base, *experts), strict=True))


def factors(width: int) -> list[Statistic | None]:
    return [observe_rows(randn(5, width)) for _ in TASKS]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_named(value: float) -> None:
    base, experts = randn(3, 2), [randn(3, 2) for _ in TASKS]
    experts[1][2, 1] = value
    with pytest.raises(BadTensor, match=r"'pets' holds NaN or infinity in 'layer.weight' \(s3://models/pets/\)") as bad:
        merge(CAT, base, experts, factors(2))
    assert bad.value.tensor == "layer.weight"
    with pytest.raises(BadTensor, match=r"the base holds NaN or infinity in 'layer.weight' \(s3://models/base/\)"):
        merge(ARITHMETIC, experts[1], [base] * 3)


def test_a_task_vector_that_overflows_is_named() -> None:
    base = torch.tensor([-3e38])
    with pytest.raises(BadTensor, match="'cars'"):
        merge(ARITHMETIC, base, [-base, base, base])


def test_an_output_that_overflows_is_named() -> None:
    made, base = recipe_of(ARITHMETIC, features=False), torch.tensor([1.0])
    plan = plan_of(made, base, dtype="F16")
    with pytest.raises(BadTensor, match=r"merged 'layer.weight' does not fit into F16.*Lower method.scaling") as bad:
        merge_tensor(plan, made, base, [torch.tensor([1e6])] * 3, [None] * 3, "cpu")
    assert bad.value.tensor == "layer.weight"


def test_another_type_for_the_output() -> None:
    made, base = recipe_of(ARITHMETIC, features=False), torch.tensor([1.0])
    merged = merge_tensor(plan_of(made, base, dtype="BF16"), made, base, [base + 1] * 3, [None] * 3, "cpu")
    assert (merged.tensor.dtype, merged.tensor.item()) == (DTYPES["BF16"], 2.5)


def test_an_embedding_is_the_transpose_of_a_linear_weight() -> None:
    base, experts = randn(12, 5), [randn(12, 5) for _ in TASKS]
    counts = [torch.randint(0, 4, (12,), generator=GENERATOR) for _ in TASKS]
    diagonal: list[Statistic | None] = [observe_indices(each, int(each.sum())) for each in counts]
    factor: list[Statistic | None] = [
        Statistic(rows=int(each.sum()), factor=torch.diag(each.double().sqrt())) for each in counts
    ]
    table = merge(CAT, base, experts, diagonal, Role.EMBEDDING, transposed=True)
    matrix = merge(CAT, base.T, [expert.T for expert in experts], factor)
    torch.testing.assert_close(table.tensor, matrix.tensor.T, rtol=0, atol=1e-12)
    assert table.removed["layer.weight.basis.cars"].shape == (5, 2)
    assert not torch.allclose(table.tensor, merge(ARITHMETIC, base, experts).tensor)


def test_a_transposed_weight_is_the_transpose_of_a_linear_one() -> None:
    base, experts, statistics = randn(6, 4), [randn(6, 4) for _ in TASKS], factors(6)
    turned = merge(CAT, base, experts, statistics, transposed=True)
    straight = merge(CAT, base.T, [expert.T for expert in experts], statistics)
    torch.testing.assert_close(turned.tensor, straight.tensor.T, rtol=0, atol=1e-12)
    assert turned.rows[0]["transposed"] is True


def test_a_convolution_is_an_unfolded_linear_weight() -> None:
    base, experts, statistics = randn(6, 3, 2, 2), [randn(6, 3, 2, 2) for _ in TASKS], factors(12)
    kernel = merge(CAT, base, experts, statistics, Role.CONVOLUTION)
    matrix = merge(CAT, base.flatten(1), [expert.flatten(1) for expert in experts], statistics)
    assert kernel.tensor.shape == base.shape
    torch.testing.assert_close(kernel.tensor.flatten(1), matrix.tensor, rtol=0, atol=1e-12)


def test_a_bare_token_is_masked_in_its_own_shape() -> None:
    base = torch.zeros(1, 1, 6)
    experts = [torch.tensor([[[9.0, 1, 1, 1, 1, 1]]]), torch.zeros(1, 1, 6), torch.ones(1, 1, 6)]
    merged = merge({**CAT, "shift_rank": 1}, base, experts, role=Role.SHIFT)
    assert merged.tensor.shape == (1, 1, 6)
    # Entry 0 disturbs pets and food most; for cars the others tie, and the lower index goes.
    assert merged.removed["layer.weight.mask.pets"].tolist() == [0]
    assert merged.tensor.flatten().tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("missing", [None, Statistic(rows=0, factor=torch.zeros(0, 4))])
def test_without_statistics_in_one_task_all_are_kept(missing: Statistic | None) -> None:
    base, experts, statistics = randn(6, 4), [randn(6, 4) for _ in TASKS], factors(4)
    merged = merge(CAT, base, experts, [statistics[0], missing, statistics[2]])
    torch.testing.assert_close(merged.tensor, merge(ARITHMETIC, base, experts).tensor, rtol=0, atol=1e-14)
    assert {(row["treatment"], row["reason"], row["removed"]) for row in merged.rows} == {
        ("keep", "no statistics in pets", 0)
    }
    assert merged.removed == {}


@pytest.mark.parametrize("proxy", ["task_vector", "covariance", "subspace"])
def test_without_features_a_proxy_stands_in(proxy: str) -> None:
    base, experts = randn(6, 4), [randn(6, 4) for _ in TASKS]
    merged = merge({**CAT, "proxy": proxy, "proxy_rank": 2}, base, experts, features=False)
    assert {row["treatment"] for row in merged.rows} == {"projection"}
    assert sum(row["removed"] for row in merged.rows) > 0


def test_a_scale_without_features_has_a_proxy_too() -> None:
    merged = merge(CAT, randn(8), [randn(8) for _ in TASKS], role=Role.SCALE, features=False)
    assert {row["treatment"] for row in merged.rows} == {"scale_mask"}


def test_statistics_of_another_width_are_named() -> None:
    statistics = [*factors(4)[:2], *factors(5)[:1]]
    with pytest.raises(BadInput, match=r"'food': the statistics of 'layer.weight' are 5 wide.*4 wide") as bad:
        merge(CAT, randn(6, 4), [randn(6, 4) for _ in TASKS], statistics)
    assert bad.value.tensor == "layer.weight"


def test_a_scale_needs_a_diagonal() -> None:
    statistics: list[Statistic | None] = [observe_squares(randn(3, 4)), *factors(4)[:2]]
    with pytest.raises(BadInput, match=r"'pets': the statistics of the scale 'layer.weight' must be a diagonal"):
        merge(CAT, randn(4), [randn(4) for _ in TASKS], statistics, Role.SCALE)


def test_a_row_for_every_task_says_what_was_done() -> None:
    base, experts = randn(6, 4), [randn(6, 4) for _ in TASKS]
    rows = merge(CAT, base, experts, factors(4)).rows
    assert [row["task"] for row in rows] == list(TASKS)
    for row, expert in zip(rows, experts, strict=True):
        assert (row["parameter"], row["role"], row["shape"]) == ("layer.weight", "linear", [6, 4])
        assert row["energy"] == pytest.approx(float((expert - base).square().sum()))
        assert row["removed"] == len(row["scores"]) == 2
        assert 0 < row["energy_removed"] < 1
        assert row["conflict_after"] < row["conflict_before"]


def test_one_task_alone_is_not_trimmed() -> None:
    made, base, expert = recipe_of(CAT, weights=(1.0,)), randn(6, 4), randn(6, 4)
    merged = merge_tensor(plan_of(made, base), made, base, [expert], [observe_rows(randn(5, 4))], "cpu")
    torch.testing.assert_close(merged.tensor, base + 0.5 * (expert - base), rtol=0, atol=1e-14)
    assert merged.removed == {}
