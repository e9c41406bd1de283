"""Process of a worker, of one client or several: a small one while nothing is asked. No torch here until then.

With the first question it imports what trains. Once the run is over, or nothing was asked for a while, it begins anew,
as a program that takes its own place (exec): a process gives back what it has imported in no other way.

Several clients have one base model between them. What they are asked to train at about the same time is trained in one
pass; each has its own socket, journal, policy and secret, and takes its own server's questions alone.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any, NamedTuple

from fedloom.deployment.client.display import say, speaking_of
from fedloom.deployment.processes import AND, hand_over, take_arguments
from fedloom.host.frames import Frame, accept, listen, receive_frame, send_frame
from fedloom.host.imports import quick_imports

if TYPE_CHECKING:
    from fedloom.deployment.client.account import Account
    from fedloom.deployment.client.worker import UnderWay, Worker
    from fedloom.deployment.signing import Verifier

OPTIONS = (
    *("socket", "name", "data", "policy", "policy_file", "journal", "signer", "server", "listener", "keep", "tasks"),
)
LOOK_SECONDS = 15.0
"""Time between two looks for the end of a run, while nothing is asked."""
MOST_WAITING = 8
"""Questions of a client that are kept while another is answered: their time is counted from when they came."""
GATHER_SECONDS = 2.0
"""Time for which a client that is to train waits for the others of its worker that may be asked, too."""
IDLE_SECONDS = 60.0
"""Least time without a question, after which the model of a run that goes on is let go."""
IDLE_LOADS = 10.0
"""Times as long as loading took, for which a model is kept without a question: loading it again then costs a tenth of
the time for which nothing was done, and no more."""


class Arrived(NamedTuple):
    """Question that came, who waits for its answer, and when it came, on the monotonic clock."""

    connection: socket.socket
    asked: Frame
    came: float
    client: int = 0
    """Place of the client that it is for, among those of this process."""


def serve(waiting: Queue[Arrived], workers: Sequence[Worker], importing_seconds: float = 0.0) -> None:
    """Answer until a worker is spent, or none has anything to do."""
    answered, next_one = time.monotonic(), None
    while not any(worker.is_spent for worker in workers):
        try:
            arrived = next_one or waiting.get(timeout=LOOK_SECONDS)
        except Empty:
            for worker in workers:
                worker.look()
            loading_seconds = importing_seconds + sum(worker.opening_seconds for worker in workers)
            is_idle = time.monotonic() - answered > idle_seconds(loading_seconds)
            holds_former = any(worker.holds_former for worker in workers)
            if not any(worker.account.goes_on for worker in workers) or (is_idle and not holds_former):
                return
            continue
        next_one = answer(arrived, waiting, workers)
        answered = time.monotonic()


def answer(first: Arrived, waiting: Queue[Arrived], workers: Sequence[Worker]) -> Arrived | None:
    """Answer a question; where it is to train, with those that come for other clients within a moment.

    Returns the question that came next, where it was for a client that was not done.
    """
    from fedloom.deployment.client.worker import UnderWay, finish

    under_way: dict[int, tuple[UnderWay, socket.socket]] = {}
    until, one, behind = time.monotonic() + GATHER_SECONDS, first, None
    while behind is None:
        # Given up while this process was stopped or the machine slept, when no clock of its own went on.
        if is_gone(one.connection):
            one.connection.close()
            say("late", "nobody waits for the answer any more: the question is left out")
        else:
            begun = UnderWay(workers[one.client], one.asked, one.came)
            if begun.answer:
                reply(one.connection, begun.answer)
            else:
                under_way[one.client] = begun, one.connection
        shares = any(begun.wanted and begun.wanted.may_share for begun, _ in under_way.values())
        if not shares or len(under_way) >= sum(worker.may_train for worker in workers):
            break
        try:
            one = waiting.get(timeout=max(until - time.monotonic(), 0.0))
        except Empty:
            break
        behind = one if one.client in under_way else None
    connections = {id(begun): connection for begun, connection in under_way.values()}
    for done in finish([begun for begun, _ in under_way.values()]):
        assert done.answer, "it is done"
        reply(connections[id(done)], done.answer)
    return behind


def reply(connection: socket.socket, found: Frame) -> None:
    """Send an answer to whoever waits for it."""
    with connection:
        try:
            send_frame(connection, found)
        # The process that asked may have been killed. The server asks again.
        except OSError as error:
            say("retry", f"the connection broke before the answer was sent ({type(error).__name__})")


def idle_seconds(loading_seconds: float) -> float:
    """Return how long a model that took so long to load is kept while nothing is asked."""
    return max(IDLE_SECONDS, IDLE_LOADS * loading_seconds)


def is_gone(connection: socket.socket) -> bool:
    """Return whether the other side has closed a connection."""
    look = select.poll()
    look.register(connection, getattr(select, "POLLRDHUP", select.POLLHUP))
    return bool(look.poll(0))


def take_in(listeners: Sequence[socket.socket]) -> Queue[Arrived]:
    """Read questions as they come, from now on, by the places of the clients that they are for.

    In the sockets' own queues their time would not be counted, while what trains is imported or another is answered.
    """
    waiting: Queue[Arrived] = Queue(MOST_WAITING * len(listeners))
    for client, listener in enumerate(listeners):
        threading.Thread(target=_take_in, args=(listener, client, waiting), daemon=True).start()
    return waiting


def _take_in(listener: socket.socket, client: int, waiting: Queue[Arrived]) -> None:
    while True:
        connection = accept(listener)
        connection.settimeout(60.0)
        try:
            asked = receive_frame(connection)
        # Of any kind, from bytes that may be anything: with this thread, the worker would hear nothing more.
        except (OSError, MemoryError, ValueError) as error:
            connection.close()
            say("retry", f"the connection broke before the question was read ({type(error).__name__})")
            continue
        waiting.put(Arrived(connection, asked, time.monotonic(), client))


def is_asked(listeners: Sequence[socket.socket], until: float | None) -> bool:
    """Wait for a question until some time of the monotonic clock, or for ever; return whether there is one."""
    seconds = None if until is None else max(until - time.monotonic(), 0.0)
    return bool(select.select(listeners, [], [], seconds)[0])


def open_workers(members: Sequence[argparse.Namespace]) -> list[tuple[Worker, Verifier | None]]:
    """Import what trains, and make a worker of each client, and what lets its questions through; without TLS nothing.

    They have one base model.
    """
    with quick_imports():
        from fedloom.deployment.client.worker import Worker
    from fedloom.deployment.client.journal import Journal
    from fedloom.deployment.client.shared_base import Bases
    from fedloom.deployment.signing import Verifier

    bases = Bases() if len(members) > 1 else None
    made: list[tuple[Worker, Verifier | None]] = []
    for chosen in members:
        verifier = Verifier(chosen.signer, chosen.name) if chosen.signer else None
        worker = Worker(
            chosen.name,
            Path(chosen.data),
            _policy(chosen),
            Journal(Path(chosen.journal)),
            verifier.open if verifier else None,
            chosen.server,
            policy_file=Path(chosen.policy_file) if chosen.policy_file else None,
            keep=Path(chosen.keep) if chosen.keep else None,
            tasks=chosen.tasks,
            bases=bases,
        )
        made.append((worker, verifier))
    return made


def open_account(chosen: argparse.Namespace) -> Account:
    """Make what tells of a run's end, where nothing is to be trained."""
    from fedloom.deployment.client.account import Account
    from fedloom.deployment.client.journal import Journal

    return Account(_policy(chosen), Journal(Path(chosen.journal)), say, chosen.server)


