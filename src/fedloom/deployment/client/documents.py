"""Documents that one client of a deployment holds, split and tokenised as the recipe says.

A folder with `train.jsonl` and `holdout.jsonl` is a split that its owner made: it is taken as it stands, in its order.
Any other file or folder is split here, by the recipe's share. Which files and which column are read is the owner's to
say, and nothing outside the folder is: a link that leads out of it is refused by its name. `write_splits` writes the
split of a run on one machine as such folders, so that a deployment can be held to it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from fedloom.data.documents import Document, Documents, find_files
from fedloom.data.splits import ClientDocuments, audit_splits, hold_out, holdout_key
from fedloom.data.tokens import ClientBlocks, distinct_blocks, tokenize_documents, without_blocks
from fedloom.deployment.client.display import say
from fedloom.deployment.client.own_documents import HOLDOUT, NO_FILE, TRAIN, load_client, read_split
from fedloom.deployment.client.policy import Policy
from fedloom.deployment.client.refusals import check_documents
from fedloom.errors import DataError, RecipeError
from fedloom.experiment.building import open_source, tokenize_for
from fedloom.experiment.preparation import gather
from fedloom.experiment.tokenizing import separate
from fedloom.host.files import hash_json
from fedloom.model.source import ModelSource
from fedloom.monitoring.observer import Observer
from fedloom.recipe.recipe import Recipe
from fedloom.text import count, list_reasons


@dataclass(frozen=True)
class ClientData:
    """Documents of one client and their blocks, with the model whose tokenizer made them."""

    source: ModelSource
    documents: ClientDocuments
    blocks: ClientBlocks
    shared_blocks: int
    """Blocks to train on that the hold-out also has, before any are dropped."""
    dropped: int
    """Documents to train on that were left out because the hold-out has nearly the same."""
    leaks: int
    """Documents to train on that were kept although the hold-out has nearly the same."""
    places: int
    """Units that could be trained on, whatever they say: empty ones too, and those held out of a file that is split."""


def gather_client(
    recipe: Recipe, path: Path, policy: Policy = NO_FILE, agree: Callable[[int], object] = bool
) -> ClientData:
    """Read, split and tokenise a client's documents as the recipe says, after `as_owner_wrote`, and its owner.

    In a private run their places alone decide what is refused, and how many units there are: a document, or a value of
    the recipe's column, keeps its own where it says nothing, is held out or is left out. `agree` is asked as soon as
    they are counted, before a model is opened for plain texts, and may raise.

    Raises:
        DataError: they can't be read, or leave nothing to train on.
        ModelError: the base model can't be had, or is shorter than a block.
        PolicyError: they are fewer than the policy wants.
    """
    if recipe.bounds_clients:
        raise RecipeError(
            "a client protects its documents: noise that protects whole clients is a server's",
            where="privacy.unit",
            mend='use "document", or a column',
        )
    # A pickle is opened at its owner's word, and never at a server's.
    open_once = cache(partial(open_source, recipe, convert=False))
    documents, places = _split(recipe, path, policy, lambda: open_once().tokenizer)
    private, drop = recipe.bounds_documents, recipe.data.duplicates == "drop"
    if recipe.privacy:
        check_documents(policy, documents=places, unit=recipe.privacy.unit)
        agree(places)
    (documents,), audit = audit_splits((), (documents,), recipe.data.near_duplicate, drop=drop, private=private)
    source = open_once()
    train, holdout = (tokenize_for(source, recipe, part) for part in (documents.train, documents.holdout))
    (blocks,), shared = separate(recipe, set(), [train], [holdout])
    if private:
        return ClientData(source, documents, blocks, shared, audit.dropped[0], audit.leaks, places)
    if not len(blocks.train):
        raise DataError("nothing to train on is left of these documents", where=str(path), mend="bring more of them")
    left = len(documents.train) - train.dropped - train.unanswered - blocks.train.repeated
    if drop and shared:
        held_out = distinct_blocks(holdout)
        # Of some documents nothing is left: a server could choose lengths at which all but one are the same.
        parts = (tokenize_for(source, recipe, [document]) for document in documents.train)
        left = sum(len(without_blocks(part, held_out)) > 0 for part in parts)
    check_documents(
        policy,
        documents=left,
        tokens=blocks.train.num_tokens,
        held_out=len(documents.holdout) - holdout.dropped - holdout.unanswered,
    )
    return ClientData(source, documents, blocks, shared, audit.dropped[0], audit.leaks, places)


def _split(
    recipe: Recipe, path: Path, policy: Policy, open_tokenizer: Callable[[], Any]
) -> tuple[ClientDocuments, int]:
    """Return the documents of both sides, and the places that there are to train on."""
    private = recipe.bounds_documents
    load = partial(load_client, recipe.documents, open_tokenizer=open_tokenizer, private=private)
    whole = read_split(path)
    if whole:
        train, holdout = whole
        kept = load(holdout, policy).documents if holdout.stat().st_size else ()
        found = load(train, policy)
        _show_unread(found, private)
        return ClientDocuments(found.documents, kept), count_places(found)
    most, key = recipe.data.documents_per_client, holdout_key(recipe.seed)
    found = load(path, policy, recipe.seed, most)
    _show_unread(found, private)
    split = hold_out(found.documents, recipe.data.client_holdout, key, strictly=private)
    places = count_places(found)
    return split, places if most is None else min(places, most)


def check_takes_all(recipe: Recipe, path: Path) -> None:
    """Refuse to take part in a private run with some of the documents at a path: whose are taken hangs on the others.

    Raises:
        DataError
    """
    if recipe.privacy and recipe.data.documents_per_client is not None and not read_split(path):
        raise DataError(
            "of a number of documents, one that is taken away lets another one in",
            where="data.documents_per_client",
            mend="leave it out of a recipe with [privacy]: a client then trains on all that it has",
        )


def _show_unread(found: Documents, private: bool) -> None:
    """Show the owner the rows that give no document, where they refuse nothing."""
    if private and found.skipped:
        rows = f"{sum(found.skipped.values()):,} of {count(_count_rows(found), 'row')}"
        say("unread", f"{rows} give no document ({list_reasons(found.skipped)}): nothing is learnt from them")


def count_places(found: Documents) -> int:
    """Return the units that were read, those that say nothing among them: values of a column, or else rows."""
    return len(found.units) or _count_rows(found)


def _count_rows(found: Documents) -> int:
    """Return the rows that were read, those that say nothing among them."""
    return len(found.documents) + sum(found.skipped.values())


def stamp_documents(path: Path, policy: Policy) -> str:
    """Return a hash of the files that are documents, by their names, sizes and times: it costs no reading of them.

    Raises:
        DataError: not a pattern.
    """
    files = find_files(path, policy.files, hidden=policy.hidden)[0] if path.is_dir() else [path]
    found = []
    for file in files:
        with suppress(OSError):  # gone since it was listed
            state = file.stat()
            found.append([str(file), state.st_size, state.st_mtime_ns, state.st_ino])
    return hash_json(found)


def write_splits(recipe: Recipe, folder: Path, display: Observer) -> list[Path]:
    """Write what each client of a run on this machine holds as a folder that `fedloom join --data` takes as it stands.

    Documents that the run would not train on, because a part of them is held out elsewhere, are left out: a client
    can't know of them.

    Raises:
        DataError: the recipe's documents can't be had.
    """
    material = gather(recipe, display)
    held_out = set().union(*map(distinct_blocks, [material.central, *(blocks.holdout for blocks in material.clients)]))

    def is_trained_on(document: Document) -> bool:
        blocks = tokenize_documents([document], material.source.tokenizer, recipe.data)
        return recipe.data.duplicates != "drop" or len(without_blocks(blocks, held_out)) > 0

    folders = []
    for client, documents in enumerate(material.splits.clients):
        target = folder / f"client-{client}"
        target.mkdir(parents=True)
        for name, part in ((TRAIN, [*filter(is_trained_on, documents.train)]), (HOLDOUT, documents.holdout)):
            # What a table has beside texts, a time in a message say, is written as a chat template is told of it.
            columns = [document.row or {recipe.data.text: document.text} for document in part]
            if (unit := recipe.documents.unit) is not None:
                columns = [{**row, unit: document.unit} for row, document in zip(columns, part, strict=True)]
            rows = [json.dumps(row, default=str) + "\n" for row in columns]
            (target / name).write_text("".join(rows), encoding="utf-8")
        folders.append(target)
    return folders
