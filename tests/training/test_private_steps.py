"""Private steps: each document's own gradient, clipped, summed and noised, in both engines; and the twins that leak."""

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from support.marks import CI, first
from support.tape import fix_shapes
from support.tiny import count_answers, make_adapted, make_blocks, make_job, switch_off_dropout, updates_of
from torch import Tensor

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.adapters.stacked_lora import Stack
from fedloom.data.tokens import TokenBlocks, take_batch
from fedloom.federation.lora_rules import trained_part
from fedloom.privacy.noise import derive_key
from fedloom.privacy.ration import Ration, Terms
from fedloom.training.batched import BatchedEngine, ClientBatch
from fedloom.training.client_dropout import ClientDropout
from fedloom.training.client_slots import ClientSlot, draw_noise
from fedloom.training.dropout_masks import sequence_keys
from fedloom.training.jobs import ClientJob, ClientUpdate, WorkLog
from fedloom.training.objective import mean_token_loss, next_token_targets, noised_mean, sum_clipped
from fedloom.training.reference import ReferenceEngine

SGD = {"optimizer": "sgd", "learning_rate": 0.1}


def ration_of(blocks: TokenBlocks, *, noise: float = 0.5, batch: int = 3, steps: int = 6, name: str = "") -> Ration:
    return Ration(Terms(noise, 0.4, batch, len(blocks), steps, 1e-3), derive_key(b"secret", name))


def make_jobs(start: Adapter, sizes: Sequence[int] = (7, 4, 9), noise: float = 0.5, **training: Any) -> list[ClientJob]:
    jobs = []
    for client, size in enumerate(sizes):
        blocks = count_answers(make_blocks(size, 12 + 2 * client, seed=size), seed=size)
        job = make_job(blocks, start, client=client, **{"batch_size": 2, **training})
        jobs.append(replace(job, ration=ration_of(blocks, noise=noise, batch=(3, 1, 2)[client], name=str(client))))
    return jobs


def train(build: Any, adapted: AdaptedModel, jobs: list[ClientJob]) -> list[ClientUpdate]:
    return sorted(updates_of(build(adapted).train(jobs)), key=lambda update: update.client)


def assert_agree(adapted: AdaptedModel, jobs: list[ClientJob], bound: float = 1e-9) -> list[ClientUpdate]:
    ours, theirs = (train(build, adapted, jobs) for build in (BatchedEngine, ReferenceEngine))
    for our, their, job in zip(ours, theirs, jobs, strict=True):
        moved = (their.adapter.weights_P - job.adapter.weights_P).norm()
        assert moved > 0
        assert (our.adapter.weights_P - their.adapter.weights_P).norm() / moved < bound
        assert our.report.drift == pytest.approx(their.report.drift, rel=10 * bound)
        assert our.report.steps == their.report.steps == 6
    return ours


