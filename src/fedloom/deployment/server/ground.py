"""Ground of a run with clients on other machines: what its server has, or must have, before any client comes."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from fedloom.data.documents import Documents, load_documents
from fedloom.data.tokens import TokenBlocks
from fedloom.experiment.building import open_source, tokenize_for
from fedloom.experiment.preparation import Setup, check
from fedloom.federation.schedule import cohort_size
from fedloom.federation.strategies import check_strategy
from fedloom.model.devices import open_device
from fedloom.model.source import ModelSource
from fedloom.progress import Say
from fedloom.recipe.recipe import Recipe
from fedloom.text import format_bytes

LARGE_BYTES = 50e6
"""Size of an adapter from which on it is said what memory it takes on its way."""
COPIES_HERE, COPIES_THERE = 12, 9
"""Copies of an adapter that the processes of the server, and of each client, hold at most while it travels: measured
with 100 and 500 MB and two clients."""


class Ground(NamedTuple):
    """Parts of a run that the server has itself."""

    source: ModelSource
    device: torch.device
    found: Documents
    central: TokenBlocks
    setup: Setup


def lay_ground(recipe: Recipe, say: Say, *, room: bool = True) -> Ground:
    """Gather what the server itself has for a run: the base model without its weights, and its own hold-out.

    Without `room` it need not fit into the memory that is free now.

    Raises:
        FedloomError: the data or the model can't be had, or they don't fit together.
    """
    source = open_source(recipe, partial(say, "model"))
    device = open_device(recipe.model.device)
    check_strategy(recipe.federation.strategy, cohort_size(recipe.data.clients, recipe.federation))
    return Ground(source, device, *gather_central(recipe, source), check(recipe, source, device, room=room))


def gather_central(recipe: Recipe, source: ModelSource) -> tuple[Documents, TokenBlocks]:
    """Load the server's own hold-out: the first documents of its source, none where the recipe asks for none."""
    wanted = recipe.data.central_holdout
    found = Documents((), {}, "none", "unknown")
    if wanted:
        found = load_documents(recipe.data, recipe.seed, wanted, open_tokenizer=lambda: source.tokenizer)
    return found, tokenize_for(source, recipe, found.documents)


def describe_room(payload_bytes: int, free_bytes: int) -> str:
    """Return what memory a large adapter takes while it travels, and whether this machine has it; nothing of others."""
    if payload_bytes < LARGE_BYTES:
        return ""
    here, there = (format_bytes(copies * payload_bytes) for copies in (COPIES_HERE, COPIES_THERE))
    lacks = "; it is likely to fail here" if COPIES_HERE * payload_bytes > free_bytes else ""
    return (
        f"an adapter of {format_bytes(payload_bytes)} takes up to {here} here while it travels, of"
        f" {format_bytes(free_bytes)} that are free{lacks}; up to {there} on each client, beside its model"
    )
