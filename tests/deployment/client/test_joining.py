"""Client that gives up because its key is not taken, or that does not: from what Flower's SuperNode says."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fedloom.cli import main
from fedloom.deployment.client import joining, watching
from fedloom.deployment.client.joining import at_work
from fedloom.deployment.client.preflight import Greeting
from fedloom.deployment.client.watching import REFUSED_SECONDS, RESTARTS, RefusedKey, watch
from fedloom.deployment.processes import Child
from fedloom.errors import DeploymentError

NOT_TAKEN = "ERROR: Exit Code: 305\n[code: 2004] Failed to activate SuperNode.\n"
UNAUTHORIZED = "INFO: SuperNode terminated gracefully.\n"
TAKEN = "INFO: SuperNode ID: 123\n"


class Node:
    """Log of a SuperNode, and a clock."""

    def __init__(self, log: Path) -> None:
        self.now, self.said, self.greeted, self.keys_seconds = 0.0, [], 0, 0.0
        self.error: DeploymentError | None = None
        self._log = log
        self._refused_key = RefusedKey("alice", log, self._greet, lambda what, detail: self.said.append(what))

    def monotonic(self) -> float:
        return self.now

    def _greet(self) -> Greeting:
        self.greeted += 1
        if self.error:
            raise self.error
        return Greeting("", self.keys_seconds)

    def ends(self, told: str, after: float) -> bool:
        self.now += after
        with self._log.open("a") as log:
            log.write(told)
        return self._refused_key.look()


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    made = Node(tmp_path / "supernode.log")
    monkeypatch.setattr(watching, "time", made)
    return made


@pytest.mark.parametrize("told", [NOT_TAKEN, UNAUTHORIZED])
def test_a_client_gives_up_when_its_key_was_refused_for_two_minutes(told: str, node: Node) -> None:
    assert node.ends(told, 0)
    assert node.ends(told, REFUSED_SECONDS / 2)
    assert node.said == ["not yet"]
    with pytest.raises(
        DeploymentError, match="the server refuses alice's key: it was not approved there, it is revoked"
    ):
        node.ends(told, REFUSED_SECONDS / 2)
    assert node.greeted == 3, "each time the clock may be why"


def test_a_server_that_is_started_again_may_refuse_for_a_while_each_time(node: Node) -> None:
    """Servers read their clients' keys after they listen, and take them then; or are gone again before that."""
    for _ in range(9):
        assert node.ends(NOT_TAKEN, 60)
        assert node.ends(TAKEN + UNAUTHORIZED, 60)
    for _ in range(9):
        assert node.ends(NOT_TAKEN, REFUSED_SECONDS)


def test_a_server_that_has_not_looked_at_its_keys_since_is_slow_and_does_not_refuse(node: Node) -> None:
    """A server computes for minutes between two looks, and this client was approved meanwhile."""
    assert node.ends(UNAUTHORIZED, 0)
    for minute in range(1, 20):
        node.keys_seconds = 60 * minute + 5
        assert node.ends(UNAUTHORIZED, 60)
    node.keys_seconds = 1
    with pytest.raises(DeploymentError, match="the server refuses alice's key"):
        node.ends(UNAUTHORIZED, 60)


def test_what_ends_for_another_reason_was_not_refused(node: Node) -> None:
    assert not node.ends(TAKEN + "Traceback: killed\n", 0)
    assert node.said == []
    assert node.greeted == 0


def test_a_certificate_that_expired_in_a_run_is_said_and_not_tried_ten_times(node: Node) -> None:
    assert not node.ends("SSL/TLS handshake error detected.\n", 500), "the server may have another by now"
    assert node.greeted == 1
    node.error = DeploymentError("the server's certificate expired on 2026-11-26; both clocks agree on that")
    with pytest.raises(DeploymentError, match="expired on"):
        node.ends("SSL/TLS handshake error detected.\n", 5)


