"""Runs in this process that fail where a test says, in half a second each, one client at a time."""

from pathlib import Path
from typing import Any

from fedloom.errors import FedloomError
from fedloom.experiment.run import run
from fedloom.host import failpoints
from fedloom.monitoring.observer import Observer
from fedloom.recipe.recipe import Recipe
from support import killed_runs
from support.killed_runs import result_of

__all__ = ["Said", "attempt", "make_recipe", "result_of"]


class Said(Observer):
    """Keeps what a run said."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def show_step(self, what: str, detail: str) -> None:
        self.steps.append(f"{what}: {detail}")


def make_recipe(folder: Path, **changes: Any) -> Recipe:
    training = {"engine": "reference", "clients_at_once": None, **changes.pop("training", {})}
    return killed_runs.make_recipe(folder, training=training, **changes)


def attempt(recipe: Recipe, folder: Path, failpoint: str = "", display: Observer | None = None) -> str:
    """Carry a recipe out, or go on with it; the line that it ends with, empty where it is done."""
    failpoints.arm(failpoint)
    try:
        run(recipe, folder, display or Observer(), resume=True)
    except FedloomError as error:
        return str(error)
    finally:
        failpoints.arm("")
    return ""
