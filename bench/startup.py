"""Seconds from starting Python to an answer: the help, a report, the first training step of `tiny`; slowest imports;
and what it costs to try a model before it is trained.

    python bench/startup.py

Of three runs each, the least. On a machine that does other things too, the processor's seconds tell more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from options import open_parser

RUNS = 3
FIRST_STEP = """
import json, os, sys, tempfile, time
from fedloom.cli import main
from fedloom.host.imports import quick_imports
from fedloom.monitoring.observer import Observer

seen = {}

def mark(what):
    spent = os.times()
    seen.setdefault(what, [time.time() - float(sys.argv[1]), spent.user + spent.system])

mark("the command line imported")
with quick_imports():
    from fedloom.experiment.run import run
from fedloom.recipe.loading import load_recipe
mark("the rest imported")

class Watching(Observer):
    def show_step(self, what, detail):
        mark(what)

    def watch(self, progress):
        mark("first evaluation" if progress.phase == "evaluate" else "first step")
        if progress.phase == "train":
            print(json.dumps(seen), flush=True)
            os._exit(0)

with tempfile.TemporaryDirectory() as folder:
    run(load_recipe("tiny"), folder + "/run", Watching())
"""


def measure(*words: str) -> tuple[float, float]:
    """Return the seconds that a command of `fedloom` takes, and those that a processor worked for it."""
    started, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, "-m", "fedloom", *words], check=True, capture_output=True)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - started, spent


def least(times: list[tuple[float, float]]) -> tuple[float, float]:
    return min(seconds for seconds, _ in times), min(spent for _, spent in times)


def time_first_step() -> dict[str, tuple[float, float]]:
    """Return when each part of a run of `tiny` began, up to its first step: seconds, and a processor's."""
    command = [sys.executable, "-c", FIRST_STEP]
    runs = [
        json.loads(subprocess.run([*command, repr(time.time())], check=True, capture_output=True).stdout)
        for _ in range(RUNS)
    ]
    return {what: least([seen[what] for seen in runs]) for what in runs[0]}


def slowest_imports(count: int = 10) -> list[tuple[str, float]]:
    """Return what a run imports: for each package, the seconds that its own modules take, the longest first."""
    command = [sys.executable, "-X", "importtime", "-c", "import fedloom.experiment.run"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stderr.splitlines()
    seconds: dict[str, float] = {}
    for line in lines:
        own, _, name = line.removeprefix("import time:").split("|")
        if own.strip().isdigit():
            # Of the largest, the parts tell more.
            parts = name.strip().split(".")
            package = ".".join(parts[: 2 if parts[0] in ("torch", "transformers", "peft") else 1])
            seconds[package] = seconds.get(package, 0.0) + int(own) / 1e6
    return sorted(seconds.items(), key=lambda one: -one[1])[:count]


def time_checks(shape: str) -> dict[str, float]:
    """Return the seconds of loading a random model, of trying what is taken for granted of it, and of a training step.

    The step is one of one client with 4 sequences of 128 tokens, forward and backward.
    """
    import torch

    from fedloom.experiment.building import load_adapted_model
    from fedloom.model.source import open_model
    from fedloom.recipe.loading import load_recipe
    from fedloom.training.assumptions import check_model, check_repeatable
    from fedloom.training.own_randomness import check_own_dropout, check_own_randomness

    recipe = load_recipe("tiny", [f"model.source=random:{shape}", "model.dtype=float32"])
    started = time.perf_counter()
    adapted = load_adapted_model(recipe, open_model(recipe.model.source))
    loaded = time.perf_counter() - started
    tokens_BT = torch.randint(200, (4, 128))

    def step() -> None:
        adapted.logits(tokens_BT).square().mean().backward()

    def check() -> None:
        for tried in (check_model, check_repeatable, check_own_randomness, check_own_dropout):
            tried(adapted, recipe.data.max_length)

    def least_of(work: Callable[[], None]) -> float:
        times = []
        for _ in range(RUNS):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return min(times)

    return {"loading": loaded, "checks": least_of(check), "a step": least_of(step)}


def main() -> None:
    open_parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = str(Path(folder) / "run")
        measure("run", "tiny", "--out", run)
        commands = {words: least([measure(*words) for _ in range(RUNS)]) for words in (("--help",), ("report", run))}
    print("| | seconds | processor seconds |\n|---|---|---|")
    for words, (seconds, spent) in commands.items():
        print(f"| fedloom {words[0]} | {seconds:.2f} | {spent:.2f} |")
    for what, (seconds, spent) in time_first_step().items():
        print(f"| fedloom run tiny: {what} | {seconds:.2f} | {spent:.2f} |")
    print("\n| shape | loading, s | checks, s | a step, s | checks in steps |\n|---|---|---|---|---|")
    for shape in ("tiny-llama", "smollm2-135m", "opt-350m"):
        took = time_checks(shape)
        row = (took["loading"], took["checks"], took["a step"], took["checks"] / took["a step"])
        print(f"| {shape} | {' | '.join(f'{value:.2f}' for value in row)} |")
    print("\n| import, with -X importtime | seconds of its own |\n|---|---|")
    for package, seconds in slowest_imports():
        print(f"| {package} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
