"""State from which a killed run goes on: written whole after every round, verified before it is used.

`RUN/state/round-000003/` holds the global adapter, what the strategy and the clients remember, and a manifest with the
SHA-256 of each file. It is made under another name, flushed to the disk, and renamed: it is there whole or not at all.
The two newest are kept.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedloom.adapters.adapter import Adapter, Layout
from fedloom.adapters.lora import Residual
from fedloom.errors import RunError
from fedloom.evaluation.held_out import Score
from fedloom.federation.aggregation import State
from fedloom.host.failpoints import failpoint
from fedloom.host.files import (
    Moment,
    clear_unfinished,
    hash_file,
    hash_folder,
    hash_json,
    hash_pieces,
    hash_start,
    remove_folder,
    replace_folder,
    writing,
)
from fedloom.records.card import CARD, without_tasks
from fedloom.records.run import judged_loss, read_run
from fedloom.training.jobs import OptimizerState

FOLDER = "state"
OWN = "own"
"""Beginning of the names of the clients' own parts of adapters, in the file of what clients keep."""
MANIFEST = "manifest.json"
KEPT = 2
FAILPOINTS: Mapping[Moment, str] = {"written": "state.flushed", "renamed": "state.renamed"}
BEGIN_AGAIN = "remove the run directory and begin again"
VERSION = 2
"""Version of the format: a state of another one is refused."""


@dataclass(frozen=True)
class RunState:
    """A run between two rounds."""

    adapter: Adapter
    strategy: State
    losses: list[float | None]
    """Losses by which adapters are judged, round 0 first; None after a round that was not evaluated."""
    scores: dict[int, Score]
    """Scores of the adapter on each client's own hold-out."""
    optimizers: dict[int, OptimizerState]
    """Optimizer states that clients keep."""
    own_parts: dict[int, Tensor]
    """Parts of adapters that clients keep."""
    record_bytes: Mapping[str, int]
    """Lengths of the records: what is beyond belongs to a round that never was complete."""
    record_hashes: Mapping[str, str]
    """SHA-256 of so much of them."""
    adapters: Mapping[str, Mapping[str, str]]
    """`initial`, `best` and `last`: SHA-256 of each file."""
    norms: Sequence[float]
    """Norms of changes that admission remembers."""
    began: Mapping[int, float]
    """Each client's loss on its own hold-out in round 0."""
    identity: Mapping[str, str]
    """Hashes of the base model and of the data, which must be the same for the run to go on."""

    @property
    def round(self) -> int:
        """Last round that is complete."""
        return len(self.losses) - 1

    @property
    def name(self) -> str:
        """Name of the state's folder."""
        return f"round-{self.round:06d}"

    @property
    def best_round(self) -> int:
        """Round of the best adapter; of equal losses, the last."""
        return self.round - self.losses[::-1].index(self.best_loss)

    @property
    def best_loss(self) -> float:
        """Lowest loss of an adapter that was evaluated."""
        return min(loss for loss in self.losses if loss is not None)


def save_state(run: Path, state: RunState) -> None:
    """Commit a round.

    Raises:
        RunError: it can't be written; what was committed before is still there.
    """
    parent = run / FOLDER
    target = parent / state.name
    with writing(target):
        clear_unfinished(parent)
        with replace_folder(target, durable=True, failpoints=FAILPOINTS) as temporary:
            _write_state(state, temporary)
        for old in committed(run)[KEPT:]:
            shutil.rmtree(old)
        failpoint("state.pruned")