def _policy(chosen: argparse.Namespace) -> Any:
    from fedloom.deployment.client.policy import load_policy

    return load_policy(Path(chosen.policy) if chosen.policy else None)


def leave(account: Account, questions: Any, place: Path) -> None:
    """Write down what the process after this one must know: the run that goes on, and what must not be asked twice."""
    told = {"run": account.leave(), "until": account.until, "questions": questions}
    place.write_text(json.dumps(told), encoding="utf-8")


def take_left(place: Path) -> Mapping[str, Any]:
    """Take what the process before this one wrote down, once: after one that died, nothing is known."""
    if not place.exists():
        return {"run": None, "until": None, "questions": None}
    left: Mapping[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    place.unlink()
    return left


def begin_anew(listeners: Sequence[socket.socket], members: Sequence[argparse.Namespace]) -> None:
    """Have this program take its own place. Whoever connects meanwhile waits in the sockets' queues."""
    kept = {listener.fileno() for listener in listeners}
    # Of what libraries opened, nothing is handed on: as long as a GPU is open, its memory is taken.
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):
            os.set_inheritable(int(name), int(name) <= 2 or int(name) in kept)
    words: list[str] = []
    for chosen, listener in zip(members, listeners, strict=True):
        told = vars(chosen) | {"listener": listener.fileno()}
        words += [AND, *(f"--{key}={told[key]}" for key in told)]
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **hand_over(words[1:])})


def read_members(words: Sequence[str]) -> list[argparse.Namespace]:
    """Read the options of each client, between which stands `AND`."""
    parser = argparse.ArgumentParser()
    for option in OPTIONS:
        parser.add_argument(f"--{option}", default="")
    ends = [number for number, word in enumerate(words) if word == AND]
    pairs = zip([0, *(end + 1 for end in ends)], [*ends, len(words)], strict=True)
    return [parser.parse_args(words[start:end]) for start, end in pairs]


def main() -> None:
    """Run a worker: `fedloom join` starts `python -m fedloom.deployment.client.worker_process`, never a person."""
    members = read_members(take_arguments())
    listeners = [
        socket.socket(fileno=int(chosen.listener)) if chosen.listener else listen(chosen.socket) for chosen in members
    ]
    places = [Path(chosen.socket).with_suffix(".left") for chosen in members]
    left = [take_left(place) for place in places]
    ends = [one["until"] for one in left if one["until"] is not None]
    if is_asked(listeners, min(ends, default=None)):
        started, waiting = time.monotonic(), take_in(listeners)
        made = open_workers(members)
        for (worker, verifier), told in zip(made, left, strict=True):
            worker.account.take_up(told["run"])
            if verifier:
                verifier.take_up(told["questions"])
        serve(waiting, [worker for worker, _ in made], time.monotonic() - started)
        if any(worker.is_spent for worker, _ in made):
            return
        for (worker, verifier), place in zip(made, places, strict=True):
            leave(worker.account, verifier and verifier.leave(), place)
    else:
        for chosen, told, place in zip(members, left, places, strict=True):
            account = open_account(chosen)
            account.take_up(told["run"])
            with speaking_of(chosen.name if len(members) > 1 else ""):
                account.look()
            leave(account, told["questions"], place)
    begin_anew(listeners, members)


if __name__ == "__main__":
    main()
