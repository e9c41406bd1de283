"""Files of a state, of adapters and of records that are not what was written: noticed, and put right or refused."""

import json
import os
import random
import shutil
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from support.marks import first
from support.quick_runs import Said, attempt, make_recipe, result_of

from fedloom.errors import RunError
from fedloom.experiment import session
from fedloom.host.files import take_lock
from fedloom.records import state as state_module
from fedloom.records.check import check_run
from fedloom.records.run import read_run
from fedloom.records.state import check_records, committed, load_state, read_state
from fedloom.report import figures

BITS = int(os.environ.get("FEDLOOM_FLIPPED_BITS", "300"))


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any], Path, Path]:
    """A recipe, what it comes to, a run that was stopped after its second round, and one of another seed."""
    folder = tmp_path_factory.mktemp("begun")
    recipe = make_recipe(folder)
    assert not attempt(recipe, folder / "whole")
    with pytest.raises(RuntimeError, match="a failpoint"):
        attempt(recipe, folder / "run", "round.begins=raise@3")
    with pytest.raises(RuntimeError, match="a failpoint"):
        attempt(recipe.model_copy(update={"seed": 6}), folder / "other", "round.begins=raise@3")
    return recipe, result_of(folder / "whole"), folder / "run", folder / "other"


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut off": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: path.write_bytes(b""),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "a flipped bit": lambda path: flip(path, 8 * path.stat().st_size - 5),
    "missing": lambda path: path.unlink(),
}


def copy(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def bad(folder: Path) -> str:
    return "; ".join(f"{finding.what}: {finding.found}" for finding in check_run(folder) if not finding.well)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["manifest.json", "server.safetensors", "clients.safetensors"])
def test_a_damaged_state_is_named_and_the_one_before_is_used(
    file: str, damage: str, begun: Any, tmp_path: Path
) -> None:
    recipe, result, stopped, _ = begun
    folder = copy(stopped, tmp_path / "run")
    newest, before = committed(folder)
    DAMAGE[damage](newest / file)
    assert f"state: damaged: {newest.name}" in bad(folder)
    said: list[str] = []
    state = load_state(folder, said.append)
    assert state is not None
    assert state.name == before.name
    assert newest.name in said[0]
    if damage == "a flipped bit":
        display = Said()
        assert not attempt(recipe, folder, display=display)
        assert result_of(folder) == result
        assert any(line.startswith("skipped: ") and newest.name in line for line in display.steps)
        assert not bad(folder)


def test_every_flipped_bit_is_noticed(begun: Any, tmp_path: Path) -> None:
    _, _, stopped, _ = begun
    folder, drawn = copy(stopped, tmp_path / "run"), random.Random(11)
    newest = committed(folder)[0]
    files = [*newest.iterdir(), *folder.glob("adapters/*/*"), folder / "rounds.jsonl", folder / "clients.jsonl"]
    for _ in range(BITS):
        path, content = (chosen := drawn.choice(files)), chosen.read_bytes()
        flip(path, drawn.randrange(8 * len(content)))
        state = None
        try:
            state = read_state(newest)
            check_records(folder, state)
        except RunError:
            noticed = True
        else:
            noticed = path.name in state_module.damaged_adapters(folder, state).get(path.parent.name, [])
        path.write_bytes(content)
        assert noticed, path
    print(f"{BITS} of {BITS} flipped bits noticed, in {len(files)} files")


@pytest.mark.parametrize(
    ("which", "damage"), first([(w, d) for d in ("cut off", "missing") for w in ("best", "last", "initial")], keep=2)
)
def test_a_damaged_adapter_is_named_and_written_again(which: str, damage: str, begun: Any, tmp_path: Path) -> None:
    recipe, result, stopped, _ = begun
    folder = copy(stopped, tmp_path / "run")
    for path in [*(folder / "adapters" / which).iterdir()]:
        DAMAGE[damage](path)
        assert f"adapters/{which}: " in bad(folder)
        assert path.name in bad(folder)
    display = Said()
    assert not attempt(recipe, folder, display=display)
    assert result_of(folder) == result
    assert any(f"adapters/{which}" in line for line in display.steps)
    assert not bad(folder)


def test_a_done_run_with_a_damaged_adapter_is_put_right(begun: Any, tmp_path: Path) -> None:
    recipe, result, stopped, _ = begun
    folder = copy(stopped.parent / "whole", tmp_path / "run")
    DAMAGE["a flipped bit"](folder / "adapters" / "last" / "adapter_model.safetensors")
    assert not attempt(recipe, folder)
    assert result_of(folder) == result
    assert not bad(folder)


