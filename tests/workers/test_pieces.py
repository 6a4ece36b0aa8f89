"""Merging piece by piece gives the same bytes whatever the pieces' size and the number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from service.contract.errors import BadTensor
from service.contract.methods import METHODS as ROWS
from service.contract.plan import TensorPlan
from service.contract.recipe import Recipe
from service.contract.treatments import Role
from workers.combining import weighted_sum
from workers.context import Context
from workers.crew import Crew
from workers.magnitudes import above
from workers.merging import merge_by_pieces, merge_tensor
from workers.methods import LOOKS, merge
from workers.pieces import Pieces
from workers.survey import survey
from workers.tensors import NAMES
from workers.thresholds import magnitudes, surveyed, thresholds

TASKS = ("cars", "pets", "food")
SHAPE = (41, 37)
SUMMED = ("slerp", "karcher", "model_stock")  # sums of all entries, in float64
VARIANTS: list[dict[str, Any]] = [
    {"name": "task_arithmetic"},
    {"name": "average"},
    {"name": "ties", "scope": "tensor"},
    {"name": "ties", "scope": "tensor", "density": 0.5, "scaling": 0.7},
    {"name": "ties", "scope": "tensor", "density": 1.0},
    {"name": "dare"},
    {"name": "dare", "combine": "ties"},
    {"name": "dare", "rescale": "l1"},
    {"name": "della"},
    {"name": "della", "combine": "linear", "rescale": "l1"},
    {"name": "breadcrumbs", "density": 0.4, "gamma": 0.05},
    {"name": "breadcrumbs", "density": 0.4, "gamma": 0.0, "combine": "ties"},
    {"name": "slerp"},
    {"name": "karcher"},
    {"name": "model_stock"},
    {"name": "sce", "density": 0.3},
    {"name": "consensus"},
    {"name": "pcb", "density": 0.3, "clip": 0.01},
    {"name": "cat", "then": {"name": "ties", "density": 0.3}},
]
every_variant = pytest.mark.parametrize("method", VARIANTS, ids=lambda m: "-".join(str(v) for v in m.values()))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def drawn(*shape: int, count: int = 4, step: float = 0.0) -> list[Tensor]:
    """Tensors; with a ``step`` of few different entries, so that many are equal."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(shape, generator=generator) for _ in range(count)]
    return [(t / step).round() * step for t in found] if step else found


def changes(whole: dict[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    """Task vectors as a survey sees them."""
    return [(name, torch.zeros_like(tensor), tensor) for name, tensor in whole.items()]


def asked(method: dict[str, Any], base: Tensor, role: Role = Role.LINEAR, **layout: Any) -> tuple[TensorPlan, Recipe]:
    names = TASKS[:2] if method["name"] == "slerp" else TASKS
    tasks = [{"name": name, "checkpoint": f"s3://models/{name}/"} for name in names]
    recipe = Recipe.model_validate({"base": "s3://models/base/", "tasks": tasks, "method": method, "seed": 3})
    plan = TensorPlan(
        name="layer.weight",
        dtype=NAMES[base.dtype],
        base_dtype=NAMES[base.dtype],
        shape=tuple(base.shape),
        role=role,
        guessed=False,
        source="merged",
        treatment=recipe.method.treatment(role),
        **{"transposed": False, **layout},
    )
    return plan, recipe


def merged(
    method: dict[str, Any], tensors: list[Tensor], entries: int, role: Role = Role.LINEAR, **layout: Any
) -> Tensor:
    base, *experts = tensors
    plan, recipe = asked(method, base, role, **layout)
    names = [task.name for task in recipe.tasks]
    context = Context(
        plan.name, role, plan.transposed, base, names, [None] * len(names), recipe.seed, blocks=plan.blocks
    )
    return merge_by_pieces(plan, recipe, context, experts[: len(names)], "cpu", entries=entries)


def test_every_method_that_goes_by_pieces_is_here() -> None:
    assert {name for name, row in ROWS.items() if row.pieces != "none"} == {method["name"] for method in VARIANTS}
    assert {row.combines for row in ROWS.values() if row.looks} == set(LOOKS)


@every_variant
@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 0.0), (torch.float32, 0.5), (torch.bfloat16, 0.0)])
def test_pieces_and_threads_change_no_byte(method: dict[str, Any], dtype: torch.dtype, step: float) -> None:
    tensors = [tensor.to(dtype) for tensor in drawn(*SHAPE, step=step)]
    with threads(1):
        whole = merged(method, tensors, 1 << 20)
    for entries in (101, 500):
        with threads(3):
            many = merged(method, tensors, entries)
        with threads(1):
            assert merged(method, tensors, entries).equal(many)
        if method["name"] in SUMMED:
            torch.testing.assert_close(many, whole)
        else:
            assert many.equal(whole)