def _write_state(state: RunState, folder: Path) -> None:
    """Write the files of a state, the manifest last: it has the hashes of the others."""
    adapter = state.adapter
    residual = adapter.residual.factors if adapter.residual else {}
    remembered, tensors = pack(state.strategy)
    tensors |= {"adapter": adapter.weights_P}
    tensors |= {
        f"residual/{layer}/{side}": t for layer, pair in residual.items() for side, t in zip("ba", pair, strict=True)
    }
    kept = {f"{client}/{name}": t for client, named in state.optimizers.items() for name, t in named.items()}
    kept |= {f"{OWN}/{client}": part for client, part in state.own_parts.items()}
    for name, content in (("server.safetensors", tensors), ("clients.safetensors", kept)):
        save_file({key: value.contiguous() for key, value in content.items()}, folder / name)
        failpoint("state.file")
    told = {
        "version": VERSION,
        "layout": [adapter.layout.names, [list(shape) for shape in adapter.layout.shapes]],
        "strategy": remembered,
        "losses": state.losses,
        "scores": {client: [s.loss_sum, s.correct, s.num_targets] for client, s in state.scores.items()},
        "record_bytes": dict(state.record_bytes),
        "record_hashes": dict(state.record_hashes),
        "adapters": {name: dict(files) for name, files in state.adapters.items()},
        "norms": list(state.norms),
        "began": dict(state.began),
        "identity": dict(state.identity),
        "files": {file.name: hash_file(file) for file in sorted(folder.iterdir())},
    }
    text = json.dumps({**told, "sha256": hash_json(told)}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    failpoint("state.manifest")


def load_state(run: Path, say: Callable[[str], object] = str) -> RunState | None:
    """Return the newest state that is whole, None where no round was committed; `say` each that is not whole.

    Raises:
        RunError: there are states, and none of them is whole; or there is none for rounds that are on record.
    """
    folders = committed(run)
    whole, blamed = False, []
    for folder in folders:
        try:
            state = read_state(folder)
            check_records(run, state)
        except RunError as error:
            say(f"{folder}: {error.what}")
            blamed.append(error)
            continue
        whole = True
        if not _lost_its_best(run, state):
            return state
        say(f"{folder}: adapters/best is damaged, and this state does not hold it")
    # A round is committed before the next begins: without a state, only round 0 was at work.
    if not folders and (rounds := count_rounds(run)) > 1:
        why = f"no state is there to go on after the {rounds} rounds on record"
        raise RunError(why, where=str(run / FOLDER), mend=f"restore it, or {BEGIN_AGAIN}")
    if folders and not whole:
        # Where the records or another version keep a state from being used, the states are not to blame.
        mendable = (error for error in blamed if error.mend)
        raise next(mendable, RunError("no state in it is whole", where=str(run / FOLDER), mend=BEGIN_AGAIN))
    if whole:
        say("no state holds the best adapter: all rounds are trained again")
    return None


def count_rounds(run: Path) -> int:
    """Return how many rounds are on record, round 0 among them."""
    path = run / "rounds.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def check_records(run: Path, state: RunState) -> None:
    """Refuse a state that the records do not go with: they are missing or changed, or it is another run's.

    Raises:
        RunError
    """
    for name, size in state.record_bytes.items():
        if hash_start(run / name, size).hexdigest() != state.record_hashes[name]:
            what = f"not what it was at the end of round {state.round}" if isfile(run / name) else "missing"
            raise RunError(f"{name} is {what}", where=str(run), mend=f"restore {name}, or {BEGIN_AGAIN}")


def damaged_adapters(run: Path, state: RunState) -> dict[str, list[str]]:
    """`initial`, `best` and `last`, where they are not what they were when the state was written, with their files.

    What tasks added to a card later is no damage.
    """
    found = {}
    for name, files in state.adapters.items():
        now = hash_folder(run / "adapters" / name)
        if CARD in now:
            card = (run / "adapters" / name / CARD).read_bytes().decode(errors="surrogateescape")
            now[CARD] = hashlib.sha256(without_tasks(card).encode(errors="surrogateescape")).hexdigest()
        if now != files:
            found[name] = sorted(file for file in {**files, **now} if now.get(file) != files.get(file))
    return found


def _lost_its_best(run: Path, state: RunState) -> bool:
    """Return whether the best adapter is damaged, and neither in the state nor made again by the rounds to come."""
    if state.best_round == state.round or "best" not in damaged_adapters(run, state):
        return False
    later = read_run(run).rounds[state.round + 1 :]
    return not any(judged_loss(record) <= state.best_loss for record in later)


def forget_states(run: Path) -> None:
    """Remove every state, all at once."""
    with writing(run / FOLDER):
        remove_folder(run / FOLDER)


def read_state(folder: Path) -> RunState:
    """Read a committed state, and verify it.

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
        if digest != hash_json(told):
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
        own_parts: dict[int, Tensor] = {}
        for key, value in kept.items():
            client, _, name = key.partition("/")
            if client == OWN:
                own_parts[int(name)] = value
            else:
                optimizers.setdefault(int(client), {})[name] = value
        return RunState(
            adapter=Adapter(layout, tensors["adapter"], residual),
            strategy=unpack(told["strategy"], tensors),
            losses=told["losses"],
            scores={int(client): Score(*score) for client, score in told["scores"].items()},
            optimizers=optimizers,
            own_parts=own_parts,
            record_bytes=told["record_bytes"],
            record_hashes=told["record_hashes"],
            adapters=told["adapters"],
            norms=told["norms"],
            # States of earlier versions have none: nothing was judged by it.
            began={int(client): loss for client, loss in told.get("began", {}).items()},
            identity=told["identity"],
        )
    except RunError:
        raise
    except Exception as error:  # of any kind, from files that may be anything
        reason = str(error) if type(error) is ValueError else type(error).__name__
        raise RunError(f"a state that is not whole ({reason})", where=str(folder)) from error


def committed(run: Path) -> list[Path]:
    """Return the folders of the states that were renamed into place, the newest first."""
    parent = run / FOLDER
    return sorted((path for path in parent.glob("round-*") if path.is_dir()), reverse=True) if parent.is_dir() else []


def pack(state: State) -> tuple[Any, dict[str, Tensor]]:
    """Return a strategy's memory as JSON with the names of its tensors, and the tensors."""
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
    """Undo `pack`."""
    if isinstance(told, dict):
        return tensors[told["tensor"]]
    return tuple(unpack(item, tensors) for item in told) if isinstance(told, list) else told


def hash_tensors(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of shapes and bytes, in order."""

    def pieces() -> Iterator[bytes | memoryview]:
        for tensor in tensors:
            yield repr(tuple(tensor.shape)).encode()
            yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data

    return hash_pieces(pieces())
