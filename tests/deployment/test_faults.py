"""Processes of a deployment that are killed, stopped or late: the run ends, and nothing counts twice."""

import json
import os
import signal
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from support.federation_here import (
    WHOLE_ROUNDS,
    Federation,
    Served,
    descendants,
    federation,
    find_process,
    run_here,
    split,
    tiny,
)

from fedloom.deployment.client.journal import Journal, standing
from fedloom.deployment.server.nginx import find_nginx
from fedloom.recipe.loading import recipe_to_toml
from fedloom.recipe.recipe import Recipe
from fedloom.records.run import Run

pytestmark = pytest.mark.timeout(900)
if not Path("/proc/self/task").is_dir():
    pytest.skip("processes are found through /proc", allow_module_level=True)

CLIENTS = ("client-0", "client-1")


def recipe(*overrides: str) -> Recipe:
    return tiny("data.clients=2", "federation.rounds=2", *overrides)


def join_all(there: Federation, recipe: Recipe) -> dict[str, int]:
    """Each client's `fedloom join`, by its process."""
    folders = split(recipe, there.folder / "split")
    return {name: there.join(name, folder).pid for name, folder in zip(CLIENTS, folders, strict=True)}


def write(recipe: Recipe, folder: Path) -> str:
    (folder / "recipe.toml").write_text(recipe_to_toml(recipe))
    return str(folder / "recipe.toml")


def hashes(run: Run) -> list[str]:
    return [record["adapter_sha256"] for record in run.rounds]


VICTIMS = {
    "worker": "fedloom.deployment.client.worker_process",
    "Flower's process for a message": "fedloom-task",
    "who starts those": "client-tasks",
    "SuperNode": "supernode",
    "server app": "fedloom-task",
    "who starts that": "server-tasks",
    "SuperLink": "superlink",
    "nginx": "nginx",
    "fedloom serve": "",
}
"""Processes that are killed, each by a word in its name or command line."""
OF_A_CLIENT = ("worker", "Flower's process for a message", "who starts those", "SuperNode")
REPEATS = int(os.environ.get("FEDLOOM_KILL_REPEATS", "1"))
"""Repeats of each kill, in one run."""


@pytest.mark.slow
@pytest.mark.timeout(900 + 900 * REPEATS)
@pytest.mark.parametrize("victim", VICTIMS)
def test_what_is_killed_is_started_again_and_no_round_is_lost(victim: str, tmp_path: Path) -> None:
    """Kill in training and between rounds: the adapters are those of a run without it, and each update counts once."""
    proxied = find_nginx() is not None
    if victim == "nginx" and not proxied:
        pytest.skip("nginx is not installed")
    asked = recipe(f"federation.rounds={3 * REPEATS}", "training.epochs=5", "data.client_holdout=0")
    with federation(tmp_path, secure=True, host="127.0.0.2" if proxied else "localhost") as there:
        joined = join_all(there, asked)
        server = there.serve(write(asked, tmp_path), "--out", str(there.out))
        for repeat in range(REPEATS):
            for when in ("in training", "between rounds"):
                if when == "in training":
                    there.wait_for("client-1", f"round {3 * repeat + 1}".ljust(10) + "training")
                else:
                    there.wait_for_rounds(3 * repeat + 3)
                before = there.committed()
                if victim == "fedloom serve":
                    kill(server.pid)
                    server.wait()
                    server = there.serve(str(there.out), "--resume")
                else:
                    kill(find_process(joined["client-1"] if victim in OF_A_CLIENT else server.pid, VICTIMS[victim]))
                killed, seconds = time.monotonic(), None
                try:
                    there.wait_for_rounds(before + 1)
                    seconds = round(time.monotonic() - killed, 1)
                finally:
                    tell({"victim": victim, "when": when, "seconds": seconds})
        served = there.finish(server)
    assert hashes(served) == hashes(run_here(asked, tmp_path / "local"))
    assert [record["lost"] for record in served.rounds] == [[]] * len(served.rounds)
    assert len(served.clients) == 2 * asked.federation.rounds
    # Of every three rounds the first is killed in, and the last as it begins; the other is the measure.
    usual = [record["train_seconds"] + record["evaluate_seconds"] for record in served.rounds[2::3]]
    tell({"victim": victim, "when": "never", "seconds": round(median(usual), 1)})


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)


def tell(trial: dict[str, Any]) -> None:
    """Append what was measured to a file, for `docs/reliability.md`."""
    if path := os.environ.get("FEDLOOM_KILL_TABLE"):
        with open(path, "a") as file:
            file.write(json.dumps(trial) + "\n")


@pytest.mark.slow
def test_a_late_client_costs_its_update_and_is_back_in_a_later_round(tmp_path: Path) -> None:
    asked = tiny(
        "data.clients=2", "federation.rounds=3", "federation.max_lost_clients=1", "federation.round_deadline=30"
    )
    with federation(tmp_path) as there:
        joined = join_all(there, asked)
        server = there.serve(write(asked, tmp_path), "--out", str(there.out))
        there.wait_for("client-1", "told      the adapter of round 1")
        worker = find_process(joined["client-1"], "fedloom.deployment.client.worker_process")
        os.kill(worker, signal.SIGSTOP)
        there.wait_for("serve", "lost", times=2)  # once for the evaluation after round 1, once for round 2
        os.kill(worker, signal.SIGCONT)
        served = there.finish(server)
    lost = [record["lost"] for record in served.rounds]
    assert len(served.rounds) == 4
    assert lost == [[], [], [1], []]
    assert "no answer within" in served.rounds[2]["lost_because"]["1"]
    assert len(served.clients) == 6 - sum(map(len, lost))


