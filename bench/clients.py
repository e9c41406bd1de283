"""Seconds and memory against the number of clients, in one process and over nodes: a few take part in a round, or all.

    python bench/clients.py [10 100 1000 10000] [--nodes 0 2] [--at-once 0] [--rounds 3] [--set SECTION.KEY=VALUE ...]

The recipe `tiny` on made-up documents, three a client; a process a case. As many as `--at-once` says take part in a
round and are scored; with 0, all. Nodes are on this machine, behind a stand-in for ssh. One JSON line a case follows
the table.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from options import open_parser

STAND_IN = """#!/bin/sh
while [ "$1" != "--" ]; do shift; done
shift; echo "$1" >> "${FEDLOOM_ASKED:-/dev/null}"; shift
exec sh -c "exec $*"
"""
"""Program `ssh` that notes the host and runs the command here, as ssh does there: with input and output as pipes."""


def stand_in_for_ssh(folder: Path) -> str:
    """Write a stand-in for ssh, and a `fedloom` that it finds; return the path of programs that begins with them."""
    for name, text in (("ssh", STAND_IN), ("fedloom", f'#!/bin/sh\nexec {sys.executable} -m fedloom "$@"\n')):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def peak_bytes(process: int | str) -> int:
    """Return the most memory that a process has held."""
    (line,) = [line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(line.split()[1])


def children(process: int | str) -> list[int]:
    """Return the numbers of the processes that a process has started."""
    return [int(word) for path in Path(f"/proc/{process}/task").glob("*/children") for word in path.read_text().split()]


def measure(
    clients: int, nodes: int, at_once: int, rounds: int, changed: Sequence[str], folder: Path
) -> dict[str, Any]:
    """One case, in this process and those of its nodes."""
    from fedloom import load_recipe
    from fedloom.experiment.clients import LocalClients
    from fedloom.experiment.run import run
    from fedloom.monitoring.observer import Observer
    from fedloom.records.run import RoundRecord

    words = [f"w{number}" for number in range(5000)]
    generator = random.Random(1)
    rows = (json.dumps({"text": " ".join(generator.choices(words, k=40))}) for _ in range(3 * clients + 50))
    (folder / "documents.jsonl").write_text("\n".join(rows) + "\n")
    changes = {
        "data.source": folder / "documents.jsonl",
        "data.clients": clients,
        "data.documents_per_client": 3,
        "data.client_holdout": 0.34,
        "data.central_holdout": 20,
        "federation.rounds": rounds,
        "federation.fraction": min(1.0, (at_once or clients) / clients),
        "evaluation.clients": min(at_once or clients, clients),
        "training.batch_size": 1,
    }
    os.environ["PATH"] = stand_in_for_ssh(folder)
    recipe = load_recipe("tiny", [*(f"{key}={value}" for key, value in changes.items()), *changed])
    started = time.perf_counter()
    seen: dict[str, Any] = {"until_round_0_seconds": None, "node_peak_bytes": []}

    class Watching(Observer):
        def show_round(self, record: RoundRecord) -> None:
            seen["until_round_0_seconds"] = seen["until_round_0_seconds"] or time.perf_counter() - started
            seen["node_peak_bytes"] = [peak_bytes(child) for child in children("self")]
            print(record["round"], round(time.perf_counter() - started, 1), file=sys.stderr, flush=True)

    names = [f"node-{number}" for number in range(nodes)]
    finished = run(recipe, folder / "run", Watching(), clients=LocalClients(names))
    found = {
        "clients": clients,
        "nodes": nodes,
        "at_once": at_once or clients,
        "run_seconds": time.perf_counter() - started,
        **seen,
        "own_peak_bytes": peak_bytes("self"),
        "folder_bytes": sum(path.stat().st_size for path in (folder / "run").rglob("*") if path.is_file()),
        "load": os.getloadavg()[0],
        "adapter_sha256": finished.rounds[-1]["adapter_sha256"],
    }
    for key in ("train_seconds", "aggregate_seconds", "evaluate_seconds"):
        found[key] = sum(record[key] for record in finished.rounds[1:]) / rounds
    return found


def main() -> None:
    parser = open_parser(__doc__)
    parser.add_argument("clients", type=int, nargs="*", default=[10, 100, 1000, 10_000])
    parser.add_argument("--nodes", type=int, nargs="*", default=[0])
    parser.add_argument("--at-once", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--case", action="store_true", help="one case, in this process")
    options = parser.parse_args()
    if options.case:
        with tempfile.TemporaryDirectory() as folder:
            case = options.clients[0], options.nodes[0], options.at_once, options.rounds, options.set
            return print(json.dumps(measure(*case, Path(folder))))
    heads = "clients", "nodes", "until round 0, s", "a round: train, aggregate, evaluate, s", "whole run, s"
    print(f"| {' | '.join(heads)} | peak MB: its own, of nodes | load |\n|{'---|' * 7}")
    lines = []
    for clients in options.clients:
        for nodes in options.nodes:
            told = ["--nodes", str(nodes), "--at-once", str(options.at_once), "--rounds", str(options.rounds), "--case"]
            command = [sys.executable, __file__, str(clients), *told, "--set", *options.set]
            line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
            found = json.loads(line)
            parts = [found[f"{what}_seconds"] for what in ("train", "aggregate", "evaluate")]
            peaks = [found["own_peak_bytes"], *found["node_peak_bytes"]]
            cells = [
                f"{clients:,}",
                str(nodes),
                f"{found['until_round_0_seconds']:.1f}",
                f"{sum(parts):.2f}: {', '.join(f'{part:.2f}' for part in parts)}",
                f"{found['run_seconds']:.1f}",
                ", ".join(f"{peak / 1e6:.0f}" for peak in peaks),
                f"{found['load']:.0f}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)
            lines.append(line)
    print("\n".join(["", *lines]))
    return None


if __name__ == "__main__":
    main()
