"""Several items are worked on at once: in order, within a limit, each with one thread, and nothing is left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from workers.abreast import abreast


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_whoever_is_done_first() -> None:
    last = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert last.wait(60)  # the first can only be done after the third
        if item == 2:
            last.set()
        return item

    assert list(abreast(work, range(3), size=lambda _: 1, limit=3)) == [0, 1, 2]


def test_small_items_have_one_thread_each_and_large_ones_all() -> None:
    def threads(item: int) -> tuple[int, bool]:
        return torch.get_num_threads(), threading.current_thread() is threading.main_thread()

    found = list(abreast(threads, [1, 5, 1, 4, 3], size=lambda item: item, limit=12))
    assert found == [(1, False), (3, True), (1, False), (1, False), (1, False)]
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("limit", [6, 60])
def test_no_more_is_begun_than_the_limit_holds(limit: int) -> None:
    begun: list[int] = []
    held: list[int] = []

    def taken() -> Iterator[int]:
        for item in range(30):
            begun.append(item)
            yield item

    def work(item: int) -> int:
        return item

    for item in abreast(work, taken(), size=lambda _: 2, limit=limit):
        held.append(2 * (len(begun) - item - 1))  # one was taken, and waits for room
    assert max(held) <= limit


def test_what_fails_comes_out_and_nothing_goes_on_afterwards() -> None:
    started: list[int] = []

    def work(item: int) -> int:
        started.append(item)
        if item == 4:
            raise ValueError("the fifth")
        return item

    with closing(abreast(work, range(10_000), size=lambda _: 1, limit=100)) as results:
        assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
        with pytest.raises(ValueError, match="the fifth"):
            next(results)
    assert len(started) < 10_000
    assert torch.get_num_threads() == 3


def test_who_stops_early_gets_all_threads_back() -> None:
    with closing(abreast(lambda item: item, range(10_000), size=lambda _: 1, limit=100)) as results:
        assert next(results) == 0
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
