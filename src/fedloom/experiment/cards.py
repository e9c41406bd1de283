"""Several devices, of this machine or of others: a process a device, each with the base model, and jobs dealt out.

The run's own process is that of its own device. It trains its share, takes in what the others find as they find it,
and gives all results in the order of the jobs, so nothing depends on who was quicker.
"""

from __future__ import annotations

import select
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from fedloom import __version__
from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.errors import ModelError, RunError
from fedloom.experiment.job_frames import (
    Done,
    Found,
    Key,
    Line,
    most_result_bytes,
    pack_jobs,
    pack_result,
    plain,
    read_word,
    unpack_result,
)
from fedloom.experiment.places import Place, name_processes
from fedloom.experiment.preparation import Prepared
from fedloom.experiment.session import Session, hash_base
from fedloom.experiment.silence import LOOK_SECONDS, LookingSocket, Silence, SilentError
from fedloom.host.frames import Frame, receive_frame, send_frame
from fedloom.host.spool import Spool
from fedloom.monitoring.observer import Observer
from fedloom.monitoring.telemetry import Telemetry
from fedloom.progress import Progress, Say, Watch
from fedloom.recipe.recipe import Recipe, pin
from fedloom.training.engines import Engine, open_engine
from fedloom.training.jobs import ClientJob, ClientResult

SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "--")
"""Command that reaches a node: asks for no password, takes no host that is not known, notices one that went."""
NODE = ("fedloom", "node")
"""Command that trains on a node, which its shell must find."""
GRACE_SECONDS = 10.0
"""Time that a process has to end by itself."""
HELD_BYTES = 2**28
"""Memory that results of a round take which wait for their turn; more of them lie on the disk."""
STOP_SECONDS = 60.0
"""Time that a process has to give up what it works on, which it does after a step: then it is ended."""