@pytest.mark.parametrize(
    ("role", "shape", "layout"),
    [
        (Role.LINEAR, (40, 30), {"transposed": True}),
        (Role.EMBEDDING, (40, 30), {"transposed": True}),
        (Role.EXPERTS, (3, 20, 18), {"blocks": 3}),
        (Role.EXPERTS, (3, 20, 18), {"blocks": 3, "transposed": True}),
        (Role.GROUPED_CONVOLUTION, (12, 3, 2, 2), {"blocks": 4}),
        (Role.CONVOLUTION, (12, 3, 2, 2), {}),
        (Role.SHIFT, (50,), {}),
        (Role.OTHER, (), {}),
    ],
)
def test_rows_come_from_every_layout(role: Role, shape: tuple[int, ...], layout: dict[str, Any]) -> None:
    tensors, method = drawn(*shape), {"name": "della", "density": 0.8}
    whole = merged(method, tensors, 1 << 20, role, **layout)
    assert whole.shape == shape
    assert not whole.equal(tensors[0])
    for entries in (1, 41):
        assert merged(method, tensors, entries, role, **layout).equal(whole)


@every_variant
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("entry", [0, 700, 1516])
def test_what_is_not_finite_is_named_wherever_it_lies(method: dict[str, Any], bad: float, entry: int) -> None:
    base, *experts = drawn(*SHAPE)
    experts[1].view(-1)[entry] = bad
    plan, recipe = asked(method, base)
    count = len(recipe.tasks)
    with pytest.raises(BadTensor, match=r"'pets' holds NaN or infinity in 'layer.weight'"):
        merge_tensor(plan, recipe, base, experts[:count], [None] * count, "cpu")
    base.view(-1)[entry] = bad
    with pytest.raises(BadTensor, match=r"the base holds NaN or infinity"):
        merge_tensor(plan, recipe, base, [base] * count, [None] * count, "cpu")


