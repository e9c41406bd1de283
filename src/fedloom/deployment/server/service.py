"""`fedloom serve` without a recipe: a service that stays, and carries out the runs of its queue, one after another.

Its link to the clients is opened once, and stays open between runs: keys that are approved meanwhile are taken, and who
is connected takes part in the next run. A run that fails is none of the others' business; what ends the link, or the
service, leaves the run where it is, and the next service goes on with it.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from pydantic import ValidationError

from fedloom.deployment.keys import Security, in_use
from fedloom.deployment.processes import check_flower, rest
from fedloom.deployment.queue import STOPPED, SUBMIT, Entry, Queue, State
from fedloom.deployment.server.ground import lay_ground
from fedloom.deployment.server.serving import (
    WAIT_SECONDS,
    RemoteClients,
    check_deployable,
    clients_of,
    link_to_clients,
    with_limits,
)
from fedloom.deployment.server.superlink import SuperLink
from fedloom.errors import FedloomError, RecipeError
from fedloom.experiment.run import run
from fedloom.host.files import writing
from fedloom.host.signals import Interruption
from fedloom.monitoring.display import Terminal
from fedloom.monitoring.observer import Observer, Observers, describe_end
from fedloom.monitoring.status import status_file
from fedloom.progress import Progress, Say
from fedloom.recipe.recipe import Recipe
from fedloom.records.run import RoundRecord, Run
from fedloom.records.writer import check_free

COMMAND = "fedloom serve"
LOOK_SECONDS = 1.0
"""Time between two looks at the queue, and at who is there."""


def submit(recipe: Recipe, server: Path, out: Path | None = None, *, resume: bool = False, say: Say) -> Entry:
    """Put a recipe into a server's queue, if that server could carry it out, and return its place there.

    Raises:
        FedloomError: what `serve` would refuse before it waits for clients, or the queue can't be written.
    """
    check_flower()
    check_deployable(recipe)
    if out and not resume:
        check_free(out)
    # The memory may be another run's now.
    lay_ground(with_limits(recipe), say, room=False)
    told = recipe.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    return Queue(server).add(recipe.name, told, out, resume=resume)


def serve_queue(
    server: Path,
    *,
    port: int = 0,
    security: Security | None = None,
    wait_seconds: float = WAIT_SECONDS,
    observers: Sequence[Observer] = (),
) -> NoReturn:
    """Carry out the runs of a server's queue with clients on other machines, until a signal ends it.

    Raises:
        KeyboardInterrupt: a signal came.
        FedloomError: the link to the clients, or the queue, can't be had; the run that was at work goes on next time.
    """
    check_flower()
    with ExitStack() as stack:
        with writing(server, "start it again"):
            server.mkdir(mode=0o700, parents=True, exist_ok=True)  # without keys there may be none yet
        stack.enter_context(in_use(server, server))
        watching = Observers(stack.enter_context(status_file(server, COMMAND)), *observers)
        say = Observers(Terminal(), watching).show_step
        interruption = stack.enter_context(Interruption(partial(say, "stopping")))
        link = stack.enter_context(link_to_clients(port, security, say))
        say("server", "starting Flower's SuperLink")
        link.watch(interruption.check)
        link.open()
        Service(Queue(server), link, wait_seconds, watching, say, interruption.check).work()


class Stopped(KeyboardInterrupt):
    """`fedloom stop` came: the run is to end as if by Ctrl-C, and the service stays."""


class Service:
    """Runs of a queue, carried out over one link."""

    def __init__(
        self,
        queue: Queue,
        link: SuperLink,
        wait_seconds: float,
        observers: Observer,
        say: Say,
        check: Callable[[], None],
        display: Callable[[], Observer] = Terminal,
    ) -> None:
        """Make a service. `observers` hear of all its runs, and `say` tells them, and people, of the service itself.

        `check` raises where it is to end, and `display` makes what shows one run to a person.
        """
        self._queue, self._link, self._wait_seconds = queue, link, wait_seconds
        self._observers, self._say, self._check, self._display = observers, say, check, display
        self._told: set[str] = set()

    def work(self) -> NoReturn:
        """Carry out one run after another, and wait where there is none."""
        is_idle = False
        while True:
            self._check()
            if entry := self._queue.take():
                is_idle = False
                self._carry_out(entry)
                continue
            if not is_idle:
                is_idle = True
                self._observers.show_next(None)
                self._say("waiting", "for a run: fedloom submit")
            self.show_queue()
            self._hold_link()
            rest(LOOK_SECONDS, self._check)

    def show_queue(self) -> None:
        """Tell everybody of the queue as it is now, and of each file once that can't be read."""
        entries, errors = self._queue.read()
        self._observers.show_queue([entry.to_record() for entry in entries])
        for words in map(str, errors):
            if words not in self._told:
                self._told.add(words)
                self._say("damaged", words)

    def _carry_out(self, entry: Entry) -> None:
        """Carry out a run, and write down how it ended.

        Raises:
            KeyboardInterrupt: the service is to end; the run is still called running.
            FedloomError: the link is lost, or the queue can't be written; so it is.
        """
        self._observers.show_next(entry.folder)
        self.show_queue()
        goes_on = "going on with " if entry.resume else ""
        self._say("next", f"{goes_on}run {entry.number}, {entry.name}: {entry.folder}")
        turn = Turn(self, entry)
        state: State = "done"
        why = ""
        try:
            finished = self._run(entry, turn)
        except Stopped:
            state, why = "stopped", STOPPED
            self._say("stopped", f"run {entry.number}: {why}")
            self._observers.show_failure("interrupted", why)
        except KeyboardInterrupt:
            self._say("stopped", f"run {entry.number} goes on when the service is started again")
            raise
        except Exception as error:
            state, why = "failed", describe_end(error)[1]
            self._watch_and_hold_link()  # where that is lost, the run is not to blame
            if not isinstance(error, FedloomError):
                traceback.print_exception(error)
                if torch.cuda.is_initialized():
                    # After an error of CUDA's own a process can do nothing more with it.
                    self._queue.end(entry, state, why)
                    raise
            self._say("failed", f"run {entry.number}: {why}")
            self._observers.show_failure("failed", why)
        else:
            # It was done before the service that carried it out was killed, and could not say so.
            if not turn.is_over:
                self._observers.show_end(finished, finished.folder / "report.html")
        # Last: whoever is killed before has said it, and says it once more.
        self._queue.end(entry, state, why)
        self._watch_and_hold_link()

    def _run(self, entry: Entry, turn: Turn) -> Run:
        recipe = read_recipe(entry)
        check_deployable(recipe)
        known = clients_of(entry.folder) if entry.resume else ()
        clients = RemoteClients(self._link, self._wait_seconds, known, turn.check, SUBMIT)
        watching = (_Lent(self._observers), turn)
        return run(
            with_limits(recipe), entry.folder, self._display(), resume=entry.resume, clients=clients, observers=watching
        )

    def asks_to_stop(self, entry: Entry) -> str:
        """Return when a run is to end: `round`, `now`, or an empty text."""
        return self._queue.asked_to_stop(entry.number)

    def _watch_and_hold_link(self) -> None:
        self._link.watch(self._check)
        self._hold_link()

    def _hold_link(self) -> None:
        """Look who is there, so that their keys are taken; connect again where the link was lost.

        Raises:
            DeploymentError: it can't be had again.
        """
        try:
            self._link.nodes()
        except OSError:
            self._say("server", "lost the connection to Flower's SuperLink; connecting again")
            self._link.reopen()


