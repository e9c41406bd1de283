"""Scalars of a run in the tools where people look at runs: TensorBoard, MLflow, Weights & Biases, Trackio.

None of them is needed; each is imported when it is asked for. They are told numbers and the recipe, never text of
documents.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedloom.errors import RunError
from fedloom.records.run import Record

Log = Callable[[int, dict[str, float]], None]
"""Take the scalars of a round."""


def scalars(record: Record) -> dict[str, float]:
    """Every number of a round's record, by its key; those by client or phase as `key/name`."""
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


@contextmanager
def open_tracker(kind: str, folder: Path, recipe: Record) -> Iterator[Log]:
    """Where to log a run's rounds; `folder` is the run directory.

    Raises:
        RunError: it can't be opened.
    """
    try:
        log, close = TRACKERS[kind](folder, recipe)
    except Exception as error:  # of any kind: each tool has its own
        why = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise RunError(
            f"{kind} can't be told anything ({why})", where="--log", mend="mend it, or leave --log out"
        ) from error
    failed = False

    def log_or_say(round: int, values: dict[str, float]) -> None:
        nonlocal failed
        try:
            log(round, values)
        except Exception as error:  # of any kind: a tracker that is down must not end a run
            if not failed:
                warnings.warn(f"{kind} takes no more numbers: {type(error).__name__}", RuntimeWarning, stacklevel=2)
            failed = True

    try:
        yield log_or_say
    finally:
        with suppress(Exception):
            close()


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
"""Name of the tool and of its package -> how to open it."""
