"""What a run needs to go on after it was killed: written whole after every round, verified before it is used.

`RUN/state/round-000003/` holds the global adapter, what the strategy and the clients remember, and a manifest with the
SHA-256 of each file. It is made under another name, flushed to the disk, and renamed: it is there whole or not at all.
The two newest are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedloom.adapters.residual import Residual
from fedloom.adapters.weights import Adapter, Layout
from fedloom.errors import RunError
from fedloom.evaluation import Score
from fedloom.failpoints import failpoint
from fedloom.federation.aggregation import State
from fedloom.records import writing
from fedloom.training.jobs import OptimizerState

FOLDER = "state"
MANIFEST = "manifest.json"
KEPT = 2
VERSION = 1
"""Of the format: a state of another one is refused."""


@dataclass(frozen=True)
class RunState:
    """A run between two rounds."""

    adapter: Adapter
    strategy: State
    losses: list[float]
    """By which adapters are judged, round 0 first."""
    scores: dict[int, Score]
    """Of the adapter, on each client's own hold-out."""
    optimizers: dict[int, OptimizerState]
    """What clients keep."""
    record_bytes: Mapping[str, int]
    """How long the records were: what is beyond belongs to a round that never was complete."""
    identity: Mapping[str, str]
    """What must be the same for the run to go on: hashes of the base model and of the data."""

    @property
    def round(self) -> int:
        """The last that is complete."""
        return len(self.losses) - 1


def save_state(run: Path, state: RunState) -> None:
    """Commit a round.

    Raises:
        RunError: it can't be written; what was committed before is still there.
    """
    parent = run / FOLDER
    target = parent / f"round-{state.round:06d}"
    temporary = parent / f".{target.name}.tmp"
    with writing(target):
        parent.mkdir(exist_ok=True)
        clear_unfinished(parent)
        temporary.mkdir()
        adapter = state.adapter
        residual = adapter.residual.factors if adapter.residual else {}
        remembered, tensors = pack(state.strategy)
        tensors |= {"adapter": adapter.weights_P}
        tensors |= {
            f"residual/{layer}/{side}": t
            for layer, pair in residual.items()
            for side, t in zip("ba", pair, strict=True)
        }
        kept = {f"{client}/{name}": t for client, named in state.optimizers.items() for name, t in named.items()}
        for name, content in (("server.safetensors", tensors), ("clients.safetensors", kept)):
            save_file({key: value.contiguous() for key, value in content.items()}, temporary / name)
            failpoint("state.file")
        told = {
            "version": VERSION,
            "layout": [adapter.layout.names, [list(shape) for shape in adapter.layout.shapes]],
            "strategy": remembered,
            "losses": state.losses,
            "scores": {client: [s.loss_sum, s.correct, s.num_targets] for client, s in state.scores.items()},
            "record_bytes": dict(state.record_bytes),
            "identity": dict(state.identity),
            "files": {file.name: hash_file(file) for file in sorted(temporary.iterdir())},
        }
        text = json.dumps({**told, "sha256": _hash_json(told)}, indent=1)
        (temporary / MANIFEST).write_text(text, encoding="utf-8")
        failpoint("state.manifest")
        for file in temporary.iterdir():
            flush(file)
        flush(temporary)
        failpoint("state.flushed")
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        flush(parent)
        failpoint("state.renamed")
        for old in committed(run)[KEPT:]:
            shutil.rmtree(old)
        failpoint("state.pruned")


def load_state(run: Path, say: Callable[[str], object] = str) -> RunState | None:
    """The newest state that is whole, None where no round was committed; `say` is told of each that is not whole.

    Raises:
        RunError: there are states, and none of them is whole.
    """
    folders = committed(run)
    for folder in folders:
        try:
            return read_state(folder)
        except RunError as error:
            say(str(error))
    if folders:
        raise RunError(
            "no state in it is whole", where=str(run / FOLDER), mend="remove the run directory and begin again"
        )
    return None


def read_state(folder: Path) -> RunState:
    """A committed state, verified.

    Raises:
        RunError: it is damaged, or of another version.
    """
    try:
        told = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        digest = told.pop("sha256")
        if told["version"] != VERSION:
            raise RunError(
                f"a state of version {told['version']}; this fedloom reads version {VERSION}",
                where=str(folder),
                mend="go on with the fedloom that began the run",
            )
        if digest != _hash_json(told):
            raise ValueError("its manifest was changed")
        for name, expected in told["files"].items():
            if hash_file(folder / name) != expected:
                raise ValueError(f"{name} was changed")
        tensors, kept = (load_file(folder / name) for name in ("server.safetensors", "clients.safetensors"))
        names, shapes = told["layout"]
        factors: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("residual/"):
                _, layer, side = key.split("/")
                factors.setdefault(layer, {})[side] = value
        residual = Residual({layer: (pair["b"], pair["a"]) for layer, pair in factors.items()}) if factors else None
        layout = Layout(tuple(names), tuple(torch.Size(shape) for shape in shapes))
        optimizers: dict[int, OptimizerState] = {}
        for key, value in kept.items():
            client, _, name = key.partition("/")
            optimizers.setdefault(int(client), {})[name] = value
        return RunState(
            adapter=Adapter(layout, tensors["adapter"], residual),
            strategy=unpack(told["strategy"], tensors),
            losses=told["losses"],
            scores={int(client): Score(*score) for client, score in told["scores"].items()},
            optimizers=optimizers,
            record_bytes=told["record_bytes"],
            identity=told["identity"],
        )
    except RunError:
        raise
    except Exception as error:  # of any kind, from files that may be anything
        reason = str(error) if type(error) is ValueError else type(error).__name__
        raise RunError(f"a state that is not whole ({reason})", where=str(folder)) from error


def committed(run: Path) -> list[Path]:
    """The folders of the states that were renamed into place, the newest first."""
    parent = run / FOLDER
    return sorted((path for path in parent.glob("round-*") if path.is_dir()), reverse=True) if parent.is_dir() else []


def clear_unfinished(folder: Path) -> None:
    """Remove what a killed run was in the middle of writing."""
    for path in [*folder.glob(".*")] if folder.is_dir() else ():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def pack(state: State) -> tuple[Any, dict[str, Tensor]]:
    """What a strategy remembers as JSON with the names of its tensors, and the tensors."""
    tensors: dict[str, Tensor] = {}

    def visit(value: State) -> Any:
        if isinstance(value, Tensor):
            name = f"strategy/{len(tensors)}"
            tensors[name] = value
            return {"tensor": name}
        if isinstance(value, tuple):
            return [visit(item) for item in value]
        assert value is None or isinstance(value, int | float), f"a strategy remembers a {type(value).__name__}"
        return value

    return visit(state), tensors


def unpack(told: Any, tensors: Mapping[str, Tensor]) -> State:
    """The inverse of `pack`."""
    if isinstance(told, dict):
        return tensors[told["tensor"]]
    return tuple(unpack(item, tensors) for item in told) if isinstance(told, list) else told


def hash_file(path: Path) -> str:
    """SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tensors(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of shapes and bytes, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk before anything that comes after."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
