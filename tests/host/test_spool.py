"""Frames that wait for their turn: whole when they are taken, in memory up to a limit, on no more disk than needed."""

import random
import tracemalloc
from pathlib import Path

import pytest

from fedloom.errors import RunError
from fedloom.host.frames import Frame
from fedloom.host.spool import Spool


def frame(number: int, size: int = 1000) -> Frame:
    return Frame({"number": number}, bytes([number % 251]) * size)


@pytest.mark.parametrize("memory_bytes", [1, 3500, 10**9])
def test_a_frame_is_taken_as_it_was_put_in_any_order(tmp_path: Path, memory_bytes: int) -> None:
    order = random.Random(1).sample(range(60), 60)
    with Spool[int](tmp_path, memory_bytes) as spool:
        for number in range(60):
            spool.put(number, frame(number, 1000 + number % 3))
            if number >= 30:  # and some are taken meanwhile
                assert spool.take(gone := order.pop(order.index(number - 30))) == frame(gone, 1000 + gone % 3)
        for number in order:
            assert number in spool
            assert spool.take(number) == frame(number, 1000 + number % 3)
            assert number not in spool
    assert not [*tmp_path.iterdir()], "it leaves nothing"


def test_memory_does_not_grow_with_what_waits(tmp_path: Path) -> None:
    with Spool[int](tmp_path, 200_000) as spool:
        tracemalloc.start()
        try:
            for number in range(100):
                spool.put(number, frame(number, 100_000))
            assert tracemalloc.get_traced_memory()[1] < 1_000_000
        finally:
            tracemalloc.stop()


def test_what_was_taken_leaves_its_room_to_the_next(tmp_path: Path) -> None:
    with Spool[int](tmp_path) as spool:
        for number in range(100):
            spool.put(number, frame(number))
            if number >= 3:
                spool.take(number - 3)
        assert spool._file.seek(0, 2) == 4 * 1000


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with Spool[int](tmp_path / "gone") as spool, pytest.raises(RunError):
        spool.put(1, frame(1))
