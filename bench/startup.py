"""Seconds from starting Python to the first training step of the recipe `tiny`, and where they go.

python bench/startup.py
"""

from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import json, sys, tempfile, time
started = time.perf_counter()
import torch
seen = {"torch": time.perf_counter() - started}
import transformers, transformers.models.auto.modeling_auto
seen["transformers"] = time.perf_counter() - started
import peft
seen["peft"] = time.perf_counter() - started
from fedloom import load_recipe, run
from fedloom.monitoring.observer import Observer
import fedloom.experiment.run
seen["fedloom"] = time.perf_counter() - started

class Watching(Observer):
    def show_step(self, what, detail):
        seen[what] = time.perf_counter() - started

    def watch(self, progress):
        if progress.phase == "train":
            seen.setdefault("first step", time.perf_counter() - started)

with tempfile.TemporaryDirectory() as folder:
    run(load_recipe("tiny"), folder + "/run", Watching())
print(json.dumps(seen))
"""


def main() -> None:
    command = [sys.executable, "-c", SCRIPT]
    runs = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(3)]
    best = min(runs, key=lambda seen: seen["first step"])
    print("| | seconds since the start |\n|---|---|")
    for what, seconds in best.items():
        print(f"| {what} | {seconds:.1f} |")
    print(json.dumps(best))


if __name__ == "__main__":
    main()