def test_a_gradient_of_each_document_is_autograds(shape: str) -> None:
    adapted = make_adapted(shape, "float64")
    switch_off_dropout(adapted)
    start = noisy(adapted)
    adapted.load(start)
    blocks = count_answers(make_blocks(6, 16))
    expected = []
    for row in range(6):
        batch = take_batch(blocks, torch.tensor([row]))
        adapted.gradient_P.zero_()
        mean_token_loss(adapted.logits(batch.tokens_BT), batch.labels_BT).backward()
        expected.append(adapted.gradient_P.clone())
    stack = Stack(adapted)
    batch = take_batch(blocks, torch.arange(6))
    weights_KP = start.weights_P.expand(2, -1).clone()
    units_GP = torch.zeros(6, adapted.layout.size, dtype=torch.float64)
    stack.bind(weights_KP, units_GP)
    targets_BT = next_token_targets(batch.labels_BT)
    with stack.installed(), ClientDropout(torch.arange(6)):
        rows_M = (targets_BT != -100).flatten().nonzero()[:, 0]
        losses_M = adapted.loss_head.losses(batch.tokens_BT, rows_M, targets_BT.flatten()[rows_M])
        (losses_M / (targets_BT != -100).sum(1)[rows_M // targets_BT.shape[1]]).sum().backward()
    for found, own in zip(units_GP, expected, strict=True):
        assert (found - own).norm() / own.norm() < 1e-12


@pytest.mark.oracles("opacus")
@pytest.mark.filterwarnings("ignore:Full backward hook")  # the first layers' inputs are embeddings, which are frozen
def test_the_clipped_sum_is_that_of_opacus(shape: str) -> None:
    opacus = import_module("opacus")
    adapted, max_norm = make_adapted(shape, "float64"), 0.13
    switch_off_dropout(adapted)
    start = noisy(adapted)
    adapted.load(start)
    blocks = count_answers(make_blocks(6, 16))
    job = replace(make_job(blocks, start, optimizer="sgd", learning_rate=1.0), ration=ration_of(blocks, batch=6))
    # All drawn, in one step, with noise so small that it is none.
    terms = replace(job.ration.terms, noise_multiplier=1e-12, max_norm=max_norm, steps=1)  # type: ignore[union-attr]
    (ours,) = train(BatchedEngine, adapted, [replace(job, ration=Ration(terms, b"k" * 32))])

    adapted.load(start)
    batch = take_batch(blocks, torch.arange(6))
    model = opacus.GradSampleModule(adapted.model.train(), loss_reduction="sum", strict=False)
    logits = model(input_ids=batch.tokens_BT, use_cache=False).logits
    targets_BT = next_token_targets(batch.labels_BT)
    losses_BT = torch.nn.functional.cross_entropy(logits.mT, targets_BT, ignore_index=-100, reduction="none")
    (losses_BT.sum(1) / (targets_BT != -100).sum(1)).sum().backward()
    samples_BP = torch.cat([adapted.parameter(name).grad_sample.flatten(1) for name in start.layout.names], 1)  # type: ignore[attr-defined]
    norms_B1 = samples_BP.norm(dim=1, keepdim=True)
    assert (norms_B1 > max_norm).any()
    theirs_P = (samples_BP * (max_norm / norms_B1).clamp(max=1)).sum(0) / 6
    model.remove_hooks()
    assert ((start.weights_P - ours.adapter.weights_P) - theirs_P).norm() / theirs_P.norm() < 1e-5


def noisy(adapted: AdaptedModel) -> Adapter:
    """Not PEFT's zeros in B, under which A has no gradient."""
    noise_P = torch.randn(adapted.layout.size, generator=torch.Generator().manual_seed(5)).to(adapted.weights_P.dtype)
    return Adapter(adapted.layout, adapted.read().weights_P + 0.02 * noise_P)


@pytest.mark.parametrize("optimizer", first(["sgd", "adamw"], rest=CI))
@pytest.mark.parametrize("mu", first([1.0, 0.0]))
def test_engines_agree_on_a_private_round(shape: str, optimizer: str, mu: float) -> None:
    adapted = make_adapted(shape, "float64")
    switch_off_dropout(adapted)
    jobs = make_jobs(noisy(adapted), optimizer=optimizer, learning_rate=1e-2, proximal_mu=mu)
    drawn = [len(rows) for job in jobs for rows in job.draw_batches()]
    assert 0 in drawn
    assert max(drawn) > 2, "more than fit into a micro-batch"
    found = assert_agree(adapted, jobs)
    for update in found:
        report = update.report
        assert (report.loss_first, report.loss_last, report.loss_mean, report.tokens) == (None, None, None, 0)
    theirs = train(ReferenceEngine, adapted, jobs)
    for job, update, their in zip(jobs, found, theirs, strict=True):
        assert len(update.own_losses) == sum(len(rows) > 0 for rows in job.draw_batches()), "of steps without any, none"
        assert update.own_losses == pytest.approx(their.own_losses, rel=1e-9)


@pytest.mark.parametrize(
    "changes",
    first([
        {"gradient_checkpointing": True}, {"gradient_accumulation": 2}, {"clients_at_once": 2},
        {"weight_decay": 0.1, "optimizer": "adamw"}, {"schedule": "cosine"},
    ], keep=2),
    ids=["checkpointing", "accumulation", "two-at-once", "decay", "cosine"],
)  # fmt: skip
def test_engines_agree_whatever_else_is_set(changes: dict[str, Any]) -> None:
    adapted = make_adapted("tiny-llama", "float64")
    assert_agree(adapted, make_jobs(noisy(adapted), **{**SGD, **changes}))


@pytest.mark.parametrize("rule", first(["ffa", "rolora"]))
def test_what_is_not_trained_has_no_part_in_a_norm_and_no_noise(rule: str) -> None:
    adapted = make_adapted("tiny-llama", "float64", freeze_a=rule == "ffa")
    start = noisy(adapted)
    jobs = make_jobs(start, **SGD)
    if rule == "rolora":
        trains_P = trained_part(adapted.layout, rule, 1)
        assert trains_P is not None
        jobs = [replace(job, trains_P=trains_P) for job in jobs]
    for update in assert_agree(adapted, jobs):
        if rule == "rolora":
            assert torch.equal(update.adapter.weights_P[~trains_P], start.weights_P[~trains_P])


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}], ids=str)
def test_with_dropout_too_both_engines_agree(shape: str, changes: dict[str, Any]) -> None:
    adapted = make_adapted(shape, "float64", dropout=0.4)
    assert_agree(adapted, make_jobs(noisy(adapted), **SGD, **changes))


