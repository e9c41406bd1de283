"""What a training step needs, and how many clients fit at once in what there is.

Counted, not guessed from the shape: a short forward pass is traced, and what autograd keeps of it for the backward
pass is added up; it grows with the number of tokens.

Letters: B sequences, T tokens, P adapter parameters.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedloom.adapters.adapter import AdaptedModel
from fedloom.adapters.stacked import Stack
from fedloom.readout import CHUNK_BYTES

ADAPTER_COPIES = {"adamw": 4, "sgd": 2}
"""Flat vectors of a client: weights and gradient, and for AdamW two moments."""
TRACED_TOKENS = 32
SHARE_OF_FREE = 0.8
"""Of the free memory, what training may take: the rest is for evaluation, the allocator and everybody else."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step: of the base model, of the loss, and of each client."""

    base_bytes: int
    loss_bytes: int
    client_bytes: int

    def peak_bytes(self, clients: int) -> int:
        """With so many clients at once."""
        return self.base_bytes + self.loss_bytes + clients * self.client_bytes

    def clients_that_fit(self, free_bytes: int) -> int:
        """Next to the base model, in memory that is free; at least one, which may be one too many."""
        return max(1, int((SHARE_OF_FREE * free_bytes - self.loss_bytes) // self.client_bytes))


def measure_step(adapted: AdaptedModel, stack: Stack, *, tokens: int, optimizer: str) -> StepMemory:
    """What a step of so many tokens a client (B × T) needs, found by tracing a forward pass of a few."""
    weights_P = adapted.weights_P.detach()
    stack.bind(weights_P[None], torch.empty_like(weights_P)[None])
    base_bytes = sum(value.numel() * value.element_size() for value in stack.model.parameters())
    own = {value.untyped_storage()._cdata for value in (*stack.model.parameters(), *stack.model.buffers(), weights_P)}
    saved: dict[int, int] = {}

    def note(kept: Tensor) -> Tensor:
        storage = kept.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        alive.append(kept)
        return kept

    alive: list[Tensor] = []  # a storage that is freed could give its name to another
    traced = min(tokens, TRACED_TOKENS)
    tokens_BT = torch.zeros(1, traced, dtype=torch.int64, device=adapted.device)
    rows_M = torch.arange(traced, device=adapted.device)
    with torch.random.fork_rng([adapted.device] if adapted.device.type == "cuda" else []), stack.installed():
        stack.model.train()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
            adapted.readout.losses(tokens_BT, rows_M, torch.zeros_like(rows_M))
        stack.model.eval()
    adapter_bytes = ADAPTER_COPIES[optimizer] * weights_P.numel() * weights_P.element_size()
    return StepMemory(base_bytes, 3 * CHUNK_BYTES, sum(saved.values()) * tokens // traced + adapter_bytes)


def free_bytes(device: torch.device) -> int:
    """Memory that can be had now: of the GPU with what torch holds unused, or of the machine."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
