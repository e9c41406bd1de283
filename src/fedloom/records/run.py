"""The run directory, read: what a run left behind, or has written so far. No torch here.

A record may lack keys: what was not known when it was written was left out. The last line may be cut off.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from os.path import isdir, isfile
from pathlib import Path
from typing import Any, NoReturn, Required, TypedDict

from fedloom.errors import RunError
from fedloom.records.kinds import KINDS, ClientNumber, MeasureRecord, find_odd
from fedloom.text import quote_path

Record = dict[str, Any]
"""A record as it is read: JSON that may lack keys."""


class RoundRecord(TypedDict, total=False):
    """A line of `rounds.jsonl`. Losses are nats per token, times seconds, sizes bytes; what is unknown is left out."""

    round: Required[int]
    train_loss: float
    client_loss: float
    central_loss: float
    central_perplexity: float
    central_accuracy: float
    judged_loss: float
    proximal_mu: float
    proximal_loss: float
    proximal_ratio: float
    drift: float
    clients: Required[list[int]]
    lost: Required[list[int]]
    lost_because: dict[str, str]
    refused: list[str]
    shares: dict[ClientNumber, float]
    capped: list[int]
    scaled: dict[str, float]
    away: dict[ClientNumber, float]
    unasked: list[int]
    train_seconds: Required[float]
    aggregate_seconds: Required[float]
    evaluate_seconds: Required[float]
    train_tokens: Required[int]
    bytes_up: Required[int]
    bytes_down: Required[int]
    client_losses: Required[dict[ClientNumber, float]]
    adapter_sha256: Required[str]
    finished: Required[str]
    evaluate_tokens: int
    evaluate_samples: int
    evaluate_steps: int
    ram_peak_bytes: dict[str, int]
    gpu_peak_bytes: dict[str, int]
    gpu_reserved_bytes: dict[str, int]
    epsilon: float
    next_max_norm: float
    lora_error: float
    lora_error_layers: dict[str, float]
    runs_together: int
    clients_at_once: int


EVALUATIONS = "evaluation.jsonl"
"""File of a run with the answers of models to tasks, counted."""


class EvaluationRecord(TypedDict, total=False):
    """A line of `evaluation.jsonl`: a task of one model. Without a round and a baseline it is the base model's.

    A task that a client elsewhere holds itself has that client as its `holder`, and no `digest` of what was asked.
    """

    round: int
    baseline: str
    client: int
    adapter_sha256: str
    holder: int
    task: Required[str]
    kind: str
    digest: str
    questions: int
    skipped: dict[str, int]
    chance: float
    of_tasks: list[str]
    warning: str
    in_training: int
    measures: Required[dict[str, MeasureRecord]]
    seconds: float
    finished: str


SWEEP = "sweep.json"
"""File of a sweep's folder: the recipe of each of its runs, by the name of the run's folder."""
MEND = "see what else is: fedloom fsck RUN"
LOSSES = ("central_loss", "judged_loss", "client_loss")
"""Keys of a round's record with the loss that adapters are judged by: the first that it has. Round 0 has one."""
NAMED = ("environment", "plan", "status", "baselines", "personalised", "contributions")
"""Records of a run, each a file of its own with that name and `.json`."""
BEGUN = ("resolved.json", "plan.json")
"""Files that a run writes as it begins, and without which nothing goes on."""
ADAPTERS = ("initial", "last", "best")
"""Folders in `adapters/` that a run has from its first round on."""
MOST_NAME_BYTES = 255
"""Longest name that a file can have."""
MOST_SHOWN = 80
"""Characters that are shown of a name that is odd."""
PATIENCE = 2
"""Rises in a row, from the best round on, that are overfitting and not noise."""


@dataclass(frozen=True)
class Run:
    """A run directory, read. `recipe` is the resolved recipe; `status["state"]` is running, done, failed or
    interrupted."""

    folder: Path
    recipe: Record
    environment: Record
    plan: Record
    status: Record
    rounds: list[Record]
    clients: list[Record]
    baselines: Record
    personalised: Record
    contributions: Record
    evaluations: list[Record] = field(default_factory=list)
    """Answers of models to tasks, counted: a record for each task of each model."""
    own_evaluations: list[Record] = field(default_factory=list)
    """Counts that clients elsewhere told of tasks of their own: a record for each task of each client and model."""

    @property
    def best_round(self) -> int | None:
        """The round whose adapter is `adapters/best`: of equal losses, the last."""
        best = min(reversed(self.rounds), key=judged_loss, default=None)
        return best["round"] if best else None

    def record_of(self, round: int) -> Record:
        """Return the record of a round.

        Raises:
            RunError: there is none.
        """
        if found := [record for record in self.rounds if record["round"] == round]:
            return found[0]
        raise RunError(f"rounds.jsonl lacks round {round}", where=str(self.folder), mend=MEND)

    @property
    def lack(self) -> str:
        """Rounds or adapters that a run which is called done no longer has, in words; see `find_lack`."""
        return find_lack(self.folder, self.status, self.rounds)

    @property
    def is_done(self) -> bool:
        """Return whether the run was carried out to its end, and lacks nothing since."""
        return self.status.get("state") == "done" and not self.lack


