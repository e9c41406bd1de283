"""Runs whose clients hold the blocks that a test gives them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedloom import run
from fedloom.data.tokens import ClientBlocks, TokenBlocks
from fedloom.experiment.clients import LocalClients
from fedloom.experiment.preparation import Prepared
from fedloom.experiment.watchers import Watchers
from fedloom.monitoring.observer import Observer
from fedloom.recipe.recipe import Recipe
from fedloom.records.run import Run


class Planted(LocalClients):
    """Clients of this process with these blocks, whatever the recipe's documents are; and a central hold-out."""

    def __init__(self, held: Sequence[ClientBlocks], central: TokenBlocks | None = None) -> None:
        super().__init__()
        self._held, self._central = tuple(held), central

    def prepare(self, recipe: Recipe, watchers: Watchers) -> Prepared:
        prepared = super().prepare(recipe, watchers)
        scored = [client for client, held in enumerate(self._held) if len(held.holdout)]
        central = prepared.central if self._central is None else self._central
        return replace(prepared, clients=self._held, scored_clients=scored, central=central)


def run_planted(recipe: Recipe, folder: Path, held: Sequence[ClientBlocks], central: TokenBlocks | None = None) -> Run:
    """Carry a recipe out with clients that hold these blocks."""
    return run(recipe, folder, Observer(), clients=Planted(held, central))