def test_what_a_server_says_can_not_command_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.kit").write_text('name = "a"\nserver = "localhost:1"\n')
    monkeypatch.setattr(joining, "join", lambda *given, **_: given[-1]("waiting", "\x1b]0;owned\x07"))
    monkeypatch.setattr(sys, "argv", ["fedloom", "join", str(tmp_path / "a.kit"), "--data", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out == "waiting   \\x1b]0;owned\\x07\n"


def joined(
    folder: Path, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[list[joining.Member], str]:
    """Type `fedloom join` in a folder with kits a, b and c; return what would join, and what is said."""
    for name, port in (("a", 1), ("b", 1), ("c", 2)):
        (folder / f"{name}.kit").write_text(f'name = "{name}"\nserver = "localhost:{port}"\n')
        (folder / f"{name}.toml").write_text(f"max_rounds = {ord(name)}\n")
    given: list[joining.Member] = []
    monkeypatch.chdir(folder)
    monkeypatch.setattr(joining, "join", lambda members, say: given.extend(members))
    monkeypatch.setattr(sys, "argv", ["fedloom", "join", *words.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code or 0) == (0 if given else 2)
    return given, capsys.readouterr().err


def test_options_go_to_the_kits_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "a.kit b.kit --data A --data B --policy a.toml --policy b.toml --journal j --journal k --keep all"
    found, _ = joined(tmp_path, words, monkeypatch, capsys)
    assert [(one.kit.name, one.data.name, one.journal.name) for one in found] == [("a", "A", "j"), ("b", "B", "k")]
    assert [one.policy.max_rounds for one in found] == [ord("a"), ord("b")]
    assert [one.policy_file and one.policy_file.name for one in found] == ["a.toml", "b.toml"]
    assert [(one.keep and one.keep.name, one.tasks) for one in found] == [("all", None)] * 2
    found, _ = joined(tmp_path, "a.kit b.kit --data A --data B --policy a.toml", monkeypatch, capsys)
    assert [one.policy.max_rounds for one in found] == [ord("a")] * 2
    assert [one.journal.name for one in found] == ["a.journal.jsonl", "b.journal.jsonl"], "each its own"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("a.kit b.kit --data A", "2 kits, and --data 1 time"),
        ("a.kit --data A --data B", "1 kit, and --data 2 times"),
        ("a.kit b.kit --data A --data B --journal j", "2 kits, and --journal 1 time"),
        ("a.kit b.kit --data A --data B --journal j --journal ./j", "two clients have the journal"),
        ("a.kit b.kit --data A --data B --journal j --journal link", "two clients have the journal"),
        ("a.kit b.kit --data A --data B --journal j.a --journal j.b", "j.secret; name each client once, with its own"),
        ("a.kit a.kit --data A --data B", "two clients have the name a"),
        (f"{'a.kit ' * 101}{'--data A ' * 101}", "101 clients in one process; start a fedloom join for each 100"),
        (
            "a.kit c.kit --data A --data C",
            "c's kit is of another server than a's; start a fedloom join for each server",
        ),
    ],
)
def test_clients_that_can_not_be_at_work_together_are_refused_in_a_sentence(
    words: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to("j")
    found, said = joined(tmp_path, words, monkeypatch, capsys)
    assert (found, why in said) == ([], True), said


def test_a_second_join_with_a_kit_says_which_one_is_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was told that its key is not accepted, or not yet."""
    (tmp_path / "a.kit").write_text('name = "a"\nserver = "localhost:1"\n')
    monkeypatch.setattr(sys, "argv", ["fedloom", "join", str(tmp_path / "a.kit"), "--data", str(tmp_path)])
    monkeypatch.setattr(joining, "await_server", lambda *_: pytest.fail("it went on"))
    journal = tmp_path / "a.journal.jsonl"
    with at_work("a", journal), pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert f"another fedloom join is at work as a (process {os.getpid()} on " in (said := capsys.readouterr().err)
    assert "end it (Ctrl-C where it runs)" in said
    with at_work("a", journal), at_work("b", journal):
        pass  # two clients may count in one journal


def test_a_join_that_was_killed_is_not_at_work(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from fedloom.deployment.client.joining import at_work\n"
        "with at_work('a', Path(sys.argv[1])): print(flush=True); time.sleep(60)"
    )
    journal = tmp_path / "a.journal.jsonl"
    process = subprocess.Popen([sys.executable, "-c", code, str(journal)], stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    with pytest.raises(DeploymentError, match=f"at work as a .process {process.pid} on "), at_work("a", journal):
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    with at_work("a", journal):
        pass


class Ending:
    """Child that ends as soon as it is started, and a clock on which that is now."""

    log = None
    ended = True

    def __init__(self, at_most: int) -> None:
        self.starts, self._at_most = 0, at_most

    def start(self) -> None:
        self.starts += 1
        if self.starts > self._at_most:
            raise KeyboardInterrupt

    def end(self) -> None:
        """Be ended."""


class Refusing:
    """Server that does or does not refuse the SuperNode."""

    def __init__(self, answer: bool) -> None:
        self._answer = answer

    def look(self) -> bool:
        return self._answer


def watch_here(children: dict[str, Any], *, refused: bool, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run `watch` without rests until it is ended, and return what it says."""
    said: list[str] = []
    monkeypatch.setattr(watching, "rest", lambda seconds, check: None)
    refused_keys: Any = {"SuperNode": Refusing(refused)}
    with pytest.raises(KeyboardInterrupt):
        watch(children, refused_keys, lambda what, detail: said.append(detail), lambda: None)
    return said


def test_the_worker_and_the_supernode_have_restarts_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching.time, "sleep", lambda seconds: None)
    children = {"worker": Ending(RESTARTS - 1), "SuperNode": Ending(RESTARTS)}
    watch_here(children, refused=False, monkeypatch=monkeypatch)
    only: Any = {"worker": Ending(RESTARTS + 1)}
    with pytest.raises(DeploymentError, match=f"the worker ended {RESTARTS} times$"):
        watch(only, {}, lambda *_: None, lambda: None)


def test_being_refused_is_no_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching.time, "sleep", lambda seconds: None)
    assert watch_here({"SuperNode": Ending(3 * RESTARTS)}, refused=True, monkeypatch=monkeypatch) == []


@pytest.mark.parametrize("fault", ["refused", "ends"])
def test_one_of_several_supernodes_that_is_given_up_is_left_out_and_the_last_ends_all(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(watching, "rest", lambda seconds, check: None)

    class Given(Refusing):
        def look(self) -> bool:
            if fault == "refused":
                raise DeploymentError("the server refuses bob's key")
            return False

    class There(Ending):
        ended = False

    said: list[str] = []
    left: Any = {"worker": There(0), "SuperNode of alice": There(0), "SuperNode of bob": Ending(10**6)}
    refused_keys: Any = {"SuperNode of alice": Refusing(False), "SuperNode of bob": Given(False)}
    looks = iter(range(2 * RESTARTS))

    def check() -> None:
        if next(looks, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch(left, refused_keys, lambda what, detail: said.append(what), check)
    assert list(left) == ["worker", "SuperNode of alice"]
    assert said.count("left out") == 1
    last: Any = {"worker": There(0), "SuperNode of bob": Ending(10**6)}
    with pytest.raises(DeploymentError, match="refuses bob's key" if fault == "refused" else "ended 10 times"):
        watch(last, refused_keys, lambda *_: None, lambda: None)


def test_what_ended_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child([sys.executable, "-c", "print('the node fails')"], tmp_path / "node.log", {})
    try:
        while not child.ended:
            time.sleep(0.05)
        monkeypatch.setattr(child, "start", Ending(0).start)
        said = watch_here({"SuperNode": child}, refused=False, monkeypatch=monkeypatch)
    finally:
        child.end()
    assert said == ["the SuperNode ended; starting it again (the node fails)"]
