"""What is told of a run in another terminal, and how it is ended from there."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.made_runs import make_run
from support.marks import first
from support.tiny import make_recipe
from typer.testing import CliRunner

from fedloom.cli import app
from fedloom.deployment.keys import in_use
from fedloom.deployment.queue import BRANCH, Queue
from fedloom.errors import RunError
from fedloom.experiment.run import plan
from fedloom.host.files import take_lock
from fedloom.monitoring.display import Terminal
from fedloom.monitoring.observer import Observer, Observers
from fedloom.monitoring.status import StatusFile, describe, find_work, status_file
from fedloom.progress import Clock, Progress, Stage
from fedloom.records.sweep_folder import write_asked


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # where it was found before


def test_who_is_at_work_tells_what_it_does_and_nobody_does_afterwards(tmp_path: Path) -> None:
    run = tmp_path / "first"
    with status_file(run, "fedloom serve") as display:
        display.show_step("waiting", "for 2 clients")
        display.show_clients({"alice": "connected", "bob": "loading"})
        lines = [*describe(run)]
    assert f"process {os.getpid()}" in lines[0]
    assert lines[1] == "doing     waiting: for 2 clients"
    assert lines[2].startswith("client    alice: connected, for ")
    assert lines[3].startswith("client    bob: loading, for ")
    assert find_work(run) is None
    with pytest.raises(RunError, match="not a run directory"):
        list(describe(run))


def test_what_clients_do_is_what_a_deployment_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress of theirs comes with their answers, when they are at work on the next question."""
    monkeypatch.setattr("fedloom.monitoring.status.TELL_SECONDS", -1.0)
    with status_file(tmp_path / "run", "fedloom serve") as display:
        display.show_stage("rounds")
        doing = []
        for phases in ({"alice": "training"}, {"alice": "answered", "bob": "scoring"}, {"alice": "answered"}):
            display.show_clients(phases)
            display.watch(Progress("train", 10, 1, 1, 0))
            doing.append(display.work.doing)
        assert doing == ["training", "evaluating", "training"]
        display.show_stage("personalise")
        display.show_clients({"alice": "training"})
        assert display.work.doing == "by itself: training"
        assert display.work.seconds_left is None


def test_a_phase_keeps_its_time_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 200.0])
    with status_file(tmp_path / "first", "fedloom serve") as display:
        monkeypatch.setattr(time, "time", lambda: next(clock))
        display.show_clients({"alice": "training", "bob": "training"})
        display.show_clients({"alice": "training", "bob": "answered"})
        work = find_work(tmp_path / "first")
    assert work is not None
    assert dict(work.clients) == {"alice": ["training", 100.0], "bob": ["answered", 200.0]}


@pytest.mark.parametrize("observer", [Terminal(), StatusFile("fedloom serve", None)])
def test_time_in_which_everybody_was_waited_for_is_not_in_the_time_left(observer: Terminal | StatusFile) -> None:
    """Of a run whose owner was away for a minute it said twice to three times what was left."""
    seconds = [0.0]
    observer._clock = clock = Clock([Stage("rounds", 10, 1000, 0)], now=lambda: seconds[0])
    clock.begin("rounds")
    for seconds[0] in (1.0, 2.0):
        observer.watch(Progress("train", 100))
    for seconds[0] in (10.0, 62.0):
        observer.show_wait()
    seconds[0] = 63.0
    observer.watch(Progress("train", 100))
    assert clock.seconds_left() == 7


def test_everything_that_is_shown_reaches_every_observer() -> None:
    """A method that `Observers` forgot would be silent for every run."""
    told: list[str] = []

    class Hears(Observer):
        def __getattribute__(self, name: str) -> Any:
            if not name.startswith("_"):
                told.append(name)
                return lambda *given: None
            return super().__getattribute__(name)

    methods = [name for name in vars(Observer) if not name.startswith("_")]
    everyone = Observers(Hears(), Hears())
    for name in methods:
        parameters = inspect.signature(getattr(Observer, name)).parameters
        getattr(everyone, name)(*[None] * (len(parameters) - 1))
    assert told == [name for name in methods for _ in range(2)]
    assert set(methods) <= set(vars(Observers))


