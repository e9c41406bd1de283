"""Scalars of a run in the tools where people look at runs: TensorBoard, MLflow, Weights & Biases, Trackio.

None of them is needed; each is imported when it is asked for. They are told numbers and the recipe, never text of
documents.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedloom.errors import RunError
from fedloom.monitoring.observer import Observer
from fedloom.records.run import Record, RoundRecord

Log = Callable[[int, dict[str, float]], None]
"""A function that takes a round's number and its scalars."""


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return every number of a round's record by its key; those by client or phase as `key/name`."""
    found: dict[str, float] = {}
    for key, value in record.items():
        parts = {f"{key}/{name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
        found |= {
            name: float(number)
            for name, number in parts.items()
            if name != "round" and isinstance(number, int | float) and not isinstance(number, bool)
        }
    return found


def check_tracker(kind: str) -> None:
    """Refuse a tool that can't be told anything.

    Raises:
        RunError: no such tool, or it is not installed.
    """
    if kind not in TRACKERS:
        raise RunError(f'no tracker "{kind}"', where="--log", mend=f"one of: {', '.join(TRACKERS)}")
    if find_spec(kind) is None:
        raise RunError(f"{kind} is not installed", where="--log", mend=f"pip install {kind}")


class Tracker(Observer):
    """A tool that is told each round's numbers, from the first round to the end of the run."""

    def __init__(self, kind: str, recipe: Record) -> None:
        check_tracker(kind)
        self._kind, self._recipe = kind, recipe
        self._log: Log | None = None
        self._close: Callable[[], object] | None = None

    def show_folder(self, folder: Path) -> None:
        """Open the tool, which names the run by its directory.

        Raises:
            RunError: it can't be opened.
        """
        try:
            self._log, self._close = TRACKERS[self._kind](folder, self._recipe)
        except Exception as error:  # of any kind: each tool has its own
            why = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
            raise RunError(
                f"{self._kind} can't be told anything ({why})", where="--log", mend="mend it, or leave --log out"
            ) from error

    def show_round(self, record: RoundRecord) -> None:
        if self._log is None:
            return
        try:
            self._log(record["round"], scalars(record))
        except Exception as error:  # of any kind: a tracker that is down must not end a run
            self._log = None
            warnings.warn(f"{self._kind} takes no more numbers: {type(error).__name__}", RuntimeWarning, stacklevel=2)

    def close(self) -> None:
        if self._close:
            with suppress(Exception):
                self._close()


def _tensorboard(folder: Path, recipe: Record) -> tuple[Log, Callable[[], Any]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def log(round: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, round)
        writer.flush()

    return log, writer.close


def _mlflow(folder: Path, recipe: Record) -> tuple[Log, Callable[[], Any]]:
    import mlflow

    mlflow.set_experiment(recipe["name"])
    mlflow.start_run(run_name=folder.name)
    mlflow.log_dict(recipe, "recipe.json")

    def log(round: int, values: dict[str, float]) -> None:
        mlflow.log_metrics(values, step=round)

    return log, mlflow.end_run


def _like_wandb(module: Any, folder: Path, recipe: Record, **settings: Any) -> tuple[Log, Callable[[], Any]]:
    module.init(project="fedloom", name=folder.name, config=recipe, **settings)

    def log(round: int, values: dict[str, float]) -> None:
        module.log(values, step=round)

    return log, module.finish


def _wandb(folder: Path, recipe: Record) -> tuple[Log, Callable[[], Any]]:
    import wandb

    # By itself it also sends a patch of what is not committed, which may be documents, and what the console shows.
    quiet = wandb.Settings(disable_git=True, save_code=False, console="off")
    return _like_wandb(wandb, folder, recipe, settings=quiet)


def _trackio(folder: Path, recipe: Record) -> tuple[Log, Callable[[], Any]]:
    import trackio

    return _like_wandb(trackio, folder, recipe)


TRACKERS: dict[str, Callable[[Path, Record], tuple[Log, Callable[[], Any]]]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
    "trackio": _trackio,
}
"""Tools by the name of their package, each with how it is opened."""
