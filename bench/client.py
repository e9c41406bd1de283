"""Memory and processor time of one client of a deployment, by process: at rest, and in a round of the recipe tiny.

    python bench/client.py [--seconds 20]

`fedloom serve` waits for two clients over TLS; the first has come and rests, and has let its model go; then the second
comes, for three rounds. Memory is PSS: what processes share is counted once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from options import open_parser

from fedloom import load_recipe
from fedloom.deployment.client.documents import write_splits
from fedloom.deployment.client.joining import read_kit
from fedloom.deployment.keys import approve, init, request
from fedloom.deployment.processes import Child, free_port, private_folder
from fedloom.monitoring.observer import Observer
from fedloom.recipe.loading import recipe_to_toml
from fedloom.recipe.recipe import Recipe

TICKS = os.sysconf("SC_CLK_TCK")
NAMES = {
    b"client.worker": "worker",
    b"client-tasks\n": "tasks",
    b"fedloom-task\n": "tasks",
    b"\0supernode": "SuperNode",
    b"\0join": "join",
}
"""Names of a client's processes, by a word of their names and command lines; the first that fits counts."""
SMALL_MB = 50.0
"""Memory of a worker that holds no model, at most."""


def family(process: int, known: Mapping[bytes, str] = NAMES) -> dict[int, str]:
    """Name a process and all that it started, by their numbers: by the first word that is `known`."""
    found, names = [process], {}
    while found:
        one = found.pop()
        try:
            told = b"".join(Path(f"/proc/{one}/{what}").read_bytes() for what in ("comm", "cmdline"))
            for thread in Path(f"/proc/{one}/task").glob("*/children"):
                found += [int(word) for word in thread.read_text().split()]
        except OSError:  # it has just ended
            continue
        names[one] = next((name for word, name in known.items() if word in told), "other")
    return names


def proportional_bytes(process: int) -> int:
    """Memory of a process, with its share of what it shares."""
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return 1024 * int(line.split()[1])
    return 0


def cpu_seconds(process: int) -> float:
    words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, words[11:15])) / TICKS  # with children that have ended


def memory(process: int) -> dict[str, float]:
    """Memory of a client's processes, MB by name."""
    found: dict[str, float] = {}
    for one, name in family(process).items():
        try:
            found[name] = found.get(name, 0.0) + proportional_bytes(one) / 1e6
        except OSError:
            continue
    return found


def wait_for(log: Path, word: str) -> None:
    until = time.monotonic() + 300
    while not log.is_file() or word not in log.read_text():
        assert time.monotonic() < until, f"{word!r} never came: {log.read_text() if log.is_file() else 'no log'}"
        time.sleep(0.2)


class Ground(NamedTuple):
    """What a deployment on this machine begins with."""

    folder: Path
    """Folder with `recipe.toml`, and the log of each command that is started."""
    server: Path
    data: Sequence[Path]
    """Documents of each client."""
    start: Callable[..., Child]
    """Start a command: the name of its log, and its words behind fedloom."""


@contextmanager
def lay_ground(recipe: Recipe) -> Iterator[Ground]:
    """Set a server up and deal a recipe's documents out, until the block ends, and with it all that was started."""
    with ExitStack() as stack:
        folder = stack.enter_context(private_folder())
        server = init(folder / "server", "localhost", free_port()).folder
        (folder / "recipe.toml").write_text(recipe_to_toml(recipe))
        data = write_splits(recipe, folder / "split", Observer())

        def start(name: str, *words: str) -> Child:
            child = Child([sys.executable, "-m", "fedloom", *words], folder / f"{name}.log", {**os.environ})
            stack.callback(child.end)
            return child

        yield Ground(folder, server, data, start)


def measure(seconds: float) -> dict[str, object]:
    with lay_ground(load_recipe("tiny", ["data.clients=2", "federation.rounds=3"])) as (folder, server, data, start):

        def join(name: str, documents: Path) -> Child:
            kit = approve(server, request(name, folder), folder).kit
            return start(name, "join", str(kit), "--fingerprint", read_kit(kit).fingerprint, "--data", str(documents))

        recipe = str(folder / "recipe.toml")
        serve = start("serve", "serve", recipe, "--server", str(server), "--out", str(folder / "run"))
        alice = join("alice", data[0])
        wait_for(folder / "serve.log", "client    alice: ")
        begun, came = memory(alice.pid), time.monotonic()
        while memory(alice.pid).get("worker", 0.0) > SMALL_MB:
            assert time.monotonic() - came < 900, "the worker holds its model"
            time.sleep(1)
        rested = time.monotonic() - came
        time.sleep(3)
        before = {one: (name, cpu_seconds(one)) for one, name in family(alice.pid).items()}
        started = time.monotonic()
        time.sleep(seconds)
        spent = time.monotonic() - started
        cpu = {name: round((cpu_seconds(one) - then) / spent, 4) for one, (name, then) in before.items()}
        rest = memory(alice.pid)
        join("bob", data[1])
        worst: dict[str, float] = {}
        while not serve.ended:
            now = memory(alice.pid)
            if sum(now.values()) > sum(worst.values()):
                worst = now
            time.sleep(0.1)
        return {"waiting_MB": begun, "rest_MB": rest, "round_MB": worst, "rest_cores": cpu, "rested_after": rested}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = open_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    found = measure(parser.parse_args(arguments).seconds)
    parts = [found[part] for part in ("rest_MB", "waiting_MB", "round_MB", "rest_cores")]
    rest, waiting, worst, cpu = (part for part in parts if isinstance(part, dict))
    print("| | at rest, MB | asked a moment ago, MB | in a round, MB | at rest, of a core |\n|---|---|---|---|---|")
    for name in rest:
        told = [f"{part.get(name, 0):.0f}" for part in (rest, waiting, worst)]
        print(f"| {name} | {' | '.join(told)} | {100 * cpu.get(name, 0):.1f} % |")
    told = [f"{sum(part.values()):.0f}" for part in (rest, waiting, worst)]
    print(f"| together | {' | '.join(told)} | {100 * sum(cpu.values()):.1f} % |")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
