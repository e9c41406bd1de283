"""Rehearsal of a recipe on its owner's machine: what a server would learn of the documents, before anybody says yes.

Documents are halved by a key that is drawn anew: members, and others that are left out. The recipe's rounds train on
the members, with its [privacy] if it has some, and what would have been sent is attacked. A second client, beside it in
the same pass, has made-up secrets among the members. No server is asked, and nothing leaves the machine.
"""

from __future__ import annotations

import hmac
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedloom.audit.canaries import make_canaries, no_canaries, seek_canaries
from fedloom.audit.client import attack_client
from fedloom.audit.leaked_tokens import read_tokens
from fedloom.audit.record import describe, describe_terms
from fedloom.audit.rounds import adapter_after, train_alone
from fedloom.data.documents import Document, normalise
from fedloom.data.tokens import TokenBlocks
from fedloom.deployment.client.documents import gather_client
from fedloom.deployment.client.policy import Policy
from fedloom.deployment.client.refusals import as_owner_wrote, as_served, find_refusals, mend_policy
from fedloom.deployment.client.terms import least_noise, take_terms
from fedloom.errors import DataError
from fedloom.experiment.building import hold, load_adapted_model, tokenize_for
from fedloom.experiment.preparation import check
from fedloom.experiment.private import Rations
from fedloom.model.devices import open_device
from fedloom.model.source import ModelSource
from fedloom.monitoring.observer import Observer
from fedloom.privacy.noise import SECRET_BYTES, check_cipher
from fedloom.recipe.privacy_section import DOCUMENT
from fedloom.recipe.recipe import Recipe
from fedloom.records.card import public_name
from fedloom.records.privacy import count_units
from fedloom.text import count
from fedloom.training.engines import open_engine

FEWEST = 8
"""Documents without which there is nothing to halve."""


class Halves(NamedTuple):
    """An owner's documents in two halves, and as blocks."""

    source: ModelSource
    documents: tuple[list[Document], list[Document]]
    members: TokenBlocks
    others: TokenBlocks


def rehearse(
    recipe: Recipe, path: Path, policy: Policy, observer: Observer, key: bytes | None = None, file: Path | None = None
) -> dict[str, Any]:
    """Train a recipe's rounds on half of the documents at a path, attack what would be sent, and return the record.

    `key` decides who is a member, what the made-up secrets are, and the noise; it is drawn anew where it is left out.
    What the policy, written in `file` or nowhere, refuses of the recipe is said: an audit is for who has not said yes.

    Raises:
        DataError: the documents can't be read, or are too few.
        RecipeError, ModelError: the recipe can't be trained here.
        TrainingError: training failed.
    """
    started, key = time.perf_counter(), key or os.urandom(SECRET_BYTES)
    say, watch, rounds = observer.show_step, observer.watch, recipe.federation.rounds
    if refusals := [*find_refusals(policy, as_served(policy, recipe))]:
        whys = "; ".join(why for _, why in refusals)
        say("refused", f"fedloom join would not train by this recipe: the policy {whys}")
        say("mend", mend_policy((key for key, _ in refusals), file))
    recipe = as_owner_wrote(policy, recipe)
    bound = recipe.privacy if recipe.bounds_documents else None
    say("documents", f"read as fedloom join would{' if the policy allowed it' if refusals else ''}")
    source, documents, members, others = gather_halves(recipe, path, policy, key)
    terms = None
    if bound:
        check_cipher()
        terms = take_terms(recipe, policy.privacy, members.num_units)
    setup = check(recipe, source, open_device(recipe.model.device))

    say("weights", source.name)
    adapted = load_adapted_model(recipe, source)
    engine = open_engine(setup.engine, adapted, recipe.data, watch, say)
    initial, tokenize = adapted.read(), partial(tokenize_for, source, recipe)
    canaries = make_canaries(key, tokenize, max_length=recipe.data.max_length)
    trained_on = [documents[0], [*documents[0], *canaries.planted]] if canaries else [documents[0]]
    nothing = others.take(torch.zeros(0, dtype=torch.int64))
    clients = [hold(recipe, tokenize(own), nothing) for own in trained_on]
    told = {"members": len(documents[0]), "others": len(documents[1])}
    say("rehearsal", f"{count(rounds, 'round')} on {count(told['members'], 'member')}, without {told['others']} others")
    rations = Rations(recipe, clients, key, least_noise(policy.privacy)) if bound else None
    sent = train_alone(clients, initial, engine.train, recipe.training, recipe.federation, recipe.seed, rations)

    say("attacks", "on what a server would have been sent")
    aligned, lost, repeated = attack_client(adapted, sent[0], members, others, terms, rounds, watch=watch)
    remembered = no_canaries("data.max_length is too short for a made-up secret")
    if canaries:
        after = adapter_after(sent[1])
        theirs = take_terms(recipe, policy.privacy, clients[1].train.num_units) if bound else None
        remembered = seek_canaries(adapted, canaries, initial, after, theirs, rounds, watch=watch)
    return describe(
        "rehearsal",
        recipe.name,
        {"you": [aligned, lost, remembered, read_tokens(adapted, sent[0], members), repeated]},
        model=public_name(source.name, source.revision),
        method=recipe.adapter.method,
        rounds=rounds,
        engine=setup.engine,
        **told,
        privacy=describe_terms(terms, bound, rounds) if terms and bound else None,
        seconds=time.perf_counter() - started,
    )


def gather_halves(recipe: Recipe, path: Path, policy: Policy, key: bytes) -> Halves:
    """Read an owner's documents as `fedloom join` would, those held out too, and halve them by a key.

    Raises:
        DataError: they can't be read, or are too few.
    """
    held = gather_client(recipe, path, policy)
    documents = halve([*held.documents.train, *held.documents.holdout], key)
    members, others = (tokenize_for(held.source, recipe, half, units=True) for half in documents)
    if min(members.num_units, others.num_units) < FEWEST // 2:
        there = count_units(recipe.privacy.unit if recipe.privacy else DOCUMENT, members.num_units + others.num_units)
        raise DataError(
            f"{there}, of which half is left out, copies of a text on one side: at least {FEWEST} that differ are"
            " needed",
            where=f"--data {path}",
            mend="bring more of them, or raise data.documents_per_client",
        )
    return Halves(held.source, documents, members, others)


def halve(documents: Sequence[Document], key: bytes) -> tuple[list[Document], list[Document]]:
    """Return two halves of documents, in an order that the key draws; a unit, or copies of a text, fall on one side."""
    groups: dict[bytes, list[Document]] = {}
    for document in documents:
        name = document.unit or normalise(document.text)
        groups.setdefault(hmac.digest(key, name.encode(), "sha256"), []).append(document)
    members: list[Document] = []
    others: list[Document] = []
    for digest in sorted(groups):
        (members if len(members) < len(documents) // 2 else others).extend(groups[digest])
    return members, others
