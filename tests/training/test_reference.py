"""One client's work against plain training, and FedProx against what it must do at its limits."""

import math
from typing import Any

import pytest
import torch
from support.tiny import make_adapted, make_blocks, make_job, switch_off_dropout, updates_of
from torch.nn import functional

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter, Layout
from fedloom.data.tokens import IGNORED, TokenBlocks
from fedloom.errors import TrainingError
from fedloom.seeds import derive_seed
from fedloom.training.jobs import ClientUpdate, OptimizerState
from fedloom.training.reference import ReferenceEngine, train_client

NOTHING = Adapter(Layout((), ()), torch.empty(0))


def train(
    adapted: AdaptedModel,
    adapter: Adapter,
    blocks: TokenBlocks,
    *,
    round: int = 1,
    client: int = 0,
    rounds: int = 3,
    state: OptimizerState | None = None,
    **training: Any,
) -> ClientUpdate:
    job = make_job(blocks, adapter, round=round, client=client, rounds=rounds, state=state, **training)
    return train_client(adapted, job)


def plain_training(
    adapted: AdaptedModel, adapter: Adapter, blocks: TokenBlocks, *, rounds: int, mu: float = 0.0
) -> Adapter:
    """What a user would write without fedloom: PEFT's model, its own parameters, torch.optim, a loop."""
    adapted.load(adapter)
    model = adapted.model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    start = [weight.detach().clone() for weight in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    batches = [rows for round in range(1, rounds + 1) for rows in make_job(blocks, adapter, round=round).draw_batches()]
    for step, rows in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / len(batches))
        optimizer.zero_grad(set_to_none=False)
        tokens = blocks.tokens_NT[rows].to(adapted.device)
        padding = torch.arange(tokens.shape[1]) >= blocks.lengths_N[rows][:, None]
        labels = tokens.masked_fill(padding.to(adapted.device), IGNORED)
        logits = model(input_ids=tokens).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss = loss + 0.5 * mu * sum(((w - s) ** 2).sum() for w, s in zip(trained, start, strict=True))
        loss.backward()
        optimizer.step()
    return adapted.read()


def relative_difference(got: Adapter, expected: Adapter, start: Adapter) -> float:
    """The difference against the norm of the update."""
    return float((got.weights_P - expected.weights_P).norm() / (expected.weights_P - start.weights_P).norm())


@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_a_round_equals_plain_training_on_the_same_objective(shape: str, mu: float) -> None:
    adapted, blocks = make_adapted(shape, "float64"), make_blocks()
    # The model's own dropout draws from a stream of its own: off, so that both see the same model.
    for module in adapted.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    adapted.model.config.dropout = adapted.model.config.attention_dropout = 0.0
    for module in adapted.model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    start = adapted.read()
    expected = plain_training(adapted, start, blocks, rounds=1, mu=mu)
    got = train(adapted, start, blocks, rounds=1, schedule="linear", proximal_mu=mu).adapter
    assert relative_difference(got, expected, start) < 1e-9
    assert not torch.equal(got.weights_P, start.weights_P)


def test_rounds_with_kept_state_and_a_schedule_over_the_run_equal_plain_training() -> None:
    adapted, blocks = make_adapted(dtype="float64"), make_blocks()
    start = adapted.read()
    expected = plain_training(adapted, start, blocks, rounds=3)
    adapter, state = start, None
    kept = {"schedule": "linear", "schedule_scope": "run", "optimizer_state": "keep"}
    for round in (1, 2, 3):
        update = train(adapted, adapter, blocks, round=round, state=state, **kept)
        adapter, state = update.adapter, update.optimizer_state
    assert relative_difference(adapter, expected, start) < 1e-9


@pytest.mark.long
def test_a_large_mu_returns_the_global_weights() -> None:
    adapted, blocks = make_adapted(), make_blocks()
    start = adapted.read()
    drifts = [
        train(adapted, start, blocks, proximal_mu=mu, optimizer="sgd", learning_rate=1e-4, epochs=20).report.drift
        for mu in (0.0, 10.0, 1000.0, 10_000.0)
    ]
    assert drifts == sorted(drifts, reverse=True)
    # With lr·μ = 1 each step starts with a return to the global weights: of 80 steps, one step's move is left.
    assert drifts[-1] < 0.05 * drifts[0]


