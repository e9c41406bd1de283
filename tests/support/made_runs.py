"""Runs made of numbers, for rules about numbers."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedloom.records.run import ADAPTERS, EVALUATIONS, Run, read_run
from support.tiny import make_recipe


def make_run(
    folder: Path,
    central: Sequence[float | None],
    *,
    train: Sequence[float] | None = None,
    clients: Sequence[Sequence[float]] | None = None,
    seconds: dict[str, Sequence[float]] | None = None,
    state: str = "done",
    error: str = "",
    lost: dict[int, list[int]] | None = None,
    refused: dict[int, list[str]] | None = None,
    at_once: dict[int, int] | None = None,
    more: dict[int, dict[str, Any]] | None = None,
    plan: dict[str, Any] | None = None,
    baselines: dict[str, Any] | None = None,
    evaluations: Sequence[dict[str, Any]] = (),
    **sections: Any,
) -> Run:
    """A run directory whose round r has the central loss `central[r]`, and what else is given."""
    recipe = make_recipe(**sections)
    rounds = len(central) - 1
    number = recipe.data.clients
    records, reports = [], []
    for round in range(len(central)):
        took = {
            phase: (values[round] if (values := (seconds or {}).get(phase)) else 1.0) for phase in ("train", "evaluate")
        }
        missing = (lost or {}).get(round, [])
        present = [client for client in range(number) if client not in missing] if round else []
        record: dict[str, Any] = {
            "round": round,
            "clients": present,
            "lost": missing,
            "train_seconds": took["train"] if round else 0.0,
            "aggregate_seconds": 0.01 if round else 0.0,
            "evaluate_seconds": took["evaluate"],
            "train_tokens": 100 * len(present),
            "evaluate_tokens": 500,
            "evaluate_samples": 50,
            "evaluate_steps": 10,
            "bytes_up": 1000 * len(present),
            "bytes_down": 1000 * number if round else 0,
            "ram_peak_bytes": {"loading": 3_000_000, "training": 5_000_000 + round},
        }
        if central[round] is not None:
            record |= {"central_loss": central[round], "central_perplexity": 2.0, "central_accuracy": 0.5}
        if clients:
            record["client_losses"] = {str(client): losses[round] for client, losses in enumerate(clients)}
            record["client_loss"] = sum(losses[round] for losses in clients) / len(clients)
        if refused and round in refused:
            record["refused"] = refused[round]
        if at_once and round in at_once:
            record["clients_at_once"] = at_once[round]
        if round:
            record |= {"drift": 0.5, "proximal_loss": 1e-3, "proximal_ratio": 0.02 * round}
            if (loss := train[round - 1] if train else central[round]) is not None:
                record["train_loss"] = loss
        record |= (more or {}).get(round, {})
        records.append(record)
        reports += [{"round": round, "client": client, "examples": 10, "tokens": 100, "steps": 5} for client in present]
    for name in ADAPTERS:
        (folder / "adapters" / name).mkdir(parents=True)
    files = {
        "resolved.json": recipe.model_dump(mode="json"),
        "environment.json": {"python": "3.11", "processor": "a processor", "cores": 2, "versions": {"torch": "2.13"}},
        "status.json": {
            "state": state,
            "started": "2026-11-22T10:00:00+00:00",
            "updated": "2026-11-22T10:01:40+00:00",
            "round": rounds,
            **({"error": error} if error else {}),
        },
        **({"baselines.json": baselines} if baselines else {}),
        "plan.json": {
            "model": "random:tiny-llama",
            "model_revision": "seeded random weights",
            "dtype": "float32",
            "engine": "batched",
            "clients_at_once": number,
            "parameters": 100_000,
            "trainable_parameters": 250,
            "payload_bytes": 1000,
            "data": "some documents",
            "data_revision": "a digest",
            "central_documents": 24,
            "central_tokens": 190,
            "clients": [{"train_documents": 10, "holdout_documents": 2}] * number,
            "clients_per_round": number,
            "audit": {"overlaps": [{"side": "train", "other": "central", "exact": 1, "near": 0}], "dropped": [1, 0, 0]},
            **(plan or {}),
        },
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    (folder / "recipe.toml").write_text('name = "test"\n', encoding="utf-8")
    for name, lines in (("rounds.jsonl", records), ("clients.jsonl", reports), (EVALUATIONS, evaluations)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert rounds >= 0
    return read_run(folder)


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key and first element below a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, part in inside:
        yield (*path, key)
        yield from paths_of(part, (*path, key))
