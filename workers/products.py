"""Products of matrices that leave the same bytes whatever the number of threads."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.threads import one_thread, shared_out

ROWS = 512  # of a product that one thread does at once


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left [m, k]`` times ``right [k, n]``, both of one type, in bands of rows, each by a thread alone.

    Left to itself torch gives every thread some of the k where m and n are small, and rounds by how many there are.
    """
    if left.is_cuda:
        return left @ right
    found = torch.empty(left.shape[0], right.shape[1], dtype=left.dtype)
    with one_thread() as threads:
        bands = list(zip(torch.split(left, ROWS), torch.split(found, ROWS), strict=True))
        shared_out(lambda band: torch.mm(band[0], right, out=band[1]), bands, threads)
    return found