@pytest.mark.parametrize("method", [{"name": "ties", "density": 0.3}, {"name": "breadcrumbs", "scope": "model"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuts_of_the_whole_vector_go_through_pieces(method: dict[str, Any], dtype: torch.dtype) -> None:
    base, *experts = [tensor.to(dtype) for tensor in drawn(*SHAPE, step=0.5)]
    plan, recipe = asked(method, base)
    vectors = [expert - base for expert in experts]
    named = [{"other": vector.T, "layer.weight": vector} for vector in vectors]
    found = [survey(partial(changes, each), recipe.method.surveys) for each in named]
    cuts = [[cut.of("layer.weight") for cut in task] for task in found]
    assert any(cut.tied for task in cuts for cut in task)
    context = Context(plan.name, plan.role, False, base, TASKS, [None] * 3, cuts=cuts)
    whole = merge_by_pieces(plan, recipe, context, experts, "cpu", entries=1 << 20)
    for entries in (101, 500):
        assert merge_by_pieces(plan, recipe, context, experts, "cpu", entries=entries).equal(whole)


# --- thresholds -------------------------------------------------------------------------------------------------------


def whole_of(values: Tensor) -> Context:
    return Context("layer.weight", Role.OTHER, False, torch.zeros_like(values), ["a"], [None])


def kept(values: Tensor, count: int, entries: int) -> np.ndarray:
    """Which entries a threshold keeps, piece by piece."""
    with Pieces(whole_of(values), [values], are_experts=False, entries=entries) as pieces:
        ((threshold,),) = thresholds(pieces, magnitudes, [[count]])
        masks = pieces.map(lambda v, context: above(v[0].abs(), threshold.within(context.first)).numpy())
        return np.concatenate(masks)


def by_sorting(values: Tensor, count: int) -> np.ndarray:
    order = np.argsort(-values.abs().numpy(), kind="stable")
    mask = np.zeros(len(order), dtype=bool)
    mask[order[:count]] = True
    return mask


def hidden(value: float, among: float) -> Tensor:
    """A ``value`` at places where a sample does not look, or hardly, ``among`` others."""
    values = torch.full((20_000,), among)
    values[10_000:10_900:3] = value
    return values


DRAWN = drawn(20_000, count=1)[0]
CASES = {
    "normal": DRAWN,
    "coarse": (DRAWN * 4).round(),
    "zeros": torch.zeros(20_000),
    "nearly all zeros": DRAWN * (torch.arange(20_000) % 97 == 0),
    "ascending": torch.arange(20_000.0),
    "tiny": DRAWN * 1e-42,
    "huge": DRAWN * 1e38,
    "hidden large": hidden(5.0, 1.0),
    "hidden small": hidden(1.0, 5.0),
    "halves": torch.cat([torch.ones(10_000), torch.full((10_000,), 2.0)]),
}


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 250, 301, 4000, 10_000, 19_703, 19_999, 20_000])
def test_a_threshold_keeps_what_a_stable_sort_puts_first(name: str, dtype: torch.dtype, count: int) -> None:
    values = CASES[name].to(dtype)
    for entries in (997, 1 << 14, 1 << 20):
        assert np.array_equal(kept(values, count, entries), by_sorting(values, count))


def test_several_thresholds_of_several_rows_take_the_same_passes() -> None:
    values, seen = drawn(20_000, count=2), []
    context = replace(whole_of(values[0]), tasks=["a", "b"], statistics=[None, None])

    def sizes(task_vectors: list[Tensor], piece: Context) -> list[Tensor]:
        seen.append(piece.first)
        return magnitudes(task_vectors, piece)

    with threads(1), Pieces(context, values, are_experts=False, entries=5000) as pieces:
        found = thresholds(pieces, sizes, [[200, 4000], [0, 19_000]])
    assert len(seen) == 1 + 4  # a sample, and each piece once
    for row, wanted, cuts in zip(values, [[200, 4000], [0, 19_000]], found, strict=True):
        for count, cut in zip(wanted, cuts, strict=True):
            assert int((row.abs() >= cut.value).sum()) == count


def test_a_survey_without_ties_needs_no_pass() -> None:
    values = torch.arange(1.0, 101)
    (whole,) = survey(lambda: changes({"layer.weight": values}), [0.0])
    with Pieces(whole_of(values), [values], are_experts=False, entries=10) as pieces:
        ((threshold,),) = surveyed(pieces, [[whole.of("layer.weight")]])
    assert not above(values, threshold.within(0)).any()


# --- pieces -----------------------------------------------------------------------------------------------------------


@every_variant
def test_task_vectors_stay_as_they_were(method: dict[str, Any]) -> None:
    base, *vectors = drawn(*SHAPE)
    _, recipe = asked(method, base)
    chosen = vectors[: len(recipe.tasks)]
    context = Context("layer.weight", Role.LINEAR, False, base, TASKS[: len(chosen)], [None] * len(chosen))
    merge(chosen, [1.0] * len(chosen), recipe.method.combining, context)
    assert all(vector.equal(fresh) for vector, fresh in zip(vectors, drawn(*SHAPE)[1:], strict=True))


def test_an_error_in_one_thread_comes_out() -> None:
    values = drawn(100, count=1)[0]

    def fail(task_vectors: list[Tensor], piece: Context) -> None:
        if piece.first == 70:
            raise ArithmeticError("seventy")

    with threads(3), Pieces(whole_of(values), [values], are_experts=False, entries=10) as pieces:
        with pytest.raises(ArithmeticError, match="seventy"):
            pieces.map(fail)
        assert pieces.map(lambda _, piece: piece.first) == list(range(0, 100, 10))


@pytest.mark.parametrize("are_experts", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_sum_is_that_of_the_task_vectors_in_their_order(dtype: torch.dtype, are_experts: bool) -> None:
    base, *others = [tensor.to(dtype) for tensor in drawn(1000, count=5)]
    factors, found = [0.3, 1.0, 0.0, -0.7], []
    context = Context("layer.weight", Role.OTHER, False, base, list("abcd"), [None] * 4)
    with threads(3), Pieces(context, others, are_experts=are_experts, entries=300) as pieces:
        pieces.add_up(factors, lambda total, piece: found.append((piece.first, total.clone(), piece.base.clone())))
    compute = torch.promote_types(dtype, torch.float32)
    start = base.to(compute)
    vectors = [other.to(compute) - (start if are_experts else 0) for other in others]
    assert [first for first, *_ in found] == [0, 300, 600, 900]
    assert torch.cat([total for _, total, _ in found]).equal(weighted_sum(vectors, factors))
    assert torch.cat([part for *_, part in found]).equal(start)


def test_a_crew_works_on_one_parameter_after_the_other() -> None:
    base, *experts = [tensor.bfloat16() for tensor in drawn(*SHAPE)]
    with threads(2), Crew(2) as crew:
        for method in ({"name": "task_arithmetic"}, {"name": "dare"}, {"name": "task_arithmetic"}):
            plan, recipe = asked(method, base)
            alone = merge_tensor(plan, recipe, base, experts, [None] * 3, "cpu")
            assert merge_tensor(plan, recipe, base, experts, [None] * 3, "cpu", crew=crew).tensor.equal(alone.tensor)


def test_a_piece_of_a_tensor_that_is_read_in_parts_knows_where_it_lies() -> None:
    method = {"name": "dare"}
    base, *experts = drawn(*SHAPE)
    plan, recipe = asked(method, base)
    whole = merge_tensor(plan, recipe, base, experts, [None] * 3, "cpu").tensor
    pieces = [torch.split(tensor.view(-1), 1000) for tensor in (base, *experts)]
    parts = [
        merge_tensor(plan, recipe, start, others, [None] * 3, "cpu", first=1000 * index).tensor
        for index, (start, *others) in enumerate(zip(*pieces, strict=True))
    ]
    assert torch.cat(parts).equal(whole.view(-1))
