"""Training where memory is short, and how a test sees what came of it."""

import re
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedloom.training.batched import BatchedEngine
from fedloom.training.jobs import ClientUpdate
from fedloom.training.reference import ReferenceEngine
from support.tiny import make_adapted, make_blocks, make_job, updates_of


def keep_limits(kept: list[int]) -> Callable[[str, str], None]:
    """Keep how many clients train at once, as people are told when memory runs out."""

    def say(what: str, detail: str) -> None:
        found = re.search(r"(\d+) at once", detail)
        assert what == "memory"
        assert found
        kept.append(int(found[1]))

    return say


def by_client(updates: list[ClientUpdate]) -> dict[int, ClientUpdate]:
    found = {update.client: update for update in updates}
    assert len(found) == len(updates), "each comes once"
    return found


def assert_same(found: list[ClientUpdate], expected: list[ClientUpdate]) -> None:
    """As float64 can tell: weights, what the optimizer keeps, and the report."""
    mine, its = by_client(found), by_client(expected)
    assert mine.keys() == its.keys()
    for client, update in mine.items():
        other = its[client]
        torch.testing.assert_close(update.adapter.weights_P, other.adapter.weights_P, rtol=1e-9, atol=1e-12)
        for name, value in update.optimizer_state.items():
            torch.testing.assert_close(value, other.optimizer_state[name], rtol=1e-7, atol=1e-14)
        assert update.report.steps == other.report.steps
        assert update.report.tokens == other.report.tokens
        assert update.report.loss_mean == pytest.approx(other.report.loss_mean, rel=1e-9)


def train_in_little(megabytes: int) -> list[int]:
    """Train 16 clients where this process may have so much more memory; return how many were at once, as said."""
    torch.set_num_threads(1)
    adapted, lowered = make_adapted(dtype="float64"), []
    blocks = [make_blocks(16, max_length=56, seed=client) for client in range(16)]
    jobs = [make_job(blocks[client], adapted.read(), client=client, epochs=1, batch_size=16) for client in range(16)]
    list(ReferenceEngine(adapted).train(jobs[:1]))  # what one client needs is there
    expected = list(updates_of(ReferenceEngine(adapted).train(jobs)))
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + megabytes * 2**20, resource.RLIM_INFINITY))
    found = list(updates_of(BatchedEngine(adapted, say=keep_limits(lowered)).train(jobs)))
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert_same(found, expected)
    return lowered