@pytest.mark.parametrize("command", first(["run", "serve"]))
def test_a_command_that_starts_says_so(command: str, tmp_path: Path) -> None:
    """Before it has imported what it needs: that takes seconds, in which it was nothing and nobody."""
    out = tmp_path / "first"
    code = (
        "import builtins, sys; imports = builtins.__import__\n"
        "def find(name, *rest):\n"
        "    if name == 'torch':\n"
        "        from pathlib import Path; from fedloom.monitoring.status import describe\n"
        "        print(*describe(Path(sys.argv[-1])), sep='\\n', flush=True); sys.exit(3)\n"
        "    return imports(name, *rest)\n"
        "builtins.__import__ = find\n"
        "from fedloom.cli import main; main()"
    )
    words = [command, "tiny", *(["--insecure"] if command == "serve" else []), "--out", str(out)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith(f"at work   fedloom {command}, process ")
    assert done.stdout.endswith("\ndoing     starting\n")


def test_what_a_command_calls_goes_on_with_its_status_file(tmp_path: Path) -> None:
    run = tmp_path / "first"
    with status_file(run, "fedloom serve"):
        with status_file(run, "fedloom serve") as display:
            display.show_step("waiting", "for 2 clients")
            assert "doing     waiting: for 2 clients" in [*describe(run)]
        assert find_work(run) is not None
    assert find_work(run) is None
    with status_file(run, "fedloom run"):
        assert find_work(run) is not None


def test_a_folder_that_others_can_write_to_is_not_used(tmp_path: Path) -> None:
    (tmp_path / f".fedloom-{os.getuid()}").mkdir(mode=0o777)
    (tmp_path / f".fedloom-{os.getuid()}").chmod(0o777)
    with status_file(tmp_path / "first", "fedloom run"):
        assert find_work(tmp_path / "first") is None
    assert not [*(tmp_path / f".fedloom-{os.getuid()}").iterdir()]


def test_a_killed_process_is_not_at_work(tmp_path: Path) -> None:
    run = tmp_path / "first"
    code = (
        "import sys, time; from pathlib import Path; from fedloom.monitoring.status import status_file\n"
        "with status_file(Path(sys.argv[1]), 'fedloom run'): print(flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    assert find_work(run) is not None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert find_work(run) is None


@pytest.mark.long
def test_a_run_that_goes_on_says_which_round_it_has(tmp_path: Path) -> None:
    """It said round 0 of 3 until it had ended another."""
    run = make_run(tmp_path / "first", [3.0, 2.0, 1.5], state="running")
    with status_file(run.folder, "fedloom serve") as display:
        display.show_plan(plan(make_recipe(federation={"rounds": 3}), Observer()))
        assert "round     2 of 3" in [*describe(run.folder)]
        display.show_round({**run.rounds[-1], "round": 3})  # type: ignore[typeddict-item]
        assert [line for line in describe(run.folder) if line.startswith("round     3 of 3")]


@pytest.mark.parametrize(
    ("state", "code"), first([("done", 0), ("running", 1), ("failed", 1), ("interrupted", 1)], keep=2)
)
def test_exit_codes_say_whether_a_run_is_well(state: str, code: int, tmp_path: Path) -> None:
    """One that is called running, and that nobody is at work in, was killed."""
    run = make_run(tmp_path / "first", [3.0, 2.0], state=state)
    assert CliRunner().invoke(app, ["status", str(run.folder)]).exit_code == code
    stopped = CliRunner().invoke(app, ["stop", str(run.folder)])
    assert (stopped.exit_code, "nobody is at work in it" in stopped.output) == (1, True)
    with status_file(run.folder, "fedloom run"):
        assert CliRunner().invoke(app, ["status", str(run.folder)]).exit_code == 0
    for command in ("status", "stop"):
        result = CliRunner().invoke(app, [command, str(tmp_path / "none")])
        assert isinstance(result.exception, RunError)
        assert "not a run directory: there is no such folder" in str(result.exception)


def test_a_run_that_was_stopped_says_how_it_goes_on_and_what_is_missing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first one", [3.0, 2.0, 1.5], state="interrupted")  # of 2 rounds
    assert f"go on     fedloom run --resume '{run.folder}'" in [*describe(run.folder)]
    assert "rounds    all 2 rounds are done, but not what follows them" in [*describe(run.folder)]
    half = make_run(tmp_path / "half", [3.0, 2.0], state="running", contributions=True)
    assert [line[:16] for line in describe(half.folder)][:2] == ["ended     killed", "go on     fedloo"]
    late = make_run(tmp_path / "late", [3.0, 2.0, 1.5], state="failed", contributions=True)
    assert "rounds    all 2 rounds are done, but not what follows them: contributions" in [*describe(late.folder)]
    served = make_run(tmp_path / "served", [3.0, 2.0], state="interrupted", plan={"elsewhere": ["alice"]})
    assert f"go on     fedloom serve --resume {served.folder}, or fedloom submit where a server stays" in [
        *describe(served.folder)
    ]
    done = make_run(tmp_path / "done", [3.0, 2.0, 1.5])
    assert not [line for line in describe(done.folder) if "go on" in line]


@pytest.mark.parametrize("state", ["running", "interrupted", "failed"])
def test_a_run_that_another_process_holds_is_at_work_whatever_its_status_says(state: str, tmp_path: Path) -> None:
    """One that goes on prepares first, and has the status of before."""
    run = make_run(tmp_path / "run", [3.0, 2.0], state=state)
    with closing(take_lock(run.folder)):
        lines = [*describe(run.folder)]
        assert CliRunner().invoke(app, ["status", str(run.folder)]).exit_code == 0
    assert lines[0] == "run       at work, but not for this user to see"
    assert not [line for line in lines if line.startswith(("ended", "go on"))]


def test_a_run_whose_sweep_is_at_work_names_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = tmp_path / "a sweep"
    run = make_run(sweep / "seed=1", [3.0, 2.0], state="running").folder
    (sweep / "sweep.json").write_text('{"seed=1": {}}')
    monkeypatch.chdir(run)
    with status_file(sweep, "fedloom sweep") as display, closing(take_lock(run)):
        display.show_step("pass", "2 runs together")
        lines = [*describe(run)]
        assert [*describe(Path())] == lines
        assert CliRunner().invoke(app, ["status", str(run)]).exit_code == 0
        stopped = CliRunner().invoke(app, ["stop", str(run)])
    assert lines[0].startswith(f"at work   fedloom sweep, process {os.getpid()}, since ")
    assert lines[1] == "doing     pass: 2 runs together"
    assert lines[2] == f"sweep     fedloom status '{sweep}', and to end it: fedloom stop '{sweep}'"
    assert str(stopped.exception) == (
        f"{run}: its sweep is at work in it (process {os.getpid()}); end the sweep, which can go on later: fedloom stop"
        f" '{sweep}'"
    )
    with status_file(sweep, "fedloom sweep"):
        assert next(iter(describe(run))).startswith("ended     killed"), "it waits for its turn"


def test_a_sweep_that_is_over_says_how_it_stands(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    make_run(sweep / "seed=1", [3.0, 2.0, 1.5])
    make_run(sweep / "seed=2", [3.0, 2.0], state="failed", error="no memory")
    (sweep / "sweep.json").write_text('{"seed=1": {}, "seed=2": {}, "seed=3": {}}')
    lines = [
        "sweep     1 of 3 runs done",
        "run       seed=2: failed after round 1 of 2: no memory",
        "runs      1 not begun",
    ]
    assert [*describe(sweep)] == [*lines, f"go on     the command that began it, and --out {sweep}"]
    write_asked(sweep, "tiny", ["seed=1,2,3", "baselines=[]"], 3)
    command = f"go on     fedloom sweep tiny seed=1,2,3 'baselines=[]' --random 3 --out {sweep}"
    assert [*describe(sweep)] == [*lines, command]
    assert CliRunner().invoke(app, ["status", str(sweep)]).exit_code == 1
    (sweep / "sweep.json").write_text('{"seed=1": {}}')
    assert [*describe(sweep)] == ["sweep     1 of 1 run done"]
    assert CliRunner().invoke(app, ["status", str(sweep)]).exit_code == 0
    stopped = CliRunner().invoke(app, ["stop", str(sweep)])
    assert (stopped.exit_code, "nobody is at work in it" in stopped.output) == (1, True)


def test_an_early_end_is_told_of_a_run_that_is_over(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", [3.0, 2.9])
    status = json.loads((made.folder / "status.json").read_text())
    early = "9 scheduled, 1 completed: enough"
    (made.folder / "status.json").write_text(json.dumps({**status, "stopped_early": early}))
    assert f"early end {early}" in [*describe(made.folder)]


def test_a_servers_folder_says_who_is_at_work_with_it_and_what_it_has(tmp_path: Path) -> None:
    """It was no run directory, as it is in the guide's first steps."""
    server = tmp_path / "server"
    server.mkdir()
    (server / "server.toml").touch()

    def ask(command: str) -> tuple[int, list[str]]:
        done = CliRunner().invoke(app, [command, str(server)])
        return done.exit_code, done.output.splitlines()

    nobody = f"server    nobody is at work with it; start it with: fedloom serve --server {server}"
    assert ask("status") == (
        1,
        [nobody, f"runs      none yet; submit one with: fedloom submit RECIPE --server {server}"],
    )
    assert ask("stop") == (1, [f"{server}: nobody is at work in it on this machine"])
    for name in ("first", "second"):
        Queue(server).add(name, {"name": name})
    counted = f"runs      2 waiting; list them with: fedloom runs --server {server}"
    assert ask("status") == (1, [nobody, counted])
    with in_use(server, tmp_path / "alone"):
        assert ask("status") == (
            0,
            [f"server    at work for one run alone: fedloom status {tmp_path / 'alone'}", counted],
        )
        stopped = CliRunner().invoke(app, ["stop", str(server)])
        assert str(stopped.exception).endswith(f"for one run alone; name that run: fedloom stop {tmp_path / 'alone'}")
    with in_use(server, server):
        assert ask("status") == (0, ["server    at work, but not for this user to see", counted])
        with status_file(server, "fedloom serve") as display:
            display.show_step("waiting", "for a run")
            code, lines = ask("status")
            assert code == 0
            assert [line[:8] for line in lines] == ["at work ", "doing   ", "runs    "]
            assert lines[-1] == counted
        with status_file(server, BRANCH):  # its runs are those of the server above
            assert [line[:8] for line in ask("status")[1]] == ["at work ", "doing   "]


@pytest.mark.long
@pytest.mark.parametrize("now", first([["--now"], []], rest=pytest.mark.slow))
def test_a_run_is_watched_and_stopped_from_another_terminal(now: list[str], tmp_path: Path) -> None:
    out = tmp_path / "first"
    words = ["run", "tiny", "federation.rounds=5000", "--out", str(out)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "fedloom", *words], stdout=log, stderr=log)
    try:
        until = time.monotonic() + 120
        while not re.search(r"round +[1-9]\d* of 5000", told := CliRunner().invoke(app, ["status", str(out)]).output):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until, told
            time.sleep(0.2)
        stopped = CliRunner().invoke(app, ["stop", str(out), *now])
        assert stopped.exit_code == 0
        assert f"fedloom run --resume {out}" in stopped.output.replace("\n", "")
        assert process.wait(60) == 143
    finally:
        process.kill()
        process.wait()
    assert "interrupted" in CliRunner().invoke(app, ["status", str(out)]).output
    assert json.loads((out / "status.json").read_text())["state"] == "interrupted"
    again = CliRunner().invoke(app, ["stop", str(out)])
    assert again.exit_code == 1
    assert "nobody is at work" in again.output
