"""What a server takes by the number of its clients: processor seconds, memory, bytes and requests.

    python bench/scale.py [--clients 10 30 100] [--recipe tiny] [--rounds 8] [--runs 3] [--rest 30]

`fedloom serve` that stays, with nginx, Flower's SuperLink and a queue of runs of the recipe; the clients are those of
`scripted.py`, in one process, and hold no model. All but one come first, for the time at rest; then the last, and the
runs, one after another. Seconds are the processor's: others use the machine too. Memory is PSS. One JSON line a number
of clients follows the table, and each run's end writes one to the standard error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from client import family, proportional_bytes
from options import open_parser

from fedloom.deployment.processes import Child, private_folder

NAMES = {b"\0superlink": "SuperLink", b"server-tasks": "server app", b"nginx": "nginx", b"\0serve\0": "serve"}
"""Names of a server's processes, by a word of their command lines."""
PARTS = ("SuperLink", "serve", "server app", "nginx", "clients")
LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Look:
    """Look at a server's processes: seconds of a processor and bytes of memory by their names, and what was asked."""

    at: float
    cpu: Mapping[str, float]
    memory: Mapping[str, float]
    asked: Mapping[str, Mapping[str, int]]


class Server:
    """`fedloom serve` with all that it starts, and the clients' account of what they asked it."""

    def __init__(self, child: Child, clients: int, asked: Path) -> None:
        self._child, self._clients, self._asked = child, clients, asked
        self._ended: Counter[str] = Counter()
        self._last: dict[tuple[int, str], float] = {}

    def look(self) -> Look:
        now: dict[tuple[int, str], float] = {}
        memory: Counter[str] = Counter()
        for process, name in [*family(self._child.pid, NAMES).items(), (self._clients, "clients")]:
            with suppress(OSError):
                now[process, name] = own_seconds(process)
                memory[name] += proportional_bytes(process)
        for gone in self._last.keys() - now.keys():
            self._ended[gone[1]] += self._last[gone]
        self._last = now
        cpu = Counter(self._ended)
        for (_, name), seconds in now.items():
            cpu[name] += seconds
        asked = json.loads(self._asked.read_text(encoding="utf-8")) if self._asked.exists() else {}
        return Look(time.monotonic(), cpu, memory, asked)


def own_seconds(process: int) -> float:
    """Return the processor seconds of a process without those of its children that have ended."""
    words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, words[11:13])) / os.sysconf("SC_CLK_TCK")


def between(before: Look, after: Look) -> dict[str, Any]:
    """Return what happened between two looks: seconds, processor seconds by part, requests and bytes by path."""
    counts = {
        what: {path: count - before.asked.get(what, {}).get(path, 0) for path, count in paths.items()}
        for what, paths in after.asked.items()
    }
    cpu = {part: after.cpu.get(part, 0.0) - before.cpu.get(part, 0.0) for part in PARTS}
    return {"seconds": after.at - before.at, "cpu": cpu, **counts}


def make_folder(folder: Path, clients: int, name: str, rounds: int) -> Path:
    """Write a server's keys, the kits and facts of its clients, and the recipe; return the server's folder."""
    from deployment import make_facts, provision
    from many import HOST
    from scripted import FACTS

    from fedloom import load_recipe
    from fedloom.experiment.building import load_adapted_model, open_source
    from fedloom.experiment.session import hash_base
    from fedloom.recipe.loading import recipe_to_toml

    security, _ = provision(folder, HOST, [f"client-{number:04}" for number in range(clients)])
    recipe = load_recipe(name, [f"data.clients={clients}", f"federation.rounds={rounds}"])
    (folder / "recipe.toml").write_text(recipe_to_toml(recipe), encoding="utf-8")
    base = hash_base(load_adapted_model(recipe, open_source(recipe, lambda words: None)))
    (folder / FACTS).write_text(json.dumps({**make_facts("scripted"), "base": base}), encoding="utf-8")
    return security.folder


