"""Thresholds over a whole task vector, found tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from workers.magnitudes import above
from workers.survey import as_json, from_json, survey

Triple = tuple[str, Tensor, Tensor]

SHAPES = {"a": (7, 5), "b": (0, 3), "c": (11,), "d": (), "e": (4, 3, 2)}


def tensors(seed: int, *, coarse: bool) -> dict[str, Tensor]:
    """Task vectors; ``coarse`` ones hold few different magnitudes, as those of 16-bit checkpoints do."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: (t * 3).round() / 64 if coarse else t for name, t in drawn.items()}


def changes(whole: dict[str, Tensor]) -> list[Triple]:
    """Task vectors as what a base of zeros has become."""
    return [(name, torch.zeros_like(tensor), tensor) for name, tensor in whole.items()]


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("share", [0.004, 0.01, 0.2, 0.5, 0.93, 1.0])
def test_a_survey_finds_what_a_sort_of_everything_finds(coarse: bool, share: float) -> None:
    for seed in range(5):
        whole = tensors(seed, coarse=coarse)
        flat = torch.cat([t.flatten() for t in whole.values()])
        count = int(share * len(flat) + 0.5)
        order = sorted(range(len(flat)), key=lambda i: (-abs(float(flat[i])), i))
        expected = torch.zeros(len(flat), dtype=torch.bool)
        expected[order[:count]] = True
        (cut,) = survey(lambda whole=whole: changes(whole), [share])  # type: ignore[misc]
        kept = torch.cat([above(t.abs().flatten(), cut.of(name)) for name, t in whole.items()])
        assert torch.equal(kept, expected)


def test_several_shares_take_two_passes_and_come_back_from_text() -> None:
    whole, passes = tensors(0, coarse=True), []

    def stream() -> Iterator[Triple]:
        passes.append(1)
        yield from changes(whole)

    cuts = survey(stream, [0.6, 0.1, 0.0])
    assert len(passes) == 2
    assert cuts[:2] == [survey(stream, [share])[0] for share in (0.6, 0.1)]
    assert not above(whole["a"].abs().flatten(), cuts[2].of("a")).any()
    assert from_json(as_json(cuts)) == cuts


def test_a_task_that_never_moved_has_a_cut_too() -> None:
    still = {"a": torch.zeros(6), "b": torch.zeros(6)}
    (cut,) = survey(lambda: changes(still), [0.75])
    assert (cut.of("a").tied, cut.of("b").tied) == (6, 3)


def large(*, is_like_all: bool) -> Tensor:
    """Entries of which only some are looked at first; those beyond the first 64 of many are others, or not."""
    drawn = torch.randn(300_000, generator=torch.Generator().manual_seed(1))
    return drawn if is_like_all else torch.where(torch.arange(300_000) % (32 * 64 + 1) < 64, 1.0, drawn)


@pytest.mark.parametrize(("is_like_all", "expected"), [(True, 2), (False, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_some_entries_tell_where_to_look_and_all_are_counted(
    is_like_all: bool, expected: int, dtype: torch.dtype
) -> None:
    base, moved, passes = torch.full((300_000,), 0.5, dtype=dtype), large(is_like_all=is_like_all).to(dtype), []

    def stream() -> Iterator[Triple]:
        passes.append(1)
        yield "a", base[:200_000].view(400, 500), moved[:200_000].view(400, 500)
        yield "b", base[200_000:], moved[200_000:]

    cuts = survey(stream, [0.2, 0.01])
    assert len(passes) == expected
    sizes = (moved.to(torch.promote_types(dtype, torch.float32)) - 0.5).float().abs()
    order = sizes.sort(descending=True, stable=True).indices
    for cut, count in zip(cuts, (60_000, 3_000), strict=True):
        kept = torch.cat([above(sizes[:200_000], cut.of("a")), above(sizes[200_000:], cut.of("b"))])
        assert torch.equal(kept.nonzero().flatten(), order[:count].sort().values)
