"""A server that stays, with Flower, as docs/deploy.md has its operator type it.

Three runs, a client that is added after the first, a kill in the second, a page, notices, and a backup that another
machine goes on from.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from support.federation_here import SECONDS, Federation, confirmed, federation, split, tiny, wait_until
from support.workers_here import LinkHere, Owner, serve_here

from fedloom.deployment.processes import free_port
from fedloom.deployment.queue import Queue
from fedloom.deployment.server.nginx import find_nginx
from fedloom.deployment.systemd import write_units
from fedloom.recipe.loading import recipe_to_toml
from fedloom.records.run import read_run

GUIDE = Path(__file__).parents[2] / "docs" / "deploy.md"
SECTION = GUIDE.read_text(encoding="utf-8").partition("## As services")[2].partition("\n## ")[0]
CLIENTS = ("alice", "bob", "carol")
RUNS = {
    "first": ("data.clients=2", "federation.rounds=2"),
    "second": ("data.clients=3", "federation.rounds=4"),
    "third": ("data.clients=3", "federation.rounds=2", "seed=8"),
}
ELSEWHERE = ("data.clients=3", "federation.rounds=1", "name=fourth")
TELL_ME = "#!/bin/sh\necho $FEDLOOM_STATE $FEDLOOM_NAME >> told\n"


def typed() -> dict[str, list[str]]:
    """Read what the guide has typed as the service's user, by what it does."""
    lines = re.findall(r"^runuser -u fedloom -- fedloom ((?:provision )?(\w+)[^#\n]*)", SECTION, re.MULTILINE)
    return {what: words.split() for words, what in lines}


class Machine:
    """Machine of a server: its folder, and what is typed and started there."""

    def __init__(self, folder: Path, there: Federation) -> None:
        self.folder, self._there = folder, there
        self.page, self.metrics = free_port(), free_port()
        self.queue = Queue(folder / "fedloom-server")
        folder.mkdir()
        (folder / "tell-me").write_text(TELL_ME)
        (folder / "tell-me").chmod(0o755)

    def type(self, what: str, *more: str, instead: Mapping[str, str] | None = None) -> str:
        """Type a command of the guide's, with other names in it and more words behind, and return what it says."""
        return type_in(self.folder, what, *more, instead=instead)

    def serve(self, units: Path) -> "subprocess.Popen[bytes]":
        """Start the server as its unit does, with the options that the guide has."""
        (line,) = re.findall(r"^ExecStart=(.+)", (units / "fedloom-serve.service").read_text(), re.MULTILINE)
        (options,) = re.findall(r"FEDLOOM_OPTIONS=(.+)' > /etc/fedloom/serve.env", SECTION)
        words = line.replace("$FEDLOOM_OPTIONS", options.replace("8080", str(self.page))).split()
        more = ("--metrics", str(self.metrics), "--port", str(self._there.inner))
        assert words[:3] == [sys.executable, "-m", "fedloom"]
        return self._there.start(f"serve-{self.folder.name}", *words[3:], *more, folder=self.folder)

    def shown(self) -> dict[str, Any]:
        """Return what the page shows, asked for as the address that was said last has it."""
        address, token = re.findall(r"^page +(http://\S+/)#(\S+)", self.said(), re.MULTILINE)[-1]
        asked = Request(f"{address}run.json", headers={"Authorization": f"Bearer {token}"})
        with urlopen(asked, timeout=SECONDS) as answer:
            told: dict[str, Any] = json.load(answer)
        return told

    def measured(self) -> str:
        with urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=SECONDS) as answer:
            return str(answer.read().decode())

    def said(self) -> str:
        return self._there.said(f"serve-{self.folder.name}")

    def states(self) -> list[str]:
        return [entry.state for entry in self.queue.read()[0]]

    def wait_for(self, states: list[str]) -> None:
        wait_until(lambda: self.states() == states or "failed" in self.states(), str(states))
        assert self.states() == states, self.type("runs") + self.said()


