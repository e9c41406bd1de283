"""A server that stays, with Flower: three runs, a client that is added after the first, a kill in the second."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from support.federation_here import SECONDS, federation, split, tiny, wait_until
from support.workers_here import LinkHere, Owner, serve_here

from fedloom.deployment.queue import Queue
from fedloom.deployment.server.nginx import find_nginx
from fedloom.recipe.loading import recipe_to_toml
from fedloom.records.run import read_run

RUNS = {
    "first": ("data.clients=2", "federation.rounds=2"),
    "second": ("data.clients=3", "federation.rounds=4"),
    "third": ("data.clients=3", "federation.rounds=2", "seed=8"),
}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_three_runs_a_client_more_and_a_kill_make_the_adapters_of_three_single_runs(tmp_path: Path) -> None:
    recipes = {name: tiny(*words, f"name={name}") for name, words in RUNS.items()}
    data = split(recipes["second"], tmp_path / "split")
    notify = f"sh -c 'echo $FEDLOOM_STATE $FEDLOOM_NAME >> {tmp_path}/told'"
    with federation(tmp_path, secure=True, host="127.0.0.2" if find_nginx() else "localhost") as there:
        assert there.server
        queue = Queue(there.server)

        def fedloom(*words: str) -> str:
            command = [sys.executable, "-m", "fedloom", *words, "--server", str(there.server)]
            return subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS).stdout

        def submit(name: str) -> None:
            (tmp_path / f"{name}.toml").write_text(recipe_to_toml(recipes[name]))
            fedloom("submit", str(tmp_path / f"{name}.toml"), "--out", str(tmp_path / name))

        def serve() -> subprocess.Popen[bytes]:
            words = ("--server", str(there.server), "--port", str(there.inner), "--notify", notify)
            return there.start("serve", "serve", *words)

        def states() -> list[str]:
            return [entry.state for entry in queue.read()[0]]

        submit("first")
        service = serve()
        clients = [there.join(f"client-{number}", data[number]) for number in range(2)]
        wait_until(lambda: states() == ["done"], "the first run")

        # On the second day: nothing is started anew.
        clients.append(there.join("client-2", data[2]))
        submit("second")
        submit("third")
        rounds = tmp_path / "second" / "rounds.jsonl"
        wait_until(lambda: rounds.exists() and rounds.read_bytes().count(b"\n") >= 2, "a round of the second run")
        service.kill()
        service.wait(SECONDS)
        assert states() == ["done", "running", "waiting"]
        service = serve()
        wait_until(lambda: states() == ["done"] * 3 or "failed" in states(), "the other runs")
        assert states() == ["done"] * 3, fedloom("runs") + there.said("serve")
        assert [client.poll() for client in clients] == [None] * 3, "one join serves them all"

        listed = json.loads(fedloom("runs", "--json"))
        assert listed["served"]
        assert [(run["name"], run["round"], run["rounds"]) for run in listed["runs"]] == [
            ("first", 2, 2),
            ("second", 4, 4),
            ("third", 2, 2),
        ]
        service.send_signal(signal.SIGTERM)
        assert service.wait(SECONDS) == 143
        assert not json.loads(fedloom("runs", "--json"))["served"]
        told = (tmp_path / "told").read_text().splitlines()
        assert [line for line in told if line.startswith("done")] == ["done first", "done second", "done third"]

    for name, recipe in recipes.items():
        held = {f"client-{number}": Owner(data[number]) for number in range(recipe.data.clients)}
        alone = serve_here(recipe, LinkHere(held, tmp_path / "alone" / name), tmp_path / f"{name}-alone")
        served = read_run(tmp_path / name)
        assert [one["adapter_sha256"] for one in served.rounds] == [one["adapter_sha256"] for one in alone.rounds], name
        assert served.plan["elsewhere"] == sorted(held)
