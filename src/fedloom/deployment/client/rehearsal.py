"""Rehearsal of `fedloom join`: would it work, and what would the policy allow of a recipe?

The server is asked for its certificate and the time, as by anybody. It hears nothing of the documents, or of the name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from fedloom.deployment.client.account import ANOTHER_RUN, find_run, open_budget
from fedloom.deployment.client.first_use import is_confirmed
from fedloom.deployment.client.joining import Kit, read_kit
from fedloom.deployment.client.journal import Journal, describe_ledger, measure_of, standing
from fedloom.deployment.client.ledger import Ledger, judge_delta
from fedloom.deployment.client.own_documents import check_there, load_client, mend_of_server, read_split
from fedloom.deployment.client.policy import Policy, load_policy, with_options
from fedloom.deployment.client.preflight import AbsentError, greet_server
from fedloom.deployment.client.reading import describe_limits
from fedloom.deployment.client.refusals import as_served, find_refusals, mend_policy
from fedloom.deployment.client.secret import check_secret, secret_path
from fedloom.deployment.client.task_file import describe_tasks
from fedloom.deployment.processes import check_flower
from fedloom.errors import DataError, DeploymentError, FedloomError, MessageError, PolicyError, RecipeError
from fedloom.experiment.recognition import open_recipe, recognise_rows
from fedloom.host.machine import Finding
from fedloom.recipe.data_section import Data
from fedloom.recipe.recipe import Recipe
from fedloom.records.privacy import NOT_PRIVATE, name_unit, name_units
from fedloom.text import count, list_reasons


def rehearse(
    kit: Path,
    data: Path | None,
    policy: Path | None,
    options: Mapping[str, Any],
    journal: Path | None,
    recipe: str | None,
    tasks: str | None = None,
) -> Iterator[Finding]:
    """Yield what is found of all that joining needs, each as soon as it is known.

    `options` are those of the command line, as `with_options` takes them; `data`, `recipe` and `tasks` may be left
    out, and the journal is the kit's where it is.
    """
    found: dict[str, Any] = {}

    def look(what: str, do: Callable[[], tuple[str, Any]]) -> Finding:
        try:
            words, found[what] = do()
        except FedloomError as error:
            where = error.where and f"{error.where}: "
            # A policy has keys of the same names as a recipe, and is its owner's to mend.
            is_own = what == "policy"
            mends = filter(None, (error.mend, "" if is_own else mend_of_server(error)))
            otherwise = "change it there" if is_own else "ask the server's owner"
            if isinstance(error, PolicyError):
                otherwise = mend_policy(error.keys, policy)
            return Finding(what, f"{where}{error.what}", "; ".join(mends) or otherwise)
        return Finding(what, words)

    yield look("Flower", _find_flower)
    yield look("kit", lambda: _read_kit(kit))
    if "kit" in found:
        yield look("fingerprint", lambda: _find_confirmed(found["kit"]))
        yield _greet(found["kit"])
    yield look("policy", lambda: _read_policy(policy, options))
    if place := journal or ("kit" in found and found["kit"].journal):
        yield look("journal", lambda: _read_journal(place, found.get("policy", Policy())))
    if recipe:
        yield look("recipe", lambda: ((loaded := open_recipe(recipe)).name, loaded))
    if "policy" in found and data:
        yield look("documents", lambda: _count_documents(data, found["policy"], found.get("recipe")))
    if tasks:
        yield look("tasks", lambda: (describe_tasks(tasks, found.get("policy", Policy())), None))
    if recipe and "recipe" in found and "policy" in found:
        yield from judge_recipe(found["policy"], found["recipe"], policy)
        yield from weigh_recipe(found["policy"], found["recipe"], place or None, data, found.get("documents"), policy)


def _find_flower() -> tuple[str, None]:
    check_flower()
    return "installed", None


def _read_kit(path: Path) -> tuple[str, Kit]:
    kit = read_kit(path)
    if not kit.ca:
        return f"{kit.name}, {kit.server}, without certificates", kit
    return f"{kit.name}, {kit.server}, key {kit.key}, {kit.end}", kit


def _find_confirmed(kit: Kit) -> tuple[str, None]:
    if not kit.key:
        return "none: this machine alone, without certificates", None
    if is_confirmed(kit, kit.key):
        return f"{kit.fingerprint}, confirmed", None
    return f"{kit.fingerprint}, not confirmed yet: join asks for it, and the server's owner reads it aloud", None


def _greet(kit: Kit) -> Finding:
    try:
        told = greet_server(kit.server, kit.ca).words
    except AbsentError as absent:
        return Finding("server", f"{kit.server}: {absent}", "join waits for it; ask its owner when it will be there")
    except FedloomError as error:
        return Finding("server", f"{error.where and f'{error.where}: '}{error.what}", error.mend or "ask its owner")
    return Finding("server", f"{kit.server} answers, and both clocks agree{told and f'; {told}'}")


def _read_policy(path: Path | None, options: Mapping[str, Any]) -> tuple[str, Policy]:
    policy = with_options(load_policy(path), **options)
    told = (
        f"{path}: {count(len(policy.model_fields_set), 'key')} of its own" if path else "none: the safe defaults hold"
    )
    return told, policy


def _read_journal(path: Path, policy: Policy) -> tuple[str, None]:
    # Looked at and not written to: a rehearsal leaves nothing behind.
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise DeploymentError("can't be written", where=str(path), mend="choose a place for it: --journal FILE")
    if (secret := secret_path(path)).exists():
        check_secret(secret)
    counts = (line.partition(";")[0] for line in describe_limits(standing(Journal(path).read()), policy))
    return f"{path}: {'; '.join(counts)}", None


class _IsConversationError(Exception):
    """A row that is a conversation: how it reads, the tokenizer of a model says, which a rehearsal does not fetch."""


def _open_no_tokenizer() -> NoReturn:
    raise _IsConversationError


def _count_documents(path: Path, policy: Policy, recipe: Recipe | None) -> tuple[str, int | None]:
    """Return what is there, by a recipe's columns if there is one, and how many rows; None where a run alone can tell.

    Raises:
        DataError: they can't be read, or are too few.
        PolicyError: a column was read that only looks like a part of one that the policy allows.
    """
    check_there(path)
    split = read_split(path)
    file = split[0] if split else path
    asked, private = (recipe.data, recipe.bounds_documents) if recipe else (Data(source=str(path)), False)
    if not recipe and (keys := recognise_rows(Data(source=str(file)))):
        columns = [name for name in ("messages", "prompt", "completion") if name in keys]
        named = " and ".join(f"data.{name} = '{keys[name]}'" for name in columns)
        return f"rows that a recipe with {named} reads: they are counted when its run begins", None
    try:
        rows = load_client(asked, file, policy, open_tokenizer=_open_no_tokenizer, private=private)
    except _IsConversationError:
        return "conversations that the recipe reads: they are counted when its run begins", None
    found = len(rows.documents)
    places = found + sum(rows.skipped.values())
    # In a private run a row keeps its place, whatever it says.
    if (there := places if private else found) < policy.min_documents:
        raise DataError(
            f"{count(there, 'document')}: policy.min_documents wants {policy.min_documents} to train on",
            where=f"--data {path}",
            mend="bring more of them",
        )
    if not found:
        raise DataError(
            f"a run would learn nothing of them: {list_reasons(rows.skipped)}",
            where=f"--data {path}",
            mend="bring documents with the columns of the recipe",
        )
    told = f"{count(found, 'document')} can be read{' to train on' if split else ''}"
    if private and rows.skipped:
        told += f"; {places:,} are counted, with rows that give no document ({list_reasons(rows.skipped)})"
    return told, places


def weigh_recipe(
    policy: Policy, recipe: Recipe, journal: Path | None, data: Path | None, rows: int | None, file: Path | None
) -> Iterator[Finding]:
    """Yield what a private recipe would tell of any one unit, with so many rows, and whether that is allowed."""
    if not recipe.privacy:
        return
    # What calibrates noise imports torch, which takes seconds.
    from fedloom.deployment.client.documents import check_takes_all
    from fedloom.deployment.client.terms import bound_of, take_terms
    from fedloom.deployment.messages import pack_recipe

    owner, unit = policy.privacy, recipe.privacy.unit
    if data and recipe.documents.unit is not None:
        try:
            rows = _count_values(recipe, data, policy)
        except FedloomError as error:
            yield Finding("privacy", f"{error.where}: {error.what}", error.mend or mend_policy(("columns",), file))
            return
    if rows is None:
        then = "they are counted when its run begins" if data else "give --data"
        why = f"follows from the number of {name_units(unit)}"
        yield Finding("privacy", f"what it would tell of {name_unit(unit)} {why}: {then}")
        return
    try:
        if data:
            check_takes_all(recipe, data)
        terms = take_terms(recipe, owner, min(rows, recipe.data.documents_per_client or rows))
    except (DataError, RecipeError) as error:
        yield Finding("privacy", f"{error.where}: {error.what}", f"{error.mend}; its owner can change it")
        return
    entries = standing(Journal(journal).read()) if journal else []
    bound = bound_of(recipe, terms)
    told = describe_ledger(owner, entries, *([bound.charge] if bound else []))
    told += f"; this recipe has a noise of {terms.noise_multiplier:.3g}"
    if not bound:
        yield Finding("privacy", f"{told}, and is {NOT_PRIVATE}")
        return
    try:
        budget = open_budget(entries, bound, find_run(entries, pack_recipe(recipe)))
    except MessageError as error:
        yield Finding("privacy", f"{error.where}: {error.what}", "its owner can change it: clients take no other")
        return
    asks = Ledger([bound.cost_of(budget.rounds)]).epsilon(measure_of(owner, entries, bound.charge).delta)
    may = f"{budget.afford(owner)} of {count(bound.rounds, 'round')}"
    if trained := bound.rounds - budget.rounds:
        may += f", of which {trained} {'was' if trained == 1 else 'were'} trained before"
    told += f", asks for ε = {asks:.3g} at this δ, and may have {may}"
    if not budget.rounds:
        yield Finding("privacy", told, ANOTHER_RUN)
        return
    refusals = [*judge_delta(owner, bound), *budget.judge(owner, budget.rounds)]
    yield Finding("privacy", told, mend_policy((key for key, _ in refusals), file) if refusals else "")


def _count_values(recipe: Recipe, path: Path, policy: Policy) -> int | None:
    """Return how many units there are of a recipe's column; None where a model's tokenizer is needed to read rows.

    Raises:
        DataError: they can't be read, or a row does not say whose it is.
        PolicyError: a column is read that only looks like a part of one that the policy allows.
    """
    if recipe.data.is_chat:
        return None
    split = read_split(path)
    return len(load_client(recipe.documents, split[0] if split else path, policy, private=True).units)


def judge_recipe(policy: Policy, recipe: Recipe, file: Path | None = None) -> Iterator[Finding]:
    """Yield all that a policy, written in a file or nowhere, refuses of a recipe, or that it allows it."""
    refused = False
    for key, why in find_refusals(policy, as_served(policy, recipe)):
        refused = True
        yield Finding(
            "recipe", f"the policy {why}", f"{mend_policy((key,), file)}; or ask the server's owner for another recipe"
        )
    if not refused:
        rounds, epochs = count(recipe.federation.rounds, "round"), count(recipe.training.epochs, "epoch")
        if recipe.training.max_steps:
            epochs += f", {count(recipe.training.max_steps, 'step')} at most"
        loss = "told" if policy.tell_holdout_loss and not recipe.privacy else "kept"
        yield Finding(
            "recipe", f"the policy allows it: {recipe.model.source}, {rounds} of {epochs}; hold-out loss {loss}"
        )
