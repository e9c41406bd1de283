"""Memory and time of nodes with several clients: one `fedloom join` for all, one for each, or any number between.

    python bench/node.py [--recipe tiny] [--clients 1 2 4] [--joins 1 3] [--rounds 3] [SECTION.KEY=VALUE ...]

`fedloom serve` asks them over TLS on this machine. Memory is the most that processes had together, as PSS: what they
share is counted once. Processor time is theirs from start to end, loading included. Without `--joins`, all clients
have one, and then one each. One JSON line a case follows the table.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from client import NAMES, cpu_seconds, family, lay_ground, proportional_bytes
from options import open_parser
from scale import NAMES as SERVER
from scale import own_seconds

from fedloom import load_recipe, read_run
from fedloom.deployment.client.joining import read_kit
from fedloom.deployment.keys import approve, request

LOOK_SECONDS = 0.5
TASK = "a task"
CLIENT = {**NAMES, b"fedloom-task\n": TASK}


def measure(recipe_name: str, changes: Sequence[str], clients: int, joins: int, rounds: int) -> dict[str, Any]:
    """One case: so many clients, dealt over so many `fedloom join`."""
    recipe = load_recipe(recipe_name, [f"data.clients={clients}", f"federation.rounds={rounds}", *changes])
    with lay_ground(recipe) as (folder, server, data, start):
        names = [f"client-{number:03}" for number in range(clients)]
        kits = [approve(server, request(name, folder), folder).kit for name in names]
        told = ["--server", str(server), "--out", str(folder / "run"), "--wait", "1500"]
        serve = start("serve", "serve", str(folder / "recipe.toml"), *told)
        confirmed = ["--fingerprint", read_kit(kits[0]).fingerprint]
        own = [["--data", str(part)] for part in data]
        nodes = [range(number, clients, joins) for number in range(joins)]
        there = [
            start(
                f"join-{node[0]}",
                "join",
                *(str(kits[one]) for one in node),
                *(word for one in node for word in own[one]),
                *confirmed,
            )
            for node in nodes
        ]
        began, seen = time.monotonic(), Seen()
        while not serve.ended:
            looked = time.monotonic()
            seen.look([("server", serve.pid, SERVER), *(("clients", join.pid, CLIENT) for join in there)])
            # A look at the memory of hundreds of processes takes a while itself.
            time.sleep(max(LOOK_SECONDS, 10 * (time.monotonic() - looked)))
        seconds = time.monotonic() - began
        finished = read_run(folder / "run")
        parts = ("train_seconds", "aggregate_seconds", "evaluate_seconds")
        said = "".join((folder / f"join-{node[0]}.log").read_text() for node in nodes)
        return {
            "clients": clients,
            "joins": joins,
            "worst_MB": {what: round(most) for what, most in seen.worst.items()},
            "cpu_seconds": {what: round(spent, 1) for what, spent in seen.spent().items()},
            "train_seconds": [round(record["train_seconds"], 2) for record in finished.rounds[1:]],
            "round_seconds": [round(sum(record[part] for part in parts), 2) for record in finished.rounds],
            "seconds": round(seconds, 1),
            "lost": sum(len(record["lost"]) for record in finished.rounds),
            "restarts": Counter(line for line in said.splitlines() if line.startswith("restart ")),
            "load": round(os.getloadavg()[0], 1),
        }


class Seen:
    """Processes that were seen: the most that those of one name had together, and the processor time of each."""

    def __init__(self) -> None:
        self.worst: Counter[str] = Counter()
        self._spent: dict[tuple[str, int], float] = {}

    def look(self, roots: Sequence[tuple[str, int, Mapping[bytes, str]]]) -> None:
        now: Counter[str] = Counter()
        for what, root, known in roots:
            for process, name in family(root, known).items():
                with suppress(OSError):
                    held = proportional_bytes(process) / 1e6
                    now[name] += held
                    now[what] += held
                    # A task is a process that ends soon, whose time its parent has then.
                    if name != TASK:
                        self._spent[name, process] = cpu_seconds(process) if name == "tasks" else own_seconds(process)
        self.worst |= now

    def spent(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for (name, _), seconds in self._spent.items():
            found[name] += seconds
        return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = open_parser(__doc__)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--joins", type=int, nargs="+", default=[])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("changes", nargs="*", default=[])
    chosen = parser.parse_args(arguments)
    print("| clients | `join`s | MB of clients at most | s of a core | s of a round, round 0 first | load |")
    print("|---|---|---|---|---|---|")
    lines = []
    for clients in chosen.clients:
        for joins in chosen.joins or sorted({1, clients}):
            found = measure(chosen.recipe, chosen.changes, clients, joins, chosen.rounds)
            cpu = sum(found["cpu_seconds"].get(name, 0.0) for name in {*CLIENT.values()})
            rounds = ", ".join(map(str, found["round_seconds"]))
            cells = [clients, joins, found["worst_MB"]["clients"], f"{cpu:.1f}", rounds, found["load"]]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
            lines.append(json.dumps(found))
    print("\n".join(["", *lines]))


if __name__ == "__main__":
    main()
