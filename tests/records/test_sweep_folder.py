"""The folder of a sweep: what is damaged in it is named, with how to mend it."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.made_runs import make_run

from fedloom.errors import RunError
from fedloom.records.run import read_sweep
from fedloom.records.sweep_folder import command_of, is_done, write_asked

WHOLE = {"recipe": "tiny", "axes": ["seed=1,2"], "random": None}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"recipe": 5}, "recipe"),
        ({"recipe": None}, "recipe"),
        ({"axes": 3}, "axes"),
        ({"axes": None}, "axes"),
        ({"axes": [3]}, "axes.0"),
        ({"axes": "abc"}, "axes"),
        ({"random": {"x": 1}}, "random"),
    ],
)
def test_what_a_sweep_was_asked_for_is_of_its_kinds(changes: dict[str, Any], key: str, tmp_path: Path) -> None:
    (tmp_path / "asked.json").write_text(json.dumps(WHOLE | changes))
    says = f'asked.json: "{key}" is not what it should be; remove it, and go on with the command that began the sweep'
    with pytest.raises(RunError, match=says):
        command_of(tmp_path)
    write_asked(tmp_path, "tiny", ["seed=1,2"], None)
    assert command_of(tmp_path) == f"fedloom sweep tiny seed=1,2 --out {tmp_path}"


def test_what_a_sweep_was_asked_for_lacks_nothing(tmp_path: Path) -> None:
    (tmp_path / "asked.json").write_text(json.dumps({"recipe": "tiny", "random": None}))
    with pytest.raises(RunError, match=r'asked.json: lacks "axes": the record is damaged; remove it, and go on'):
        command_of(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"seed=1": 5}, '"seed=1" is not what it should be'),
        ({"seed=1": [1]}, '"seed=1" is not what it should be'),
        *(
            ({name: {}}, "can be no folder's name in it")
            for name in ("../R", "", ".", "..", "a\0", "x" * 5000, "\ud800")
        ),
        ({}, "names no run"),
    ],
)
def test_a_list_of_runs_names_folders_in_it_and_their_recipes(
    content: dict[str, Any], says: str, tmp_path: Path
) -> None:
    assert read_sweep(tmp_path) == {}, "of a folder that is no sweep's"
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    with pytest.raises(RunError) as refused:
        read_sweep(tmp_path)
    assert f"{says}: the file is damaged; restore it, or begin a sweep of its own" in str(refused.value)
    assert len(str(refused.value)) < 700


def test_a_run_is_done_where_all_that_it_had_is_there(tmp_path: Path) -> None:
    """An early version did not write down which round was the last."""
    run = make_run(tmp_path / "run", [3.0, 2.0, 1.5], federation={"rounds": 2}).folder
    whole = json.loads((run / "status.json").read_text())
    early = {key: value for key, value in whole.items() if key != "round"}
    rounds = (run / "rounds.jsonl").read_text().splitlines(keepends=True)

    def is_done_with(status: dict[str, Any], *lines: str) -> bool:
        (run / "status.json").write_text(json.dumps(status))
        (run / "rounds.jsonl").write_text("".join(lines))
        return is_done(run)

    for status in (whole, early):
        assert is_done_with(status, *rounds)
        assert not is_done_with(status, *rounds[:2])
    for lines in ([], rounds[1:], [rounds[0], *rounds[:2]], [*rounds, rounds[-1]], [*rounds[:2], "{}\n"]):
        assert not is_done_with(whole, *lines)
    assert is_done_with({**early, "stopped_early": "the loss rose"}, *rounds[:2])
    assert not is_done_with({**whole, "state": "interrupted"}, *rounds)
    assert not is_done_with({**whole, "round": "2"}, *rounds)
    assert is_done_with(whole, *rounds)
    for name in ("plan.json", "resolved.json"):
        before = (run / name).read_bytes()
        (run / name).write_bytes(before[:-1])
        assert not is_done(run)
        (run / name).unlink()
        assert not is_done(run)
        (run / name).write_bytes(before)
    assert is_done(run)
    (run / "adapters" / "best").rmdir()
    assert not is_done(run)
