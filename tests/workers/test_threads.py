"""Work that is shared out among threads leaves the bytes that one thread leaves."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from workers.threads import alone, one_thread, shared_out

LEFT = torch.randn(6, 130, generator=torch.Generator().manual_seed(0))
RIGHT = torch.randn(130, 1001, generator=torch.Generator().manual_seed(1))


def product(_: int) -> Tensor:
    return LEFT @ RIGHT


def test_the_first_product_of_a_new_thread_is_rounded_as_any_other() -> None:
    with one_thread() as before:
        assert torch.get_num_threads() == 1
        expected = product(0)
        assert all(found.equal(expected) for found in shared_out(product, range(6), threads=3))
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(alone(product), 0).result().equal(expected)
    assert torch.get_num_threads() == before


def test_results_come_in_the_order_of_the_items_whoever_did_them() -> None:
    with one_thread():
        assert shared_out(lambda item: item * item, range(100), threads=4) == [item * item for item in range(100)]
