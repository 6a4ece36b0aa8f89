"""Thresholds over a whole task vector, found tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from workers.magnitudes import above
from workers.survey import as_json, from_json, survey

SHAPES = {"a": (7, 5), "b": (0, 3), "c": (11,), "d": (), "e": (4, 3, 2)}


def tensors(seed: int, *, coarse: bool) -> dict[str, Tensor]:
    """Task vectors; ``coarse`` ones hold few different magnitudes, as those of 16-bit checkpoints do."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: (t * 3).round() / 64 if coarse else t for name, t in drawn.items()}


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
        (cut,) = survey(lambda whole=whole: iter(whole.items()), [share])  # type: ignore[misc]
        kept = torch.cat([above(t.abs().flatten(), cut.of(name)) for name, t in whole.items()])
        assert torch.equal(kept, expected)


def test_several_shares_take_two_passes_and_come_back_from_text() -> None:
    whole, passes = tensors(0, coarse=True), []

    def stream() -> Iterator[tuple[str, Tensor]]:
        passes.append(1)
        yield from whole.items()

    cuts = survey(stream, [0.6, 0.1, 0.0])
    assert len(passes) == 2
    assert cuts[:2] == [survey(stream, [share])[0] for share in (0.6, 0.1)]
    assert not above(whole["a"].abs().flatten(), cuts[2].of("a")).any()
    assert from_json(as_json(cuts)) == cuts


def test_a_task_that_never_moved_has_a_cut_too() -> None:
    still = {"a": torch.zeros(6), "b": torch.zeros(6)}
    (cut,) = survey(lambda: still.items(), [0.75])
    assert (cut.of("a").tied, cut.of("b").tied) == (6, 3)
