"""Audit of a finished run of this machine: what its kept adapters tell of each client's documents.

A run keeps the adapters of some rounds, and no client's own update. So this is the view of whoever has those adapters;
a server has seen each client's change apart, and knows at least as much. What is told, one can't take back.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.audit.attack import Attack, Sent
from fedloom.audit.canaries import no_canaries
from fedloom.audit.client import attack_client
from fedloom.audit.leaked_tokens import read_tokens
from fedloom.audit.record import describe, describe_terms
from fedloom.data.tokens import ClientBlocks, TokenBlocks, join_blocks
from fedloom.errors import RunError
from fedloom.experiment.building import load_adapted_model
from fedloom.experiment.central import set_run_terms
from fedloom.experiment.preparation import Material, gather, prepare
from fedloom.experiment.private import set_client_terms
from fedloom.experiment.session import identify
from fedloom.experiment.tokenizing import tokenize_splits
from fedloom.handover.finished_run import open_recorded, recipe_of
from fedloom.monitoring.observer import Observer
from fedloom.recipe.recipe import Recipe
from fedloom.records.card import public_name
from fedloom.records.run import Run, list_adapters, read_run
from fedloom.records.state import load_state

FEWEST = 4
"""Documents of a client, and as many that it has not trained on, without which nothing is compared."""

MOST_CLIENTS = 12
"""Clients that are looked at, those with the most documents."""


def audit_run(folder: Path, observer: Observer) -> dict[str, Any]:
    """Attack what a finished run kept, client by client, and return the record.

    Raises:
        RunError: there is no such run, it kept no adapters, one of them was changed, or the documents are not here.
        DataError, ModelError: the documents or the model can't be had.
    """
    started, run = time.perf_counter(), read_run(folder)
    kept, recipe, state = kept_adapters(run), recipe_of(run.folder), load_state(run.folder)
    if len(kept) < 2 or state is None:
        raise RunError(
            "it kept no adapter that was trained, with the state that says on what",
            where=str(run.folder),
            mend="audit a run that has adapters/initial, adapters/last and state",
        )
    material = gather(recipe, observer)
    prepared = prepare(recipe, observer, material, predict=False)
    source = prepared.source
    observer.show_step("weights", source.name)
    adapted = load_adapted_model(recipe, source, prepared.plan)
    here = identify(prepared, adapted)
    if differing := [name for name in ("documents", "base model") if state.identity.get(name) != here[name]]:
        raise RunError(
            f"the {' and the '.join(differing)} of this run are not those that its recipe finds on this machine",
            where=str(run.folder),
            mend="bring them back; where clients were elsewhere, each owner audits the recipe: fedloom audit RECIPE"
            " --data PATH",
        )
    chosen = choose_clients(recipe, material)
    if not chosen:
        raise RunError(
            f"no client has {FEWEST} documents to train on, beside {FEWEST} that are held out",
            where=str(run.folder),
            mend="audit a run with more documents",
        )
    sent, rounds = list(changes_between(adapted, run, kept)), kept[-1][0]
    observer.show_step("attacks", f"on the adapters of rounds {', '.join(str(round) for round, _ in kept)}")
    found: dict[str, Sequence[Attack]] = {}
    bound, promised = (recipe.privacy if recipe.bounds_documents else None), []
    for client, (members, others) in chosen.items():
        observer.show_step("client", str(client))
        terms = set_client_terms(recipe, members.num_units) if bound else None
        found[str(client)] = attack_client(
            adapted, sent, members, others, terms, rounds, clients=len(chosen), watch=observer.watch
        )
        if terms and bound:
            promised.append(describe_terms(terms, bound, rounds))
    found["all together"] = [
        no_canaries("none were planted: a run's documents are nobody's to add to; a rehearsal does it"),
        read_tokens(adapted, sent, join_blocks([held.train for held in material.clients])),
    ]
    return describe(
        "run",
        recipe.name,
        found,
        model=public_name(source.name, source.revision),
        method=recipe.adapter.method,
        rounds=rounds,
        adapters=[round for round, _ in kept],
        clients_left_out=len(material.clients) - len(chosen),
        privacy=max(promised, key=lambda told: told["epsilon"], default=None),
        of_clients=_describe_central(recipe, run.plan, rounds),
        seconds=time.perf_counter() - started,
    )


def _describe_central(recipe: Recipe, plan: Mapping[str, Any], rounds: int) -> dict[str, Any] | None:
    """Return what was promised of whole clients over the rounds that are looked at; None where nothing was."""
    if not recipe.bounds_clients:
        return None
    terms, told = set_run_terms(recipe, plan["privacy"]["central"]["clients"]), plan["privacy"]
    return {"epsilon": terms.epsilon(rounds), "delta": told["delta"], "noise": told["noise"]}


def choose_clients(recipe: Recipe, material: Material) -> dict[int, tuple[TokenBlocks, TokenBlocks]]:
    """Return the clients that are looked at, in order, each with what it trained on and what is held out of it."""
    central, clients = _texts_of(recipe, material)
    held = {client: (own.train, join_blocks([own.holdout, central])) for client, own in enumerate(clients)}
    able = [client for client, parts in held.items() if min(part.num_units for part in parts) >= FEWEST]
    chosen = sorted(able, key=lambda one: -held[one][0].num_units)[:MOST_CLIENTS]
    return {client: held[client] for client in sorted(chosen)}


def _texts_of(recipe: Recipe, material: Material) -> tuple[TokenBlocks, Sequence[ClientBlocks]]:
    """Return the central hold-out and what clients hold: each document told from others where it has several blocks,
    and each by itself where it was packed.
    """
    data = recipe.data
    if data.window == "truncate":
        return material.central, material.clients
    alone = data.model_copy(update={"window": "truncate"}) if data.window == "pack" else data
    told = recipe.model_copy(update={"data": alone})
    central, clients, _ = tokenize_splits(material.splits, material.source, told, units=True)
    return central, clients


def kept_adapters(run: Run) -> list[tuple[int, Path]]:
    """Return the rounds whose adapters a run kept, in order, and their folders; nothing where the first is gone."""
    named = {run.folder / "adapters" / name: round for name, round in list_adapters(run).items()}
    kept = sorted({round: folder for folder, round in named.items() if folder.is_dir()}.items())
    return kept if kept and kept[0][0] == 0 else []


def changes_between(adapted: AdaptedModel, run: Run, kept: list[tuple[int, Path]]) -> list[Sent]:
    """Return each adapter that a run kept with the change up to the next one.

    Raises:
        RunError: one is another than the run has on record: what it tells is not the run's.
        ModelError: one can't be read.
    """
    opened = [open_recorded(adapted, folder, run.record_of(round)["adapter_sha256"]) for round, folder in kept]
    return [Sent(before, after.weights_P - before.weights_P) for before, after in pairwise(opened)]
