"""What Flower costs: a round without training, the recipe tiny, a message's start, the server's memory.

    python bench/deployment.py [--rounds 10] [--many 100] [--many 30 --tiny]

Server and clients are processes of this machine, over TLS with node keys, as `fedloom serve` and `fedloom join` start
them. Without training, an echo stands where each client's worker is: 6.3 MB to each client and back. Memory is that of
a server whose transport makes every reply when it is looked at, a process a case. JSON lines follow the tables.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median
from tempfile import gettempdir

from options import open_parser

from fedloom.deployment.client.policy import Policy
from fedloom.deployment.keys import Security, approve, init, request
from fedloom.deployment.processes import Child, free_port, private_folder, take_arguments
from fedloom.deployment.signing import Verifier
from fedloom.host.frames import CREDENTIALS, Frame, accept, listen, receive_frame, send_frame

WEIGHTS = 1_572_864
"""Of an adapter: LoRA r 16 on q_proj and v_proj of opt-350m, 6.3 MB."""
WEIGHTS_OF_TINY = 1792
"""Of the recipe tiny's adapter."""
NAMES = ("alice", "bob", "carol")
WORKER = "fedloom.deployment.client.worker_process"
TICKS = os.sysconf("SC_CLK_TCK")


def echo(facts: dict[str, object]) -> None:
    """A worker that reads signed questions, gives back their numbers, and tells of the process that brought them."""
    told = dict(word.removeprefix("--").split("=", 1) for word in take_arguments())
    verifier = Verifier(told["signer"], told["name"])
    with listen(told["socket"]) as listener:
        while True:
            connection = accept(listener)
            with connection:
                process, *_ = CREDENTIALS.unpack(
                    connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
                )
                times = {**describe_start(process), "arrived": time.time()}
                asked = verifier.open(receive_frame(connection))
                do = asked.manifest["do"]
                # Beyond facts, the exchange passes on what it gets: here that is times, which no real answer has.
                answer = facts if do == "meet" else {**times, "answered": time.time()}
                send_frame(connection, Frame(answer, asked.payload if do == "train" else b""))


FACTS = "echo.json"
"""File with the facts that an echo tells, beside the kits: made once, for what makes them loads torch."""


def make_facts(name: str) -> dict[str, object]:
    """Facts of a client that has one of each thing."""
    from fedloom import __version__
    from fedloom.deployment.messages import COUNTS

    return {"name": name, "version": __version__, "base": "0" * 64, "documents": "0" * 64, **dict.fromkeys(COUNTS, 1)}


def describe_start(process: int) -> dict[str, float]:
    """How old a process is, and how long it has computed."""
    words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    born = int(words[19]) / TICKS
    return {
        "age_seconds": time.clock_gettime(time.CLOCK_BOOTTIME) - born,
        "cpu_seconds": (int(words[11]) + int(words[12])) / TICKS,
    }