def test_a_client_is_the_same_alone_and_beside_others_with_dropout() -> None:
    adapted = make_adapted("tiny-gpt2", "float64", dropout=0.4)
    jobs = make_jobs(noisy(adapted), **SGD)
    together, alone = train(BatchedEngine, adapted, jobs), train(BatchedEngine, adapted, jobs[:1])
    assert torch.allclose(together[0].adapter.weights_P, alone[0].adapter.weights_P, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_steps_without_a_document_move_the_weights_by_noise(
    fixed_shapes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fixed_shapes:
        fix_shapes(monkeypatch)
    adapted = make_adapted("tiny-llama", "float64")
    start, blocks = noisy(adapted), make_blocks(5, 12)
    rations = (ration_of(blocks, batch=1, steps=3, name=str(name)) for name in range(1000))
    ration = next(one for one in rations if not any(len(one.draw(step)) for step in range(3)))
    job = replace(make_job(blocks, start, **SGD), ration=ration)
    expected_P = start.weights_P - 0.1 * sum(ration.noise(step, len(start.weights_P)) for step in range(3))
    for build in (BatchedEngine, ReferenceEngine):
        (update,) = train(build, adapted, [job])
        assert torch.allclose(update.adapter.weights_P, expected_P, rtol=0, atol=1e-12)


def test_one_documents_gradient_moves_a_sum_by_no_more_than_the_norm() -> None:
    gradients_GP = torch.randn(6, 40, dtype=torch.float64) * torch.tensor([[0.01], [1], [5], [100], [0], [2]])
    sums = sum_clipped(gradients_GP.clone(), 0.7, 2)
    for row in range(6):
        left = gradients_GP.clone()
        left[row] = 0
        moved = (sum_clipped(left, 0.7, 2) - sums).norm(dim=1)
        assert moved.max() <= 0.7
        assert (moved > 0).sum() == (row != 4)
    assert torch.allclose(sum_clipped(0.001 * gradients_GP[:1], 0.7, 1)[0], 0.001 * gradients_GP[0], rtol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_no_number_counts_as_nothing(value: float) -> None:
    gradients_GP = torch.ones(4, 10)
    gradients_GP[2, 3] = value
    expected = sum_clipped(torch.ones(4, 10)[[0, 1, 3, 3]] * torch.tensor([1, 1, 0, 1.0])[:, None], 1.0, 2)
    assert torch.equal(sum_clipped(gradients_GP, 1.0, 2), expected)


@pytest.mark.parametrize("norm", [1.25e39, 4e38, 3e36, 1e33])
def test_a_gradient_that_is_too_large_to_be_scaled_is_never_longer_than_the_norm(norm: float) -> None:
    """A server can send weights that make it so large that the factor has no digits left, and was rounded up."""
    gradients_GP = torch.full((1, 1000), norm / 1000**0.5)
    assert sum_clipped(gradients_GP, 1e-6, 1).double().norm() <= 1e-6


def test_a_document_that_explodes_ends_nothing() -> None:
    adapted = make_adapted("tiny-llama", "float64")
    jobs = make_jobs(noisy(adapted), sizes=(7,), **SGD)
    poisoned = adapted.base.get_input_embeddings().weight
    token = int(jobs[0].blocks.tokens_NT[2, 0])
    before = poisoned.data[token].clone()
    poisoned.data[token] = float("nan")
    try:
        for build in (BatchedEngine, ReferenceEngine):
            (update,) = train(build, adapted, jobs)
            assert bool(torch.isfinite(update.adapter.weights_P).all())
    finally:
        poisoned.data[token] = before


def test_the_mean_is_over_the_expected_number_in_float64() -> None:
    sums, noise = torch.ones(2, 3), torch.full((2, 3), 2.0**-40, dtype=torch.float64)
    found = noised_mean(sums, noise, torch.tensor([2, 4]))
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.tensor([[0.5] * 3, [0.25] * 3]))


def moved_by_one_document(build: Any, case: str) -> float:
    """Return how far a step without noise moves, in norms, where one document is longer, or left out."""
    adapted = make_adapted("tiny-gpt2", "float64", dropout=0.4)
    start, blocks = noisy(adapted), count_answers(make_blocks(6, 20))
    lengths_N = blocks.lengths_N.clone()
    lengths_N[2] = blocks.lengths_N[2] // 2
    counted_NT = blocks.counted_NT & (torch.arange(20) < lengths_N[:, None])
    shorter = replace(blocks, lengths_N=lengths_N, counted_NT=counted_NT)
    other = shorter if case == "longer" else blocks.take(torch.tensor([0, 1, 3, 4, 5]))
    # All drawn, in one step, with noise so small that it is none.
    ration = Ration(Terms(1e-12, 0.01, 6, 6, 1, 1e-3), b"k" * 32)
    job = make_job(blocks, start, optimizer="sgd", learning_rate=1.0, batch_size=6)
    ours, theirs = (train(build, adapted, [replace(job, blocks=held, ration=ration)])[0] for held in (blocks, other))
    return float(6 * (ours.adapter.weights_P - theirs.adapter.weights_P).norm() / 0.01)


@pytest.mark.parametrize("build", [BatchedEngine, ReferenceEngine])
@pytest.mark.parametrize("case", ["longer", "left out"])
def test_with_dropout_one_document_moves_a_step_by_no_more_than_the_norm(build: Any, case: str) -> None:
    """Dropout that is drawn for a whole batch falls otherwise for all of it where one document is longer."""
    assert 0 < moved_by_one_document(build, case) <= (2 if case == "longer" else 1)


def test_masks_by_a_documents_place_in_the_batch_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_place(self: ClientBatch, batches: Any, sequences: int, *others: int) -> Tensor:
        return sequence_keys([1], [0], [0], sequences)

    monkeypatch.setattr(ClientBatch, "_dropout_keys", by_place)
    assert moved_by_one_document(BatchedEngine, "left out") > 1.5


def test_a_steps_noise_is_sent_while_the_processor_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make_adapted()
    jobs, told = make_jobs(adapted.read()), []
    slots = [ClientSlot(WorkLog(job), job.draw_batches(), step=1) for job in jobs]
    right = Tensor.to

    def see(self: Tensor, *given: Any, **named: Any) -> Tensor:
        told.append(named.get("non_blocking"))
        return right(self, *given, **named)

    like_KP = torch.zeros(3, adapted.layout.size)
    expected = [job.ration.noise(1, like_KP.shape[1]) for job in jobs if job.ration]
    monkeypatch.setattr(Tensor, "to", see)
    noise = draw_noise(slots, like_KP)
    monkeypatch.undo()
    assert noise is not None
    assert all(torch.equal(mine, its) for mine, its in zip(noise.noise_KP, expected, strict=True))
    assert told[-2:] == [True, True]
