"""Blocks of tokens of a run: the central hold-out's and each client's, none of them on two sides."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fedloom.data.splits import Splits
from fedloom.data.tokens import ClientBlocks, TokenBlocks, distinct_blocks, without_blocks, without_copies
from fedloom.errors import DataError
from fedloom.experiment.building import hold, tokenize_for
from fedloom.model.source import ModelSource
from fedloom.recipe.recipe import Recipe
from fedloom.records.plan import TOO_SHORT, UNANSWERED


def tokenize_splits(
    splits: Splits, source: ModelSource, recipe: Recipe, *, units: bool = False
) -> tuple[TokenBlocks, tuple[ClientBlocks, ...], int]:
    """Return blocks of the central hold-out and of every client, and how many training blocks are also held out.

    With `units`, the blocks know their unit, as in `tokenize_for`.

    Raises:
        DataError: the central hold-out's documents are all too short, or the tokenizer is not the model's.
    """
    tokenize = partial(tokenize_for, source, recipe, units=units)
    where = f'data.source = "{recipe.data.source}"'
    central, holdouts = tokenize(splits.central), [tokenize(client.holdout) for client in splits.clients]
    if splits.central and not len(central):
        raise DataError(
            "nothing that counts is left of the central hold-out's documents"
            if central.unanswered
            else "each of the central hold-out's documents has fewer than two tokens",
            where=where,
            mend="raise data.max_length" if central.unanswered else "use longer documents",
        )
    trains = [tokenize(client.train) for client in splits.clients]
    clients, shared = separate(recipe, distinct_blocks(central), trains, holdouts)
    return central, clients, shared


def separate(
    recipe: Recipe, central: set[bytes], trains: Sequence[TokenBlocks], holdouts: Sequence[TokenBlocks]
) -> tuple[tuple[ClientBlocks, ...], int]:
    """Return what each client holds without blocks on both sides, and how many of those to train on there were.

    Training loses what is held out. In a private run, training loses what is held out centrally alone, and of equal
    units all but one; the hold-outs lose what anybody trains on: one held-out document decides over nothing.
    """
    private, drop = recipe.bounds_documents, recipe.data.duplicates == "drop"
    held_out = central.union(*([] if private else map(distinct_blocks, holdouts)))
    unseen = [without_blocks(train, held_out) for train in trains]
    shared = sum(map(len, trains)) - sum(map(len, unseen))
    if drop:
        trains = [without_copies(train) for train in unseen] if private else unseen
    if drop and private:
        trained = set().union(*map(distinct_blocks, trains))
        holdouts = [without_blocks(holdout, trained) for holdout in holdouts]
    return tuple(hold(recipe, *pair) for pair in zip(trains, holdouts, strict=True)), shared


def find_idle(splits: Splits, tokenized: Sequence[ClientBlocks], recipe: Recipe) -> tuple[str, ...]:
    """Say of each client that has nothing to train on why; it holds out what it has, and never trains.

    Raises:
        DataError: no client has anything.
    """
    left_out = tuple(
        _why_idle(client, splits, tokenized) for client, blocks in enumerate(tokenized) if not len(blocks.train)
    )
    if len(left_out) == len(tokenized):
        raise DataError(
            f"no client has anything to train on: {left_out[0]}",
            where=f'data.source = "{recipe.data.source}"',
            mend="use more or longer documents, fewer clients, a smaller data.client_holdout or a larger"
            " data.max_length" + (', or data.duplicates = "report"' if any(splits.audit.dropped) else ""),
        )
    return left_out


def _why_idle(client: int, splits: Splits, tokenized: Sequence[ClientBlocks]) -> str:
    """Say what became of the documents of a client that has nothing to train on."""
    documents, train = splits.clients[client], tokenized[client].train
    counts = {
        "held out": len(documents.holdout),
        "dropped as a copy of held-out text": splits.audit.dropped[client],
        TOO_SHORT: train.dropped,
        UNANSWERED: train.unanswered,
        "equal to held-out text within data.max_length": len(documents.train) - train.dropped - train.unanswered,
    }
    why = ", ".join(f"{number} {what}" for what, number in counts.items() if number)
    return f"client {client} of {len(tokenized)}: {why or 'no document'}"