def peak_bytes(process: int) -> int:
    """The most memory that a process has held."""
    (line,) = [line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(line.split()[1])


def settle(happened: Callable[[], bool], seconds: float) -> None:
    """Wait until something is so, but no longer than some seconds."""
    until = time.monotonic() + seconds
    while not happened() and time.monotonic() < until:
        time.sleep(0.1)


def join_with_echo(kit: Path) -> None:
    """`fedloom join`, but for its worker."""
    from fedloom.deployment.client import joining

    def start(command: list[str], log: Path | None, environment: dict[str, str], *, output: int) -> Child:
        if WORKER in command:  # the echo takes the worker's own arguments, from the environment
            command = [sys.executable, __file__, "--echo", str(kit.parent / FACTS)]
        return Child(command, log, environment, output=output)

    joining.Child = start

    def say(what: str, detail: str) -> None:
        print(f"{what:<10}{detail}", flush=True)

    joining.join([joining.Member(joining.read_kit(kit), kit, Policy(), kit.with_suffix(".journal.jsonl"))], say)


def provision(folder: Path, host: str = "localhost", names: Sequence[str] = NAMES) -> tuple[Security, list[Path]]:
    """A server's keys and certificate, and its clients' kits."""
    security = init(folder / "server", host, free_port())
    (folder / FACTS).write_text(json.dumps(make_facts("echo")), encoding="utf-8")
    return security, [approve(security.folder, request(name, folder), folder).kit for name in names]


def measure_overhead(rounds: int) -> dict[str, object]:
    """Rounds of three clients with one and with two messages each, and messages to one client alone."""
    from fedloom.deployment.messages import pack_recipe
    from fedloom.deployment.server.exchange import Exchange
    from fedloom.deployment.server.superlink import SuperLink
    from fedloom.recipe.loading import load_recipe

    def say(what: str, detail: str) -> None:
        print(f"{what:<10}{detail}", flush=True)

    payload = os.urandom(4 * WEIGHTS)
    with ExitStack() as stack:
        folder = stack.enter_context(private_folder())
        security, kits = provision(folder)
        for kit in kits:
            command = [sys.executable, __file__, "--join", str(kit)]
            stack.callback(Child(command, kit.with_suffix(".log"), os.environ).end)
        link = stack.enter_context(closing(SuperLink(folder, security.port, security, say)))
        link.open()
        recipe = load_recipe("tiny")
        exchange = Exchange(link, pack_recipe(recipe), recipe.federation.round_deadline, say, lambda phases: None)
        exchange.assemble(len(NAMES), 300)

        def ask(names: Sequence[str], do: str) -> list[Frame]:
            answers = [found for _, found in exchange.ask(dict.fromkeys(names, Frame({"do": do}, payload)))]
            assert all(isinstance(answer, Frame) for answer in answers), answers
            return answers

        ask(NAMES, "train")
        train_seconds, both_seconds, to_worker, back, age, cpu = [], [], [], [], [], []
        for _ in range(rounds):
            started = time.time()
            ask(NAMES, "train")
            train_seconds.append(time.time() - started)
            ask(NAMES, "evaluate")
            both_seconds.append(time.time() - started)
        for _ in range(rounds):
            started = time.time()
            (answer,) = ask(NAMES[:1], "train")
            told = answer.manifest
            to_worker.append(told["arrived"] - started)
            back.append(time.time() - told["answered"])
            age.append(told["age_seconds"])
            cpu.append(told["cpu_seconds"])
    print("\n| | median, s | worst, s |\n|---|---|---|")
    rows = {
        "a round: train": train_seconds,
        "a round: train, then score": both_seconds,
        "one client alone: from the question to its worker": to_worker,
        "of it, Flower's process for the message": age,
        "of it, computing": cpu,
        "one client alone: from its worker to the answer": back,
    }
    for what, seconds in rows.items():
        print(f"| {what} | {median(seconds):.2f} | {max(seconds):.2f} |", flush=True)
    return {what: [round(one, 3) for one in seconds] for what, seconds in rows.items()}


def measure_tiny(rounds: int) -> dict[str, object]:
    """`tiny` through `fedloom serve` and three times `fedloom join`."""
    from fedloom import load_recipe, read_run
    from fedloom.deployment.client.documents import write_splits
    from fedloom.deployment.client.joining import read_kit
    from fedloom.monitoring.observer import Observer
    from fedloom.recipe.loading import recipe_to_toml

    fedloom = [sys.executable, "-m", "fedloom"]
    with private_folder() as folder, ExitStack() as stack:
        security, kits = provision(folder)
        recipe = load_recipe("tiny", [f"federation.rounds={rounds}"])
        (folder / "tiny.toml").write_text(recipe_to_toml(recipe))
        for kit, data in zip(kits, write_splits(recipe, folder / "split", Observer()), strict=True):
            told = ("--fingerprint", read_kit(kit).fingerprint)
            command = [*fedloom, "join", str(kit), *told, "--data", str(data)]
            stack.callback(Child(command, kit.with_suffix(".log"), os.environ).end)
        command = [*fedloom, "serve", str(folder / "tiny.toml"), "--server", str(security.folder)]
        subprocess.run([*command, "--out", str(folder / "run")], check=True, stdout=subprocess.DEVNULL)
        finished = read_run(folder / "run")
        loads = [kit.with_suffix(".log").read_text().count("\nmodel ") for kit in kits]
    whole, working = [], []
    for record in finished.rounds[1:]:
        reports = [report for report in finished.clients if report["round"] == record["round"]]
        whole.append(sum(record[key] for key in ("train_seconds", "aggregate_seconds", "evaluate_seconds")))
        whole[-1] += max(report["evaluate_seconds"] for report in reports)
        working.append(max(report["seconds"] + report["evaluate_seconds"] for report in reports))
    beyond = [one - other for one, other in zip(whole, working, strict=True)]
    print("\n| `tiny`, 3 clients | median, s | worst, s |\n|---|---|---|")
    for what, seconds in (("a round", whole), ("beyond the slowest client's work", beyond)):
        print(f"| {what} | {median(seconds):.2f} | {max(seconds):.2f} |")
    print(f"\nEach worker loaded the base model {' and '.join(sorted({str(count) for count in loads}))} times.")
    return {"round_seconds": whole, "beyond_seconds": beyond, "loads": loads}


def measure_memory(clients: int) -> dict[str, object]:
    """The most that a server holds in a round beyond what it held before, in this process."""
    import torch

    from fedloom import load_recipe
    from fedloom.adapters.adapter import Adapter, Layout
    from fedloom.deployment.messages import pack_recipe, pack_update
    from fedloom.deployment.server import exchange as waits
    from fedloom.deployment.server.exchange import Answer, Exchange, Node
    from fedloom.deployment.server.remote_fleet import RemoteFleet
    from fedloom.evaluation.held_out import Score
    from fedloom.federation.lora_rules import factors
    from fedloom.federation.rounds import FederatedRun
    from fedloom.host.machine import peak_memory, reset_peak_memory
    from fedloom.training.client_report import ClientReport
    from fedloom.training.jobs import ClientUpdate

    start = Adapter(Layout(("weight",), (torch.Size((WEIGHTS,)),)), torch.randn(WEIGHTS) * 0.02)
    numbers = {"examples": 1, "tokens": 1, "steps": 1}
    names = [field for field in ClientReport.__dataclass_fields__ if not field.startswith("holdout")]

    class MadeTransport:
        """Nodes whose answers are made when they are looked at."""

        def __init__(self, count: int) -> None:
            self._nodes = [Node(f"{number:03}", f"client-{number:03}", "1") for number in range(count)]
            self._asked: dict[str, Callable[[], Frame]] = {}

        def nodes(self) -> Sequence[Node]:
            return self._nodes

        def send(self, node: Node, frame: Frame, seconds: float) -> str:
            message = str(time.monotonic_ns())
            told = frame.manifest
            if told["do"] == "meet":
                self._asked[message] = lambda: Frame(make_facts(node.name))
            else:
                self._asked[message] = lambda: self._train(told["round"], told["client"])
            return message

        def pull(self, messages: Collection[str]) -> Answer | None:
            for message in messages:
                if made := self._asked.pop(message, None):
                    return Answer(message, made(), "")
            return None

        def reopen(self) -> None:
            raise AssertionError("this transport is never lost")

        def _train(self, round: int, client: int) -> Frame:
            told = {**dict.fromkeys(names, 1.0), **numbers, "round": round, "client": client}
            weights_P = start.weights_P + torch.randn(WEIGHTS) * 1e-3
            return pack_update(ClientUpdate(ClientReport(**told), Adapter(start.layout, weights_P), {}), None)

    waits.ATTEND_SECONDS, waits.POLL_SECONDS = 0.0, 0.001

    def run_round(count: int) -> None:
        recipe = load_recipe("tiny", [f"data.clients={count}"])
        section, told = recipe.federation, pack_recipe(recipe)
        quiet = lambda *words: None  # noqa: E731
        exchange = Exchange(MadeTransport(count), told, section.round_deadline, quiet, quiet)
        found = exchange.assemble(count, 60)
        fleet = RemoteFleet(exchange, found, section, (), Path(gettempdir()))
        judge = lambda adapter: Score(1.0, 0, 1)  # noqa: E731
        run = FederatedRun(
            recipe.training,
            recipe.federation,
            recipe.seed,
            fleet,
            factors(recipe.federation),
            judge,
            start,
            sizes=fleet.sizes,
        )
        run.begin()
        opened = run.open_round()
        for answer in fleet.train(opened.tasks):
            opened.add(answer)
        result = run.close_round(opened)
        assert len(result.reports) == count, result.lost

    run_round(1)
    reset_peak_memory()
    before = peak_memory()
    run_round(clients)
    return {"clients": clients, "replies_bytes": clients * 4 * WEIGHTS, "peak_bytes": peak_memory() - before}


def main() -> None:
    parser = open_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--clients", type=int, nargs="*", default=[10, 100], help="of the server's memory")
    parser.add_argument("--many", metavar="CLIENTS", type=int, help="so many clients with an echo, and nothing else")
    parser.add_argument("--tiny", action="store_true", help="so many clients with a model of their own instead")
    parser.add_argument(
        "--rest", metavar="SECONDS", type=float, default=30.0, help="for which clients at rest are seen"
    )
    parser.add_argument("--join-all", metavar="FOLDER", type=Path, help="be all clients whose kits lie there")
    parser.add_argument("--data", metavar="FOLDER", type=Path, help="documents of those clients; without, an echo each")
    parser.add_argument("--echo", metavar="FACTS", type=Path, help="stand where a client's worker is")
    parser.add_argument("--join", metavar="KIT", type=Path, help="be one client, with an echo")
    parser.add_argument("--memory", metavar="CLIENTS", type=int, help="one case, as a JSON line")
    options = parser.parse_args()
    if options.echo:
        return echo(json.loads(options.echo.read_text(encoding="utf-8")))
    if options.join:
        return join_with_echo(options.join)
    if options.join_all or options.many:
        import many  # what it imports, an echo does without

        if options.join_all:
            return many.join_all(options.join_all, options.data)
        if options.tiny:
            return print(json.dumps(many.measure_tiny_of_many(options.many, options.rounds)))
        return print(json.dumps(many.measure_many(options.many, options.rounds, options.rest)))
    if options.memory:
        return print(json.dumps(measure_memory(options.memory)))
    lines = [json.dumps(measure(options.rounds)) for measure in (measure_overhead, measure_tiny)]
    print("\n| clients | replies | server's memory beyond what it held |\n|---|---|---|")
    for clients in options.clients:
        command = [sys.executable, __file__, "--memory", str(clients)]
        line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        found = json.loads(line)
        print(f"| {clients} | {found['replies_bytes'] / 1e6:.0f} MB | {found['peak_bytes'] / 1e6:.0f} MB |", flush=True)
        lines.append(line)
    print("\n".join(["", *lines]))
    return None


if __name__ == "__main__":
    main()
