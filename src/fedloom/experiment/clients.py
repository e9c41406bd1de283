"""The clients of a run, wherever they are: how they are prepared for, and the fleet that asks them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from fedloom.experiment.preparation import Prepared, prepare
from fedloom.experiment.private import open_rations
from fedloom.experiment.session import Session
from fedloom.experiment.watchers import Watchers
from fedloom.federation.fleet import Fleet, LocalFleet
from fedloom.federation.lora_rules import open_own_parts
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


class LocalClients:
    """Clients of this process: each holds its split of the recipe's documents."""

    command = "fedloom run"

    def prepare(self, recipe: Recipe, watchers: Watchers) -> Prepared:
        """Load and split the documents, and plan the run."""
        prepared = prepare(recipe, watchers, predict=False)
        watchers.check()
        return prepared

    def open_fleet(self, recipe: Recipe, prepared: Prepared, session: Session, folder: Path) -> LocalFleet:
        """Return a fleet that trains in this process."""
        return local_fleet(recipe, prepared, session, folder)


def local_fleet(recipe: Recipe, prepared: Prepared, session: Session, folder: Path) -> LocalFleet:
    """Return the fleet of clients that train over a session in this process, from the adapter that is in its model.

    `folder` is the run directory.
    """
    score = session.scorer(recipe.evaluation.batch_size)
    rations = open_rations(recipe, prepared.clients, folder)
    own = open_own_parts(session.adapted.layout, recipe.federation.lora_rule, session.adapted.read)
    return LocalFleet(prepared.clients, session.train_clients, score, prepared.scored_clients, own, rations)