def find_lack(folder: Path, status: Record, rounds: Sequence[Record]) -> str:
    """Say what is gone of the rounds and adapters of a run that is called done; nothing where they are all there.

    Whether they are what they were is not looked at, which takes longer: `fedloom fsck` does.

    Raises:
        RunError: a record lacks what it must have.
    """
    if file := next((name for name in (*BEGUN, "rounds.jsonl") if not isfile(folder / name)), ""):
        return f"{file} is missing"
    last = status.get("round")
    if last is None:  # an early version wrote it
        early = status.get("stopped_early") and rounds
        last = rounds[-1]["round"] if early else read_json(folder / "resolved.json")["federation"]["rounds"]
    whole = next((at for at, record in enumerate(rounds) if record["round"] != at), len(rounds))
    if whole <= last:
        return f"rounds.jsonl lacks round {whole} of {last}"
    if len(rounds) > last + 1:
        return f"rounds.jsonl has more than its {last} rounds"
    if not any(key in record for record in rounds for key in LOSSES):
        return "rounds.jsonl has no loss of a hold-out"
    gone = next((name for name in ADAPTERS if not isdir(folder / "adapters" / name)), None)
    return f"adapters/{gone} is missing" if gone else ""


def list_adapters(run: Run) -> dict[str, int]:
    """Return the adapters that must be there, and those of rounds that are there, with the rounds that they are of."""
    if not run.rounds:
        return {}
    kept = {path.name: path.name.removeprefix("round-") for path in sorted(run.folder.glob("adapters/round-*"))}
    rounds = {name: int(number) for name, number in kept.items() if number.isdecimal()}
    return {
        "initial": 0,
        "last": run.rounds[-1]["round"],
        "best": run.best_round or 0,
        **{name: round for name, round in rounds.items() if round < len(run.rounds)},
    }


def judged_loss(record: Record) -> float:
    """Return the loss that the best adapter is chosen by: central, or the clients' where there is none.

    Where clients' shares are capped, theirs is `judged_loss`, unless that is `client_loss` anyway.
    """
    loss = next((record[key] for key in LOSSES if key in record), None)
    return math.inf if loss is None else float(loss)


def overfitting_onset(rounds: Sequence[int], losses: Sequence[float], patience: int = PATIENCE) -> int | None:
    """Return the first round, after the best, from which the loss rose `patience` times in a row, or None."""
    if not losses:
        return None
    best = len(losses) - 1 - losses[::-1].index(min(losses))
    for start in range(best, len(losses) - patience):
        if all(low < high for low, high in pairwise(losses[start : start + patience + 1])):
            return rounds[start + 1]
    return None


def overfitting_onsets(rounds: Sequence[Record]) -> Record:
    """Return the rounds from which the central loss, and each client's on its own hold-out, only rose, or None."""
    clients = sorted({client for record in rounds for client in record.get("client_losses", {})}, key=int)
    central = [(record["round"], record["central_loss"]) for record in rounds if "central_loss" in record]
    own = {
        client: [(r["round"], r["client_losses"][client]) for r in rounds if client in r.get("client_losses", {})]
        for client in clients
    }
    return {
        "central": overfitting_onset(*_unzip(central)),
        "clients": {client: overfitting_onset(*_unzip(pairs)) for client, pairs in own.items()},
    }


