"""The batched engine against the reference, client by client, after a whole round.

The difference is measured against the norm of the update, on data that can be learnt: on noise, Adam turns rounding
into signs.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from support.marks import first
from support.shapes import ARCHITECTURES
from support.tape import fix_shapes
from support.tiny import (
    DEVICE,
    count_answers,
    count_padding,
    make_adapted,
    make_blocks,
    make_job,
    make_recipe,
    start_from,
    switch_off_dropout,
    updates_of,
)

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter, Layout
from fedloom.adapters.lora import Residual, lora_pairs
from fedloom.data.packing import pack_blocks
from fedloom.data.tokens import TokenBlocks
from fedloom.errors import TrainingError
from fedloom.federation.lora_rules import trained_part
from fedloom.recipe.training_section import LARGEST
from fedloom.training import batched, client_slots, reference, stretches
from fedloom.training.batched import BatchedEngine
from fedloom.training.engines import ENGINES
from fedloom.training.jobs import ClientFailure, ClientJob, ClientUpdate
from fedloom.training.objective import count_targets
from fedloom.training.reference import ReferenceEngine
from fedloom.training.stacked_step import StackedStep, StepInputs

NOWHERE = Adapter(Layout((), ()), torch.empty(0))
TOLERANCES = {
    "float64": (1e-9, 1e-12),
    "float32": (1e-3, 1e-5),
    # A GPU's products of bfloat16 are rounded in another order, and the adapters' are of bfloat16 too: each engine is
    # 0.05 to 0.07 of an update's norm from float64 then, and 0.09 at most from the other, where it was tried.
    "bfloat16": (5e-2 if DEVICE.type == "cpu" else 0.12, 2e-2),
}
"""By dtype: of the update, relative to its norm; of losses."""


def make_jobs(sizes: Sequence[int] = (8, 5, 11), states: Any = None) -> list[ClientJob]:
    """Where they start from, and how they train, `train` says."""
    return [
        make_job(
            make_blocks(size, 12 + 2 * client, seed=client),
            NOWHERE,
            round=2,
            client=client,
            state=states[client] if states else None,
        )
        for client, size in enumerate(sizes)
    ]


def train(
    build: Any, adapted: AdaptedModel, start: Adapter, jobs: Sequence[ClientJob], **changes: Any
) -> dict[int, ClientUpdate]:
    training = make_recipe(training={"epochs": 2, "proximal_mu": 0.1, "optimizer_state": "keep", **changes}).training
    told = [replace(job, adapter=start, training=training) for job in jobs]
    return {update.report.client: update for update in updates_of(build(adapted).train(told))}


def assert_agree(ours: dict[int, ClientUpdate], theirs: dict[int, ClientUpdate], start: Adapter, dtype: str) -> None:
    of_update, of_loss = TOLERANCES[dtype]
    assert ours.keys() == theirs.keys()
    signed = []
    for client, their in theirs.items():
        our = ours[client]
        difference_P = our.adapter.weights_P - their.adapter.weights_P
        moved = (their.adapter.weights_P - start.weights_P).norm()
        assert difference_P.norm() / moved < of_update, f"client {client}"
        signed.append(float(difference_P.mean() / moved * difference_P.numel() ** 0.5))
        for name in ("loss_first", "loss_last", "loss_mean"):
            assert getattr(our.report, name) == pytest.approx(getattr(their.report, name), rel=of_loss), name
        for name in ("proximal_loss", "proximal_ratio", "drift"):
            assert getattr(our.report, name) == pytest.approx(getattr(their.report, name), rel=2 * of_update), name
        for name in ("round", "client", "examples", "tokens", "steps"):
            assert getattr(our.report, name) == getattr(their.report, name), name
        assert our.optimizer_state.keys() == their.optimizer_state.keys()
        for name, value in their.optimizer_state.items():
            distance = (our.optimizer_state[name] - value).norm() / value.norm()
            assert distance < 4 * of_update, name
    assert abs(sum(signed) / len(signed)) < of_update, "a one-sided drift"


@pytest.mark.parametrize("dtype", first(["float64", "float32", "bfloat16"]))
@pytest.mark.parametrize("shape", ARCHITECTURES)
def test_every_clients_adapter_is_the_references(shape: str, dtype: str) -> None:
    adapted = make_adapted(shape, dtype)
    switch_off_dropout(adapted)
    start, jobs = start_from(adapted), make_jobs()
    # Until something is learnt: in bfloat16, the first steps of a random model are mostly rounding.
    learning = {"batch_size": 4, "epochs": 8}
    theirs = train(ReferenceEngine, adapted, start, jobs, **learning)
    assert theirs[0].report.loss_last < theirs[0].report.loss_first
    assert_agree(train(BatchedEngine, adapted, start, jobs, **learning), theirs, start, dtype)


@pytest.mark.parametrize(
    "changes",
    first(
        [
            {"schedule": "cosine", "schedule_scope": "run"},
            {"optimizer": "sgd", "learning_rate": 0.5, "weight_decay": 0.1, "max_gradient_norm": 0.05},
            {"proximal_mu": 5.0, "max_gradient_norm": 0.05},
            {"batch_size": 64},
            {"optimizer": {"kind": "adamw", "betas": [0.8, 0.9], "eps": 1e-3}},
            {"optimizer": {"kind": "sgd", "momentum": 0.5}, "learning_rate": 0.1, "weight_decay": 0.1},
            {"optimizer": {"kind": "adafactor"}, "weight_decay": 0.3, "max_gradient_norm": 0.05},
            {"max_steps": 2, "batch_size": 3, "gradient_accumulation": 2},
            {"gradient_accumulation": 3, "max_gradient_norm": 0.05},
            {"max_gradient_norm": 0.05},
            {"schedule": "linear"},
            {"optimizer": "sgd", "learning_rate": 0.5},
            {"weight_decay": 0.3},
            {"proximal_mu": 0.0},
            {"batch_size": 3, "epochs": 1},
            {"optimizer": {"kind": "sgd", "momentum": 0.9}, "learning_rate": 0.1},
            {"optimizer": "adafactor"},
            {"warmup": 2, "schedule": "cosine", "learning_rate_end": 1e-3},
            {"warmup": 0.5, "schedule": "linear", "schedule_scope": "run"},
            {"schedule": "linear", "schedule_scope": "rounds", "learning_rate_end": 1e-3},
            {"max_steps": 3},
            {"gradient_accumulation": 2},
            {"gradient_accumulation": 64, "batch_size": 3, "proximal_mu": 5.0},
        ],
        keep=6,
    ),
    ids=lambda changes: ",".join(f"{name}={value}" for name, value in changes.items()),
)
def test_every_objective_and_optimizer_agrees(changes: dict[str, Any]) -> None:
    adapted = make_adapted(dtype="float64")
    start, jobs = start_from(adapted), make_jobs()
    theirs = train(ReferenceEngine, adapted, start, jobs, **changes)
    assert_agree(train(BatchedEngine, adapted, start, jobs, **changes), theirs, start, "float64")


@pytest.mark.parametrize("build", [BatchedEngine, ReferenceEngine])
@pytest.mark.parametrize(("size", "parts"), first([(2, 3), (1, 6), (4, 2)]))
@pytest.mark.parametrize("dtype", first(["float64", "float32"]))
def test_micro_batches_are_one_batch(shape: str, build: Any, size: int, parts: int, dtype: str) -> None:
    # Blocks of mixed lengths: a mean of the micro-batches' means would be another gradient.
    adapted = make_adapted(shape, dtype)
    switch_off_dropout(adapted)
    start, jobs = start_from(adapted), make_jobs((8, 5, 13))
    assert jobs[2].blocks.lengths_N.unique().numel() > 3
    settings = {"optimizer": "sgd", "learning_rate": 0.1, "max_gradient_norm": 0.5}
    whole = train(build, adapted, start, jobs, batch_size=size * parts, **settings)
    split = train(build, adapted, start, jobs, batch_size=size, gradient_accumulation=parts, **settings)
    of_update = {"float64": 1e-12, "float32": 1e-6}[dtype]
    for client, expected in whole.items():
        found = split[client]
        moved = (expected.adapter.weights_P - start.weights_P).norm()
        distance = (found.adapter.weights_P - expected.adapter.weights_P).norm()
        assert distance < 10 * of_update * moved if dtype == "float32" else distance < of_update * moved
        assert found.report.loss_last == pytest.approx(expected.report.loss_last, rel=1e-6)
        assert (found.report.steps, found.report.tokens) == (expected.report.steps, expected.report.tokens)


@pytest.mark.parametrize("build", [BatchedEngine, ReferenceEngine])
def test_a_mean_of_means_would_be_caught(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make_adapted(dtype="float64")
    start, jobs = start_from(adapted), make_jobs((12,))
    settings = {"optimizer": "sgd", "learning_rate": 0.1, "epochs": 1}
    whole = train(build, adapted, start, jobs, batch_size=4, **settings)[0].adapter.weights_P
    split = {"batch_size": 2, "gradient_accumulation": 2, **settings}
    right = train(build, adapted, start, jobs, **split)[0].adapter.weights_P
    for module in (batched, reference):
        monkeypatch.setattr(module, "count_targets", lambda labels_BT: len(labels_BT))
    if build is BatchedEngine:
        collect = batched.ClientBatch._collect
        monkeypatch.setattr(
            batched.ClientBatch,
            "_collect",
            lambda self, batches, totals, *others: collect(
                self, batches, [2 * count_targets(batch.labels_BT) for batch in batches], *others
            ),
        )
    wrong = train(build, adapted, start, jobs, **split)[0].adapter.weights_P
    assert (right - whole).norm() < 1e-10 * (whole - start.weights_P).norm()
    assert (wrong - whole).norm() > 1e-3 * (whole - start.weights_P).norm()


def test_micro_batches_of_fixed_shapes_are_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    # As a GPU has them. Clients of few rows wait while another has its last micro-batches.
    fix_shapes(monkeypatch)
    adapted = make_adapted(dtype="float64")
    start, jobs = start_from(adapted), make_jobs((8, 5, 11, 1))
    told = {"batch_size": 2, "gradient_accumulation": 4, "clients_at_once": 3}
    theirs = train(ReferenceEngine, adapted, start, jobs, **told)
    assert_agree(train(BatchedEngine, adapted, start, jobs, **told), theirs, start, "float64")


@pytest.mark.parametrize("clients", [1, 2])
def test_fixed_shapes_hold_the_largest_batch_where_a_round_begins_with_a_small_one(
    clients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Five blocks are batches of 2, 2 and 1, and the second round of two steps begins with the last one.
    fix_shapes(monkeypatch)
    adapted = make_adapted(dtype="float64")
    start, jobs = start_from(adapted), make_jobs((5, 9)[:clients])
    told = {"batch_size": 2, "max_steps": 2}
    assert [len(rows) for rows in replace(jobs[0], training=make_recipe(training=told).training).draw_batches()] == [
        1,
        2,
    ]
    theirs = train(ReferenceEngine, adapted, start, jobs, **told)
    assert_agree(train(BatchedEngine, adapted, start, jobs, **told), theirs, start, "float64")


@pytest.mark.parametrize(
    "changes",
    first([{"batch_size": 3}, {"batch_size": 2, "gradient_accumulation": 2}, {"gradient_checkpointing": True}], keep=2),
    ids=str,
)
@pytest.mark.parametrize("fixed_shapes", [False, True] if DEVICE.type == "cpu" else [True])
@pytest.mark.parametrize("counted", first([False, True]))
def test_with_dropout_too_every_clients_adapter_is_the_references(
    shape: str, changes: dict[str, Any], fixed_shapes: bool, counted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # OPT and GPT-2 have dropout of their own, GPT-2 on its attention too; an adapter on the head sees rows of its own.
    monkeypatch.setattr(batched, "ClientBatch", partial(batched.ClientBatch, fixed_shapes=fixed_shapes))
    attention = "sdpa" if counted else None
    adapted = make_adapted(shape, "float64", dropout=0.4, targets="all-linear", attention=attention)
    start, jobs = start_from(adapted), make_jobs((8, 5, 11, 1))
    if counted:
        jobs = [replace(job, blocks=count_padding(job.blocks)) for job in jobs]
    theirs = train(ReferenceEngine, adapted, start, jobs, **changes)
    assert_agree(train(BatchedEngine, adapted, start, jobs, clients_at_once=3, **changes), theirs, start, "float64")


@pytest.mark.parametrize("build", [BatchedEngine, ReferenceEngine])
def test_micro_batches_have_the_masks_of_one_batch(build: Any) -> None:
    adapted = make_adapted("tiny-gpt2", "float64", dropout=0.4)
    start, jobs = start_from(adapted), make_jobs((8, 5, 13))
    whole = train(build, adapted, start, jobs, batch_size=6)
    assert_agree(train(build, adapted, start, jobs, batch_size=2, gradient_accumulation=3), whole, start, "float64")


@pytest.mark.parametrize("beside", first([[0, 1, 2], [2, 0, 1]]))
def test_with_accumulation_and_dropout_a_client_is_the_same_alone_and_beside_others(beside: list[int]) -> None:
    adapted = make_adapted("tiny-gpt2", "float64", dropout=0.4)
    start, jobs = start_from(adapted), make_jobs((7, 5, 11))
    told = {"batch_size": 2, "gradient_accumulation": 3}
    alone = train(BatchedEngine, adapted, start, [jobs[0]], **told)[0].adapter
    together = train(BatchedEngine, adapted, start, [jobs[client] for client in beside], **told)[0].adapter
    assert (alone.weights_P - together.weights_P).norm() / (alone.weights_P - start.weights_P).norm() < 1e-9


@pytest.mark.parametrize("optimizer", ["adafactor", {"kind": "sgd", "momentum": 0.9}, "adamw"], ids=str)
@pytest.mark.parametrize("build", first([BatchedEngine, ReferenceEngine]))
def test_kept_state_goes_on_in_either_engine(optimizer: Any, build: Any) -> None:
    adapted = make_adapted(dtype="float64")
    start, jobs = start_from(adapted), make_jobs()
    told = {"optimizer": optimizer, "learning_rate": 1e-2}
    first = train(build, adapted, start, jobs, **told)
    kept = make_jobs(states={client: update.optimizer_state for client, update in first.items()})
    theirs = train(ReferenceEngine, adapted, start, kept, **told)
    assert_agree(train(BatchedEngine, adapted, start, kept, **told), theirs, start, "float64")
    fresh = train(ReferenceEngine, adapted, start, jobs, **told)
    assert fresh[0].adapter.sha256() != theirs[0].adapter.sha256()


@pytest.mark.parametrize("clients_at_once", first([2, 1, 3]))
def test_more_clients_than_fit_at_once(clients_at_once: int) -> None:
    adapted = make_adapted(dtype="float64")
    start, jobs = start_from(adapted), make_jobs((7, 1, 12, 2, 5))
    theirs = train(ReferenceEngine, adapted, start, jobs)
    ours = train(BatchedEngine, adapted, start, jobs, clients_at_once=clients_at_once)
    assert_agree(ours, theirs, start, "float64")


@pytest.mark.long
def test_kept_optimizer_state_moves_between_engines() -> None:
    adapted = make_adapted(dtype="float64")
    start, jobs = start_from(adapted), make_jobs()
    first = train(BatchedEngine, adapted, start, jobs)
    kept = make_jobs(states={client: update.optimizer_state for client, update in first.items()})
    theirs = train(ReferenceEngine, adapted, start, kept)
    assert_agree(train(BatchedEngine, adapted, start, kept), theirs, start, "float64")
    fresh = train(BatchedEngine, adapted, start, jobs)
    assert fresh[0].adapter.sha256() != theirs[0].adapter.sha256()


@pytest.mark.parametrize("targets", first([["lm_head"], "all-linear", ["q_proj", "lm_head", "down_proj"]]))
def test_any_layer_can_be_adapted(targets: Any) -> None:
    adapted = make_adapted(dtype="float64", targets=targets)
    start, jobs = start_from(adapted), make_jobs()
    theirs = train(ReferenceEngine, adapted, start, jobs)
    assert_agree(train(BatchedEngine, adapted, start, jobs), theirs, start, "float64")


@pytest.mark.parametrize("adapter", first([{"rslora": True, "rank": 4}, {"alpha": 64.0}]))
def test_the_scale_is_that_of_the_method(adapter: dict[str, Any]) -> None:
    adapted = make_adapted(dtype="float64", **adapter)
    start, jobs = start_from(adapted), make_jobs()
    theirs = train(ReferenceEngine, adapted, start, jobs)
    assert_agree(train(BatchedEngine, adapted, start, jobs), theirs, start, "float64")


# A recorded step has shapes that stay.
@pytest.mark.parametrize("fixed_shapes", [False, True] if DEVICE.type == "cpu" else [True])
def test_counted_padding_agrees(shape: str, fixed_shapes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched, "ClientBatch", partial(batched.ClientBatch, fixed_shapes=fixed_shapes))
    adapted = make_adapted(shape, "float64", attention="sdpa")
    switch_off_dropout(adapted)
    start, jobs = start_from(adapted), make_jobs((8, 5, 11, 1))
    # The last client has no padding of its own.
    jobs = [replace(job, blocks=count_padding(job.blocks)) for job in jobs]
    full_N = jobs[3].blocks.widths
    jobs[3] = replace(jobs[3], blocks=replace(jobs[3].blocks, lengths_N=full_N))
    theirs = train(ReferenceEngine, adapted, start, jobs, batch_size=3)
    ours = train(BatchedEngine, adapted, start, jobs, batch_size=3, clients_at_once=3)
    assert_agree(ours, theirs, start, "float64")
    checkpointed = train(BatchedEngine, adapted, start, jobs, batch_size=3, gradient_checkpointing=True)
    assert_agree(checkpointed, theirs, start, "float64")
    monkeypatch.setattr(TokenBlocks, "pad_counts", False)
    jobs = [replace(job, blocks=replace(job.blocks)) for job in jobs]  # which have not looked yet
    without = train(BatchedEngine, adapted, start, jobs, batch_size=3)
    assert without[0].report.loss_first != pytest.approx(theirs[0].report.loss_first, rel=1e-6)


@pytest.mark.parametrize("beside", first([[2, 0, 1, 3], [0, 1, 2], [0, 2]]))
@pytest.mark.parametrize("counted", first([False, True]))
def test_with_dropout_a_client_is_the_same_alone_and_beside_others(
    shape: str, beside: list[int], counted: bool
) -> None:
    # OPT and GPT-2 have dropout of their own, GPT-2 on its attention too; the clients' batches differ in width.
    adapted = make_adapted(shape, "float64", dropout=0.4, attention="sdpa" if counted else None)
    start, jobs = start_from(adapted), make_jobs((8, 5, 11, 3))
    if counted:
        jobs = [replace(job, blocks=count_padding(job.blocks)) for job in jobs]
    alone = train(BatchedEngine, adapted, start, [jobs[0]])[0].adapter
    together = train(BatchedEngine, adapted, start, [jobs[client] for client in beside])[0].adapter
    assert (alone.weights_P - together.weights_P).norm() / (alone.weights_P - start.weights_P).norm() < 1e-9


def test_dropout_is_there_and_each_clients_own(shape: str) -> None:
    adapted = make_adapted(shape, "float64", dropout=0.4)
    start = start_from(adapted)
    blocks = make_blocks(2)
    same_data = [make_job(blocks, NOWHERE, client=client) for client in range(3)]
    one_step = {"epochs": 1, "batch_size": 2}
    updates = train(BatchedEngine, adapted, start, same_data, **one_step)
    assert len({update.adapter.sha256() for update in updates.values()}) == 3
    switch_off_dropout(adapted)
    without = train(BatchedEngine, make_adapted(shape, "float64"), start, same_data, **one_step)
    assert updates[0].report.loss_first != without[0].report.loss_first


def explosive_state(adapted: AdaptedModel) -> dict[str, torch.Tensor]:
    """A client whose first step throws it far away: moments out of all proportion, as if it had diverged."""
    size = adapted.layout.size
    return {
        "step": torch.tensor(1.0),
        "exp_avg": torch.full((size,), 1.0, dtype=adapted.weights_P.dtype),
        "exp_avg_sq": torch.zeros(size, dtype=adapted.weights_P.dtype),
    }


def test_a_client_with_a_huge_loss_does_not_move_the_others_by_a_bit(shape: str) -> None:
    adapted = make_adapted(shape, "float64")  # in fewer bits its loss is none at all on a GPU
    start = start_from(adapted)
    calm = train(BatchedEngine, adapted, start, make_jobs())
    wild = train(BatchedEngine, adapted, start, make_jobs(states={0: None, 1: explosive_state(adapted), 2: None}))
    assert wild[1].report.drift > 30 * calm[1].report.drift
    for client in (0, 2):
        assert torch.equal(wild[client].adapter.weights_P, calm[client].adapter.weights_P)
        assert wild[client].report.loss_last == calm[client].report.loss_last


def test_a_leak_between_clients_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    # The same check on an engine with a deliberate mistake: the gradient of the mean over all clients.
    adapted = make_adapted(dtype="float64")
    start, jobs = start_from(adapted), make_jobs()
    theirs = train(ReferenceEngine, adapted, start, jobs)
    right = StackedStep._losses

    def pooled(self: StackedStep, inputs: StepInputs) -> torch.Tensor:
        loss_K = right(self, inputs)
        return loss_K.mean().expand(len(loss_K)) + 0 * loss_K

    monkeypatch.setattr(StackedStep, "_losses", pooled)
    wrong = train(BatchedEngine, adapted, start, jobs)
    with pytest.raises(AssertionError):
        assert_agree(wrong, theirs, start, "float64")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_with_a_frozen_a_only_b_is_trained(shape: str, dtype: str) -> None:
    adapted = make_adapted(shape, dtype, freeze_a=True)
    switch_off_dropout(adapted)
    assert all(".lora_B." in name for name in adapted.layout.names)
    frozen = {name: value.clone() for name, value in adapted.frozen.items()}
    start, jobs = start_from(adapted), make_jobs()
    theirs = train(ReferenceEngine, adapted, start, jobs)
    assert_agree(train(BatchedEngine, adapted, start, jobs), theirs, start, dtype)
    assert all(torch.equal(adapted.frozen[name], value) for name, value in frozen.items())


@pytest.mark.parametrize("changes", [{}, {"weight_decay": 0.3}, {"max_gradient_norm": 0.05, "proximal_mu": 5.0}])
@pytest.mark.parametrize("at_once", first([2, 3]))
def test_what_a_client_does_not_train_stays(changes: dict[str, Any], at_once: int) -> None:
    # One client trains B alone, as RoLoRA has it, one the lowest rank alone, as with ranks that differ, one everything.
    adapted = make_adapted(dtype="float64")
    start, jobs = start_from(adapted), make_jobs((7, 4, 12))
    layout = adapted.layout
    parts = [trained_part(layout, "rolora", 1), trained_part(layout, "svd", 1, rank=1), None]
    jobs = [replace(job, trains_P=part) for job, part in zip(jobs, parts, strict=True)]
    theirs = train(ReferenceEngine, adapted, start, jobs, **changes)
    ours = train(BatchedEngine, adapted, start, jobs, clients_at_once=at_once, **changes)
    assert_agree(ours, theirs, start, "float64")
    for client, part_P in enumerate(parts[:2]):
        assert part_P is not None
        changed_P = ours[client].adapter.weights_P != start.weights_P
        assert not changed_P[~part_P].any()
        assert changed_P[part_P].float().mean() > 0.9


def test_a_residual_is_part_of_the_model(shape: str) -> None:
    adapted = make_adapted(shape, "float64", residuals=True)
    switch_off_dropout(adapted)
    plain = start_from(adapted)
    generator = torch.Generator().manual_seed(2)
    tensors = plain.layout.split(plain.weights_P)
    residual = Residual(
        {
            layer: (
                0.1 * torch.randn(len(tensors[b_name]), 4, generator=generator).double(),
                torch.randn(4, tensors[a_name].shape[1], generator=generator).double(),
            )
            for layer, (a_name, b_name) in lora_pairs(plain.layout.names).items()
        }
    )
    start, jobs = replace(plain, residual=residual), make_jobs()
    theirs = train(ReferenceEngine, adapted, start, jobs)
    assert_agree(train(BatchedEngine, adapted, start, jobs), theirs, start, "float64")
    without = train(BatchedEngine, adapted, plain, jobs)
    assert without[0].report.loss_first != pytest.approx(theirs[0].report.loss_first, rel=1e-6)


def test_runs_of_their_own_share_a_step() -> None:
    # As a sweep has it: another start, seed, μ, learning rate, schedule, batch size and number of epochs each.
    adapted = make_adapted(dtype="float64", dropout=0.3)
    first, second = start_from(adapted), adapted.read()
    settings: list[dict[str, Any]] = [
        {"proximal_mu": 0.0, "learning_rate": 3e-3},
        {"proximal_mu": 2.0, "epochs": 3, "schedule": "linear", "optimizer_state": "keep"},
        {"proximal_mu": 0.5, "batch_size": 4},
    ]
    jobs = [
        replace(make_job(make_blocks(5 + trial, seed=trial), start, round=2, trial=trial, **changes), seed=trial)
        for trial, (start, changes) in enumerate(zip([first, second, first], settings, strict=True))
    ]
    alone = {job.trial: next(updates_of(BatchedEngine(adapted).train([job]))) for job in jobs}
    together = {update.trial: update for update in updates_of(BatchedEngine(adapted).train(jobs))}
    for job in jobs:
        assert_agree({0: together[job.trial]}, {0: alone[job.trial]}, job.adapter, "float64")


@pytest.mark.parametrize("dropout", first([0.4, 0.0]))
@pytest.mark.parametrize("build", [BatchedEngine, ReferenceEngine])
def test_checkpointed_gradients_are_the_same(shape: str, build: Any, dropout: float) -> None:
    adapted = make_adapted(shape, "float64", dropout=dropout)
    start, jobs = start_from(adapted), make_jobs()
    plain = train(build, adapted, start, jobs)
    checkpointed = train(build, adapted, start, jobs, gradient_checkpointing=True)
    for client in plain:
        difference = (plain[client].adapter.weights_P - checkpointed[client].adapter.weights_P).norm()
        assert difference < 1e-12 * plain[client].report.drift


def test_padding_to_fixed_shapes_changes_nothing(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a GPU is given, whose recorded steps need shapes that stay: here the same arithmetic on the processor.
    adapted = make_adapted(shape, "float64")
    switch_off_dropout(adapted)
    start, jobs = start_from(adapted), make_jobs((8, 5, 11, 1))
    theirs = train(ReferenceEngine, adapted, start, jobs, batch_size=3)
    fix_shapes(monkeypatch)
    monkeypatch.setattr(stretches, "STRETCH", 5)
    ours = train(BatchedEngine, adapted, start, jobs, batch_size=3, clients_at_once=2)
    assert_agree(ours, theirs, start, "float64")


@pytest.mark.parametrize("packed", [False, True])
def test_with_fixed_shapes_logits_are_made_for_what_counts(
    shape: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = make_adapted(shape, "float64")
    switch_off_dropout(adapted)
    start, jobs = start_from(adapted), make_jobs((8, 5, 11, 1))
    jobs = [replace(job, blocks=count_answers(job.blocks)) for job in jobs]
    if packed:
        jobs = [replace(job, blocks=pack_blocks(job.blocks)) for job in jobs]
    theirs = train(ReferenceEngine, adapted, start, jobs, batch_size=3)
    fix_shapes(monkeypatch)
    monkeypatch.setattr(client_slots, "WIDTHS", 1)
    made, losses = [], adapted.loss_head.losses

    def watch(tokens_NT: torch.Tensor, rows_M: torch.Tensor, *others: Any) -> torch.Tensor:
        made.append((tokens_NT.numel(), len(rows_M), len(rows_M.unique())))
        return losses(tokens_NT, rows_M, *others)

    monkeypatch.setattr(adapted.loss_head, "losses", watch)
    ours = train(BatchedEngine, adapted, start, jobs, batch_size=3, clients_at_once=2)
    assert_agree(ours, theirs, start, "float64")
    assert all(rows == different < 0.9 * positions for positions, rows, different in made)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("at_once", [2, 4])
@pytest.mark.parametrize("counted", [False, True])
def test_a_recorded_step_is_the_step(shape: str, dropout: float, at_once: int, counted: bool) -> None:
    # With two at once, slots are refilled while a recording goes on; clients of equal sizes, so that it does.
    adapted = make_adapted(shape, device="cuda", dropout=dropout, attention="sdpa" if counted else None)
    start, jobs = start_from(adapted), make_jobs((20, 20, 20, 13))
    if counted:
        jobs = [replace(job, blocks=count_padding(job.blocks)) for job in jobs]
    recorded = train(BatchedEngine, adapted, start, jobs, clients_at_once=at_once)
    launched = train(BatchedEngine, adapted, start, jobs, clients_at_once=at_once, cuda_graph=False)
    assert_agree(recorded, launched, start, "float32")


@pytest.mark.parametrize("build", [BatchedEngine, ReferenceEngine])
@pytest.mark.parametrize("at_once", first([2, 3]))
def test_a_client_that_fails_leaves_the_others_as_they_are(build: Any, at_once: int) -> None:
    adapted = make_adapted(dtype="float64")
    start, jobs = start_from(adapted), make_jobs()
    calm = train(build, adapted, start, jobs, clients_at_once=at_once)
    training = make_recipe(
        training={"epochs": 2, "proximal_mu": 0.1, "optimizer_state": "keep", "clients_at_once": at_once}
    ).training
    wild = training.model_copy(update={"learning_rate": 1e300})
    told = [replace(job, adapter=start, training=wild if job.client == 1 else training) for job in jobs]
    results = list(build(adapted).train(told))
    failures = [result for result in results if isinstance(result, ClientFailure)]
    assert [failure.client for failure in failures] == [1]
    assert "round 2, client 1" in str(failures[0].error)
    others = {result.report.client: result for result in results if isinstance(result, ClientUpdate)}
    assert_agree(others, {client: calm[client] for client in (0, 2)}, start, "float64")


@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize(
    ("optimizer", "rate"),
    first([("adamw", 1e25), ("sgd", LARGEST), ("sgd", 1e25), ("adafactor", 1e25), ("adamw", 1e20)], keep=2),
)
def test_a_client_that_overflows_fails_in_the_same_step_in_both_engines(
    optimizer: str, rate: float, fixed_shapes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Weights of 1e25, whose norm is infinite in float32, have a loss. AdamW goes on from them in two ways: torch.optim
    # makes NaN of a square that has overflown, the stacked one leaves the weights where they are.
    monkeypatch.setattr(batched, "ClientBatch", partial(batched.ClientBatch, fixed_shapes=fixed_shapes))
    adapted = make_adapted(dtype="float32")
    start, jobs = adapted.read(), make_jobs()
    training = make_recipe(training={"proximal_mu": 0.1, "epochs": 2, "optimizer": optimizer}).training
    wild = training.model_copy(update={"learning_rate": rate})
    told = [replace(job, adapter=start, training=wild if job.client == 1 else training) for job in jobs]
    ours, theirs = ({found.client: found for found in build(adapted).train(told)} for build in ENGINES.values())
    failed = [results[1] for results in (ours, theirs)]
    assert all(isinstance(result, ClientFailure) for result in failed)
    assert str(failed[0].error) == str(failed[1].error)  # type: ignore[union-attr]
    assert "step 2: the drift is inf" in str(failed[0].error)  # type: ignore[union-attr]


def test_a_diverging_client_is_named() -> None:
    adapted = make_adapted()
    with pytest.raises(TrainingError, match=r"round 2, client \d, step \d+: the (loss|drift) is (nan|inf)"):
        train(BatchedEngine, adapted, start_from(adapted), make_jobs(), learning_rate=1e30, optimizer="sgd")


def test_after_the_engine_the_model_is_pefts_again(shape: str) -> None:
    adapted = make_adapted(shape)
    start = start_from(adapted)
    tokens = make_blocks(2).tokens_NT.to(adapted.device)
    adapted.load(start)
    before = adapted.model.eval()(input_ids=tokens).logits
    train(BatchedEngine, adapted, start, make_jobs())
    assert torch.equal(adapted.model(input_ids=tokens).logits, before)
    assert not adapted.model.training
    assert torch.equal(adapted.read().weights_P, start.weights_P)


def test_updates_come_as_clients_finish() -> None:
    adapted = make_adapted()
    jobs = [replace(job, adapter=start_from(adapted)) for job in make_jobs((11, 3, 7))]
    order = [update.report.client for update in updates_of(BatchedEngine(adapted).train(jobs))]
    assert order == [1, 2, 0]
