"""Works on several small items at once, each with one thread of its own, and hands results on in the items' order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from workers.threads import alone, one_thread

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 32  # items per thread that may be begun before the first of them is handed on


def abreast(
    work: Callable[[Item], Result], items: Iterable[Item], size: Callable[[Item], int], limit: int
) -> Iterator[Result]:
    """``work`` of every item, in their order; whoever does it, it must leave the same bytes with any threads.

    Items of which each of torch's threads could hold one within ``limit`` are done at once, as long as all that are
    begun hold no more than that together, results that wait for their turn included; ``size`` tells what an item holds.
    Others are done by this thread, with all of torch's threads and nothing beside them. Items are taken by this thread.
    """
    with one_thread() as threads:
        if threads > 1:
            yield from _abreast(work, items, size, limit, threads)
        else:
            yield from map(work, items)


def _abreast(
    work: Callable[[Item], Result], items: Iterable[Item], size: Callable[[Item], int], limit: int, threads: int
) -> Iterator[Result]:
    begun: deque[tuple[Future[Result], int]] = deque()
    held = 0
    pool = ThreadPoolExecutor(threads, thread_name_prefix="abreast")
    try:
        for item in items:
            needed = size(item)
            is_small = needed * threads <= limit
            while begun and not (is_small and held + needed <= limit and len(begun) < AHEAD * threads):
                done, released = begun.popleft()
                held -= released
                yield done.result()
            if is_small:
                begun.append((pool.submit(alone(work), item), needed))
                held += needed
            else:
                yield _with_threads(threads, work, item)
        while begun:
            yield begun.popleft()[0].result()
    finally:
        pool.shutdown(cancel_futures=True)


def _with_threads(threads: int, work: Callable[[Item], Result], item: Item) -> Result:
    torch.set_num_threads(threads)
    try:
        return work(item)
    finally:
        torch.set_num_threads(1)