def test_the_proximal_term_is_on_record_from_the_second_step() -> None:
    adapted, blocks = make_adapted(), make_blocks()
    start = adapted.read()
    report = train(adapted, start, blocks, proximal_mu=0.1).report
    assert report.proximal_loss > 0
    assert report.proximal_ratio > 0
    assert report.drift > 0
    assert report.drift == pytest.approx(float((adapted.read().weights_P - start.weights_P).norm()), rel=1e-5)
    without = train(adapted, start, blocks, proximal_mu=0.0).report
    assert without.proximal_loss == without.proximal_ratio == 0
    assert report.drift < without.drift


def test_the_proximal_term_holds_only_trained_weights() -> None:
    adapted, blocks = make_adapted(), make_blocks()
    frozen = {
        name: weight.detach().clone() for name, weight in adapted.model.named_parameters() if not weight.requires_grad
    }
    train(adapted, adapted.read(), blocks, proximal_mu=10.0)
    now = dict(adapted.model.named_parameters())
    assert all(torch.equal(now[name], weight) for name, weight in frozen.items())


def test_a_learning_rate_too_small_to_move_is_refused_with_a_proximal_term() -> None:
    adapted, blocks = make_adapted(), make_blocks()
    # From weights that are not zero: there a step of 1e-30 rounds away.
    start = Adapter(adapted.layout, torch.ones_like(adapted.read().weights_P))
    with pytest.raises(TrainingError, match="proximal term is zero"):
        train(adapted, start, blocks, proximal_mu=0.1, learning_rate=1e-30)


def test_training_is_repeatable_and_does_not_depend_on_who_trains_beside() -> None:
    adapted = make_adapted(dropout=0.3)
    start = adapted.read()
    engine = ReferenceEngine(adapted)
    jobs = [make_job(make_blocks(4 + client, seed=client), start, client=client) for client in range(3)]
    together = {update.report.client: update.adapter.sha256() for update in updates_of(engine.train(jobs))}
    alone = {job.client: next(updates_of(engine.train([job]))).adapter.sha256() for job in reversed(jobs)}
    assert together == alone
    assert len(set(together.values())) == 3


def test_dropout_is_drawn_for_the_round_and_the_client() -> None:
    adapted, blocks = make_adapted(dropout=0.5), make_blocks(2)
    start = adapted.read()
    one_step = {"epochs": 1, "batch_size": 2}
    first, again = (train(adapted, start, blocks, **one_step) for _ in range(2))
    other = train(adapted, start, blocks, client=1, **one_step)
    assert first.adapter.sha256() == again.adapter.sha256()
    assert first.adapter.sha256() != other.adapter.sha256()
    assert torch.is_grad_enabled()
    assert not adapted.model.training


def test_training_leaves_the_global_random_state_alone() -> None:
    adapted, blocks = make_adapted(dropout=0.5), make_blocks()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    train(adapted, adapted.read(), blocks)
    assert torch.equal(torch.rand(4), expected)


def test_a_diverging_client_stops_with_round_client_and_step() -> None:
    adapted, blocks = make_adapted(), make_blocks()
    with pytest.raises(TrainingError, match=r"round 2, client 4, step \d+: the (loss|drift) is (nan|inf)"):
        train(adapted, adapted.read(), blocks, round=2, client=4, learning_rate=1e30, optimizer="sgd")


def test_losses_on_record() -> None:
    adapted, blocks = make_adapted(), make_blocks(6)
    report = train(adapted, adapted.read(), blocks, epochs=4).report
    assert report.steps == 12
    assert report.examples == 6
    assert report.tokens == 4 * blocks.num_tokens
    assert report.loss_first == pytest.approx(math.log(260), rel=0.1)
    assert report.loss_last < report.loss_mean < report.loss_first