class Card:
    """Process that trains on one device; a child of this one, or of a node's."""

    def __init__(self, place: Place, observer: Observer) -> None:
        """Start it; `observer` is told where it is late, and may end a run that waits for it."""
        self.place, self.is_busy = place, False
        self._say, self._check_run = observer.show_step, observer.check
        self._silence = Silence(str(place), observer.show_step)
        self.lowered_to: int | None = None
        self._asked: dict[Key, ClientJob] = {}
        """Jobs whose results it owes."""
        self._most_bytes = 0
        """Length of the numbers that it may send with a word: a result's."""
        ours, theirs = socket.socketpair()
        self._connection = LookingSocket(fileno=ours.detach())
        self._connection.look = self.look
        self._connection.moved = lambda: self._silence.end()
        number = theirs.fileno()
        how: dict[str, Any] = {"stdin": subprocess.DEVNULL, "pass_fds": [number]}
        command = [sys.executable, "-m", "fedloom.experiment.card_process", str(number)]
        if place.host:
            how, command = {"stdin": theirs, "stdout": theirs}, [*SSH, place.host, *NODE]
        with theirs:
            # A session of its own: Ctrl-C in a terminal reaches the run alone, which ends the others.
            self._process = subprocess.Popen(command, start_new_session=True, **how)

    def begin(self, recipe: Recipe, engine: str) -> None:
        """Have it load the model of a recipe.

        Raises:
            RunError: the process ended.
        """
        told = recipe.model_dump(mode="json", exclude_unset=True, exclude_none=True)
        # A node has as many threads as it is set up for.
        threads = 0 if self.place.host else torch.get_num_threads()
        self._send(Frame({"version": __version__, "recipe": told, "engine": engine, "threads": threads}))

    def fileno(self) -> int:
        """Return the socket's descriptor, by which `select` waits for it."""
        return self._connection.fileno()

    @property
    def pid(self) -> int:
        """Return the number of the process."""
        return self._process.pid

    def check(self, base: str) -> None:
        """Wait until its model is loaded; people are told what it says of it.

        Raises:
            ModelError: it can't be, or is another one than `base`.
            RunError: the process ended, hangs, or speaks something else.
            KeyboardInterrupt: the run is to end.
        """
        self._silence.begin()
        while (told := self._receive().manifest).get("do") in ("say", "loads"):
            self._silence.has_pace = True
            if told["do"] == "say":
                self._say(plain(told.get("what")), f"{self.place}: {plain(told.get('detail'))}")
        if told.get("do") == "failed":
            raise ModelError(f"{self.place} can't train: {plain(told.get('why'))}", where=self.place.where)
        if told.get("do") != "ready":
            raise self._lost()
        if told.get("base") != base:
            raise ModelError(
                f"{self.place} loaded another base model", where="model.source", mend="have the same files everywhere"
            )
        # Loading says nothing of how long its steps will take.
        self._silence = Silence(str(self.place), self._say)

    def ask(self, jobs: Sequence[ClientJob]) -> None:
        """Have it carry out jobs."""
        self._asked = {(job.trial, job.client): job for job in jobs}
        self._most_bytes = most_result_bytes(jobs)
        self._silence.begin()
        self._send(pack_jobs(jobs))
        self.is_busy = True

    def hear(self) -> Progress | Line | Done | Found:
        """Wait for what it says next while it trains.

        Raises:
            RunError: the process ended, hangs, or says what nobody asked it.
            KeyboardInterrupt: the run is to end.
        """
        try:
            found = read_word(self._receive(), self._asked)
        except ConnectionError:
            raise self._lost() from None
        self._silence.has_pace |= isinstance(found, Progress)
        if isinstance(found, Done):
            self.is_busy, self.lowered_to = False, found.lowered_to
        return found

    def look(self) -> None:
        """Look up from a wait for it: people are told where it is late.

        Raises:
            RunError: it hangs, and is ended.
            KeyboardInterrupt: the run is to end.
        """
        self._check_run()
        try:
            self._silence.look()
        except SilentError as silent:
            self.close()
            reach = (
                f"see that `{' '.join([*SSH, self.place.host])} fedloom --version` answers; " if self.place.host else ""
            )
            raise RunError(
                f"the process that trains on {self.place} {silent}: it was given up",
                where=self.place.where,
                mend=f"{reach}go on with --resume, without it if it hangs again",
            ) from None

    def stop(self) -> None:
        """Have it give up what it works on, and wait until it has; one that ended says so when it is asked again."""
        if not self.is_busy:
            return
        until = time.monotonic() + STOP_SECONDS

        def look() -> None:
            if time.monotonic() > until:
                raise TimeoutError

        self._connection.look = look
        try:
            self._send(Frame({"do": "stop"}))
            while self._receive().manifest.get("do") != "done":
                look()
        except (RunError, TimeoutError):
            self.close()
        self._connection.look = self.look
        self.is_busy = False

    def close(self) -> None:
        """End the process."""
        self.is_busy = False
        self._connection.close()
        self._process.terminate()
        try:
            self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _receive(self) -> Frame:
        """Wait for a frame.

        Raises:
            RunError: the process ended, or speaks something else.
        """
        try:
            return receive_frame(self._connection, self._most_bytes)
        except (OSError, MemoryError):
            raise self._lost() from None

    def _send(self, frame: Frame) -> None:
        try:
            send_frame(self._connection, frame)
        except OSError:
            raise self._lost() from None

    def _lost(self) -> RunError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_SECONDS)
        number = self._process.returncode
        mend = "go on with --resume, once the machine has memory again if that ran out"
        if number is None:
            how = "says what fedloom does not"
        else:
            how = f"was killed (signal {-number})" if number < 0 else f"ended (status {number})"
        if self.place.host:
            answers = "answers" if number is not None else "answers with its one line and nothing else"
            mend = f"see that `{' '.join([*SSH, self.place.host])} fedloom --version` {answers}; {mend}"
        return RunError(f"the process that trains on {self.place} {how}", where=self.place.where, mend=mend)


