"""A command that is told how a run fares: facts in its environment, no shell, a time limit, and no harm to the run."""

import sys
import time
from pathlib import Path

import pytest
from support.boards import make_board, make_record
from support.tiny import make_recipe

from fedloom import run
from fedloom.errors import DeploymentError, RunError
from fedloom.monitoring import notice
from fedloom.monitoring.board import Board
from fedloom.monitoring.notice import MOST_LETTERS, Notice, facts_of
from fedloom.monitoring.observer import Observer, Observers
from fedloom.run_options import Asked, observed

WRITER = (
    "import os, sys; told = {key: value for key, value in os.environ.items() if key.startswith('FEDLOOM_')};"
    " open(sys.argv[1], 'a').write(repr(told) + '\\n')"
)


def command(tmp_path: Path, *more: str) -> str:
    """A command that writes what it was told, and the words that follow it, into a file."""
    script = tmp_path / "tell me.py"
    script.write_text(WRITER + "; open(sys.argv[1] + '.words', 'w').write(repr(sys.argv[2:]))\n", encoding="utf-8")
    return " ".join(f"'{word}'" for word in (sys.executable, script, tmp_path / "told", *more))


def told(tmp_path: Path) -> list[dict[str, str]]:
    return [eval(line) for line in (tmp_path / "told").read_text(encoding="utf-8").splitlines()]


def say_nothing(what: str, detail: str) -> None:
    pass


def test_the_end_of_a_run_is_told_with_its_facts(tmp_path: Path) -> None:
    asked = Asked(notify=command(tmp_path, "$HOME; true"))
    with observed("fedloom run", tmp_path / "run", say_nothing, asked) as observers:
        done = run(make_recipe(), tmp_path / "run", Observer(), observers=observers)
    (facts,) = told(tmp_path)
    assert facts == {
        "FEDLOOM_STATE": "done",
        "FEDLOOM_COMMAND": "fedloom run",
        "FEDLOOM_RUN": str(tmp_path / "run"),
        "FEDLOOM_NAME": "test",
        "FEDLOOM_ROUND": "2",
        "FEDLOOM_ROUNDS": "2",
        **{
            f"FEDLOOM_LOSS_{name.upper()}": str(done.rounds[-1][key])
            for name, key in (("central", "central_loss"), ("clients", "client_loss"), ("train", "train_loss"))
        },
    }
    assert eval((tmp_path / "told.words").read_text()) == ["$HOME; true"], "no shell looked at it"


@pytest.mark.parametrize(
    ("error", "state", "why"),
    [
        (DeploymentError("1 of 2 clients came"), "failed", "1 of 2 clients came"),
        (KeyboardInterrupt(), "interrupted", "Ctrl-C"),
        (ValueError("private text"), "failed", "bug: ValueError"),
    ],
)
def test_a_failure_is_told_with_why(tmp_path: Path, error: BaseException, state: str, why: str) -> None:
    with (
        pytest.raises(type(error)),
        observed("fedloom serve", tmp_path / "run", say_nothing, Asked(notify=command(tmp_path))),
    ):
        raise error
    (facts,) = told(tmp_path)
    assert (facts["FEDLOOM_STATE"], facts["FEDLOOM_WHY"]) == (state, why)
    assert facts["FEDLOOM_RUN"] == str(tmp_path / "run")


def test_waiting_is_told_once_until_a_round_is_complete(tmp_path: Path) -> None:
    one = Notice(command(tmp_path), Board("fedloom serve"), say_nothing)
    for _ in range(3):
        one.show_step("waiting", "for 2 clients")
        one.show_step("client", "alice: 5 documents")
    one.close()
    assert [facts["FEDLOOM_WHY"] for facts in told(tmp_path)] == ["for 2 clients"]
    one.show_round(make_record(1))
    one.show_step("waiting", "for bob: the round has too few updates without them")
    one.close()
    assert len(told(tmp_path)) == 2


def test_a_client_that_waits_again_after_it_took_part_is_told_of_again(tmp_path: Path) -> None:
    one = Notice(command(tmp_path), Board("fedloom join"), say_nothing)
    one.show_step("waiting", "for server: connection refused")
    one.show_step("waiting", "for server: it reads its clients' keys")
    for _ in range(3):  # recipes that are refused come as often as a server likes
        one.show_step("asked", "to read and count the documents")
        one.show_step("waiting", "for another run")
    one.close()
    assert len(told(tmp_path)) == 1
    one.show_step("told", "14 documents")
    one.show_step("waiting", "for another run")
    one.close()
    assert len(told(tmp_path)) == 2


