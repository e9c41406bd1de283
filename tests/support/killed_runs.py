"""Runs in processes of their own that can be killed: forked from one that has imported everything already.

Importing this module, as the fork server does, carries out a run once, so that nothing is left to import.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from fedloom.errors import FedloomError
from fedloom.experiment import trial
from fedloom.experiment.run import run
from fedloom.experiment.sweep import sweep
from fedloom.host import failpoints
from fedloom.host.signals import Terminated
from fedloom.monitoring.observer import Observer
from fedloom.recipe.recipe import Recipe
from fedloom.records.state import save_state
from fedloom.records.writer import RunWriter
from fedloom.report import run_report

TIMES = ("seconds", "finished", "ram_peak_bytes", "gpu_peak_bytes", "gpu_reserved_bytes")
"""Parts of the names of what no two runs have alike."""


def make_recipe(folder: Path, **changes: Any) -> Recipe:
    """A run of a second or less that remembers as much as one can: server momentum, and the clients' Adam."""
    path = folder / "documents.jsonl"
    if not path.exists():
        lines = [json.dumps({"text": f"{number} " + f"word{number * 7919 % 101} " * 9}) for number in range(30)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    values: dict[str, Any] = {
        "name": "killed",
        "seed": 5,
        "model": {"source": "random:tiny-llama", "dtype": "float32"},
        "adapter": {"rank": 2, "alpha": 4, "targets": ["q_proj"], "dropout": 0.1},
        "data": {
            "source": str(path),
            "max_length": 24,
            "clients": 3,
            "client_holdout": 0.2,
            "central_holdout": 4,
        },
        "training": {
            "batch_size": 4,
            "learning_rate": 1e-2,
            "proximal_mu": 0.1,
            "optimizer_state": "keep",
            "clients_at_once": 2,
        },
        "federation": {"rounds": 3, "strategy": {"kind": "fedadam", "learning_rate": 0.01}},
    }
    for section, value in changes.items():
        values[section] = {**values.get(section, {}), **value} if isinstance(value, dict) else value
    return Recipe.model_validate(values)


def result_of(folder: Path) -> dict[str, Any]:
    """Everything that a run came to, times aside."""
    lines = {}
    for name in ("rounds.jsonl", "clients.jsonl", "evaluation.jsonl"):
        if name != "rounds.jsonl" and not (folder / name).exists():
            continue
        records = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        lines[name] = [{k: v for k, v in record.items() if not any(t in k for t in TIMES)} for record in records]
        if name == "clients.jsonl":  # of a round, in the order in which they finished
            lines[name].sort(key=lambda record: (record["round"], record["client"]))
    adapters = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in ("adapters/*/*.safetensors", "clients/*/adapter/*.safetensors", "baselines/*/*.safetensors")
        for path in sorted(folder.glob(pattern))
    }
    files = {name: folder / f"{name}.json" for name in ("baselines", "personalised", "contributions")}
    return {**lines, **adapters, **{name: path.read_text() if path.exists() else "" for name, path in files.items()}}


def _carry_out(recipe: Recipe, folder: Path, failpoint: str, twin: str) -> None:
    """In the child: the run, until it is done or something happens to it; the exit code says which."""
    _end(lambda: run(recipe, folder, Observer(), resume=True), folder, failpoint, twin)


def _sweep(source: Path, axes: list[str], folder: Path, failpoint: str) -> None:
    """In the child: the sweep, likewise."""
    _end(lambda: sweep(source, axes, folder, Observer()), folder, failpoint, "none")


def _end(work: Callable[[], object], folder: Path, failpoint: str, twin: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    failpoints.arm(failpoint)
    run_report.draw = lambda plot: "<svg></svg>"  # plots take most of the time and remember nothing
    TWINS[twin]()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            work()
        except Terminated:
            os._exit(143)
        except KeyboardInterrupt:
            os._exit(130)
        except FedloomError as error:
            (folder.parent / f"{folder.name}.error").write_text(str(error))
            os._exit(2)
        except BaseException as error:
            (folder.parent / f"{folder.name}.error").write_text(repr(error))
            os._exit(1)
    os._exit(0)


def start(recipe: Recipe, folder: Path, failpoint: str = "", twin: str = "none") -> Any:
    """A process that carries the recipe out, or goes on with it; `failpoint` and `twin` are what goes wrong in it."""
    return _fork(_carry_out, recipe, folder, failpoint, twin)


def sweep_out(source: Path, axes: list[str], folder: Path, failpoint: str = "") -> int:
    """Sweep in a process of its own, or go on with that, to its end; the exit code, negative for a signal."""
    process = _fork(_sweep, source, axes, folder, failpoint)
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return int(process.exitcode)


def _fork(work: Callable[..., None], *told: object) -> Any:
    # The fork server of Python 3.11 finds what it is to import by the environment alone.
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(os.pathsep.join(paths).split(os.pathsep)))
    context = get_context("forkserver")
    context.set_forkserver_preload(["support.killed_runs"])
    process = context.Process(target=work, args=told)
    process.start()
    return process


def carry_out(recipe: Recipe, folder: Path, failpoint: str = "", twin: str = "none") -> int:
    """As `start`, to its end; the exit code, negative for a signal."""
    process = start(recipe, folder, failpoint, twin)
    process.join(60)
    assert process.exitcode is not None, "it hangs"
    return int(process.exitcode)


# Each of these is a run directory's writer with one rule of this house left out.


def _write_states_in_place() -> None:
    """No other name, no rename, no second copy: what is there may be half of it."""
    right = save_state

    def save(folder: Path, state: Any) -> None:
        for old in (folder / "state").glob("round-*"):
            shutil.rmtree(old)
        Path.rename = lambda self, target: shutil.copytree(self, target)  # type: ignore[assignment, method-assign]
        try:
            right(folder, state)
        finally:
            Path.rename = rename  # type: ignore[method-assign]

    rename = Path.rename
    trial.save_state = save


def _keep_what_was_recorded() -> None:
    """Records of a round that never was complete stay."""
    RunWriter.cut_records = lambda self, sizes: None  # type: ignore[method-assign]


def _forget(what: str) -> Callable[[], None]:
    """A state that lacks a part."""

    def twin() -> None:
        right = save_state

        def save(folder: Path, state: Any) -> None:
            round, *moments = state.strategy
            nothing = {"optimizers": {}, "strategy": (round, *map(torch.zeros_like, moments))}
            right(folder, replace(state, **{what: nothing[what]}))

        trial.save_state = save

    return twin


TWINS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "writes states in place": _write_states_in_place,
    "keeps what was recorded": _keep_what_was_recorded,
    "forgets the clients' optimizers": _forget("optimizers"),
    "forgets the server's moments": _forget("strategy"),
}

if "pytest" not in sys.modules:  # in the fork server
    with tempfile.TemporaryDirectory() as _folder:
        run(make_recipe(Path(_folder)), Path(_folder) / "run", Observer())
