"""Works on several small tensors at once, each with one thread of its own, and hands results on in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from service.contract.plan import ShardPlan
from service.contract.planning import held_bytes, largest_held
from workers.sources import Found
from workers.threads import alone, one_thread
from workers.work import Work

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 16  # items per thread that may be begun before the first of them is handed on


def tensors_abreast(
    work: Work, shard: ShardPlan, function: Callable[[Found], Result], tensors: Iterable[Found]
) -> Generator[Result, None, None]:
    """``function`` of every tensor of a shard, in their order.

    Tensors that are looked at as a whole take one thread each, several at once, and hold no more together than the plan
    says of the largest. Others are shared out among threads themselves, and a GPU takes one after the other.
    """
    limit = largest_held(work.recipe, shard.tensors, work.recipe.method)

    def held(found: Found) -> int:
        method = found.plan.method or work.recipe.method
        is_whole = work.recipe.method.trims or method.pieces == "none"
        return held_bytes(work.recipe, found.plan, work.recipe.method) if is_whole else limit + 1

    if work.device == "cpu":
        yield from abreast(function, tensors, held, limit)
    else:
        yield from map(function, tensors)


def abreast(
    work: Callable[[Item], Result], items: Iterable[Item], size: Callable[[Item], int], limit: int
) -> Generator[Result, None, None]:
    """``work`` of every item, in their order; with any number of threads it must leave the same bytes.

    ``size`` tells how many bytes an item holds until its result has been handed on. Items of which each of torch's
    threads could hold one within ``limit`` are done at once, as long as all that are begun stay within it; others by
    the caller's thread, with all of torch's threads and nothing beside them. The caller's thread takes the items, and
    torch has one thread there until this is closed.
    """
    with one_thread() as threads:
        if threads == 1:
            yield from map(work, items)
        else:
            yield from _abreast(work, items, size, limit, threads)


def _abreast(
    work: Callable[[Item], Result], items: Iterable[Item], size: Callable[[Item], int], limit: int, threads: int
) -> Generator[Result, None, None]:
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
                del done
            if is_small:
                begun.append((pool.submit(alone(work), item), needed))
                held += needed
                del item  # nothing is held on to while the next is waited for
            else:
                result = _with_threads(threads, work, item)
                del item
                yield result
                del result
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
