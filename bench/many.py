"""Many clients of one machine, forks of one process that has loaded what they need: a part of `deployment.py`.

    python bench/deployment.py --many 100 [--rounds 10]
    python bench/deployment.py --many 30 --tiny [--rounds 3]

What `fedloom join` imports is loaded once, instead of in each process of each client: a hundred clients start and fit
into memory on two cores. All else is as `fedloom join` and `fedloom serve` do it, behind nginx and over TLS. With an
echo no client has a model, and this process is the server's `serve`; with `--tiny` each trains in a worker of its own.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

from client import cpu_seconds, family, proportional_bytes
from deployment import FACTS, WEIGHTS_OF_TINY, echo, peak_bytes, provision, settle

from fedloom.deployment.client.policy import Policy
from fedloom.deployment.flower.programs import BACKOFF_SECONDS, END_WITH_PARENT, LOADED, QUIET_SECONDS, run_supernode
from fedloom.deployment.processes import Child, free_port, private_folder, take_arguments
from fedloom.host.frames import Frame

LOOK_SECONDS = 20.0
"""Time between two looks at the memory of all processes: a look takes a core a second or more."""
HOST = "127.0.0.2"
"""Host that nginx stands before."""


class Fork:
    """Child that is a fork of this process: it runs a function, in a session of its own, with its output in a file."""

    def __init__(self, run: Callable[[], object], log: Path | None, environment: dict[str, str]) -> None:
        self._run, self.log, self._environment = run, log, environment
        self.start()

    def start(self) -> None:
        sys.stdout.flush()
        if pid := os.fork():
            self.pid, self._status = pid, None
            return
        code = 1
        try:
            os.setsid()
            ctypes.CDLL(None).prctl(END_WITH_PARENT, signal.SIGKILL)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            if self.log:
                output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                os.dup2(output, 1)
                os.dup2(output, 2)
            os.environ.clear()
            os.environ.update(self._environment)
            self._run()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}")
        finally:
            sys.stdout.flush()
            os._exit(code)

    _status: int | None = None

    @property
    def ended(self) -> bool:
        if self._status is None:
            with suppress(ChildProcessError):
                found, status = os.waitpid(self.pid, os.WNOHANG)
                self._status = status if found else None
        return self._status is not None

    def tell(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def end(self) -> None:
        until = time.monotonic() + 10
        self.tell(signal.SIGTERM)
        while not self.ended and time.monotonic() < until:
            time.sleep(0.05)
        self.tell(signal.SIGKILL)
        while not self.ended:
            time.sleep(0.05)


def join_all(folder: Path, data: Path | None) -> None:
    """Be all clients whose kits lie in a folder, with the documents in `data`, or with an echo each."""
    from flwr.supercore import constant

    constant.PULL_INITIAL_BACKOFF = BACKOFF_SECONDS  # as Flower's programs have it here
    modules = [*LOADED, "fedloom.deployment.client.joining", "fedloom.deployment.client.worker_process"]
    for module in [*modules, *(["fedloom.deployment.client.worker"] if data else [])]:
        import_module(module)
    gc.freeze()
    told = signal.SIGTERM, signal.SIGINT
    signal.pthread_sigmask(signal.SIG_BLOCK, told)  # each client unblocks them for itself
    joins = []
    for number, kit in enumerate(sorted(folder.glob("*.kit"))):
        documents = data / f"client-{number}" if data else kit
        joins.append(
            Fork(partial(join_one, kit, documents, with_echo=not data), kit.with_suffix(".log"), {**os.environ})
        )
    signal.sigwait(told)
    for join in joins:
        join.tell(signal.SIGTERM)
    for join in joins:
        join.end()


def join_one(kit: Path, data: Path, *, with_echo: bool) -> None:
    """Do what `fedloom join` does, but for the start of its processes."""
    from fedloom.deployment.client import joining, worker_process

    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))

    def work() -> None:
        if with_echo:
            return echo(json.loads((kit.parent / FACTS).read_text(encoding="utf-8")))
        # It begins anew as a process that has nothing in common with others.
        sys.orig_argv = [sys.executable, "-m", "fedloom.deployment.client.worker_process"]
        return worker_process.main()

    def node() -> None:
        sys.argv = ["supernode", *take_arguments()]
        run_supernode()

    def start(program: str, words: Sequence[str], log: Path, environment: dict[str, str]) -> Fork:
        return Fork(node, log, {**environment, **joining.hand_over(words)})

    joining.Child = lambda command, log, environment, output: Fork(work, log, environment)
    joining.flower_child = start

    def say(what: str, detail: str) -> None:
        print(f"{what:<10}{detail}", flush=True)

    joining.join([joining.Member(joining.read_kit(kit), data, Policy(), kit.with_suffix(".journal.jsonl"))], say)


class Clients:
    """All clients of one machine, and what their processes take."""

    def __init__(self, child: Child, kits: Sequence[Path]) -> None:
        self._child, self._kits = child, kits

    @property
    def processes(self) -> list[int]:
        return [process for process in family(self._child.pid) if process != self._child.pid]

    @property
    def ended(self) -> int:
        """Clients whose `join` has ended."""
        text = Path(f"/proc/{self._child.pid}/task/{self._child.pid}/children").read_text()
        alive = [word for word in text.split() if ") Z " not in Path(f"/proc/{word}/stat").read_text()]
        return len(self._kits) - len(alive)

    def megabytes(self) -> float:
        """Memory of a client, with its share of what all have together."""
        found = 0.0
        for process in self.processes:
            with suppress(OSError):
                found += proportional_bytes(process) / 1e6
        return found / len(self._kits)

    def cpu_seconds(self) -> dict[int, float]:
        found = {}
        for process in self.processes:
            with suppress(OSError):
                found[process] = cpu_seconds(process)
        return found

    def cores(self, seconds: float) -> float:
        """Processor time of a client, in cores, over some seconds."""
        before, began = self.cpu_seconds(), time.monotonic()
        time.sleep(seconds)
        after, spent = self.cpu_seconds(), time.monotonic() - began
        return sum(after[one] - before[one] for one in before.keys() & after.keys()) / spent / len(self._kits)

    def told(self, words: str) -> int:
        """How often the clients said something."""
        return sum(kit.with_suffix(".log").read_text(encoding="utf-8").count(words) for kit in self._kits)


@contextmanager
def clients_of(folder: Path, kits: Sequence[Path], data: Path | None = None) -> Any:
    words = [sys.executable, str(Path(__file__).parent / "deployment.py"), "--join-all", str(folder)]
    child = Child([*words, *(["--data", str(data)] if data else [])], folder / "clients.log", os.environ)
    try:
        yield Clients(child, kits)
    finally:
        os.kill(child.pid, signal.SIGTERM)
        settle(lambda: child.ended, 120)
        child.end()


def measure_many(clients: int, rounds: int, rest_seconds: float) -> dict[str, object]:
    """Many clients behind one address and nginx, with an echo each: is any of them lost?"""
    from fedloom.deployment.messages import pack_recipe
    from fedloom.deployment.server.exchange import Exchange
    from fedloom.deployment.server.nginx import proxy
    from fedloom.deployment.server.superlink import SuperLink
    from fedloom.recipe.loading import load_recipe

    said: list[str] = []

    def say(what: str, detail: str) -> None:
        said.append(f"{what} {detail}")

    payload = os.urandom(4 * WEIGHTS_OF_TINY)
    names = [f"client-{number:03}" for number in range(clients)]
    with ExitStack() as stack:
        folder = stack.enter_context(private_folder())
        security, kits = provision(folder, HOST, names)
        inner = free_port()
        stack.enter_context(proxy(security, inner, folder, say))
        link = stack.enter_context(closing(SuperLink(folder, inner, security, say)))
        begun = time.monotonic()
        there = stack.enter_context(clients_of(folder, kits))
        link.open()
        opened = time.monotonic() - begun
        exchange = Exchange(link, pack_recipe(load_recipe("tiny")), 600, say, lambda phases: None)
        exchange.assemble(clients, 1500)
        assembled = time.monotonic() - begun
        time.sleep(min(QUIET_SECONDS, rest_seconds))  # after which tasks are looked for less often
        rest = {"MB": there.megabytes(), "cores": there.cores(rest_seconds)}
        assert link._child is not None
        watched = {"SuperLink": link._child.pid, "serve": os.getpid()}
        begun, before = time.monotonic(), {what: cpu_seconds(one) for what, one in watched.items()}
        whole, lost, at_work = [], 0, 0.0
        for _ in range(rounds):
            started = time.monotonic()
            questions = dict.fromkeys(names, Frame({"do": "train"}, payload))
            lost += sum(not isinstance(found, Frame) for _, found in exchange.ask(questions))
            whole.append(time.monotonic() - started)
        spent = time.monotonic() - begun
        cores = {what: (cpu_seconds(one) - before[what]) / spent for what, one in watched.items()}
        at_work = there.megabytes()
        found = {
            "clients": clients,
            "opened_seconds": opened,
            "assembled_seconds": assembled,
            "rest": rest,
            "round_MB": at_work,
            "round_seconds": whole,
            "cores": cores,
            "peak_bytes": {what: peak_bytes(one) for what, one in watched.items()},
            "lost": lost,
            "ended": there.ended,
            "refused": there.told("\nrefused ") + there.told("\nnot yet "),
            "restarts": there.told("\nrestart "),
            "said": [words for words in said if not words.startswith("client ")][:20],
        }
    print(f"\n| {clients} clients with an echo | |\n|---|---|")
    print(f"| until the keys are in and the app runs, s | {opened:.0f} |\n| until all are there, s | {assembled:.0f} |")
    print(f"| a client at rest: MB, of a core | {rest['MB']:.0f}, {100 * rest['cores']:.1f} % |")
    print(f"| a client after {rounds} rounds, MB | {at_work:.0f} |")
    print(f"| a round, median and worst, s | {median(whole):.1f}, {max(whole):.1f} |")
    print(f"| rounds a minute | {60 * len(whole) / spent:.1f} |")
    for what in watched:
        print(f"| {what}: of a core, and memory | {100 * cores[what]:.0f} %, {peak_bytes_of(found, what):.0f} MB |")
    for what in ("lost", "ended", "refused", "restarts"):
        print(f"| {what} | {found[what]} |", flush=True)
    return found


def peak_bytes_of(found: dict[str, Any], what: str) -> float:
    return float(found["peak_bytes"][what]) / 1e6


def measure_tiny_of_many(clients: int, rounds: int) -> dict[str, object]:
    """`tiny` through `fedloom serve`, with a worker and a model for each client."""
    from fedloom import load_recipe, read_run
    from fedloom.deployment.client.documents import write_splits
    from fedloom.monitoring.observer import Observer
    from fedloom.recipe.loading import recipe_to_toml

    names = [f"client-{number:03}" for number in range(clients)]
    with private_folder() as folder:
        security, kits = provision(folder, HOST, names)
        recipe = load_recipe("tiny", [f"federation.rounds={rounds}", f"data.clients={clients}"])
        (folder / "tiny.toml").write_text(recipe_to_toml(recipe))
        write_splits(recipe, folder / "split", Observer())
        command = [
            sys.executable,
            "-m",
            "fedloom",
            "serve",
            str(folder / "tiny.toml"),
            "--server",
            str(security.folder),
        ]
        with clients_of(folder, kits, folder / "split") as there:
            begun, worst = time.monotonic(), 0.0
            words = [*command, "--out", str(folder / "run"), "--wait", "1500"]
            with (folder / "serve.log").open("wb") as log, subprocess.Popen(words, stdout=log, stderr=log) as serve:
                while serve.poll() is None:
                    worst = max(worst, there.megabytes())
                    with suppress(subprocess.TimeoutExpired):
                        serve.wait(LOOK_SECONDS)
            whole = time.monotonic() - begun
            cpu = sum(there.cpu_seconds().values()) / clients
            ended, refused, restarts = there.ended, there.told("\nrefused "), there.told("\nrestart ")
        assert serve.returncode == 0, (folder / "serve.log").read_text()
        finished = read_run(folder / "run")
    parts = ("train_seconds", "aggregate_seconds", "evaluate_seconds")
    seconds = [sum(record[part] for part in parts) for record in finished.rounds]
    lost = sum(len(record["lost"]) for record in finished.rounds)
    print(f"\n| {clients} clients, `tiny` | |\n|---|---|\n| from start to end, s | {whole:.0f} |")
    print(f"| rounds, round 0 first, s | {', '.join(f'{one:.0f}' for one in seconds)} |")
    print(f"| a client at work: MB at most, and s of a core over all | {worst:.0f}, {cpu:.0f} |")
    print(f"| lost, ended, refused, restarts | {lost}, {ended}, {refused}, {restarts} |", flush=True)
    return {
        "clients": clients,
        "seconds": whole,
        "round_seconds": seconds,
        "worst_MB": worst,
        "cpu_seconds": cpu,
        "lost": lost,
        "ended": ended,
        "refused": refused,
        "restarts": restarts,
        "updates": len(finished.clients),
    }
