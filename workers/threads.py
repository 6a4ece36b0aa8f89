"""Shares work out among threads, each of which computes alone, so that the same inputs leave the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def one_thread() -> Iterator[int]:
    """Torch computes with one thread inside; gives the number of threads that it had before.

    A factorization by several threads rounds differently than one by a single thread, and on a busy host its threads
    wait for each other. Small operations gain nothing from more threads either.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def alone(work: Callable[[Item], Result]) -> Callable[[Item], Result]:
    """The same work, for a thread that may be new; to be called within ``one_thread``, by which it must have ended.

    Whatever torch was told, a new thread multiplies its first matrices with as many threads of OpenMP's as there are
    processors, and rounds them differently.
    """

    def told(item: Item) -> Result:
        torch.set_num_threads(1)
        return work(item)

    return told


def shared_out(work: Callable[[Item], Result], items: Sequence[Item], threads: int) -> list[Result]:
    """``work`` of every item, in their order, done by up to ``threads`` threads; to be called within ``one_thread``."""
    if min(threads, len(items)) <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(threads, len(items)), thread_name_prefix="share") as pool:
        return list(pool.map(alone(work), items))
