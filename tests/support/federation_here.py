"""A federation of this machine's processes, started as people start it; all of them end with the test."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from fedloom.deployment import keys
from fedloom.deployment.processes import free_port
from fedloom.experiment.run import run
from fedloom.recipe.loading import load_recipe
from fedloom.recipe.recipe import Recipe
from fedloom.records.run import Run, read_run

SECONDS = 400.0
"""That any wait of a test takes at the most."""
QUICK = ["training.engine=reference", "model.dtype=float32", "data.documents_per_client=10"]


def tiny(*overrides: str) -> Recipe:
    """`tiny` on the engine that is the same everywhere."""
    return load_recipe("tiny", [*QUICK, *overrides])


class Federation:
    """A server and its clients, each a process of its own, with what they say in files."""

    def __init__(self, folder: Path, stack: ExitStack, *, secure: bool, host: str = "localhost") -> None:
        self.folder, self._stack = folder, stack
        self.port, self.inner = free_port(), free_port()
        self.out = folder / "served"
        self.server = folder / "server" if secure else None
        if self.server:
            keys.init(self.server, host, self.port)

    def start(
        self, name: str, *words: str, before: Sequence[str] = (), folder: Path | None = None, **environment: str
    ) -> subprocess.Popen[bytes]:
        """One `fedloom` command, after the words of one that it is to be run by, in a folder."""
        command = [*before, sys.executable, "-m", "fedloom", *words]
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env={**os.environ, **environment})
        self._stack.callback(end, process)
        return process

    def serve(self, recipe: str, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        how = ("--server", str(self.server)) if self.server else ("--insecure",)
        port = ("--port", str(self.inner if self.server else self.port))
        return self.start("serve", "serve", recipe, *how, *port, *words, **environment)

    def join(
        self, name: str, data: Path, *words: str, through: int | None = None, **environment: str
    ) -> subprocess.Popen[bytes]:
        """`through` is a port of this machine that leads to the server's."""
        kit = self.folder / name / f"{name}.kit"
        if self.server:
            asked = keys.request(name, kit.parent)
            keys.approve(self.server, asked, kit.parent)
        else:
            kit.parent.mkdir()
            kit.write_text(f'name = "{name}"\nserver = "127.0.0.1:{self.port}"\n')
        if through:
            kit.write_text(kit.read_text().replace(f":{self.port}", f":{through}"))
        return self.start(name, "join", str(kit), "--data", str(data), *words, **environment)

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def wait_for(self, name: str, text: str, *, times: int = 1) -> None:
        """Until somebody has said something."""
        until = time.monotonic() + SECONDS
        while self.said(name).count(text) < times:
            assert time.monotonic() < until, f"{name} never said {text!r}:\n{self.said(name)}"
            time.sleep(0.1)

    def committed(self) -> int:
        """Rounds that are on record, round 0 among them."""
        rounds = self.out / "rounds.jsonl"
        return rounds.read_bytes().count(b"\n") if rounds.exists() else 0

    def wait_for_rounds(self, number: int) -> None:
        wait_until(lambda: self.committed() >= number, f"{number} rounds")

    def finish(self, server: subprocess.Popen[bytes]) -> Run:
        """The run that a server left behind."""
        code = server.wait(SECONDS)
        assert code == 0, self.said("serve")
        return read_run(self.out)


@contextmanager
def federation(folder: Path, *, secure: bool = False, host: str = "localhost") -> Iterator[Federation]:
    """With another host than localhost, behind nginx."""
    with ExitStack() as stack:
        yield Federation(folder, stack, secure=secure, host=host)


def descendants(process: int) -> list[int]:
    """Processes that a process started, and that they did."""
    children = []
    for listed in Path(f"/proc/{process}/task").glob("*/children"):  # each thread's own
        with suppress(OSError):
            children += [int(word) for word in listed.read_text().split()]
    return [*children, *(found for child in children for found in descendants(child))]


def find_process(parent: int, word: str) -> int:
    """A descendant with a word in its name or command line, once there is one."""
    until = time.monotonic() + SECONDS
    while True:
        for found in descendants(parent):
            with suppress(OSError):
                if any(word.encode() in Path(f"/proc/{found}/{what}").read_bytes() for what in ("comm", "cmdline")):
                    return found
        assert time.monotonic() < until, f"no process {word}"
        time.sleep(0.02)


def wait_until(happened: Callable[[], bool], what: str) -> None:
    """Until something is so."""
    until = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < until, f"{what} did not happen"
        time.sleep(0.02)


def end(process: subprocess.Popen[bytes]) -> None:
    """As a person ends it, and by force where that does not do."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(120)
    if process.poll() is None:
        process.kill()
        process.wait()
        raise AssertionError("it had to be killed")


def split(recipe: Recipe, folder: Path) -> list[Path]:
    from fedloom.deployment.client.documents import write_splits
    from fedloom.monitoring.observer import Observer

    return write_splits(recipe, folder, Observer())


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without times, memory and what depends on them."""
    kept = []
    for record in records:
        told = {
            key: value
            for key, value in record.items()
            if not any(word in key for word in ("seconds", "finished", "peak_bytes"))
        }
        kept.append(json.loads(json.dumps(told)))
    return kept


def run_here(recipe: Recipe, folder: Path) -> Run:
    from fedloom.monitoring.observer import Observer

    return run(recipe, folder, Observer())
