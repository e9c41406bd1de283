"""Audit of a finished run of this machine: what its kept adapters tell of each client's documents.

A run keeps the adapters of some rounds, and no client's own update. So this is the view of whoever has those adapters;
a server has seen each client's change apart, and knows at least as much. What is told, one can't take back.
"""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.audit.attack import Sent
from fedloom.audit.canaries import no_canaries
from fedloom.audit.client import attack_client
from fedloom.audit.leaked_tokens import read_tokens
from fedloom.audit.record import describe, describe_terms
from fedloom.data.tokens import join_blocks
from fedloom.errors import RunError
from fedloom.experiment.building import load_adapted_model, tokenize_for
from fedloom.experiment.preparation import gather, prepare
from fedloom.experiment.private import set_client_terms
from fedloom.experiment.session import identify
from fedloom.handover.finished_run import recipe_of
from fedloom.monitoring.observer import Observer
from fedloom.records.card import public_name
from fedloom.records.run import Run, read_run
from fedloom.records.state import load_state

FEWEST = 4
"""Documents of a client, and as many that it has not trained on, without which nothing is compared."""


def audit_run(folder: Path, observer: Observer) -> dict[str, Any]:
    """Attack what a finished run kept, client by client, and return the record.

    Raises:
        RunError: there is no such run, it kept no adapters, or the documents are not here.
        DataError, ModelError: the documents or the model can't be had.
    """
    started, run = time.perf_counter(), read_run(folder)
    kept = kept_adapters(run)
    recipe = recipe_of(run.folder)
    state = load_state(run.folder)
    if len(kept) < 2 or state is None:
        raise RunError(
            "it kept no adapter that was trained, with the state that says on what",
            where=str(run.folder),
            mend="audit a run that has adapters/initial, adapters/last and state",
        )
    material = gather(recipe, observer)
    prepared = prepare(recipe, observer, material, predict=False)
    observer.show_step("weights", prepared.source.name)
    adapted = load_adapted_model(recipe, prepared.source, prepared.plan)
    here = identify(prepared, adapted)
    if differing := [name for name in ("documents", "base model") if state.identity.get(name) != here[name]]:
        raise RunError(
            f"the {' and the '.join(differing)} of this run are not those that its recipe finds on this machine",
            where=str(run.folder),
            mend="bring them back; where clients were elsewhere, each owner audits the recipe: fedloom audit RECIPE"
            " --data PATH",
        )
    sent = list(changes_between(adapted, kept))
    observer.show_step("attacks", f"on the adapters of rounds {', '.join(str(round) for round, _ in kept)}")
    rounds, clients, privacy = kept[-1][0], {}, {}
    for client, held in enumerate(material.clients):
        train = held.train
        if recipe.data.window == "pack":  # each text by itself again
            train = tokenize_for(prepared.source, recipe, material.splits.clients[client].train)
        others = join_blocks([held.holdout, material.central])
        if min(len(train), len(others)) < FEWEST:
            continue
        observer.show_step("client", str(client))
        terms = set_client_terms(recipe, len(train)) if recipe.privacy else None
        clients[str(client)] = [*attack_client(adapted, sent, train, others, terms, rounds, watch=observer.watch)]
        if terms and recipe.privacy:
            privacy[str(client)] = describe_terms(terms, recipe.privacy.noise, rounds)
    if not clients:
        raise RunError(
            f"no client has {FEWEST} documents to train on, beside {FEWEST} that are held out",
            where=str(run.folder),
            mend="audit a run with more documents",
        )
    everybody = join_blocks([held.train for held in material.clients])
    clients["all together"] = [
        no_canaries("none were planted: a run's documents are nobody's to add to; a rehearsal does it"),
        read_tokens(adapted, sent, everybody),
    ]
    worst = max(privacy.values(), key=lambda told: told["epsilon"], default=None)
    return describe(
        "run",
        recipe.name,
        clients,
        model=public_name(prepared.source.name, prepared.source.revision),
        method=recipe.adapter.method,
        rounds=rounds,
        adapters=[round for round, _ in kept],
        privacy=worst,
        seconds=time.perf_counter() - started,
    )


def kept_adapters(run: Run) -> list[tuple[int, Path]]:
    """Return the rounds whose adapters a run kept, in order, and their folders; nothing where the first is gone."""
    named = {"initial": 0, "best": run.best_round, "last": run.rounds[-1]["round"] if run.rounds else None}
    named |= {f"round-{record['round']}": record["round"] for record in run.rounds}
    there = {name: run.folder / "adapters" / name for name in named if (run.folder / "adapters" / name).is_dir()}
    kept = sorted({round: there[name] for name, round in named.items() if round is not None and name in there}.items())
    return kept if kept and kept[0][0] == 0 else []


def changes_between(adapted: AdaptedModel, kept: list[tuple[int, Path]]) -> list[Sent]:
    """Return each kept adapter with the change up to the next one."""
    opened = [adapted.open(folder) for _, folder in kept]
    return [Sent(before, after.weights_P - before.weights_P) for before, after in pairwise(opened)]
