"""Units of several rows, a person's documents say: drawn as one, and one of the rows gives the gradient."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.marks import first
from support.tiny import count_answers, make_adapted, make_blocks, make_job, switch_off_dropout, updates_of
from torch import Tensor

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.data.tokens import TokenBlocks, take_batch
from fedloom.privacy.noise import derive_key
from fedloom.privacy.ration import Ration, Terms
from fedloom.training.batched import BatchedEngine
from fedloom.training.jobs import ClientJob, ClientUpdate
from fedloom.training.objective import mean_token_loss
from fedloom.training.reference import ReferenceEngine

UNITS = [3, 0, 3, 7, 0, 3, 8, 9, 9]
"""Unit of each row: five of them, of one to three rows, whose numbers leave some out."""
MAX_NORM = 0.4


def blocks_of(units: Sequence[int], seed: int = 0) -> TokenBlocks:
    blocks = count_answers(make_blocks(len(units), 14, seed=seed), seed=seed)
    return replace(blocks, units_N=torch.tensor(units))


def ration_of(blocks: TokenBlocks, *, batch: int = 3, steps: int = 5, noise: float = 0.5, name: str = "") -> Ration:
    return Ration(Terms(noise, MAX_NORM, batch, blocks.num_units, steps, 1e-3), derive_key(b"secret", name))


def make_jobs(start: Adapter, **training: Any) -> list[ClientJob]:
    jobs = []
    for client, units in enumerate([UNITS, [0, 0, 0, 0, 1], [*range(7)]]):
        blocks = blocks_of(units, seed=client)
        job = make_job(blocks, start, client=client, **{"batch_size": 2, **training})
        jobs.append(replace(job, ration=ration_of(blocks, batch=min(3, blocks.num_units), name=str(client))))
    return jobs


def noisy(adapted: AdaptedModel) -> Adapter:
    noise_P = torch.randn(adapted.layout.size, generator=torch.Generator().manual_seed(5)).to(adapted.weights_P.dtype)
    return Adapter(adapted.layout, adapted.read().weights_P + 0.02 * noise_P)


def train(build: Any, adapted: AdaptedModel, jobs: list[ClientJob]) -> list[ClientUpdate]:
    return sorted(updates_of(build(adapted).train(jobs)), key=lambda update: update.client)


def by_hand(adapted: AdaptedModel, job: ClientJob, rate: float) -> Tensor:
    """The weights after a round of plain SGD: of each drawn unit one row, its gradient by autograd, clipped by hand."""
    assert job.ration
    weights_P = job.adapter.weights_P.clone()
    units_N = job.blocks.units_N
    assert units_N is not None
    for step in range(job.ration.terms.steps):
        total_P = job.ration.noise(step, len(weights_P))
        for row in job.ration.draw_rows(step, units_N):
            adapted.load(Adapter(adapted.layout, weights_P))
            batch = take_batch(job.blocks, row[None])
            adapted.gradient_P.zero_()
            mean_token_loss(adapted.logits(batch.tokens_BT), batch.labels_BT).backward()
            gradient_P = adapted.gradient_P.clone()
            total_P += gradient_P * min(1.0, MAX_NORM * (1 - 1e-6) / float(gradient_P.norm()))
        weights_P = weights_P - rate * total_P / job.ration.terms.batch
    return weights_P


def test_a_round_is_autograds_unit_by_unit(shape: str) -> None:
    adapted = make_adapted(shape, "float64")
    switch_off_dropout(adapted)
    (job, *_) = make_jobs(noisy(adapted), optimizer="sgd", learning_rate=0.1)
    assert any(len(rows) > 2 for rows in job.draw_batches()), "more than fit into a micro-batch"
    expected_P = by_hand(adapted, job, 0.1)
    for build in (BatchedEngine, ReferenceEngine):
        (update,) = train(build, adapted, [job])
        moved = (expected_P - job.adapter.weights_P).norm()
        assert (update.adapter.weights_P - expected_P).norm() / moved < 1e-9
        assert update.report.examples == 5, "units, and not rows"


@pytest.mark.parametrize("optimizer", first(["adamw", "sgd"]))
def test_engines_agree_on_units(optimizer: str) -> None:
    adapted = make_adapted("tiny-llama", "float64")
    jobs = make_jobs(noisy(adapted), optimizer=optimizer, learning_rate=1e-2, proximal_mu=0.5)
    ours, theirs = (train(build, adapted, jobs) for build in (BatchedEngine, ReferenceEngine))
    for our, their, job in zip(ours, theirs, jobs, strict=True):
        moved = (their.adapter.weights_P - job.adapter.weights_P).norm()
        assert moved > 0
        assert (our.adapter.weights_P - their.adapter.weights_P).norm() / moved < 1e-9


@pytest.mark.long
def test_a_unit_is_drawn_as_one_and_gives_each_of_its_rows_as_often() -> None:
    blocks, steps = blocks_of(UNITS), 6000
    ration = ration_of(blocks, batch=2, steps=steps)
    rows, together = Counter[int](), 0
    for step in range(steps):
        drawn = ration.draw_rows(step, blocks.owners).tolist()
        units = [UNITS[row] for row in drawn]
        assert len(set(units)) == len(units), "no unit gives two rows"
        assert len(units) == len(ration.draw(step))
        rows.update(drawn)
        together += 3 in units and 0 in units
    rate = ration.terms.rate
    assert rate == 2 / 5
    for row, unit in enumerate(UNITS):
        share = rate / UNITS.count(unit)
        assert abs(rows[row] - steps * share) < 4 * (steps * share * (1 - share)) ** 0.5, f"row {row}"
    assert abs(together - steps * rate**2) < 4 * (steps * rate**2 * (1 - rate**2)) ** 0.5, "each unit by itself"


def test_which_row_a_unit_gives_is_new_in_each_step_and_the_same_for_the_same_task() -> None:
    units_N = torch.zeros(1000, dtype=torch.int64)
    ration = Ration(Terms(0.5, MAX_NORM, 1, 1, 50, 1e-3), derive_key(b"secret", ""))
    found = [int(ration.draw_rows(step, units_N)) for step in range(50)]
    assert len(set(found)) > 40
    assert found == [int(ration.draw_rows(step, units_N)) for step in range(50)]
    other = replace(ration, key=derive_key(b"secret", "another"))
    assert found != [int(other.draw_rows(step, units_N)) for step in range(50)]


def moved_by_one_unit(adapted: AdaptedModel, rows_as_units: bool) -> float:
    """How far a step moves with all rows of one unit exchanged, in units of what the norm allows at most."""
    blocks = blocks_of([0, 0, 0, 0, 0, 0, 1, 2], seed=1)
    tokens_NT = blocks.tokens_NT.clone()
    tokens_NT[:6] = blocks_of([0] * 6, seed=9).tokens_NT
    found = []
    for one in (blocks, replace(blocks, tokens_NT=tokens_NT)):
        one = replace(one, units_N=None) if rows_as_units else one
        ration = ration_of(one, batch=one.num_units, steps=1, noise=0.0)
        ration = replace(ration, terms=replace(ration.terms, max_norm=1e-3))  # below every gradient
        job = replace(make_job(one, noisy(adapted), optimizer="sgd", learning_rate=1.0), ration=ration)
        (update,) = train(BatchedEngine, adapted, [job])
        found.append(update.adapter.weights_P * ration.terms.batch)
    return float((found[0] - found[1]).norm()) / (2 * 1e-3)


def test_all_rows_of_a_unit_move_a_step_by_no_more_than_one_norm() -> None:
    adapted = make_adapted("tiny-llama", "float64")
    assert 0 < moved_by_one_unit(adapted, rows_as_units=False) <= 1
    # The twin that draws and bounds each row by itself.
    assert moved_by_one_unit(adapted, rows_as_units=True) > 1.5


def test_units_of_which_nothing_is_left_are_drawn_and_bring_nothing() -> None:
    blocks = blocks_of(UNITS)
    ration = ration_of(blocks, batch=3)
    more = replace(ration, terms=replace(ration.terms, units=12, batch=12))
    assert sorted(UNITS[row] for row in more.draw_rows(0, blocks.owners)) == [0, 3, 7, 8, 9]
    job = replace(make_job(blocks, noisy(make_adapted("tiny-llama", "float64")), optimizer="sgd"), ration=more)
    for build in (BatchedEngine, ReferenceEngine):
        (update,) = train(build, make_adapted("tiny-llama", "float64"), [job])
        assert update.report.examples == 12
