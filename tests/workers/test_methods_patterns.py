"""Patterns over parameter names, by which a recipe's overrides find their parameters."""

from __future__ import annotations

import pytest

from service.contract.patterns import checked_pattern, matches

LAYER = "model.layers.12.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("model.layers.{0..12}.*", True),
        ("model.layers.{12..12}.*", True),
        ("model.layers.{0..11}.*", False),
        ("*.{10..20}.mlp.*weight", True),
        ("*{0..2}.mlp.*", False),  # 12 is no 2
        ("model.layers.{0..1}*", False),
        ("model.layers.{0..20}", False),
        ("model.layers.{0..20}.mlp.?p_proj.*", True),
        ("model.layers.*.mlp.*", True),
        ("model.layers.{0..20}.mlp.experts.{0..3}.*", False),
        ("model.layers.{0..20}.[ms]*", True),
        ("model.layers.{0..x}.*", False),
    ],
)
def test_a_range_is_a_number_within_it(pattern: str, expected: bool) -> None:
    assert matches(LAYER, checked_pattern(pattern)) is expected


def test_several_ranges_each_hold() -> None:
    name = "layers.3.experts.07.weight"
    assert matches(name, "layers.{0..3}.experts.{4..7}.weight")
    assert not matches(name, "layers.{0..3}.experts.{0..6}.weight")


def test_a_range_that_counts_down_is_refused() -> None:
    with pytest.raises(ValueError, match=r"write \{3\.\.9\}"):
        checked_pattern("layers.{9..3}.*")