@pytest.mark.slow
def test_a_client_that_is_stopped_whole_is_lost_and_back_when_it_goes_on(tmp_path: Path) -> None:
    """Stop all processes of one of three clients for longer than a deadline, as where a machine sleeps."""
    rounds = 12
    limits = ("federation.max_lost_clients=1", "federation.round_deadline=25")
    asked = tiny("data.clients=3", f"federation.rounds={rounds}", "training.epochs=3", *limits)
    with federation(tmp_path, secure=True) as there:
        folders = split(asked, tmp_path / "split")
        joined = [there.join(f"client-{number}", folders[number]).pid for number in range(3)]
        server = there.serve(write(asked, tmp_path), "--out", str(there.out))
        there.wait_for("client-1", "round 2   training")
        family = [joined[1], *descendants(joined[1])]
        for process in family:
            os.kill(process, signal.SIGSTOP)
        there.wait_for("serve", "lost ")
        for process in family:
            os.kill(process, signal.SIGCONT)
        served = there.finish(server)
    lost = [record["lost"] for record in served.rounds]
    assert lost[2] == [1]
    assert lost[-1] == []
    assert "no answer within 0:25: what comes later is refused" in served.rounds[2]["lost_because"]["1"]
    assert len(served.clients) == 3 * rounds - sum(map(len, lost)), "what it sent late counts in no round"
    journal = Journal(there.folder / "client-1" / "client-1.journal.jsonl").read()
    trained = len([entry for entry in standing(journal) if entry.kind == "train"])
    # Stopped in its training it gives that up; stopped behind it, the round stands in its journal.
    missed = sum(1 in names for names in lost)
    assert rounds - missed <= trained <= rounds - missed + 1


@pytest.mark.xdist_group("served")
def test_a_client_whose_policy_refuses_a_round_is_lost_and_its_owner_alone_sees_why(served: Served) -> None:
    before, last = served.run.rounds[-2:]
    assert (last["round"], last["lost"]) == (WHOLE_ROUNDS + 1, [1])
    why = f"its policy allows {WHOLE_ROUNDS} rounds a day; the next may begin on "
    assert why in served.logs["client-1"]
    for told in (last["lost_because"]["1"], served.logs["serve"]):
        assert "its owner's limit for a day is reached" in told
        assert why not in told
    assert [record["client"] for record in served.run.clients if record["round"] == last["round"]] == [0]
    assert last["adapter_sha256"] != before["adapter_sha256"], "the other client's update counts"


LIAR = """\
import sys
if "fedloom.deployment.client.worker_process" in sys.orig_argv:
    from dataclasses import replace
    from fedloom.deployment import messages
    pack_update = messages.pack_update

    def lie(update, trains_P):
        frame = pack_update(update, trains_P)
        return replace(frame, payload=b"\\xff" * len(frame.payload))

    messages.pack_update = lie
"""


@pytest.mark.slow
def test_a_worker_that_lies_is_refused_and_the_others_make_the_model(tmp_path: Path) -> None:
    """Weights that are no numbers come from a worker."""
    asked = recipe("federation.max_lost_clients=1")
    (tmp_path / "liar").mkdir()
    (tmp_path / "liar" / "sitecustomize.py").write_text(LIAR)
    with federation(tmp_path, secure=True) as there:
        folders = split(asked, tmp_path / "split")
        there.join("client-0", folders[0])
        path = os.pathsep.join([str(tmp_path / "liar"), *filter(None, [os.environ.get("PYTHONPATH")])])
        there.join("client-1", folders[1], PYTHONPATH=path)
        served = there.finish(there.serve(write(asked, tmp_path), "--out", str(there.out)))
    assert [record["lost"] for record in served.rounds] == [[], [1], [1]]
    assert "has a weight that is not finite" in served.rounds[1]["lost_because"]["1"]
    assert [record["client"] for record in served.clients] == [0, 0]
    assert len(set(hashes(served))) == 3


@pytest.mark.slow
def test_a_policy_is_kept_and_its_reason_told_to_its_owner(tmp_path: Path) -> None:
    asked = recipe("training.epochs=3")
    policy = tmp_path / "policy.toml"
    policy.write_text("max_epochs = 2\n")
    with federation(tmp_path) as there:
        server = there.serve(write(asked, tmp_path), "--out", str(there.out), "--wait", "45")
        folders = split(asked, tmp_path / "split")
        there.join("client-0", folders[0])
        log = tmp_path / "client-1.said"
        there.join("client-1", folders[1], "--policy", str(policy), "--log-file", str(log))
        assert server.wait(150) == 2
        assert "WARNING refused   policy.max_epochs: its policy allows 2 epochs a round" in log.read_text()
        assert "its policy allows 2 epochs a round, not 3" in there.said("client-1")
        assert "its owner's policy does not allow it (policy)" in there.said("serve")
    assert not there.out.exists()
