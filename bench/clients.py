"""Seconds and memory against the number of clients: 10 of them take part in a round, 10 are scored.

    python bench/clients.py [10 100 1000 10000]

The recipe `tiny` on made-up documents, three a client; a process a case. One JSON line a case follows the table.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def measure(clients: int, folder: Path) -> dict[str, float]:
    """One case, in this process."""
    from fedloom import load_recipe, run
    from fedloom.monitoring.observer import Observer

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
        "federation.fraction": 10 / clients,
        "evaluation.clients": 10,
        "training.batch_size": 1,
    }
    recipe = load_recipe("tiny", [f"{key}={value}" for key, value in changes.items()])
    started = time.perf_counter()
    finished = run(recipe, folder / "run", Observer())
    keys = ("train_seconds", "aggregate_seconds", "evaluate_seconds")
    rounds = [sum(record[key] for key in keys) for record in finished.rounds[1:]]
    return {
        "clients": clients,
        "run_seconds": time.perf_counter() - started,
        "round_seconds": sum(rounds) / len(rounds),
        "ram_peak_bytes": max(max(record["ram_peak_bytes"].values()) for record in finished.rounds),
    }


def main() -> None:
    if sys.argv[1:2] == ["--case"]:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(int(sys.argv[2]), Path(folder))))
        return
    print("| clients | seconds a round | whole run, s | peak RAM |\n|---|---|---|---|")
    lines = []
    for clients in map(int, sys.argv[1:] or (10, 100, 1000, 10_000)):
        command = [sys.executable, __file__, "--case", str(clients)]
        line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        found = json.loads(line)
        seconds, whole, peak = found["round_seconds"], found["run_seconds"], found["ram_peak_bytes"] / 1e6
        print(f"| {clients:,} | {seconds:.2f} | {whole:.1f} | {peak:.0f} MB |", flush=True)
        lines.append(line)
    print("\n".join(["", *lines]))


if __name__ == "__main__":
    main()