def test_a_long_reason_keeps_no_command_from_being_run(tmp_path: Path) -> None:
    one = Notice(command(tmp_path), Board("fedloom serve"), say_nothing)
    one.show_failure("failed", "ε" * 200_000)
    one.close()
    (facts,) = told(tmp_path)
    assert facts["FEDLOOM_WHY"] == "ε" * MOST_LETTERS + "…"


@pytest.mark.long
def test_each_run_of_a_service_is_told_of_by_itself(tmp_path: Path) -> None:
    board = make_board()
    one = Notice(command(tmp_path), board, say_nothing)
    watching = Observers(board, one)
    for name in ("first", "second"):
        watching.show_next(tmp_path / name)
        watching.show_step("waiting", "for 2 clients")
        watching.show_failure("failed", "1 of 2 clients came")
        one.close()
    watching.show_next(None)
    watching.show_failure("interrupted", "SIGTERM")
    one.close()
    ended = [facts for facts in told(tmp_path) if facts["FEDLOOM_STATE"] != "waiting"]
    assert len(told(tmp_path)) == 5, "waiting is told of each"
    runs = [str(tmp_path / "first"), str(tmp_path / "second"), str(Path("runs/first").absolute())]
    assert [facts["FEDLOOM_RUN"] for facts in ended] == runs, "of none, the folder that it was opened with"
    assert not [facts for facts in ended if "FEDLOOM_ROUND" in facts], "rounds of the run before"


def test_a_run_of_a_service_has_its_name_before_it_has_a_plan(tmp_path: Path) -> None:
    board = Board("fedloom serve", tmp_path)
    told = {"number": 2, "name": "second", "state": "running", "run": str(tmp_path / "second")}
    done = told | {"number": 1, "name": "first", "state": "done"}
    board.show_next(tmp_path / "second")
    board.show_queue([done, told])
    assert facts_of(board, "failed", "1 of 2 clients came")["FEDLOOM_NAME"] == "second"
    board.show_next(None)
    board.show_queue([done, told | {"state": "failed"}])
    assert "FEDLOOM_NAME" not in facts_of(board, "waiting")


def test_what_is_told_comes_in_its_order(tmp_path: Path) -> None:
    slow = f"sh -c '[ $FEDLOOM_STATE = waiting ] || sleep 0.5; echo $FEDLOOM_STATE >> {tmp_path}/told'"
    one = Notice(slow, Board("fedloom serve"), say_nothing)
    one.show_failure("failed", "1 of 2 clients came")
    one.show_step("waiting", "for a run")
    one.close()
    assert (tmp_path / "told").read_text().split() == ["failed", "waiting"]


def test_facts_have_neither_control_characters_nor_secrets() -> None:
    facts = facts_of(make_board(), "failed", "no\x00such \x1b[2Jhost https://me:secret@hub.example")
    assert facts["FEDLOOM_WHY"] == "no\\x00such \\x1b[2Jhost https://…@hub.example"


@pytest.mark.long
def test_a_command_that_fails_or_takes_too_long_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notice, "SECONDS", 0.5)
    said: list[str] = []

    def try_out(words: str) -> None:
        one = Notice(words, Board("fedloom run"), lambda what, why: said.append(f"{what} {why}"))
        one.show_failure("failed", "")
        one.close()

    try_out("false")
    began = time.monotonic()
    # The shell's child holds on where the shell alone is ended.
    try_out(f"sh -c '(sleep 3; touch {tmp_path}/late) & sleep 60'")
    assert time.monotonic() - began < 20
    time.sleep(max(0.0, began + 5 - time.monotonic()))
    assert not (tmp_path / "late").exists()
    assert said == [
        "notify the command ended with 1",
        "notify the command took more than 0.5 seconds, and was ended",
    ]


@pytest.mark.parametrize(
    ("words", "why"),
    [("", "it is empty"), ("no-such-program-here --now", "no-such-program-here"), ("echo 'a", "No closing quotation")],
)
def test_what_is_no_command_is_refused_before_the_run(words: str, why: str) -> None:
    with pytest.raises(RunError, match=rf"^--notify: .*{why}"):
        Notice(words, Board("fedloom run"), say_nothing)
