"""The run directory, read back: whole, cut or damaged."""

import json
import os
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from support.made_runs import make_run
from support.tiny import make_recipe

from fedloom import read_run, run
from fedloom.errors import RunError
from fedloom.monitoring.observer import Observer
from fedloom.records import kinds
from fedloom.records import writer as writer_module
from fedloom.records.run import RoundRecord
from fedloom.records.writer import RunWriter
from fedloom.training.client_report import ClientReport


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    recipe = make_recipe(federation={"rounds": 1})
    finished = run(recipe, tmp_path / "run")
    read = read_run(str(tmp_path / "run"))
    assert read == finished
    assert read.recipe == recipe.model_dump(mode="json")


def test_a_line_that_was_cut_while_it_was_written_is_left_out(tmp_path: Path) -> None:
    run(make_recipe(federation={"rounds": 1}), tmp_path / "run")
    path = tmp_path / "run" / "rounds.jsonl"
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(last, len(whole) - 1, 37):
        path.write_bytes(whole[:cut])
        assert [record["round"] for record in read_run(tmp_path / "run").rounds] == [0]


def test_damage_elsewhere_names_the_line(tmp_path: Path) -> None:
    run(make_recipe(federation={"rounds": 1}), tmp_path / "run")
    path = tmp_path / "run" / "rounds.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["{", *lines[1:]]) + "\n")
    with pytest.raises(RunError, match=r"rounds.jsonl:1: .*damaged"):
        read_run(tmp_path / "run")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run directory"):
        read_run(tmp_path)


def test_a_run_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="can't make the run directory"):
        RunWriter(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("key", "value"), [("updated", "2026-11-28"), ("updated", 5), ("paused", "abc"), ("moved_to", [])]
)
def test_a_status_of_other_kinds_is_not_gone_on_from(key: str, value: object, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [3.0, 2.0], state="interrupted")
    path = run.folder / "status.json"
    path.write_text(json.dumps({**run.status, key: value}))
    before = path.read_bytes()
    for _ in range(2):  # nobody is left at work in it
        with pytest.raises(RunError, match=rf'status.json: "{key}" is not what it should be; see what else is'):
            RunWriter(run.folder, resume=True)
    assert path.read_bytes() == before


def test_a_pause_lasts_until_the_run_is_at_work_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it takes to load a model, and to wait for clients elsewhere, is in no run's time at its start either."""
    run = make_run(tmp_path / "run", [3.0, 2.0], state="interrupted")
    stopped = datetime.fromisoformat(run.status["updated"])
    monkeypatch.setattr(writer_module, "seconds_since", lambda moment: (clock - datetime.fromisoformat(moment)).seconds)
    clock = stopped + timedelta(seconds=10)
    writer = RunWriter(run.folder, resume=True)
    clock = stopped + timedelta(seconds=50)  # its clients are there
    writer.write_status("running")
    writer.write_status("running", round=2)
    assert writer.status["paused"] == 50
    writer.close()


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run")
    writer.write_status("running", round=0)
    writer.write_status("done")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "status.json"]
    assert '"started"' in (tmp_path / "run" / "status.json").read_text()
    with pytest.raises(ValueError, match="JSON"):
        writer.write_json("status.json", {"loss": float("nan")})
    assert '"done"' in (tmp_path / "run" / "status.json").read_text()


def test_a_round_is_on_the_disk_with_its_clients_before_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each client's line by itself was a third of a round with ten thousand clients."""
    seen, fsync = [], os.fsync

    def note(descriptor: int) -> None:
        seen.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, os.fstat(descriptor).st_size))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    run(make_recipe(federation={"rounds": 1}), tmp_path / "run", Observer())
    names = [name for name, _ in seen]
    assert names.count("clients.jsonl") == 1, "of all clients"
    assert names.count("rounds.jsonl") == 2
    for name in ("clients.jsonl", "rounds.jsonl"):
        assert dict(seen)[name] == (tmp_path / "run" / name).stat().st_size
    assert max(names.index("clients.jsonl"), names.index("rounds.jsonl")) < max(
        place for place, name in enumerate(names) if "state" in name
    )


def test_records_have_the_keys_that_their_types_name(tmp_path: Path) -> None:
    finished = run(make_recipe(training={"engine": "batched"}, baselines=["round0"]), tmp_path / "run", Observer())
    for record in finished.rounds:
        assert RoundRecord.__required_keys__ <= record.keys() <= RoundRecord.__annotations__.keys()
    for client in finished.clients:
        assert client.keys() <= ClientReport.__annotations__.keys()
    assert finished.clients


@pytest.mark.long
def test_what_a_kind_is_made_of_is_worked_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It took three quarters of the time in which a run is read."""
    finished = run(make_recipe(federation={"rounds": 1}), tmp_path / "run")
    read_run(finished.folder)

    def refuse(*given: object, **told: object) -> None:
        raise AssertionError(given)

    monkeypatch.setattr(kinds, "get_type_hints", refuse)
    assert read_run(finished.folder) == finished