class Turn(Observer):
    """A run's turn: ends it where somebody asked for that, after the round that is under way, or at once."""

    def __init__(self, service: Service, entry: Entry) -> None:
        self._service, self._entry = service, entry
        self._looked = 0.0
        self._in_rounds = False
        self.is_over = False
        """True once it was told that the run is done."""

    def check(self) -> None:
        """End the run here, if it is to end at once, or before its first round.

        Raises:
            Stopped
        """
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        asked = self._service.asks_to_stop(self._entry)
        if asked == "now" or (asked and not self._in_rounds):
            raise Stopped
        self._service.show_queue()

    def watch(self, progress: Progress) -> None:
        self.check()

    def show_folder(self, folder: Path) -> None:
        self._in_rounds = True

    def show_round(self, record: RoundRecord) -> None:
        """End the run, whose round is on record, if that was asked for.

        Raises:
            Stopped
        """
        if self._service.asks_to_stop(self._entry):
            raise Stopped

    def show_end(self, run: Run, report: Path) -> None:
        self.is_over = True


class _Lent(Observers):
    """Observers of a service, which stay open when one of its runs ends."""

    def close(self) -> None:
        """Close nothing."""


def read_recipe(entry: Entry) -> Recipe:
    """Read the recipe of a run as it was submitted.

    Raises:
        RecipeError: it is none of this version's.
    """
    try:
        return Recipe.model_validate(entry.recipe)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise RecipeError(
            f"not a recipe of this version of fedloom: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            where=f"run {entry.number} of the queue",
            mend=f"submit it again: {SUBMIT}",
        ) from None
