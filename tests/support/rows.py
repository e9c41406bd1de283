"""Clients whose texts are of mixed lengths, and what they are trained on."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.data.tokens import TokenBlocks
from fedloom.training import client_slots
from fedloom.training.batched import BatchedEngine, ClientBatch
from fedloom.training.jobs import ClientJob, ClientUpdate
from fedloom.training.stacked_step import StepInputs
from support.tiny import count_answers, make_blocks, make_job, updates_of

EXACT = 1e-11
"""Distance of updates in float64, after steps in which Adam has made rounding larger."""


def let_rows_pay(monkeypatch: pytest.MonkeyPatch, **changes: float) -> None:
    """Have shapes that stay, and rows that pay wherever one token is left out, in sizes of one token, or as told."""
    for name, value in {"ROW_LAUNCHES": 0, "ROW_TRAFFIC": 0, "WIDTHS": 1, "SIZES": 1000, **changes}.items():
        monkeypatch.setattr(client_slots, name, value)
    plain = ClientBatch.__init__
    monkeypatch.setattr(
        ClientBatch, "__init__", lambda self, *given, **named: plain(self, *given, **{**named, "fixed_shapes": True})
    )


def make_mixed(sizes: Sequence[int] = (7, 4, 9), width: int = 32) -> list[TokenBlocks]:
    """Blocks of clients with texts of 3 tokens up to the width, in which only the ends count."""
    parts = []
    for client, size in enumerate(sizes):
        generator = torch.Generator().manual_seed(client)
        blocks = make_blocks(size, width, seed=client)
        lengths_N = torch.minimum(blocks.lengths_N, torch.randint(3, width + 1, (size,), generator=generator))
        real_NT = torch.arange(width) < lengths_N[:, None]
        blocks = TokenBlocks(blocks.tokens_NT.masked_fill(~real_NT, 0), lengths_N, real_NT)
        parts.append(count_answers(blocks, seed=client))
    return parts


def make_jobs(adapted: AdaptedModel, parts: Sequence[TokenBlocks], **changes: Any) -> list[ClientJob]:
    told = {"batch_size": 3, "proximal_mu": 0.1, "max_gradient_norm": 1.0, "epochs": 2, **changes}
    return [make_job(part, adapted.read(), client=client, **told) for client, part in enumerate(parts)]


def train(
    adapted: AdaptedModel, jobs: Sequence[ClientJob], engine: BatchedEngine | None = None
) -> tuple[list[ClientUpdate], list[StepInputs]]:
    """The clients' updates, and the inputs of every part of a step that made them, as the processor draws them."""
    seen: list[StepInputs] = []
    told: list[tuple[str, str]] = []
    right = ClientBatch._inputs

    def see(self: ClientBatch, batches: Any, totals: Any, number: int, ahead: int, need: int | None) -> StepInputs:
        inputs = right(self, batches, totals, number, ahead, need)
        # Of the largest size, a step is drawn to see how many bytes it takes.
        if need is None:
            seen.append(inputs)
        return inputs

    engine = engine or BatchedEngine(adapted, say=lambda *words: told.append(words))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClientBatch, "_inputs", see)
        found = sorted(updates_of(engine.train(jobs)), key=lambda update: update.client)
    assert "graph" not in dict(told), told
    return found, seen


def distance(ours: Sequence[ClientUpdate], theirs: Sequence[ClientUpdate], start_P: Tensor) -> float:
    """The largest distance of a client's weights, relative to how far they moved."""
    return max(
        float((our.adapter.weights_P - their.adapter.weights_P).norm() / (their.adapter.weights_P - start_P).norm())
        for our, their in zip(ours, theirs, strict=True)
    )
