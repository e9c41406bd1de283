"""Logs: what the terminal is told, with time and level, in a file that never grows without end."""

import io
import json
import os
import re
import sys
from contextlib import redirect_stderr
from datetime import datetime
from pathlib import Path

import pytest
from support.boards import HOSTILE, make_record
from support.tiny import make_recipe

from fedloom import run
from fedloom.errors import DeploymentError, RunError
from fedloom.monitoring import log as logs
from fedloom.monitoring.log import Log
from fedloom.monitoring.observer import Observer
from fedloom.run_options import Asked, observed, saying_to

LINE = re.compile(r"(\S+) (INFO   |WARNING|ERROR  ) (\S.*)")


def say_nothing(what: str, detail: str) -> None:
    pass


def test_each_line_of_a_run_has_its_time_and_level(tmp_path: Path) -> None:
    with observed("fedloom run", None, say_nothing, Asked(log_file=tmp_path / "log")) as observers:
        done = run(make_recipe(), tmp_path / "run", Observer(), observers=observers)
    lines = (tmp_path / "log").read_text().splitlines()
    for line in lines:
        found = LINE.fullmatch(line)
        assert found, line
        assert datetime.fromisoformat(found[1]).tzinfo is not None
    rounds = [line for line in lines if " round     " in line]
    assert len(rounds) == 3
    assert f"central {done.rounds[-1]['central_loss']:.4f}" in rounds[-1]
    assert any("plan      model: random:" in line for line in lines)
    assert lines[-1].endswith(f"done      {tmp_path / 'run' / 'report.html'}")


def test_json_has_a_line_for_each_and_the_numbers_of_rounds(tmp_path: Path) -> None:
    log = Log(tmp_path / "log", "json", say_nothing)
    log.show_step("refused", f"mallory:\n{HOSTILE} https://me:secret@hub.example")
    log.show_clients({"alice": "training", "bob": "late"})
    log.show_clients({"alice": "answered", "bob": "late"})
    log.show_round(make_record(3, lost=[1], lost_because={"1": "round 3, client 1: late"}))
    log.show_failure("failed", "round 4: no quorum")
    log.show_step("expired", "bob's key is taken no longer")
    log.close()
    told = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [(line["level"], line["what"]) for line in told] == [
        ("warning", "refused"),
        ("info", "client"),
        ("warning", "client"),
        ("info", "client"),
        ("info", "round"),
        ("warning", "lost"),
        ("error", "failed"),
        ("warning", "expired"),
    ]
    assert "\x1b" not in told[0]["text"]
    assert "secret" not in told[0]["text"]
    assert told[4]["numbers"]["central_loss"] == 4.25
    assert "numbers" not in told[0]


def test_a_file_is_put_aside_by_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MOST_BYTES", 2000)
    log = Log(tmp_path / "log", "text", say_nothing)
    for number in range(500):
        log.show_step("client", f"number {number}")
    log.close()
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["log", *(f"log.{number}" for number in range(1, logs.FILES_KEPT + 1))]
    assert all(file.stat().st_size <= 2000 for file in files)
    assert "number 499" in files[0].read_text() + files[1].read_text()


def test_a_file_is_its_owners_alone_whatever_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MOST_BYTES", 100)
    before = os.umask(0)
    try:
        log = Log(tmp_path / "log", "text", say_nothing)
        for _ in range(3):
            log.show_step("client", "alice: connected")
        log.close()
    finally:
        os.umask(before)
    files = sorted(tmp_path.iterdir())
    assert len(files) > 1
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_a_disk_that_is_full_is_said_once_and_ends_nothing() -> None:
    said: list[str] = []
    log = Log(Path("/dev/full"), "text", lambda what, why: said.append(f"{what}: {why}"))
    for _ in range(3):
        log.show_step("client", "alice")
    log.close()
    assert said == ["log: can't be written (No space left on device); the run goes on"]


def test_a_file_that_can_not_be_had_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"^--log-file .*no/log: can't be written \(No such file or directory\)"):
        Log(tmp_path / "no" / "log", "text", say_nothing)


def test_a_format_alone_writes_to_standard_error() -> None:
    with (
        redirect_stderr(io.StringIO()) as shown,
        observed("fedloom join", None, say_nothing, Asked(log_format="json")) as observers,
    ):
        saying_to(observers, say_nothing)("waiting", "for the server")
    assert json.loads(shown.getvalue())["text"] == "for the server"


@pytest.mark.parametrize(
    ("error", "level", "words"),
    [
        (DeploymentError("1 of 2 clients came"), "ERROR", "failed    1 of 2 clients came"),
        (KeyboardInterrupt(), "WARNING", "interrupted Ctrl-C"),
        (ValueError("private text"), "ERROR", "failed    bug: ValueError"),
    ],
)
def test_how_a_run_ended_is_its_last_line(tmp_path: Path, error: BaseException, level: str, words: str) -> None:
    with (
        pytest.raises(type(error)),
        observed("fedloom serve", None, say_nothing, Asked(log_file=tmp_path / "log")),
    ):
        raise error
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line.split(maxsplit=2)[1:] == [level, words]
    assert sys.exc_info() == (None, None, None)
