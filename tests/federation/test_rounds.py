"""The round loop over real clients, and over a scripted fleet."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import pytest
import torch
from support.tiny import make_adapted, make_blocks, make_job, make_recipe, make_scorer, make_update, run_of

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.data.tokens import ClientBlocks, TokenBlocks
from fedloom.evaluation.held_out import Score, evaluate
from fedloom.federation.aggregation import STRATEGIES
from fedloom.federation.fleet import LocalFleet
from fedloom.federation.lora_rules import LORA_RULES
from fedloom.federation.rounds import RoundResult, run_rounds
from fedloom.federation.schedule import cohort_size, sample_clients
from fedloom.recipe.sections import Federation, Strategy
from fedloom.records.writer import round_record
from fedloom.training.jobs import ClientFailure, ClientTask, ClientUpdate
from fedloom.training.reference import ReferenceEngine, train_client

FEDAVG = STRATEGIES["fedavg"](Strategy())


def federate(
    adapted: AdaptedModel,
    start: Adapter,
    data: Sequence[TokenBlocks],
    *,
    rounds: int = 3,
    fraction: float = 1.0,
    holdout: TokenBlocks | None = None,
    federation: dict[str, Any] | None = None,
    **training: Any,
) -> list[RoundResult]:
    recipe = make_recipe(
        training={"epochs": 2, "proximal_mu": 0.0, **training},
        federation={"rounds": rounds, "fraction": fraction, **(federation or {})},
    )
    engine = ReferenceEngine(adapted).train
    score = partial(evaluate, adapted, batch_size=4)
    held_out = holdout or make_blocks(0)
    fleet = LocalFleet([ClientBlocks(blocks, held_out) for blocks in data], engine, make_scorer(adapted))
    central = make_blocks(6, seed=99)
    aggregate = LORA_RULES[recipe.federation.lora_rule](recipe.federation)
    return list(run_rounds(run_of(recipe, fleet, aggregate, lambda a: score(a, central), start), fleet))


def test_one_client_federated_equals_plain_training_to_the_bit() -> None:
    adapted, blocks = make_adapted(), make_blocks()
    start = adapted.read()
    kept = {"schedule": "cosine", "schedule_scope": "run", "optimizer_state": "keep"}
    federated = federate(adapted, start, [blocks], **kept)[-1].adapter

    adapter, state = start, None
    for round in (1, 2, 3):
        update = train_client(adapted, make_job(blocks, adapter, round=round, state=state, **kept))
        adapter, state = update.adapter, update.optimizer_state
    assert federated.sha256() == adapter.sha256()
    reset = federate(adapted, start, [blocks], **{**kept, "optimizer_state": "reset"})[-1].adapter
    assert federated.sha256() != reset.sha256()


def test_identical_clients_equal_one(shape: str) -> None:
    adapted, blocks = make_adapted(shape), make_blocks()
    start = adapted.read()
    # One batch a client, so that their orders of their own do not matter; the model's dropout would.
    for module in adapted.model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    whole = {"batch_size": 8, "epochs": 1, "proximal_mu": 0.1}
    one = federate(adapted, start, [blocks], **whole)[-1].adapter
    three = federate(adapted, start, [blocks] * 3, **whole)[-1].adapter
    difference = (one.weights_P - three.weights_P).norm() / (one.weights_P - start.weights_P).norm()
    assert difference < 1e-3


def test_without_mu_it_is_federated_averaging_to_the_bit() -> None:
    adapted, data = make_adapted(), [make_blocks(4 + 2 * k, seed=k) for k in range(3)]
    start = adapted.read()
    ours = federate(adapted, start, data, rounds=1, proximal_mu=0.0)[-1].adapter

    # FedAvg as its paper has it: plain local training without any proximal code, then the mean by examples.
    from fedloom.data.tokens import take_batch

    sum_P, total = torch.zeros(start.layout.size, dtype=torch.float64), 0
    for client, blocks in enumerate(data):
        adapted.load(start)
        adapted.model.train()
        trained = [weight for weight in adapted.model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
        for rows in make_job(blocks, start, client=client).draw_batches():
            batch = take_batch(blocks, rows)
            optimizer.zero_grad(set_to_none=False)
            logits = adapted.model(input_ids=batch.tokens_BT, use_cache=False).logits
            targets = torch.nn.functional.pad(batch.labels_BT[:, 1:], (0, 1), value=-100)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            (loss / (targets != -100).sum()).backward()
            optimizer.step()
        sum_P += len(blocks) * adapted.read().weights_P.double()
        total += len(blocks)
    assert torch.equal(ours.weights_P, (sum_P / total).float())
    assert not torch.equal(
        ours.weights_P, federate(adapted, start, data, rounds=1, proximal_mu=0.5)[-1].adapter.weights_P
    )


def test_round_0_is_evaluated_before_any_training_and_the_loss_falls() -> None:
    adapted, data = make_adapted(), [make_blocks(8, seed=k) for k in range(3)]
    start = adapted.read()
    results = federate(adapted, start, data, holdout=make_blocks(3, seed=50))
    assert [result.round for result in results] == [0, 1, 2, 3]
    assert results[0].adapter is start
    assert results[0].reports == ()
    assert results[0].bytes_up == results[0].bytes_down == 0
    losses = [result.central.loss for result in results if result.central]
    assert losses == sorted(losses, reverse=True)
    for result in results[1:]:
        assert [report.client for report in result.reports] == [0, 1, 2]
        assert result.bytes_up == result.bytes_down == 3 * start.num_bytes


def test_hold_out_losses_before_training_are_those_of_the_global_adapter() -> None:
    adapted, data = make_adapted(), [make_blocks(8, seed=k) for k in range(2)]
    results = federate(adapted, adapted.read(), data, holdout=make_blocks(3, seed=50))
    for before, after in pairwise(results):
        for report in after.reports:
            assert report.holdout_loss_before == before.clients[report.client].loss
            assert report.holdout_loss_after not in (None, report.holdout_loss_before)
    assert results[1].reports[0].holdout_loss_after < results[1].reports[0].holdout_loss_before


def test_only_the_sampled_clients_train() -> None:
    adapted, data = make_adapted(), [make_blocks(4, seed=k) for k in range(4)]
    results = federate(adapted, adapted.read(), data, fraction=0.5)
    cohorts = [result.cohort for result in results[1:]]
    assert all(len(cohort) == 2 for cohort in cohorts)
    assert all(tuple(r.client for r in result.reports) == result.cohort for result in results)
    assert len(set(cohorts)) > 1


class ScriptedFleet:
    """Clients that answer with weights of the test's choosing, in an order of the test's choosing."""

    clients: Sequence[int] = range(3)
    away: Mapping[int, float] = MappingProxyType({})

    def __init__(self, adapter: Adapter, order: Sequence[int]) -> None:
        self.adapter, self.order = adapter, order
        self.received: list[Adapter] = []

    def train(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate]:
        round, adapter = tasks[0].round, tasks[0].adapter
        self.received.append(adapter)
        for client in self.order:
            weights_P = torch.full_like(adapter.weights_P, 10.0 * round + client)
            yield make_update(Adapter(adapter.layout, weights_P), client, round=round)

    def evaluate(self, adapter: Adapter) -> dict[int, Score]:
        return {0: Score(1.0, 0, 1)}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1,)])
def test_each_round_starts_from_the_mean_of_the_last(order: tuple[int, ...]) -> None:
    start = make_adapted().read()
    fleet = ScriptedFleet(start, order)
    results = list(run_rounds(run_of(make_recipe(), fleet, FEDAVG, lambda adapter: None, start), fleet))
    mean = sum(order) / len(order)
    assert [float(result.adapter.weights_P[0]) for result in results[1:]] == pytest.approx([10 + mean, 20 + mean])
    assert fleet.received == [start, results[1].adapter]
    assert [report.client for report in results[1].reports] == sorted(order)


def test_what_a_round_waited_for_is_on_record_where_it_did_and_nowhere_else() -> None:
    class Leaves(ScriptedFleet):
        def train(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate]:
            self.away = {2: 3.5} if tasks[0].round == 1 else {}
            return super().train(tasks)

    fleet = Leaves(start := make_adapted().read(), (0, 1, 2))
    run = run_of(make_recipe(), fleet, FEDAVG, lambda adapter: None, start)
    records = [round_record(result) for result in run_rounds(run, fleet)]
    assert [record.get("away") for record in records] == [None, {"2": 3.5}, None]


def test_sampling_is_drawn_for_the_round() -> None:
    section = Federation(fraction=0.1)
    drawn = [sample_clients(range(100), section, seed=1, round=round) for round in range(1, 21)]
    assert all(len(set(clients)) == 10 and clients == sorted(clients) for clients in drawn)
    assert drawn == [sample_clients(range(100), section, seed=1, round=round) for round in range(1, 21)]
    assert len({tuple(clients) for clients in drawn}) == 20
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=100)
    assert counts.max() < 10, "no client is drawn again and again"


@pytest.mark.parametrize(
    ("clients", "fraction", "least", "size"),
    [(3, 1.0, 1, 3), (3, 0.5, 1, 2), (3, 0.01, 1, 1), (10, 0.25, 1, 3), (10, 0.1, 4, 4), (3, 0.1, 5, 3)],
)
def test_cohort_size(clients: int, fraction: float, least: int, size: int) -> None:
    assert cohort_size(clients, Federation(fraction=fraction, min_clients=least)) == size


def test_a_client_whose_optimizer_came_to_no_number_is_lost_and_begins_afresh() -> None:
    """What it kept would have spoiled its next round, and lay in the run's state meanwhile."""
    adapted = make_adapted()
    fleet = LocalFleet([ClientBlocks(make_blocks(2), make_blocks(2))], lambda jobs: iter(()), make_scorer(adapted))
    good = replace(make_update(adapted.read(), 0), optimizer_state={"exp_avg": torch.ones(3)})
    bad = replace(good, optimizer_state={"exp_avg": torch.tensor([1.0, math.nan, 1.0])})
    assert fleet.finish([good]) == [good]
    (lost,) = fleet.finish([bad])
    assert isinstance(lost, ClientFailure)
    assert "round 1, client 0" in str(lost.error)
    assert "the optimizer's exp_avg is not finite" in str(lost.error)
    assert fleet.optimizer_states == {}
