"""The k-th largest entry agrees with a sort."""

from __future__ import annotations

import pytest
import torch

from workers.magnitudes import kth_largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 7, 5000])
def test_it_agrees_with_a_sort(dtype: torch.dtype, n: int) -> None:
    drawn = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=dtype).abs()
    for sizes in (drawn, (4 * drawn).floor(), torch.zeros_like(drawn), drawn * 1e-30):
        ordered = sizes.sort(descending=True).values
        for count in {1, max(1, n // 5), n}:
            assert kth_largest(sizes, count) == ordered[count - 1]