def measure(clients: int, name: str, rounds: int, runs: int, rest_seconds: float) -> dict[str, Any]:
    """Measure a server with so many clients."""
    from scripted import ALL, ASKED

    with private_folder() as folder:
        server, log = make_folder(folder, clients, name, rounds), folder / "serve.log"
        fedloom = [sys.executable, "-m", "fedloom"]
        outs = [folder / f"run-{number}" for number in range(runs)]
        for out in outs:
            words = [*fedloom, "submit", str(folder / "recipe.toml"), "--server", str(server), "--out", str(out)]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        words = [sys.executable, str(Path(__file__).parent / "scripted.py"), str(folder)]
        found: dict[str, Any] = {"clients": clients, "recipe": name, "runs": []}
        with ExitStack() as stack:
            there = Child(words, folder / "clients.log", {**os.environ})
            stack.callback(there.end)
            child = Child([*fedloom, "serve", "--server", str(server), "--wait", "3000"], log, {**os.environ})
            stack.callback(child.end)
            watched = Server(child, there.pid, folder / ASKED)
            wait(child, log, lambda: log.read_text().count("\nclient ") >= clients - 1)
            time.sleep(2)
            before = watched.look()
            time.sleep(rest_seconds)
            found["rest"] = {**between(before, now := watched.look()), "memory": now.memory}
            (folder / ALL).touch()
            for out in outs:
                found["runs"].append(watch_run(child, log, watched, out, rounds))
                # What takes long may be cut off.
                print(json.dumps({**found, "of": runs, "load": os.getloadavg()}), file=sys.stderr, flush=True)
    return found


def watch_run(child: Child, log: Path, watched: Server, out: Path, rounds: int) -> dict[str, Any]:
    """Look at a run's processes whenever one of its rounds is complete, until all are.

    Its first seconds are those since the run before was complete, or since the last client came.
    """
    begun, looks, records = time.monotonic(), [], out / "rounds.jsonl"
    for complete in range(rounds + 1):
        wait(child, log, lambda least=complete: records.exists() and records.read_bytes().count(b"\n") > least)
        looks.append(watched.look())
    told = [json.loads(line) for line in records.read_text().splitlines()]
    return {
        "until_round_0_seconds": looks[0].at - begun,
        "all_rounds": between(looks[0], looks[-1]),
        "round_seconds": [after.at - before.at for before, after in pairwise(looks)],
        "round_cpu": [between(before, after)["cpu"] for before, after in pairwise(looks)],
        "memory": [look.memory for look in looks],
        "bytes": {key: told[-1][key] for key in ("bytes_up", "bytes_down")},
        "lost": sum(len(record["lost"]) for record in told),
    }


def wait(child: Child, log: Path, happened: Any) -> None:
    while not happened():
        assert not child.ended or happened(), log.read_text()[-2000:]
        time.sleep(LOOK_SECONDS)


def show(found: Mapping[str, Any]) -> None:
    """Print the rows of one number of clients."""
    runs, rest = found["runs"], found["rest"]
    seconds = [one for run in runs for one in run["round_seconds"]]
    rounds, clients = len(seconds), found["clients"]
    at_rest = sum(rest["requests"].values()) / rest["seconds"] / (clients - 1)
    in_rounds = sum(sum(run["all_rounds"]["requests"].values()) for run in runs) / rounds / clients
    rows = {
        "a round, median and worst, s": f"{median(seconds):.2f}, {max(seconds):.2f}",
        "rounds a minute": f"{60 * rounds / sum(seconds):.1f}",
        "requests a client: a second at rest, a round": f"{at_rest:.2f}, {in_rounds:.1f}",
        "until round 0, s": ", ".join(f"{run['until_round_0_seconds']:.0f}" for run in runs),
        "lost": sum(run["lost"] for run in runs),
    }
    for part in PARTS:
        cpu = sum(run["all_rounds"]["cpu"][part] for run in runs) / rounds
        first, last = (mean(run["memory"][place].get(part, 0) for run in runs) / 1e6 for place in (0, -1))
        rows[f"{part}: of a core at rest; s a round; MB at rest, in round 0, at the end"] = (
            f"{100 * rest['cpu'][part] / rest['seconds']:.1f} %; {cpu:.3f}; "
            f"{rest['memory'].get(part, 0) / 1e6:.0f}, {first:.0f}, {last:.0f}"
        )
    print(f"\n| {clients} clients, `{found['recipe']}` | |\n|---|---|")
    for what, value in rows.items():
        print(f"| {what} | {value} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = open_parser(__doc__)
    parser.add_argument("--clients", type=int, nargs="*", default=[10, 30, 100])
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rest", metavar="SECONDS", type=float, default=30.0)
    options = parser.parse_args(arguments)
    lines = []
    for clients in options.clients:
        found = measure(clients, options.recipe, options.rounds, options.runs, options.rest)
        show(found)
        lines.append(json.dumps(found))
    print("\n".join(["", *lines]))


if __name__ == "__main__":
    main()
