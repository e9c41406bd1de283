"""Runs in this process that fail where a test says, in half a second each: one client at a time, empty plots."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedloom.errors import FedloomError
from fedloom.experiment.run import run
from fedloom.host import failpoints
from fedloom.monitoring.observer import Observer
from fedloom.recipe.recipe import Recipe
from fedloom.report import run_report
from support import killed_runs
from support.killed_runs import result_of

__all__ = ["Said", "attempt", "make_recipe", "plain_plots", "result_of"]


class Said(Observer):
    """Keeps what a run said."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def show_step(self, what: str, detail: str) -> None:
        self.steps.append(f"{what}: {detail}")


def make_recipe(folder: Path, **changes: Any) -> Recipe:
    training = {"engine": "reference", "clients_at_once": None, **changes.pop("training", {})}
    return killed_runs.make_recipe(folder, training=training, **changes)


@contextmanager
def plain_plots() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_lines", "draw_bars"):
            patch.setattr(run_report, name, lambda *args, **kwargs: "<svg></svg>")
        yield


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