class DealtEngine:
    """Engine that deals jobs out to processes on further devices, and to one in this process where there is one."""

    def __init__(
        self, cards: Sequence[Card], open_local: Callable[[Watch], Engine] | None, watch: Watch, say: Say, folder: Path
    ) -> None:
        """Deal over cards; results that come before their turn lie in `folder`, should there be many."""
        self._cards, self._tell, self._say, self._folder = cards, watch, say, folder
        self._local = open_local(self._watch) if open_local else None
        self._found: Spool[Key]

    @property
    def lowered_to(self) -> int | None:
        """Clients that train at once on the device that has the least, since memory ran out there."""
        known = [card.lowered_to for card in self._cards] + [self._local.lowered_to if self._local else None]
        return min(filter(None, known), default=None)

    def train(self, jobs: Sequence[ClientJob]) -> Iterator[ClientResult]:
        """Carry out every job; yield the results in the order of the jobs.

        Raises:
            RunError: a process ended, or hangs.
            KeyboardInterrupt: the run is to end.
        """
        asked = {(job.trial, job.client): job for job in jobs}
        assert len(asked) == len(jobs), "two jobs of one client"
        waiting = deque(asked)
        shares = deal(jobs, len(self._cards) + (self._local is not None))
        own = self._local.train(shares.pop(0)) if self._local else iter(())
        with Spool[Key](self._folder, HELD_BYTES) as self._found:
            try:
                for card, share in zip(self._cards, shares, strict=True):
                    if share:
                        card.ask(share)
                while waiting:
                    if waiting[0] in self._found:
                        key = waiting.popleft()
                        yield unpack_result(self._found.take(key), asked[key])
                    # Here this process trains; meanwhile `_watch` takes in what others find.
                    elif result := next(own, None):
                        key = result.trial, result.client
                        if key == waiting[0]:
                            waiting.popleft()
                            yield result
                        else:
                            self._found.put(key, pack_result(result))
                    else:
                        self._take_in(wait=True)
            except KeyboardInterrupt:
                # Nobody trains on: none is asked to end its step first, which one that hangs never does.
                for card in self._cards:
                    card.close()
                raise
            finally:
                for card in self._cards:
                    card.stop()

    def _watch(self, progress: Progress) -> None:
        """Tell of a step of this process, and of what came of the others since."""
        self._tell(progress)
        self._take_in(wait=False)

    def _take_in(self, *, wait: bool) -> None:
        """Take in what the busy processes say, all of it that is there; with `wait`, something at least."""
        busy = [card for card in self._cards if card.is_busy]
        assert busy or not wait, "results that nobody works on"
        while busy:
            ready = select.select(busy, [], [], LOOK_SECONDS if wait else 0)[0]
            for card in ready:
                self._hear(card, card.hear())
            # Only of one that has nothing to say just now is it known that it is silent.
            for card in busy:
                if card not in ready:
                    card.look()
            if not ready and not wait:
                return
            busy, wait = [card for card in busy if card.is_busy], wait and not ready

    def _hear(self, card: Card, said: Progress | Line | Done | Found) -> None:
        match said:
            case Progress():
                self._tell(said)
            case Line():
                self._say(said.what, f"{card.place}: {said.detail}")
            case Found():
                self._found.put(said.key, said.frame)


def deal(jobs: Sequence[ClientJob], processes: int) -> list[list[ClientJob]]:
    """Deal jobs out: the longest first, each to who has the least to do; each share is in the order of the jobs.

    It depends on the jobs alone: a run that goes on deals as it did before.
    """
    shares: list[list[int]] = [[] for _ in range(processes)]
    loads = [0.0] * processes
    for place in sorted(range(len(jobs)), key=lambda place: -count_work(jobs[place])):
        least = loads.index(min(loads))
        shares[least].append(place)
        loads[least] += count_work(jobs[place])
    return [[jobs[place] for place in sorted(share)] for share in shares]


def count_work(job: ClientJob) -> float:
    """Return about how many tokens a job trains on."""
    blocks, training = job.blocks, job.training
    steps = job.ration.terms.steps if job.ration else training.steps_of(len(blocks))
    return steps * training.step_size * float(blocks.lengths_N.double().mean())


@contextmanager
def open_session(
    recipe: Recipe, prepared: Prepared, adapted: AdaptedModel, telemetry: Telemetry, observer: Observer, folder: Path
) -> Iterator[Session]:
    """Open a session over a loaded model, and a process on each further device that the recipe trains on.

    `folder` is where it may put what it has no room for, once it trains.

    Raises:
        ModelError: the model is not what its engine takes for granted, or can't be loaded there.
        RunError: a process ended, or hangs.
        KeyboardInterrupt: the run is to end.
    """
    name, say = prepared.plan.engine, observer.show_step

    def open_local(watch: Watch) -> Engine:
        return open_engine(name, adapted, recipe.data, watch, say)

    others, own = [*prepared.places], Place(str(prepared.device))
    trains_here = not others or own in others
    if trains_here and others:
        others.remove(own)
    with ExitStack() as stack:
        engine: Engine
        if not others:
            engine = open_local(observer.watch)
        else:
            say("devices", name_processes(prepared.places))
            told = pin(recipe, prepared.plan.to_json())
            cards = [open_card(told, place, prepared.plan.dtype, name, observer, stack) for place in others]
            base = hash_base(adapted)
            engine = DealtEngine(cards, open_local if trains_here else None, observer.watch, say, folder)
            for card in cards:
                card.check(base)
        yield Session(adapted, engine, telemetry, observer, batched=name == "batched")


def open_card(recipe: Recipe, place: Place, dtype: str, engine: str, observer: Observer, stack: ExitStack) -> Card:
    """Start the process of a device, which ends with the stack."""
    model = recipe.model.model_copy(update={"device": place.device, "dtype": dtype})
    training = recipe.training.model_copy(update={"devices": None})
    card = Card(place, observer)
    stack.callback(card.close)
    card.begin(recipe.model_copy(update={"model": model, "training": training}), engine)
    return card