def _unzip(pairs: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [round for round, _ in pairs], [loss for _, loss in pairs]


RECORD_OF = {"baselines": "baselines", "personalise": "personalised", "contributions": "contributions"}
"""Keys of the recipe with what follows the rounds, and what a run's record of it is called."""


def missing_records(run: Run) -> list[str]:
    """Return the keys of what a run's recipe asks for behind its rounds, and is not on record."""
    return [key for key, record in RECORD_OF.items() if run.recipe.get(key) and not getattr(run, record)]


def has_plan(folder: Path) -> bool:
    """Return whether a run directory is one of a run that began: it may have been killed before."""
    return isfile(folder / "plan.json")


def read_run(folder: str | Path) -> Run:
    """Read a run that is done, failed or still going.

    Raises:
        RunError: the folder is no run, or a file in it is damaged.
    """
    folder = Path(folder).expanduser()
    # By functions that take an impossible name for one that is not there.
    if not isfile(folder / "resolved.json"):
        if isfile(folder / SWEEP):
            names = [*read_sweep(folder)]
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise RunError("a sweep, and not one of its runs", where=str(folder), mend=f"name one in it: {some}")
        why = "it has no resolved.json" if isdir(folder) else "there is no such folder"
        mend = ""
        if has_plan(folder):
            swept = folder.resolve().name in read_sweep(folder.resolve().parent)
            anew = "move the folder away, and its sweep makes the run anew" if swept else "begin again elsewhere"
            mend = f"restore it, or {anew}"
        raise RunError(f"not a run directory: {why}", where=str(folder), mend=mend)
    asked = _read_checked(folder / EVALUATIONS, EvaluationRecord)
    return Run(
        folder,
        recipe=read_record(folder / "resolved.json"),
        **{name: read_record(folder / f"{name}.json") for name in NAMED},
        rounds=_read_checked(folder / "rounds.jsonl", RoundRecord),
        clients=_read_checked(folder / "clients.jsonl", KINDS["clients.jsonl"]),
        evaluations=[record for record in asked if "holder" not in record],
        own_evaluations=[record for record in asked if "holder" in record],
    )


class _Kept(Record):
    """A record as it is on disk: a key that a reader needs and that it lacks is an error which names the file."""

    def __init__(self, where: str, mend: str, pairs: Iterable[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self._where, self._mend = where, mend

    def __missing__(self, key: str) -> NoReturn:
        raise RunError(f'lacks "{key}": the record is damaged', where=self._where, mend=self._mend)


def read_json(path: Path, mend: str = MEND) -> Record:
    """Read a JSON object; empty where there is no such file.

    Raises:
        RunError: the file is damaged. So does every look at a key that is not there.
    """
    return _parse(path.read_bytes(), str(path), "the file", mend) if isfile(path) else _Kept(str(path), mend, ())


def read_sweep(folder: Path) -> Record:
    """Return the recipe of each run of a sweep, by the name of its folder; empty where a folder is no sweep's.

    Raises:
        RunError: the list is damaged.
    """
    run, path = quote_path(folder / "RUN"), folder / SWEEP
    mend = (
        "restore it, or begin a sweep of its own with another --out; each run in this one is whole without it:"
        f" fedloom run --resume {run} goes on with one, and fedloom compare sets those that are done side by side"
    )
    recipes = read_json(path, mend)
    odd = next((name for name, recipe in recipes.items() if not (_is_name(name) and isinstance(recipe, dict))), None)
    if odd is not None:
        why = "is not what it should be" if _is_name(odd) else "can be no folder's name in it"
        raise RunError(f"{json.dumps(odd)[:MOST_SHOWN]} {why}: the file is damaged", where=str(path), mend=mend)
    if not recipes and isfile(path):
        raise RunError("names no run: the file is damaged", where=str(path), mend=mend)
    return recipes


def _is_name(text: str) -> bool:
    """Return whether a text can be the name of a folder inside another."""
    try:
        size = len(os.fsencode(text))
    except UnicodeEncodeError:
        return False
    return text not in ("", ".", "..") and not {"/", "\0"} & {*text} and size <= MOST_NAME_BYTES


def read_record(path: Path, mend: str = MEND) -> Record:
    """Read a JSON object of a run or a sweep, whose kind its name says; empty where there is no such file.

    Raises:
        RunError: the file is damaged, or something in it is of another kind.
    """
    return _checked(read_json(path, mend), KINDS[path.name], path, mend)


def _read_checked(path: Path, kind: type) -> list[Record]:
    """Read records whose values are of the kinds that a typed dictionary says, as far as it knows them.

    Raises:
        RunError: something else stands for one.
    """
    return [_checked(record, kind, f"{path}:{number}") for number, record in enumerate(read_lines(path), start=1)]


def _checked(record: Record, kind: type, where: str | Path, mend: str = MEND) -> Record:
    odd = find_odd(record, kind)
    if odd is not None:
        raise RunError(f'"{odd}" is not what it should be', where=str(where), mend=mend)
    return record


def read_lines(path: Path) -> list[Record]:
    """Read every whole line; the last may have been cut by a crash while it was written."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            if line:
                records.append(_parse(line, f"{path}:{number}", "the line"))
        except RunError:
            if number != len(lines):
                raise
    return records


def _parse(text: bytes, where: str, what: str, mend: str = MEND) -> Record:
    try:
        value = json.loads(text, object_pairs_hook=partial(_Kept, where, mend))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise RunError(f"not a JSON object: {what} is damaged", where=where, mend=mend)
    return value


def flatten(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a resolved recipe with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
