"""Memory and time of one node with several clients: one `fedloom join` for all, or one for each.

    python bench/node.py [--recipe tiny] [--clients 1 2 4] [--rounds 3] [SECTION.KEY=VALUE ...]

`fedloom serve` asks them over TLS on this machine. Memory is the most that the clients' processes had together, as PSS:
what processes share is counted once. Processor time is theirs from start to end, loading included. One JSON line a case
follows the table.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress

from client import cpu_seconds, family, lay_ground, proportional_bytes

from fedloom import load_recipe, read_run
from fedloom.deployment.client.joining import read_kit
from fedloom.deployment.keys import approve, request

LOOK_SECONDS = 0.5


def measure(
    recipe_name: str, changes: Sequence[str], clients: int, rounds: int, *, together: bool
) -> dict[str, object]:
    """One case: clients of one `fedloom join`, or each of its own."""
    recipe = load_recipe(recipe_name, [f"data.clients={clients}", f"federation.rounds={rounds}", *changes])
    with lay_ground(recipe) as (folder, server, data, start):
        names = [f"client-{number}" for number in range(clients)]
        kits = [approve(server, request(name, folder), folder).kit for name in names]
        told = ["--server", str(server), "--out", str(folder / "run"), "--wait", "600"]
        serve = start("serve", "serve", str(folder / "recipe.toml"), *told)
        confirmed = ["--fingerprint", read_kit(kits[0]).fingerprint]
        own = [["--data", str(part)] for part in data]
        nodes = [[number] for number in range(clients)] if not together else [[*range(clients)]]
        joins = [
            start(
                f"join-{node[0]}",
                "join",
                *(str(kits[one]) for one in node),
                *(word for one in node for word in own[one]),
                *confirmed,
            )
            for node in nodes
        ]
        began, worst, spent = time.monotonic(), 0.0, 0.0
        while not serve.ended:
            found = now = 0.0
            for process in [one for join in joins for one in family(join.pid)]:
                with suppress(OSError):
                    found += proportional_bytes(process) / 1e6
                    now += cpu_seconds(process)  # with that of those which have ended, and were its own
            worst, spent = max(worst, found), max(spent, now)
            time.sleep(LOOK_SECONDS)
        seconds = time.monotonic() - began
        finished = read_run(folder / "run")
        return {
            "clients": clients,
            "joins": len(nodes),
            "worst_MB": round(worst),
            "cpu_seconds": round(spent, 1),
            "train_seconds": [round(record["train_seconds"], 2) for record in finished.rounds[1:]],
            "seconds": round(seconds, 1),
            "load": round(os.getloadavg()[0], 1),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("changes", nargs="*", default=[])
    chosen = parser.parse_args(arguments)
    print("| clients | `join`s | MB of all at most | s of a core | s of training a round | load |")
    print("|---|---|---|---|---|---|")
    lines = []
    for clients in chosen.clients:
        for together in (True, False)[: 1 if clients == 1 else 2]:
            found = measure(chosen.recipe, chosen.changes, clients, chosen.rounds, together=together)
            keys = ("clients", "joins", "worst_MB", "cpu_seconds", "train_seconds", "load")
            cells = [", ".join(map(str, one)) if isinstance(one := found[key], list) else str(one) for key in keys]
            print(f"| {' | '.join(cells)} |", flush=True)
            lines.append(json.dumps(found))
    print("\n".join(["", *lines]))


if __name__ == "__main__":
    main()
