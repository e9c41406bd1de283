"""Models, blocks and jobs that the benchmarks share."""

from __future__ import annotations

import torch

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.adapters.peft_config import build_config
from fedloom.data.tokens import TokenBlocks
from fedloom.model.devices import choose_dtype, open_device
from fedloom.model.loading import load_model
from fedloom.model.source import open_model
from fedloom.recipe.sections import Adapter as AdapterSection
from fedloom.recipe.sections import Training
from fedloom.training.jobs import ClientJob

BATCH, LENGTH, VOCABULARY = 2, 128, 40_000
DEVICE = open_device("auto")
DTYPE = choose_dtype("auto", DEVICE)


def make_blocks(num_blocks: int, seed: int, length: int = LENGTH, *, mixed: bool = False) -> TokenBlocks:
    """Return blocks of random tokens; with `mixed`, of lengths evenly spread, so that half of them is padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens_NT = torch.randint(0, VOCABULARY, (num_blocks, length), generator=generator)
    lengths_N = torch.full((num_blocks,), length)
    if mixed:
        lengths_N = (
            torch.linspace(2, length, num_blocks).round().long()[torch.randperm(num_blocks, generator=generator)]
        )
    return TokenBlocks(tokens_NT, lengths_N, lengths_N)


def build_adapted(shape: str, dtype: str = "float32") -> AdaptedModel:
    """Return a random base model of a shape, with LoRA of rank 16 on queries and values."""
    base = load_model(open_model(f"random:{shape}"), dtype=dtype, device=DEVICE)
    section = AdapterSection(rank=16, alpha=32, targets=("q_proj", "v_proj"))
    return AdaptedModel(base, build_config(section, base), 1)


def make_jobs(start: Adapter, data: list[TokenBlocks]) -> list[ClientJob]:
    """Return a job of one epoch for each client's blocks."""
    training = Training(batch_size=BATCH, learning_rate=1e-5)
    return [
        ClientJob(round=1, client=client, adapter=start, training=training, rounds=1, seed=1, blocks=blocks)
        for client, blocks in enumerate(data)
    ]
