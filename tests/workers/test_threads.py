"""Work that is shared out among threads leaves the bytes that one thread leaves."""

import os
import subprocess
import sys

from workers.threads import one_thread, shared_out

FIRST_PRODUCTS = """
import torch
from concurrent.futures import ThreadPoolExecutor
from workers.threads import alone, one_thread, shared_out

left, right = torch.randn(6, 130), torch.randn(130, 1001)
with one_thread() as before:
    assert (before, torch.get_num_threads()) == (2, 1)
    expected = left @ right
    found = shared_out(lambda _: left @ right, range(6), threads=3)
    with ThreadPoolExecutor(1) as pool:
        found.append(pool.submit(alone(lambda _: left @ right), 0).result())
assert torch.get_num_threads() == 2
print([product.equal(expected) for product in found].count(False))
"""


def test_the_first_product_of_a_new_thread_is_rounded_as_any_other() -> None:
    # In a process of its own: how many threads OpenMP begins with is settled as a process starts.
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    run = subprocess.run(
        [sys.executable, "-c", FIRST_PRODUCTS], env=environment, capture_output=True, text=True, check=False
    )
    assert (run.stdout, run.stderr) == ("0\n", "")


def test_results_come_in_the_order_of_the_items_whoever_did_them() -> None:
    with one_thread():
        assert shared_out(lambda item: item * item, range(100), threads=4) == [item * item for item in range(100)]