@pytest.mark.long
def test_a_best_adapter_that_no_state_holds_is_trained_again(tmp_path: Path) -> None:
    rising = make_recipe(
        tmp_path,
        adapter={"targets": ["lm_head"]},
        training={"learning_rate": 3.0},
        federation={"strategy": {"kind": "fedavg", "learning_rate": None}},
    )
    assert not attempt(rising, tmp_path / "whole")
    assert read_run(tmp_path / "whole").best_round == 0
    with pytest.raises(RuntimeError, match="a failpoint"):
        attempt(rising, tmp_path / "run", "round.begins=raise@3")
    (tmp_path / "run/adapters/best/adapter_model.safetensors").unlink()
    display = Said()
    assert not attempt(rising, tmp_path / "run", display=display)
    assert "skipped: no state holds the best adapter: all rounds are trained again" in display.steps
    assert result_of(tmp_path / "run") == result_of(tmp_path / "whole")


@pytest.mark.long
def test_a_run_with_capped_shares_that_its_clients_judge_goes_on_to_the_same(tmp_path: Path) -> None:
    """Its losses are those of round 0 and how far each client has come since, which the state remembers."""
    recipe = make_recipe(tmp_path, data={"central_holdout": 0}, federation={"max_share": 0.34})
    assert not attempt(recipe, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="a failpoint"):
        attempt(recipe, tmp_path / "run", "round.begins=raise@3")
    assert not attempt(recipe, tmp_path / "run")
    result = result_of(tmp_path / "run")
    assert result == result_of(tmp_path / "whole")
    assert any("judged_loss" in record for record in result["rounds.jsonl"])


def test_a_state_of_another_run_is_not_used(begun: Any, tmp_path: Path) -> None:
    recipe, result, stopped, other = begun
    folder = copy(stopped, tmp_path / "run")
    newest = committed(folder)[0]
    copy(other / "state" / newest.name, newest)
    assert "not what it was at the end of round" in bad(folder)
    assert not attempt(recipe, folder)
    assert result_of(folder) == result


def test_without_a_whole_state_it_says_so_and_overwrites_nothing(begun: Any, tmp_path: Path) -> None:
    recipe, _, stopped, _ = begun
    folder = copy(stopped, tmp_path / "run")
    for state in committed(folder):
        DAMAGE["cut off"](state / "server.safetensors")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    assert "no state in it is whole; remove the run directory and begin again" in attempt(recipe, folder)
    assert before == {path: path.read_bytes() for path in before}
    assert "no state is whole" in next(finding.mend for finding in check_run(folder) if finding.what == "state")


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_rounds_whose_state_is_gone_are_not_trained_again_unasked(left: str, begun: Any, tmp_path: Path) -> None:
    run = copy(begun[2], tmp_path / "run")
    shutil.rmtree(run / "state")
    if left == "an empty folder":
        (run / "state").mkdir()
    before = {path: path.read_bytes() for path in run.glob("*.jsonl")}
    assert "no state is there to go on after the 3 rounds on record; restore it, or remove" in attempt(begun[0], run)
    assert before == {path: path.read_bytes() for path in run.glob("*.jsonl")}
    (found,) = [one for one in check_run(run) if one.what == "state"]
    assert (found.well, found.found) == (False, "missing, and 3 rounds are on record")


def test_what_was_on_record_of_round_0_alone_begins_again(tmp_path: Path, begun: Any) -> None:
    recipe, whole, _, _ = begun
    with pytest.raises(RuntimeError, match="a failpoint"):
        attempt(recipe, tmp_path / "run", "record.round=raise@1")
    assert not committed(tmp_path / "run")
    assert not attempt(recipe, tmp_path / "run")
    assert result_of(tmp_path / "run") == whole


@pytest.mark.parametrize("name", [".lock", "rounds.jsonl", "clients.jsonl"])
def test_a_link_in_a_files_place_is_not_written_through(name: str, begun: Any, tmp_path: Path) -> None:
    run, theirs = copy(begun[2], tmp_path / "run"), tmp_path / "theirs"
    content = (run / name).read_bytes()
    theirs.write_bytes(content)
    (run / name).unlink()
    (run / name).symlink_to(theirs)
    assert "move what is in its place away" in attempt(begun[0], run)
    assert theirs.read_bytes() == content


def test_a_pipe_in_the_locks_place_is_what_is_to_be_moved_away(begun: Any, tmp_path: Path) -> None:
    run = copy(begun[2], tmp_path / "run")
    (run / ".lock").unlink(missing_ok=True)
    os.mkfifo(run / ".lock")
    assert "move what is in its place away" in attempt(begun[0], run)