def type_in(folder: Path, what: str, *more: str, instead: Mapping[str, str] | None = None) -> str:
    words = typed()[what]
    for shown, name in (instead or {}).items():
        words = [word.replace(shown, name) for word in words]
    command = [sys.executable, "-m", "fedloom", *words, *more]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_guides_server_stays_for_three_runs_and_goes_to_another_machine(tmp_path: Path) -> None:
    recipes = {name: tiny(*words, f"name={name}") for name, words in RUNS.items()}
    data = dict(zip(CLIENTS, split(recipes["second"], tmp_path / "split"), strict=True))
    write_units(tmp_path / "units")
    with federation(tmp_path) as there:
        server = Machine(tmp_path / "machine", there)

        def submit(name: str) -> None:
            (server.folder / f"{name}.toml").write_text(recipe_to_toml(recipes[name]))
            server.type("submit", "--out", f"runs/{name}", instead={"first": name})

        def come(name: str) -> "subprocess.Popen[bytes]":
            folder = tmp_path / name
            folder.mkdir()
            type_in(folder, "request", instead={"alice": name})
            shutil.copy(folder / f"{name}.request", server.folder)
            server.type("approve", instead={"alice": name})
            kit = Path(shutil.copy(server.folder / f"{name}.kit", folder))
            words = ("join", kit.name, *confirmed(kit), "--data", str(data[name]))
            return there.start(name, *words, folder=folder)

        # On the first day.
        host = "127.0.0.2" if find_nginx() else "localhost"
        server.type("init", "--port", str(there.port), instead={"fed.example.org": host})
        service = server.serve(tmp_path / "units")
        clients = [come("alice"), come("bob")]
        submit("first")
        server.wait_for(["done"])
        wait_until(lambda: server.shown()["state"] == "waiting", "the page without a run")
        assert [run["name"] for run in server.shown()["queue"]] == ["first"]
        assert 'fedloom_queue{state="done"} 1.0' in server.measured()

        # On the second: nothing is started anew.
        submit("second")
        submit("third")
        clients.append(come("carol"))  # whom the second waits for: it is not over before it is looked at
        rounds = server.folder / "runs" / "second" / "rounds.jsonl"
        wait_until(lambda: rounds.exists() and rounds.read_bytes().count(b"\n") >= 2, "a round of the second run")
        assert {one["name"] for one in server.shown()["clients"]} == set(CLIENTS)
        service.kill()
        service.wait(SECONDS)
        assert server.states() == ["done", "running", "waiting"]
        service = server.serve(tmp_path / "units")
        server.wait_for(["done"] * 3)

        listed = json.loads(server.type("runs", "--json"))
        assert listed["served"]
        assert [(run["name"], run["round"], run["rounds"]) for run in listed["runs"]] == [
            ("first", 2, 2),
            ("second", 4, 4),
            ("third", 2, 2),
        ]
        server.type("backup")
        end(service)
        assert not json.loads(server.type("runs", "--json"))["served"]
        told = (server.folder / "told").read_text().splitlines()
        assert [line for line in told if line.startswith("done")] == ["done first", "done second", "done third"]

        # On another machine, which its name leads to from now on.
        other = Machine(tmp_path / "other", there)
        shutil.move(server.folder / "fedloom-server.backup", other.folder)
        restored = other.type("restore")
        assert all(name in restored for name in CLIENTS)
        other.type("runs")
        (other.folder / "fourth.toml").write_text(recipe_to_toml(tiny(*ELSEWHERE)))
        other.type("submit", instead={"first": "fourth"})
        service = other.serve(tmp_path / "units")
        other.wait_for(["done"] * 4)
        assert [client.poll() for client in clients] == [None] * 3, "one join serves them all"
        end(service)

    compare_alone(server.folder / "runs", recipes, data, tmp_path / "alone")


def end(service: "subprocess.Popen[bytes]") -> None:
    service.send_signal(signal.SIGTERM)
    assert service.wait(SECONDS) == 143


def compare_alone(runs: Path, recipes: Mapping[str, Any], data: Mapping[str, Path], folder: Path) -> None:
    """Compare each run's adapters with those of the run that it is alone, without Flower between."""
    for name, recipe in recipes.items():
        held = {client: Owner(data[client]) for client in CLIENTS[: recipe.data.clients]}
        alone = serve_here(recipe, LinkHere(held, folder / name), folder / f"{name}-alone")
        served = read_run(runs / name)
        assert [one["adapter_sha256"] for one in served.rounds] == [one["adapter_sha256"] for one in alone.rounds], name
        assert served.plan["elsewhere"] == sorted(held)


def test_the_guide_has_each_command_of_the_story() -> None:
    assert list(typed()) == ["init", "approve", "submit", "runs", "stop", "request", "backup", "restore"]