def test_every_epoch_visits_each_block_once_in_another_order() -> None:
    job = make_job(make_blocks(7), make_adapted().read(), batch_size=3)
    batches = job.draw_batches()
    assert [len(rows) for rows in batches] == [3, 3, 1, 3, 3, 1]
    epochs = torch.cat(batches[:3]).tolist(), torch.cat(batches[3:]).tolist()
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(7))
    assert epochs[0] != epochs[1]
    assert [r.tolist() for r in batches] == [r.tolist() for r in job.draw_batches()]


def test_seeds_differ_by_purpose_round_and_client() -> None:
    seeds = {derive_seed(*key) for key in [(1, "a"), (1, "b"), (2, "a"), (1, "a", 1), (1, "a", 0, 1), (1, "a", 1, 1)]}
    assert len(seeds) == 6


@pytest.mark.parametrize(("blocks", "size", "most"), [(12, 3, 2), (11, 2, 4), (7, 3, 1), (5, 2, 2), (40, 4, 7)])
def test_rounds_of_few_steps_walk_through_all_rows_before_one_comes_again(blocks: int, size: int, most: int) -> None:
    held = make_blocks(blocks)
    settings = {"max_steps": most, "batch_size": size}
    jobs = [make_job(held, NOTHING, round=round, **settings) for round in range(1, 25)]
    drawn = [job.draw_batches() for job in jobs]
    assert all(len(batches) == most for batches in drawn)
    walked = [batch for batches in drawn for batch in batches]
    in_a_pass = -(-blocks // size)
    passes = [torch.cat(walked[start : start + in_a_pass]) for start in range(0, len(walked), in_a_pass)]
    for rows in passes[:-1]:
        assert sorted(rows.tolist()) == list(range(blocks))
    assert len({tuple(rows.tolist()) for rows in passes[:-1]}) > 1, "each pass has an order of its own"
    assert len(set(passes[-1].tolist())) == len(passes[-1])
    # Nothing but the seed, the round and the client is asked, and another client walks elsewhere.
    assert [rows.tolist() for rows in drawn[6]] == [rows.tolist() for rows in jobs[6].draw_batches()]
    other = make_job(held, NOTHING, round=7, client=1, **settings).draw_batches()
    assert [rows.tolist() for rows in other] != [rows.tolist() for rows in drawn[6]]


def test_the_epochs_bound_the_steps_of_a_small_client() -> None:
    few = make_job(make_blocks(3), NOTHING, max_steps=9, batch_size=2, epochs=2)
    assert [len(rows) for rows in few.draw_batches()] == [2, 1, 2, 1]


@pytest.mark.parametrize("scope", ["round", "run"])
def test_rounds_of_few_steps_with_kept_state_are_one_round_of_all_steps(scope: str) -> None:
    adapted, blocks = make_adapted(), make_blocks(11)
    switch_off_dropout(adapted)
    start = adapted.read()
    schedule = "linear" if scope == "run" else "constant"
    settings = {"batch_size": 2, "optimizer_state": "keep", "schedule": schedule, "schedule_scope": scope,
                "warmup": 3 if scope == "run" else 0, "weight_decay": 0.1}  # fmt: skip
    whole = train(adapted, start, blocks, rounds=1, max_steps=16, epochs=9, **settings)
    adapter, state = start, None
    for round in range(1, 5):
        part = train(adapted, adapter, blocks, round=round, rounds=4, state=state, max_steps=4, epochs=9, **settings)
        adapter, state = Adapter(start.layout, part.adapter.weights_P.clone()), part.optimizer_state
    assert torch.equal(adapter.weights_P, whole.adapter.weights_P)
    assert not torch.equal(adapter.weights_P, start.weights_P)


def test_a_warm_up_whose_first_step_moves_nothing_is_no_missing_proximal_term() -> None:
    adapted = make_adapted()
    update = train(adapted, adapted.read(), make_blocks(4), batch_size=2, epochs=1, warmup=2, proximal_mu=0.1)
    assert update.report.steps == 2
    assert update.report.proximal_loss == 0
