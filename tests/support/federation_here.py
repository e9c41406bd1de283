"""Federation of this machine's processes, started as people start it; all of them end with the test."""

import json
import os
import signal
import ssl
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any

import psutil

from fedloom.deployment import keys
from fedloom.deployment.fingerprints import identify_server
from fedloom.deployment.processes import free_port
from fedloom.deployment.server.nginx import find_nginx
from fedloom.experiment.run import run
from fedloom.recipe.loading import load_recipe, recipe_to_toml
from fedloom.recipe.recipe import Recipe
from fedloom.records.run import Run, read_run

SECONDS = 400.0
"""Longest time that any wait of a test takes."""
QUICK = ["training.engine=reference", "model.dtype=float32", "data.documents_per_client=10"]


def tiny(*overrides: str) -> Recipe:
    """`tiny` on the engine that is the same everywhere."""
    return load_recipe("tiny", [*QUICK, *overrides])


class Federation:
    """Server and clients, each a process of its own, with what they say in files."""

    def __init__(self, folder: Path, stack: ExitStack, *, secure: bool, host: str = "localhost") -> None:
        self.folder, self._stack = folder, stack
        self.port, self.inner = free_port(), free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.out = folder / "served"
        self.server = folder / "server" if secure else None
        if self.server:
            keys.init(self.server, host, self.port)

    def start(
        self,
        name: str,
        *words: str,
        before: Sequence[str] = (),
        folder: Path | None = None,
        stdin: int | None = None,
        **environment: str,
    ) -> subprocess.Popen[bytes]:
        """Start a `fedloom` command in a folder, after the words of another command that runs it."""
        command = [*before, sys.executable, "-m", "fedloom", *words]
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=stdin, stdout=log, stderr=log, cwd=folder, env={**os.environ, **environment}
            )
        self._stack.callback(end, process)
        self.processes[name] = process
        return process

    def serve(self, recipe: str, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        how = ("--server", str(self.server)) if self.server else ("--insecure",)
        port = ("--port", str(self.inner if self.server else self.port))
        return self.start("serve", "serve", recipe, *how, *port, *words, **environment)

    def join(
        self, name: str, data: Path, *words: str, through: int | None = None, **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start a client; `through` is a port of this machine that leads to the server's."""
        kit = self.folder / name / f"{name}.kit"
        if self.server:
            asked = keys.request(name, kit.parent)
            keys.approve(self.server, asked, kit.parent)
        else:
            kit.parent.mkdir()
            kit.write_text(f'name = "{name}"\nserver = "127.0.0.1:{self.port}"\n')
        if through:
            kit.write_text(kit.read_text().replace(f":{self.port}", f":{through}"))
        return self.start(name, "join", str(kit), *confirmed(kit), "--data", str(data), *words, **environment)

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def wait_for(self, name: str, text: str, *, times: int = 1) -> None:
        """Wait until somebody has said something."""
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
        """Wait for a server to end, and read the run that it left behind."""
        code = server.wait(SECONDS)
        assert code == 0, self.said("serve")
        return read_run(self.out)


def confirmed(kit: Path) -> list[str]:
    """Words for `join` by which the server of a kit is confirmed, whoever made it; none where it has no certificate."""
    told = tomllib.loads(kit.read_text())
    return ["--fingerprint", identify_server(told["ca"], told["signer"])] if "ca" in told else []


@contextmanager
def federation(folder: Path, *, secure: bool = False, host: str = "localhost") -> Iterator[Federation]:
    """Open a federation; with another host than localhost it is behind nginx."""
    with ExitStack() as stack:
        yield Federation(folder, stack, secure=secure, host=host)


DOORS = {
    "/v1/control/list-runs": 403,
    "/v1/control/start-run": 403,
    "/v1/control/register-node": 403,
    "/v1/control/stop-run": 403,
    "//v1/control/list-runs": 403,
    "/V1/control/list-runs": 403,
    "/v1/fleet/../control/list-runs": 401,
    "/v1/fleet/%2e%2e/control/list-runs": 401,
    "/docs": 403,
    "/v1/runtime/acquire-task": 403,
}
"""Paths of a SuperLink, and what it answers to whoever has its certificate alone."""


WHOLE_ROUNDS = 2
"""Rounds of the federation for many tests in which both clients take part; in the third one is lost."""


@dataclass(frozen=True)
class Seen:
    """What every user of a machine sees of a command's processes."""

    lines: tuple[str, ...]
    """Command lines."""
    names: tuple[str, ...]
    """Names: a process that was forked has its parent's command line."""
    ports: frozenset[int]
    """Ports on which they listen."""


@dataclass(frozen=True)
class Served:
    """Federation that many tests look at: what it left behind, and what was seen while it ran."""

    run: Run
    local: Run
    """Run of the same recipe on one machine."""
    logs: dict[str, str]
    """Output of each process, by its name."""
    doors: dict[str, int]
    """Statuses that the SuperLink answered with on each of `DOORS`."""
    seen: dict[str, "Seen"]
    """What others could see of each command's processes while a client trained."""


def serve_for_many_tests(folder: Path) -> Served:
    """Three rounds of two clients over TLS, behind nginx if there is one; client 1's policy refuses the last.

    An adapter has 57 kB: more than nginx keeps in memory of a request, as any real one.
    """
    rounds = (f"federation.rounds={WHOLE_ROUNDS + 1}", "federation.max_lost_clients=1")
    recipe = tiny("data.clients=2", "adapter.rank=32", *rounds)
    local = run_here(recipe, folder / "local")
    (folder / "tiny.toml").write_text(recipe_to_toml(recipe))
    (folder / "policy.toml").write_text(f"max_rounds_a_day = {WHOLE_ROUNDS}\n")
    with federation(folder, secure=True, host="127.0.0.2" if find_nginx() else "localhost") as there:
        assert there.server is not None
        server = there.serve(str(folder / "tiny.toml"), "--out", str(there.out))
        data = split(recipe, folder / "split")
        there.wait_for("serve", "waiting")  # a node that comes before it can be let in starts anew
        there.join("client-0", data[0])
        there.join("client-1", data[1], "--policy", str(folder / "policy.toml"))
        there.wait_for("client-1", "training")  # all that there is of both sides runs now
        seen = look_around(there)
        superlink = there.inner if find_nginx() else there.port
        doors = {path: _knock(there.server / "ca.crt", superlink, path) for path in DOORS}
        run = there.finish(server)
        logs = {name: there.said(name) for name in ("serve", "client-0", "client-1")}
    return Served(run, local, logs, doors, seen)


def look_around(there: Federation) -> dict[str, Seen]:
    """See what every user of this machine can of the processes of each command."""
    seen = {}
    for name, process in there.processes.items():
        family = [process.pid, *descendants(process.pid)]
        lines, names, ports = [], [], set()
        for member in family:
            with suppress(OSError, psutil.Error):
                lines.append(Path(f"/proc/{member}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip())
                names.append(Path(f"/proc/{member}/comm").read_text().strip())
                ports |= {
                    found.laddr.port
                    for found in psutil.Process(member).net_connections("tcp")
                    if found.status == psutil.CONN_LISTEN
                }
        seen[name] = Seen(tuple(lines), tuple(names), frozenset(ports))
    return seen


def _knock(ca: Path, port: int, path: str) -> int:
    """Return the status of an answer to whoever has the server's certificate authority and no secret."""
    trust = ssl.create_default_context(cafile=ca)
    with closing(HTTPSConnection("localhost", port, context=trust, timeout=60)) as connection:
        connection.request("POST", path, b"", {"content-type": "application/protobuf"})
        return connection.getresponse().status


def descendants(process: int) -> list[int]:
    """Processes that a process started, and that they did."""
    children = []
    for listed in Path(f"/proc/{process}/task").glob("*/children"):  # each thread's own
        with suppress(OSError):
            children += [int(word) for word in listed.read_text().split()]
    return [*children, *(found for child in children for found in descendants(child))]


def find_process(parent: int, word: str) -> int:
    """Find a descendant with a word in its name or command line, once there is one."""
    until = time.monotonic() + SECONDS
    while True:
        for found in descendants(parent):
            with suppress(OSError):
                if any(word.encode() in Path(f"/proc/{found}/{what}").read_bytes() for what in ("comm", "cmdline")):
                    return found
        assert time.monotonic() < until, f"no process {word}"
        time.sleep(0.02)


def wait_until(happened: Callable[[], bool], what: str) -> None:
    """Wait until something is so."""
    until = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < until, f"{what} did not happen"
        time.sleep(0.02)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process as a person does, and by force where that does not do."""
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
    """Run a recipe in this process, with the limits that `fedloom serve` adds to it and puts on record."""
    from fedloom.deployment.server.serving import with_limits
    from fedloom.monitoring.observer import Observer

    return run(with_limits(recipe), folder, Observer())
