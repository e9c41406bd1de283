"""A kit at its first use and later: nothing is joined before somebody has heard whose server it is."""

import errno
import os
import pty
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="comes with Flower: pip install 'fedloom[deploy]'")

from fedloom.deployment.client import first_use
from fedloom.deployment.client.first_use import confirm_server
from fedloom.deployment.client.joining import Kit, read_kit
from fedloom.deployment.keys import approve, init, request
from fedloom.deployment.processes import free_port
from fedloom.errors import DeploymentError


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    """Alice's, of the server that she means."""
    server = init(tmp_path / "server", "localhost", free_port())
    return read_kit(approve(server.folder, request("alice", tmp_path), tmp_path).kit)


@pytest.fixture
def exchanged(kit: Kit, tmp_path: Path) -> Kit:
    """Kit that mallory sends in its place, with a server of his own."""
    return replace(kit, ca=init(tmp_path / "mallory", "localhost", 8443).ca.read_text())


def confirm(kit: Kit, told: str | None = None, answer: str | None = None) -> str:
    """Confirm a kit with what is typed, behind the command or when it asks; return what was shown."""
    shown: list[str] = []

    def ask(question: str) -> str:
        assert answer is not None, "nobody was to be asked"
        return answer

    confirm_server(kit, told, ask, lambda what, detail: shown.append(detail))
    return "\n".join(shown)


def known(kit: Kit) -> Path:
    assert kit.key
    return kit.key.with_suffix(".known")


@pytest.mark.parametrize("typed", [str.upper, lambda own: own.replace(" ", ""), lambda own: "yes", lambda own: " YES "])
def test_what_was_confirmed_once_is_not_asked_again(typed: Callable[[str], str], kit: Kit) -> None:
    assert kit.fingerprint in confirm(kit, answer=typed(kit.fingerprint))
    assert known(kit).read_text() == f"{kit.fingerprint}\n"
    assert stat.S_IMODE(known(kit).stat().st_mode) == 0o600
    assert confirm(kit) == ""
    assert confirm(kit, told=kit.fingerprint) == ""


def test_the_clients_own_key_is_shown_beside_the_servers(kit: Kit, tmp_path: Path) -> None:
    approved = approve(tmp_path / "server", tmp_path / "alice.request", tmp_path).client
    assert approved in confirm(kit, answer="yes")


@pytest.mark.parametrize("told", [True, False])
def test_an_exchanged_kit_is_refused_for_what_its_owner_read_aloud(told: bool, kit: Kit, exchanged: Kit) -> None:
    with pytest.raises(DeploymentError, match=f"of another server: its fingerprint is {exchanged.fingerprint}"):
        confirm(exchanged, kit.fingerprint) if told else confirm(exchanged, answer=kit.fingerprint)
    assert not known(kit).exists()


def test_whoever_says_no_is_told_what_to_do_next(kit: Kit) -> None:
    with pytest.raises(DeploymentError, match="if the server's owner reads another aloud, ask for the kit again; else"):
        confirm(kit, answer="no")


@pytest.mark.parametrize("answer", ["", "no", "y", "what?"])
def test_whoever_does_not_confirm_does_not_join(answer: str, kit: Kit) -> None:
    with pytest.raises(DeploymentError, match=r"not confirmed|not a whole fingerprint"):
        confirm(kit, answer=answer)
    assert not known(kit).exists()


def test_a_terminal_that_is_closed_confirms_nothing(kit: Kit) -> None:
    def ask(question: str) -> str:
        raise EOFError

    with pytest.raises(DeploymentError, match="was not confirmed"):
        confirm_server(kit, None, ask, lambda what, detail: None)
    assert not known(kit).exists()


def test_without_a_terminal_the_fingerprint_has_to_be_named(kit: Kit) -> None:
    with pytest.raises(DeploymentError, match=r"no terminal to ask on; .*--fingerprint"):
        confirm_server(kit, None, None, lambda what, detail: None)
    confirm_server(kit, kit.fingerprint, None, lambda what, detail: None)
    confirm_server(kit, None, None, lambda what, detail: None)


@pytest.mark.parametrize("told", [True, False])
def test_a_kit_that_is_exchanged_later_is_refused(told: bool, kit: Kit, exchanged: Kit) -> None:
    """Even where its own fingerprint is named: a new authority is no everyday thing."""
    confirm(kit, answer="yes")
    with pytest.raises(
        DeploymentError, match=f"{kit.fingerprint} was confirmed, this kit's is {exchanged.fingerprint}"
    ):
        confirm(exchanged, exchanged.fingerprint if told else None)
    known(kit).unlink()
    confirm(exchanged, exchanged.fingerprint)


@pytest.mark.parametrize("text", ["", "yes", "\0", "ab" * 15])
def test_what_can_not_be_read_confirms_nothing(text: str, kit: Kit) -> None:
    known(kit).write_text(text)
    with pytest.raises(DeploymentError, match=r"alice\.known: the server that was confirmed can't be read"):
        confirm(kit)


def test_where_nothing_can_be_written_each_start_confirms(kit: Kit) -> None:
    """In a container."""
    closed = replace(kit, key=Path("/proc/alice.key"))
    for _ in range(2):
        confirm(closed, kit.fingerprint)


def test_what_was_typed_and_can_not_be_remembered_is_an_error(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, content: bytes) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(first_use, "write_private", refuse)
    with pytest.raises(DeploymentError, match=r"can't be written \(Read-only file system\); .*--fingerprint"):
        confirm(kit, answer="yes")


def test_a_kit_without_a_certificate_has_nothing_to_confirm(tmp_path: Path) -> None:
    local = Kit("a", "127.0.0.1:8000")
    confirm(local)
    with pytest.raises(DeploymentError, match="a kit without a certificate has no fingerprint; leave it out, or ask"):
        confirm(local, "ab" * 16)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_join_waits_at_a_terminal_and_ends_without_one(kit: Kit, tmp_path: Path) -> None:
    """Nothing of the client's is started, and the server is not asked, before somebody has typed yes."""
    command = [sys.executable, "-m", "fedloom", "join", str(tmp_path / "alice.kit"), "--data", str(tmp_path)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no terminal to ask on" in done.stderr
    assert "waiting" not in done.stdout

    ours, theirs = pty.openpty()
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdin=theirs, stdout=log, stderr=log, env={**os.environ, "TERM": "dumb"})
    os.close(theirs)

    def wait_for(text: str) -> None:
        until = time.monotonic() + 60
        while text not in (tmp_path / "log").read_text():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until, (tmp_path / "log").read_text()
            time.sleep(0.1)

    try:
        wait_for(kit.fingerprint)
        time.sleep(1)
        assert "waiting" not in (tmp_path / "log").read_text()
        os.write(ours, b"yes\n")
        wait_for("waiting   for localhost")
        assert known(kit).is_file()
    finally:
        process.terminate()
        process.wait(60)
        os.close(ours)
