"""A run directory whose files were cut, emptied, lost or changed is read as far as it goes, or refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.asked import write_tasks
from support.marks import first
from support.tiny import make_recipe

from fedloom import run
from fedloom.errors import RunError
from fedloom.monitoring.observer import Observer
from fedloom.records.run import Record, read_run
from fedloom.report.run_report import build_report, write_report

WHOLE = ("status.json", "plan.json", "environment.json", "resolved.json")
LINES = ("rounds.jsonl", "clients.jsonl", "evaluation.jsonl")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run: two rounds of three clients, and two tasks."""
    folder = tmp_path_factory.mktemp("runs")
    tasks = write_tasks(folder, [{"q": "so", "c": ["yes", "no"], "a": "yes"}], {"name": "one"}, {"name": "two"})
    return run(make_recipe(evaluation={"tasks": [str(tasks)]}), folder / "run", Observer()).folder


@pytest.fixture
def damaged(finished: Path, tmp_path: Path) -> Path:
    """The run's records alone, to damage."""
    for name in (*WHOLE, *LINES):
        shutil.copy(finished / name, tmp_path / name)
    return tmp_path


def cut_everywhere(path: Path, use: Callable[[bytes], None]) -> None:
    """Cut a file at some hundred places, its last bytes among them."""
    content = path.read_bytes()
    for cut in sorted({*range(0, len(content), 1 + len(content) // 100), len(content) - 2, len(content) - 1}):
        path.write_bytes(content[:cut])
        use(content[:cut])


@pytest.mark.parametrize("name", first(LINES))
def test_lines_that_were_cut_anywhere_are_read_up_to_the_last_whole_one(name: str, damaged: Path) -> None:
    whole = [line for line in (damaged / name).read_bytes().split(b"\n") if line]

    def check(content: bytes) -> None:
        read = read_run(damaged)
        build_report(read)
        found = {"rounds.jsonl": read.rounds, "clients.jsonl": read.clients}.get(name, read.evaluations)
        complete = [line for line in content.split(b"\n") if line in whole and line]
        assert found == [json.loads(line) for line in complete]

    cut_everywhere(damaged / name, check)


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_that_was_cut_anywhere_is_refused_by_name(name: str, damaged: Path) -> None:
    def check(content: bytes) -> None:
        if content.rstrip().endswith(b"\n}"):  # only the line end is gone
            build_report(read_run(damaged))
            return
        with pytest.raises(RunError, match=f"{name}: .*damaged"):
            read_run(damaged)

    cut_everywhere(damaged / name, check)


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("line", [b"null", b"3", b'"text"', b"[]", b"{", b"\xff\xfe", b"\x00" * 9, b"[" * 100_000])
def test_a_line_that_is_no_record_is_refused_by_its_place(name: str, line: bytes, damaged: Path) -> None:
    first, *rest = (damaged / name).read_bytes().split(b"\n")
    (damaged / name).write_bytes(b"\n".join([first, line, *rest]))
    with pytest.raises(RunError, match=f"{name}:2: .*damaged"):
        read_run(damaged)


@pytest.mark.parametrize("name", [*WHOLE, *LINES])
def test_a_file_that_is_lost_is_refused_or_not_missed(name: str, damaged: Path) -> None:
    (damaged / name).unlink()
    needed = {"resolved.json": "no resolved.json", "plan.json": "no plan.json"}
    if name in needed:
        with pytest.raises(RunError, match=needed[name]):
            write_report(damaged)
        assert not (damaged / "report.html").exists()
    else:
        assert "How to repeat it" in write_report(damaged).read_text()


def test_a_reader_without_checks_would_be_caught(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin that these tests must not let through: it takes every line that is JSON and drops the rest."""

    def read_carelessly(path: Path) -> list[Record]:
        records = []
        for line in path.read_bytes().split(b"\n"):
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
        return records

    monkeypatch.setattr("fedloom.records.run.read_lines", read_carelessly)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_a_line_that_is_no_record_is_refused_by_its_place("rounds.jsonl", b"{", damaged)
