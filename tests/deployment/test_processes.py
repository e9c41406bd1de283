"""Processes that `serve` and `join` start: each ends with them, comes back if it dies, and leaves nothing behind."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedloom.deployment.flower import programs
from fedloom.deployment.processes import private_folder

HOLDS_A_FOLDER = """\
import time
from fedloom.deployment.processes import private_folder
with private_folder() as folder:
    (folder / "secret").write_text("")
    print(folder, flush=True)
    time.sleep(600)
"""
HANGS = """\
import socket, sys, threading, time
from fedloom.deployment.flower.apps import _end_with
connection = socket.socket(fileno=int(sys.argv[1]))
threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
print("hangs", flush=True)
time.sleep(600)
"""


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path leaves room for those of sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)


def test_a_folder_whose_owner_was_killed_is_removed_by_the_next_and_no_other(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(short))
    monkeypatch.setattr("tempfile.tempdir", None)  # where it was found before
    (short / "fedloom-of-somebody").mkdir()
    owners = [subprocess.Popen([sys.executable, "-c", HOLDS_A_FOLDER], stdout=subprocess.PIPE) for _ in range(2)]
    try:
        folders = [Path(owner.stdout.readline().decode().strip()) for owner in owners if owner.stdout]
        assert len(set(folders)) == 2
        owners[0].kill()
        owners[0].wait()
        assert folders[0].is_dir(), "a killed process can't tidy up"
        with private_folder() as mine:
            assert mine.parent == short
            assert not folders[0].exists()
            assert (folders[1] / "secret").is_file()
        assert not mine.exists()
        assert (short / "fedloom-of-somebody").is_dir()
    finally:
        for owner in owners:
            owner.kill()
            owner.communicate()


def test_a_folder_that_is_swept_by_another_at_the_same_moment_is_no_error(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found, and gone before it is looked at: two commands that begin while a third ends."""
    monkeypatch.setattr("tempfile.tempdir", str(short))
    found = short / "fedloom-gone" / "owner.lock"
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([found]))
    with private_folder() as mine:
        assert mine.is_dir()


@pytest.mark.skipif(os.getuid() != 0, reason="only root makes a folder that is another's")
def test_another_users_folder_is_not_looked_into(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipes there would be opened for ever."""
    monkeypatch.setattr("tempfile.tempdir", str(short))
    others = short / "fedloom-x"
    others.mkdir()
    os.mkfifo(others / "owner.lock")
    os.chown(others, 12345, 12345)
    with private_folder() as mine:
        assert mine.is_dir()
    assert others.is_dir()


@pytest.mark.long
def test_the_server_app_ends_with_serve_even_where_it_hangs() -> None:
    pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-c", HANGS, str(theirs.fileno())]
        app = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE)
        try:
            theirs.close()
            assert app.stdout
            assert app.stdout.readline() == b"hangs\n"
            ours.sendall(b"a question that it does not read")
            time.sleep(0.3)
            assert app.poll() is None
            ours.close()
            assert app.wait(30) == 1
        finally:
            app.kill()
            app.communicate()


def test_a_link_that_is_cut_in_a_handshake_is_tried_again_and_a_wrong_certificate_is_not() -> None:
    pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")
    import httpx
    from flwr.supercore.retry import http_retry

    flowers = http_retry.make_simple_http_retry_invoker().should_giveup
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http_retry, "RetryInvoker", programs.patient(http_retry.RetryInvoker))
        ours = http_retry.make_simple_http_retry_invoker().should_giveup
    assert flowers
    assert ours
    cut = httpx.ConnectError("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol (_ssl.c:1006)")
    wrong = httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate")
    assert (flowers(cut), flowers(wrong)) == (True, True)
    assert (ours(cut), ours(wrong)) == (False, True)