def test_a_loader_that_does_not_verify_would_be_caught(
    begun: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: whatever can be parsed is taken for what was written."""
    _, result, stopped, _ = begun
    recipe = begun[0]
    folder = copy(stopped, tmp_path / "run")
    server = committed(folder)[0] / "server.safetensors"
    flip(server, 8 * (server.stat().st_size - 40) + 4)
    monkeypatch.setattr(state_module, "hash_file", lambda path: "the same")
    monkeypatch.setattr(state_module, "hash_json", lambda value: "the same")
    told = json.loads((committed(folder)[0] / "manifest.json").read_text())
    told |= {"sha256": "the same", "files": dict.fromkeys(told["files"], "the same")}
    (committed(folder)[0] / "manifest.json").write_text(json.dumps(told))
    attempt(recipe, folder)
    assert result_of(folder) != result


def test_a_second_run_in_a_directory_is_refused_by_process_and_host(begun: Any, tmp_path: Path) -> None:
    import platform

    recipe, result, stopped, _ = begun
    folder = copy(stopped, tmp_path / "run")
    held = take_lock(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    refusal = attempt(recipe, folder)
    assert f"another run is at work in it (process {os.getpid()} on {platform.node()})" in refusal
    assert before == {path: path.read_bytes() for path in before}
    held.close()  # as the kernel does for a process that is killed
    (folder / ".lock").write_text("process 1 on nowhere")
    assert not attempt(recipe, folder)
    assert result_of(folder) == result


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"training": {"learning_rate": 2e-2}}, "began with another recipe: training.learning_rate;"),
        ({"seed": 8}, "began with another recipe: seed;"),
        ({"model": {"source": "random:tiny-opt"}}, "began with another recipe: model.source;"),
    ],
)
def test_another_recipe_is_refused_by_its_keys(changes: Any, says: str, begun: Any, tmp_path: Path) -> None:
    _, _, stopped, _ = begun
    folder = copy(stopped, tmp_path / "run")
    assert says in attempt(make_recipe(stopped.parent, **changes), folder)


def test_without_its_plan_a_run_is_not_taken_for_one_that_has_not_begun(begun: Any, tmp_path: Path) -> None:
    """It went on with whatever recipe came, which took the place of the one that it began with."""
    recipe, result, stopped, _ = begun
    folder = copy(stopped, tmp_path / "run")
    (folder / "plan.json").unlink()
    before = (folder / "recipe.toml").read_bytes()
    other = make_recipe(stopped.parent, training={"learning_rate": 2e-2})
    for asked in (recipe, other):
        assert "plan.json is missing, without which a run that has rounds" in attempt(asked, folder)
    assert (folder / "recipe.toml").read_bytes() == before
    assert bad(folder) == "plan.json: missing"
    shutil.copy(stopped / "plan.json", folder)
    assert not attempt(recipe, folder)
    assert result_of(folder) == result


@pytest.mark.parametrize(
    ("file", "mend"),
    [
        ("resolved.json", "restore it, or remove the run directory and begin again"),
        ("plan.json", "restore it, or remove the run directory and begin again"),
        ("rounds.jsonl", "restore it, or remove the run directory and begin again"),
        ("environment.json", "remove it: a run does without it"),
        ("recipe.toml", "restore it, or go on by the recipe that it began with"),
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(file: str, mend: str, begun: Any, tmp_path: Path) -> None:
    """Some were not looked at, and of others fsck sent to itself."""
    _, _, stopped, _ = begun
    folder = copy(stopped, tmp_path / "run")
    (folder / file).write_text("{]\n" + (folder / file).read_text())
    (broken,) = [finding for finding in check_run(folder) if not finding.well]
    assert broken.what.startswith(file)
    assert broken.mend.startswith(mend)


def test_how_many_train_at_once_may_change_and_is_on_record(begun: Any, tmp_path: Path) -> None:
    """And neither the time between is in the runtime, nor is it hidden that there was one."""
    _, _, stopped, _ = begun
    folder = copy(stopped, tmp_path / "run")
    status = json.loads((folder / "status.json").read_text())
    before, hour = read_run(folder), timedelta(hours=1)
    ended, started = (datetime.fromisoformat(status[key]) - 5 * hour for key in ("updated", "started"))
    status |= {"updated": ended.isoformat(), "started": (started - hour).isoformat()}
    (folder / "status.json").write_text(json.dumps(status))
    recipe = make_recipe(stopped.parent, training={**before.recipe["training"], "clients_at_once": 1})
    assert not attempt(recipe, folder)
    done = read_run(folder)
    assert done.status["clients_at_once"] == 1
    assert done.status["moved"] == [f"after round {before.status['round']} with training.clients_at_once = 1"]
    assert 3598 < (figures.elapsed_seconds(done) or 0) < 3600 + 600, "the hour, and what it took"
    text = (folder / "report.md").read_text()
    assert "went on 1 time; 5:0" in text
    assert f"between are not in the runtime; after round {before.status['round']} with training.clients" in text
    assert "from start to end, pauses left out" in text
    assert not attempt(recipe, folder), "it is complete"


def test_what_was_moved_is_moved_back_and_every_move_is_on_record(begun: Any, tmp_path: Path) -> None:
    _, _, stopped, _ = begun
    folder = copy(stopped, tmp_path / "run")
    plain, planned = read_run(folder).recipe["training"], read_run(folder).plan["clients_at_once"]
    found = []
    for number in (2, 2, 3, None):  # to none, as the run began
        recipe = make_recipe(stopped.parent, training={**plain, "clients_at_once": number})
        with pytest.raises(RuntimeError):
            attempt(recipe, folder, "training.stepped=raise@1")
        found.append((read_run(folder).status["clients_at_once"], len(read_run(folder).status["moved"])))
    assert found == [(2, 1), (2, 1), (3, 2), (planned, 3)]
    assert read_run(folder).status["moved"][-1].endswith("with no training.clients_at_once")
    assert attempt(make_recipe(stopped.parent, training={**plain, "learning_rate": 2e-2}), folder)


def test_other_documents_or_another_base_model_are_refused_by_name(tmp_path: Path, begun: Any) -> None:
    recipe, result, stopped, _ = begun
    folder = copy(stopped, tmp_path / "run")
    documents = stopped.parent / "documents.jsonl"
    was = documents.read_text()
    documents.write_text(was.replace("word1", "ward1", 1))
    assert "the documents are not those that the run began with; bring them back" in attempt(recipe, folder)
    documents.write_text(was)
    with pytest.MonkeyPatch.context() as patch:
        right = session.hash_tensors
        patch.setattr(session, "hash_tensors", lambda tensors: right([t + 1 for t in tensors if t.is_floating_point()]))
        assert "the base model" in attempt(recipe, folder)
    assert not attempt(recipe, folder)
    assert result_of(folder) == result


@pytest.mark.parametrize("damage", first(["cut off", "emptied"]))
def test_a_status_that_can_not_be_read_is_named_and_made_again(damage: str, begun: Any, tmp_path: Path) -> None:
    recipe, result, stopped, _ = begun
    folder = copy(stopped, tmp_path / "run")
    DAMAGE[damage](folder / "status.json")
    (broken,) = check_run(folder)
    assert (broken.what, broken.well) == ("status.json", False)
    assert broken.mend.startswith("remove it, and go on with it: fedloom run --resume")
    (folder / "status.json").unlink()
    assert not attempt(recipe, folder)
    assert not bad(folder)
    assert result_of(folder) == result


def test_a_run_without_a_whole_state_is_not_said_to_go_on(begun: Any, tmp_path: Path) -> None:
    _, _, stopped, _ = begun
    folder = copy(stopped, tmp_path / "run")
    for state in committed(folder):
        DAMAGE["cut off"](state / "server.safetensors")
    DAMAGE["cut off"](folder / "adapters" / "last" / "adapter_model.safetensors")
    mends = {finding.mend for finding in check_run(folder) if not finding.well}
    assert mends == {"remove the run directory and begin again: no state is whole"}


@pytest.mark.parametrize("name", ["rounds.jsonl", "clients.jsonl"])
@pytest.mark.parametrize(
    ("damage", "says"), [("missing", "missing"), ("cut off", "not what it was at the end of round")]
)
def test_records_are_blamed_for_themselves_and_not_the_states(
    name: str, damage: str, says: str, begun: Any, tmp_path: Path
) -> None:
    recipe, result, stopped, _ = begun
    folder = copy(stopped, tmp_path / "run")
    kept = (folder / name).read_bytes()
    if damage == "cut off":
        (folder / name).write_bytes(b"")
    else:
        DAMAGE[damage](folder / name)
    mend = f"restore {name}, or remove the run directory and begin again"
    display = Said()
    refusal = attempt(recipe, folder, display=display)
    assert refusal.startswith(f"{folder}: {name} is {says}")
    assert refusal.endswith(mend)
    assert {finding.mend for finding in check_run(folder) if not finding.well} == {mend}
    assert next(line for line in display.steps if "skipped" in line).startswith(f"skipped: {committed(folder)[0]}: ")
    (folder / name).write_bytes(kept)
    assert not attempt(recipe, folder)
    assert result_of(folder) == result
