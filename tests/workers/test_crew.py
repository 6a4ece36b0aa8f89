"""A crew's threads and their memory stay from one piece of work to the next."""

from __future__ import annotations

import threading

import pytest
import torch

from workers.crew import LENT_BYTES, Crew, Room

CPU = torch.device("cpu")


def together(crew: Crew, threads: int) -> dict[int, str]:
    """The rooms that so many threads work in at once, by their memory, and the names of the threads."""
    found: dict[int, str] = {}
    all_there = threading.Barrier(threads)

    def work(room: Room) -> None:
        all_there.wait(timeout=60)
        found[room.rows(2, 100, torch.float32, CPU)[0].data_ptr()] = threading.current_thread().name

    crew.share_out(work, threads)
    return found


def test_threads_and_rooms_stay() -> None:
    with Crew(3) as crew:
        before = together(crew, 3)
        assert len(set(before.values())) == 3
        assert together(crew, 3).keys() == before.keys()
        assert set(together(crew, 3).values()) == set(before.values())


def test_the_caller_works_in_a_room_of_its_own() -> None:
    with Crew(2) as crew:
        (memory,), (name,) = zip(*together(crew, 1).items(), strict=True)
        assert (memory, name) == (crew.room.rows(2, 100, torch.float32, CPU)[0].data_ptr(), "MainThread")


def test_an_error_comes_out_once_all_have_ended() -> None:
    ended: list[Room] = []

    def work(room: Room) -> None:
        if room is not crew.room:
            raise ArithmeticError("of another thread")
        ended.append(room)

    with Crew(3) as crew, pytest.raises(ArithmeticError, match="of another thread"):
        crew.share_out(work, 3)
    assert len(ended) == 1


def test_rows_are_laid_out_anew_in_the_same_memory() -> None:
    room = Room()
    wide = room.rows(3, 1000, torch.float64, CPU)
    narrow = room.rows(5, 7, torch.float32, CPU)
    assert [len(row) for row in narrow] == [7] * 5
    assert narrow[0].data_ptr() == wide[0].data_ptr()
    assert room.rows(5, 7, torch.float32, CPU) is narrow


def test_a_result_lies_in_the_memory_of_one_that_nobody_has_any_more() -> None:
    shape = (LENT_BYTES // 8, 4)
    with Crew(1) as crew:
        first = crew.result(shape, torch.bfloat16)
        held = crew.result(shape, torch.bfloat16)
        where = first.data_ptr()
        del first
        again = crew.result(shape, torch.bfloat16)
        assert (again.data_ptr(), tuple(again.shape), again.dtype) == (where, shape, torch.bfloat16)
        assert held.data_ptr() != where
        assert crew.result((), torch.float32).shape == ()
