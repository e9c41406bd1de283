"""A run that is killed at any instant goes on to the same result."""

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.killed_runs import TWINS, carry_out, make_recipe, result_of, start
from support.marks import first

from fedloom.errors import RunError
from fedloom.host.failpoints import NAMES
from fedloom.records.check import check_run
from fedloom.records.run import read_run
from fedloom.records.state import load_state

pytestmark = pytest.mark.xdist_group("kills")
"""One test worker alone starts the process that all of these are forked from: it imports everything."""
RANDOM_KILLS = int(os.environ.get("FEDLOOM_RANDOM_KILLS", "30"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    """A recipe, and what it comes to uninterrupted."""
    folder = tmp_path_factory.mktemp("whole")
    questions = [{"q": f"word{number}", "c": ["yes", "no"], "a": ["yes", "no"][number % 2]} for number in range(4)]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    task = 'name = "t"\nsource = "q.jsonl"\nkind = "choice"\nprompt = "{q}"\nchoices = "c"\nanswer = "{a}"\n'
    (folder / "tasks.toml").write_text(f"[[task]]\n{task}")
    asked = {"tasks": [str(folder / "tasks.toml")], "tasks_every": 2}
    recipe = make_recipe(folder, baselines=["pooled"], personalise={"epochs": 1}, contributions=True, evaluation=asked)
    assert carry_out(recipe, folder / "run") == 0
    return recipe, result_of(folder / "run")


CHIEF = ("client.trained", "state.manifest")
"""Failpoints that stand for the others: in a round, and inside what is written after it."""


def assert_sound(folder: Path) -> None:
    bad = [f"{finding.what}: {finding.found}" for finding in check_run(folder) if not finding.well]
    assert not bad


def rounds_lost(folder: Path) -> int:
    """Of a killed run: rounds on record that it will not go on from."""
    recorded = len(read_run(folder).rounds) if (folder / "resolved.json").exists() else 0
    state = load_state(folder)
    return recorded - (state.round + 1 if state else 0)


def test_the_same_run_twice_is_the_same(whole: Any, tmp_path: Path) -> None:
    recipe, result = whole
    assert carry_out(recipe, tmp_path / "run") == 0
    assert result_of(tmp_path / "run") == result
    assert len(result["rounds.jsonl"]) == 4
    best = max(2, read_run(tmp_path / "run").best_round or 0)
    asked = [record.get("round", record.get("baseline")) for record in result["evaluation.jsonl"]]
    assert asked == [2, None, *([best] if best > 2 else []), "pooled"]
    assert_sound(tmp_path / "run")


@pytest.mark.parametrize("name", first(sorted(NAMES, key=lambda name: name not in CHIEF), keep=len(CHIEF), every=2))
def test_killed_at_a_failpoint_it_goes_on_to_the_same_result(name: str, whole: Any, tmp_path: Path) -> None:
    recipe, result = whole
    code = carry_out(recipe, tmp_path / "run", f"{name}=kill@3")
    if code == 0:  # it comes by fewer than three times
        shutil.rmtree(tmp_path / "run")
        code = carry_out(recipe, tmp_path / "run", f"{name}=kill@1")
    assert code == -signal.SIGKILL, f"{name}: it ended with {code}, and with 0 where it never comes by"
    assert rounds_lost(tmp_path / "run") <= 1
    assert carry_out(recipe, tmp_path / "run") == 0
    assert result_of(tmp_path / "run") == result
    assert_sound(tmp_path / "run")


@pytest.mark.long
def test_killed_again_and_again_while_it_goes_on(whole: Any, tmp_path: Path) -> None:
    recipe, result = whole
    for name in ("state.manifest", "run.loaded", "record.client", "adapter.between", "state.renamed", "client.trained"):
        assert carry_out(recipe, tmp_path / "run", f"{name}=kill@1") == -signal.SIGKILL
    assert carry_out(recipe, tmp_path / "run") == 0
    assert result_of(tmp_path / "run") == result
    assert_sound(tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize("batch", first(range(10), rest=pytest.mark.slow))
def test_killed_at_random_instants_it_goes_on_to_the_same_result(batch: int, whole: Any, tmp_path: Path) -> None:
    recipe, result = whole
    instants = random.Random(2026 + batch)
    started = time.perf_counter()
    assert carry_out(recipe, tmp_path / "whole") == 0
    seconds = time.perf_counter() - started
    kills, killed, kept = RANDOM_KILLS // 10, 0, Counter()
    for number in range(kills):
        folder = tmp_path / str(number)
        process = start(recipe, folder)
        time.sleep(instants.uniform(0, seconds))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        assert not folder.exists() or rounds_lost(folder) <= 1
        kept[len(read_run(folder).rounds) if (folder / "resolved.json").exists() else 0] += 1
        assert carry_out(recipe, folder) == 0, (tmp_path / f"{number}.error").read_text()
        assert result_of(folder) == result, f"kill {number}"
        assert_sound(folder)
    print(f"{killed} of {kills} killed, all went on to the same result; rounds on record when killed: {dict(kept)}")
    assert killed or kills < 5, "of one or two, each may come when the run is over"


@pytest.mark.long
@pytest.mark.parametrize("twin", first((name for name in TWINS if name != "none"), every=2))
def test_a_writer_without_one_of_the_rules_is_caught(twin: str, whole: Any, tmp_path: Path) -> None:
    recipe, result = whole
    caught = 0
    for number, failpoint in enumerate(("state.manifest=kill@3", "record.client=kill@5", "round.begins=kill@3")):
        folder = tmp_path / str(number)
        assert carry_out(recipe, folder, failpoint, twin) == -signal.SIGKILL
        try:
            lost = rounds_lost(folder)
        except RunError:  # a run that goes on is refused then, too
            caught += carry_out(recipe, folder, "", twin) != 0
            continue
        caught += lost > 1 or carry_out(recipe, folder, "", twin) != 0 or result_of(folder) != result
    assert caught, "the twin's mistake goes unnoticed"


@pytest.mark.parametrize(("number", "code"), first([(signal.SIGTERM, 143), (signal.SIGINT, 130)]))
def test_a_signal_ends_it_after_the_step_and_it_goes_on(number: int, code: int, whole: Any, tmp_path: Path) -> None:
    recipe, result = whole
    process = start(recipe, tmp_path / "run", "round.begins=sleep:0.5@2")
    while not (tmp_path / "run" / "rounds.jsonl").exists():
        time.sleep(0.01)
        assert process.is_alive()
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == code
    assert read_run(tmp_path / "run").status["state"] == "interrupted"
    assert carry_out(recipe, tmp_path / "run") == 0
    assert result_of(tmp_path / "run") == result


@pytest.mark.long
def test_a_second_signal_ends_it_at_once(whole: Any, tmp_path: Path) -> None:
    recipe, result = whole
    process = start(recipe, tmp_path / "run", "round.begins=sleep:30")
    while not (tmp_path / "run" / "rounds.jsonl").exists():
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.3)
    assert process.is_alive(), "the first waits for the step's end"
    os.kill(process.pid, signal.SIGINT)
    process.join(10)
    assert process.exitcode == 130
    assert carry_out(recipe, tmp_path / "run") == 0
    assert result_of(tmp_path / "run") == result


@pytest.mark.long
def test_a_done_run_is_left_alone(whole: Any, tmp_path: Path) -> None:
    recipe, _ = whole
    assert carry_out(recipe, tmp_path / "run") == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert carry_out(recipe, tmp_path / "run") == 0
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {path.name for path in before if before[path] != after[path]} <= {".lock"}
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"
