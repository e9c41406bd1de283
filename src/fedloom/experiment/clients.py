"""The clients of a run, wherever they are: how they are prepared for, and the fleet that asks them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from fedloom.experiment.personalising import personalise, write_own_adapters
from fedloom.experiment.preparation import Prepared, prepare
from fedloom.experiment.private import open_rations
from fedloom.experiment.session import Session
from fedloom.experiment.trial import Trial
from fedloom.experiment.watchers import Watchers
from fedloom.federation.fleet import Fleet, LocalFleet
from fedloom.federation.lora_rules import open_own_parts
from fedloom.progress import Say
from fedloom.recipe.recipe import Recipe


class Clients(Protocol):
    """Whoever a run's clients are."""

    command: str
    """The command that such a run is started with, for people."""

    def prepare(self, recipe: Recipe, watchers: Watchers) -> Prepared:
        """Gather all that the run needs, and know what the clients hold.

        Raises:
            FedloomError: what the person who asked can mend.
        """
        ...

    def open_fleet(self, recipe: Recipe, prepared: Prepared, session: Session, folder: Path) -> Fleet:
        """Return the fleet of the clients that were prepared for; `folder` is the run directory.

        Raises:
            FedloomError: a client can't take part.
        """
        ...

    def finish(self, trial: Trial, session: Session, say: Say) -> None:
        """Have clients make the adapters that are their own, where the recipe has some, when the rounds are over."""
        ...


class LocalClients:
    """Clients of this process: each holds its split of the recipe's documents."""

    def __init__(self, nodes: Sequence[str] = ()) -> None:
        """Have `nodes` of this owner's train some of them, named as `choose_places` takes them."""
        self._nodes = nodes
        self.command = " ".join(["fedloom run", *(f"--node {node}" for node in nodes)])

    def prepare(self, recipe: Recipe, watchers: Watchers) -> Prepared:
        """Load and split the documents, and plan the run."""
        prepared = prepare(recipe, watchers, predict=False, nodes=self._nodes)
        watchers.check()
        return prepared

    def open_fleet(self, recipe: Recipe, prepared: Prepared, session: Session, folder: Path) -> LocalFleet:
        """Return a fleet that trains in this process."""
        return local_fleet(recipe, prepared, session, folder)

    def finish(self, trial: Trial, session: Session, say: Say) -> None:
        """Make the clients' own adapters, and keep them in the run directory."""
        write_own_adapters(trial, session)
        if trial.recipe.personalise:
            say("by itself", "each client goes on from the best adapter")
            personalise(trial, session, trial.recipe.personalise)


def local_fleet(recipe: Recipe, prepared: Prepared, session: Session, folder: Path) -> LocalFleet:
    """Return the fleet of clients that train over a session in this process, from the adapter that is in its model.

    `folder` is the run directory.
    """
    scorer = session.scorer(recipe.evaluation.batch_size)
    rations = open_rations(recipe, prepared.clients, folder)
    own = open_own_parts(session.adapted.layout, recipe.federation.lora_rule, session.adapted.read)
    return LocalFleet(prepared.clients, session.train_clients, scorer, prepared.scored_clients, own, rations)
