"""Locks: held by one process, and asked after by any number without standing in its way."""

import fcntl
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from fedloom.host import files
from fedloom.host.files import Lock, is_held, read_holder

ASKS = """\
import sys
from pathlib import Path
from fedloom.host.files import is_held
print("asks", flush=True)
while True:
    is_held(Path(sys.argv[1]))
"""


def test_who_asks_whether_a_lock_is_held_is_in_nobodys_way(tmp_path: Path) -> None:
    """A server that began while somebody asked was refused."""
    path = tmp_path / "lock"
    Lock(path).close()
    with ExitStack() as stack:
        for _ in range(3):
            command = [sys.executable, "-c", ASKS, str(path)]
            asking = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
            stack.callback(asking.kill)
            assert asking.stdout
            asking.stdout.readline()
        until = time.monotonic() + 1
        while time.monotonic() < until:
            Lock(path).close()
            assert not is_held(path), "nor does who asks see another that asks"


def test_a_lock_is_waited_for_while_somebody_asks_and_not_while_it_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    assert not is_held(path)
    with path.open("w") as asks:
        fcntl.flock(asks, fcntl.LOCK_SH)
        assert not is_held(path), "who asks does not hold it"
        letting_go = threading.Timer(0.2, lambda: fcntl.flock(asks, fcntl.LOCK_UN))
        letting_go.start()
        with Lock(path):
            letting_go.join()
            assert is_held(path)
            began = time.monotonic()
            with pytest.raises(BlockingIOError):
                Lock(path)
            assert time.monotonic() - began < 1, "who holds it is not waited for"
        assert not is_held(path)
        fcntl.flock(asks, fcntl.LOCK_SH)
        monkeypatch.setattr(files, "ASKED_SECONDS", 0.1)
        with pytest.raises(BlockingIOError):
            Lock(path)
    with Lock(path):
        assert is_held(path)


def test_of_many_that_want_a_lock_at_once_one_gets_it(tmp_path: Path) -> None:
    path, together = tmp_path / "lock", threading.Barrier(8)
    got: list[Lock] = []

    def want() -> None:
        together.wait()
        with suppress(BlockingIOError):
            got.append(Lock(path))

    for _ in range(50):
        threads = [threading.Thread(target=want) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (lock,) = got
        lock.close()
        got.clear()


def test_a_pipe_in_a_locks_place_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lock")
    started = time.monotonic()
    assert not is_held(tmp_path / "lock")
    assert read_holder(tmp_path / "lock") == ("", "")
    assert time.monotonic() - started < 5


def test_a_lock_is_not_taken_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("of somebody else")
    (tmp_path / "lock").symlink_to(tmp_path / "theirs")
    with pytest.raises(OSError, match="symbolic"):
        Lock(tmp_path / "lock")
    assert (tmp_path / "theirs").read_text() == "of somebody else"
