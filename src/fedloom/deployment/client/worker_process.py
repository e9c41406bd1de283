"""Process of a client's worker: a small one while nothing is asked. No torch here, until a question comes.

With the first question it imports what trains. Once the run is over, or nothing was asked for a while, it begins anew,
as a program that takes its own place (exec): a process gives back what it has imported in no other way.
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
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any, NamedTuple

from fedloom.deployment.client.display import say
from fedloom.deployment.processes import hand_over, take_arguments
from fedloom.host.frames import Frame, accept, listen, receive_frame, send_frame
from fedloom.host.imports import quick_imports

if TYPE_CHECKING:
    from fedloom.deployment.client.account import Account
    from fedloom.deployment.client.worker import Worker
    from fedloom.deployment.signing import Verifier

OPTIONS = (
    *("socket", "name", "data", "policy", "policy_file", "journal", "signer", "server", "listener", "keep", "tasks"),
)
LOOK_SECONDS = 15.0
"""Time between two looks for the end of a run, while nothing is asked."""
MOST_WAITING = 8
"""Questions that are kept while another is answered: their time is counted from when they came."""
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


def serve(waiting: Queue[Arrived], worker: Worker, importing_seconds: float = 0.0) -> None:
    """Answer until the worker is spent, or has nothing to do."""
    answered = time.monotonic()
    while not worker.is_spent:
        try:
            connection, asked, came = waiting.get(timeout=LOOK_SECONDS)
        except Empty:
            worker.account.look()
            loading_seconds = importing_seconds + worker.opening_seconds
            is_idle = time.monotonic() - answered > idle_seconds(loading_seconds)
            if not worker.account.goes_on or (is_idle and not worker.holds_former):
                return
            continue
        with connection:
            # Given up while this process was stopped or the machine slept, when no clock of its own went on.
            if is_gone(connection):
                say("late", "nobody waits for the answer any more: the question is left out")
                continue
            try:
                send_frame(connection, worker.answer(asked, came))
            # The process that asked may have been killed. The server asks again.
            except OSError as error:
                say("retry", f"the connection broke before the answer was sent ({type(error).__name__})")
        answered = time.monotonic()


def idle_seconds(loading_seconds: float) -> float:
    """Return how long a model that took so long to load is kept while nothing is asked."""
    return max(IDLE_SECONDS, IDLE_LOADS * loading_seconds)


def is_gone(connection: socket.socket) -> bool:
    """Return whether the other side has closed a connection."""
    look = select.poll()
    look.register(connection, getattr(select, "POLLRDHUP", select.POLLHUP))
    return bool(look.poll(0))


def take_in(listener: socket.socket) -> Queue[Arrived]:
    """Read questions as they come, from now on.

    In the socket's own queue their time would not be counted, while what trains is imported or another is answered.
    """
    waiting: Queue[Arrived] = Queue(MOST_WAITING)
    threading.Thread(target=_take_in, args=(listener, waiting), daemon=True).start()
    return waiting


def _take_in(listener: socket.socket, waiting: Queue[Arrived]) -> None:
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
        waiting.put(Arrived(connection, asked, time.monotonic()))


def is_asked(listener: socket.socket, until: float | None) -> bool:
    """Wait for a question until some time of the monotonic clock, or for ever; return whether there is one."""
    seconds = None if until is None else max(until - time.monotonic(), 0.0)
    return bool(select.select([listener], [], [], seconds)[0])


def open_worker(chosen: argparse.Namespace) -> tuple[Worker, Verifier | None]:
    """Import what trains, and make a worker of it, and what lets its questions through; without TLS nothing does."""
    with quick_imports():
        from fedloom.deployment.client.worker import Worker
    from fedloom.deployment.client.journal import Journal
    from fedloom.deployment.signing import Verifier

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
    )
    return worker, verifier


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


def begin_anew(listener: socket.socket, chosen: argparse.Namespace) -> None:
    """Have this program take its own place. Whoever connects meanwhile waits in the socket's queue."""
    # Of what libraries opened, nothing is handed on: as long as a GPU is open, its memory is taken.
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):
            os.set_inheritable(int(name), int(name) <= 2)
    os.set_inheritable(listener.fileno(), True)
    told = vars(chosen) | {"listener": listener.fileno()}
    words = hand_over([f"--{key}={told[key]}" for key in told])
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **words})


def main() -> None:
    """Run a worker: `fedloom join` starts `python -m fedloom.deployment.client.worker_process`, never a person."""
    parser = argparse.ArgumentParser()
    for option in OPTIONS:
        parser.add_argument(f"--{option}", default="")
    chosen = parser.parse_args(take_arguments())
    listener = socket.socket(fileno=int(chosen.listener)) if chosen.listener else listen(chosen.socket)
    place = Path(chosen.socket).with_suffix(".left")
    left = take_left(place)
    if is_asked(listener, left["until"]):
        started, waiting = time.monotonic(), take_in(listener)
        worker, verifier = open_worker(chosen)
        worker.account.take_up(left["run"])
        if verifier:
            verifier.take_up(left["questions"])
        serve(waiting, worker, time.monotonic() - started)
        if worker.is_spent:
            return
        leave(worker.account, verifier and verifier.leave(), place)
    else:
        account = open_account(chosen)
        account.take_up(left["run"])
        account.look()
        leave(account, left["questions"], place)
    begin_anew(listener, chosen)


if __name__ == "__main__":
    main()
