"""Documents that one client of a deployment holds, split and tokenised as the recipe says.

A folder with `train.jsonl` and `holdout.jsonl` is a split that its owner made: it is taken as it stands, in its order.
Anything else that a recipe could name is split here, by the recipe's share. `write_splits` writes the split of a run on
one machine as such folders, so that a deployment can be held to it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fedloom.data.documents import Document, load_documents
from fedloom.data.splits import ClientDocuments, audit_splits, hold_out
from fedloom.data.tokens import ClientBlocks, distinct_blocks, tokenize_documents, without_blocks
from fedloom.errors import DataError
from fedloom.experiment.building import open_source, tokenize_for
from fedloom.experiment.preparation import check_length, gather
from fedloom.model.source import ModelSource
from fedloom.monitoring.observer import Observer
from fedloom.recipe.recipe import Recipe
from fedloom.seeds import derive_seed

TRAIN, HOLDOUT = "train.jsonl", "holdout.jsonl"


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


def gather_client(recipe: Recipe, path: Path) -> ClientData:
    """Read, split and tokenise a client's documents as the recipe says.

    Raises:
        DataError: they can't be read, or leave nothing to train on.
        ModelError: the base model can't be had, or is shorter than a block.
    """
    documents = _split(recipe, path)
    drop = recipe.data.duplicates == "drop"
    (documents,), audit = audit_splits((), (documents,), recipe.data.near_duplicate, drop=drop)
    # A pickle is opened at its owner's word, and never at a server's.
    source = open_source(recipe, convert=False)
    # The server's own look at it is no reason to believe it: each document becomes a block of that length.
    check_length(recipe.data.max_length, source)

    train, holdout = (tokenize_for(source, recipe, part) for part in (documents.train, documents.holdout))
    unseen = without_blocks(train, distinct_blocks(holdout))
    shared = len(train) - len(unseen)
    blocks = ClientBlocks(unseen if drop else train, holdout)
    if not len(blocks.train):
        raise DataError("nothing to train on is left of these documents", where=str(path), mend="bring more of them")
    return ClientData(source, documents, blocks, shared, audit.dropped[0], audit.leaks)


def _split(recipe: Recipe, path: Path) -> ClientDocuments:
    def load(source: Path, seed: int | None, at_most: int | None = None) -> tuple[Document, ...]:
        data = recipe.data.model_copy(update={"source": str(source)})
        return load_documents(data, seed, at_most).documents

    if (path / TRAIN).is_file() and (path / HOLDOUT).is_file():
        holdout = load(path / HOLDOUT, None) if (path / HOLDOUT).stat().st_size else ()
        return ClientDocuments(load(path / TRAIN, None), holdout)
    found = load(path, recipe.seed, recipe.data.documents_per_client)
    return hold_out(list(found), recipe.data.client_holdout, derive_seed(recipe.seed, "client-holdout"))


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
        for name, part in ((TRAIN, filter(is_trained_on, documents.train)), (HOLDOUT, documents.holdout)):
            rows = [json.dumps({recipe.data.text: document.text}) + "\n" for document in part]
            (target / name).write_text("".join(rows), encoding="utf-8")
        folders.append(target)
    return folders
