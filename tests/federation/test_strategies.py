"""Every strategy against Flower's own of that name, on the same updates; and what they refuse."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from support.marks import first
from support.tiny import make_recipe, make_update

from fedloom import run
from fedloom.adapters.adapter import Adapter, Layout
from fedloom.errors import RecipeError
from fedloom.experiment.run import plan
from fedloom.federation.aggregation import STRATEGIES
from fedloom.federation.strategies import check_strategy
from fedloom.monitoring.observer import Observer
from fedloom.recipe.loading import load_recipe
from fedloom.recipe.sections import STRATEGY_DEFAULTS, Strategy
from fedloom.training.jobs import ClientUpdate

SHAPES = (torch.Size([3, 4]), torch.Size([5]))
LAYOUT = Layout(("a", "b"), SHAPES)
ROUNDS, CLIENTS = 4, 7


def update_of(client: int, weights_P: torch.Tensor, examples: int) -> ClientUpdate:
    return make_update(Adapter(LAYOUT, weights_P), client, examples=examples)


def start() -> Adapter:
    return Adapter(LAYOUT, torch.randn(17, generator=torch.Generator().manual_seed(0)).double())


def draw_updates(round: int, adapter: Adapter) -> list[ClientUpdate]:
    """The same change of every client whatever the strategy made of the last round."""
    generator = torch.Generator().manual_seed(round)
    return [
        update_of(k, adapter.weights_P + 0.1 * torch.randn(17, generator=generator).double(), examples=3 * k + 1)
        for k in range(CLIENTS)
    ]


def ours(strategy: Strategy) -> list[torch.Tensor]:
    aggregate, adapter = STRATEGIES[strategy.kind](strategy), start()
    state, seen = aggregate.init(adapter), []
    for round in range(1, ROUNDS + 1):
        state, adapter = aggregate.update(state, adapter, iter(draw_updates(round, adapter)))
        seen.append(adapter.weights_P)
    return seen


def theirs(build: Callable[[Any], Any]) -> list[torch.Tensor]:
    """Flower's strategy over the same rounds; it is told the same updates as arrays."""
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays

    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    adapter, seen = start(), []
    strategy = build(ndarrays_to_parameters([view.numpy() for view in LAYOUT.split(adapter.weights_P).values()]))
    for round in range(1, ROUNDS + 1):
        results: Any = [
            (
                None,
                FitRes(
                    Status(Code.OK, ""),
                    ndarrays_to_parameters([v.numpy() for v in LAYOUT.split(update.adapter.weights_P).values()]),
                    update.report.examples,
                    {},
                ),
            )
            for update in draw_updates(round, adapter)
        ]
        parameters, _ = strategy.aggregate_fit(round, results, [])
        arrays = parameters_to_ndarrays(parameters)
        adapter = Adapter(LAYOUT, torch.from_numpy(np.concatenate([array.ravel() for array in arrays])))
        seen.append(adapter.weights_P)
    return seen


def flower(name: str, **settings: Any) -> Callable[[Any], Any]:
    import flwr.server.strategy as strategies

    return lambda initial: getattr(strategies, name)(initial_parameters=initial, **settings)


CASES: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"kind": "fedavg"}, "FedAvg", {}),
    ({"kind": "fedavgm", "momentum": 0.0}, "FedAvgM", {"server_learning_rate": 1.0}),
    ({"kind": "fedavgm", "learning_rate": 0.5}, "FedAvgM", {"server_learning_rate": 0.5, "server_momentum": 0.9}),
    ({"kind": "fedadam"}, "FedAdam", {"eta": 0.1, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-9}),
    ({"kind": "fedadam", "learning_rate": 0.01, "tau": 0.1}, "FedAdam", {"eta": 0.01, "tau": 0.1}),
    ({"kind": "fedyogi"}, "FedYogi", {"eta": 0.01, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3}),
    ({"kind": "fedadagrad"}, "FedAdagrad", {"eta": 0.1, "tau": 1e-9}),
    ({"kind": "fedmedian"}, "FedMedian", {}),
    ({"kind": "trimmed_mean"}, "FedTrimmedAvg", {"beta": 0.2}),
    ({"kind": "trimmed_mean", "trim": 0.45}, "FedTrimmedAvg", {"beta": 0.45}),
    ({"kind": "krum"}, "Krum", {}),
    ({"kind": "krum", "malicious": 2}, "Krum", {"num_malicious_clients": 2}),
    ({"kind": "multi_krum", "malicious": 1, "keep": 3}, "Krum", {"num_malicious_clients": 1, "num_clients_to_keep": 3}),
    ({"kind": "bulyan", "malicious": 1}, "Bulyan", {"num_malicious_clients": 1, "to_keep": 0}),
]


@pytest.mark.parametrize(("settings", "name", "of_theirs"), CASES, ids=lambda value: str(value))
def test_it_is_flowers(settings: dict[str, Any], name: str, of_theirs: dict[str, Any]) -> None:
    # Momentum needs to be told the weights that it moves, which FedAvg does not.
    found, expected = ours(Strategy(**settings)), theirs(flower(name, **of_theirs))
    for our, their in zip(found, expected, strict=True):
        torch.testing.assert_close(our, their.double(), rtol=1e-9, atol=1e-12)
    assert not torch.equal(found[0], start().weights_P)


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_is_torchs(nesterov: bool) -> None:
    found = ours(Strategy(kind="fedavgm", learning_rate=0.3, momentum=0.8, nesterov=nesterov))
    weights_P = torch.nn.Parameter(start().weights_P.clone())
    sgd = torch.optim.SGD([weights_P], lr=0.3, momentum=0.8, nesterov=nesterov)
    for round in range(1, ROUNDS + 1):
        updates = draw_updates(round, Adapter(LAYOUT, weights_P.detach().clone()))
        total = sum(update.report.examples for update in updates)
        mean_P = sum(update.report.examples / total * update.adapter.weights_P for update in updates)
        weights_P.grad = weights_P.detach() - mean_P
        sgd.step()
        torch.testing.assert_close(found[round - 1], weights_P.detach(), rtol=1e-9, atol=1e-12)


def test_a_huge_update_moves_the_clipped_mean_by_no_more_than_its_share() -> None:
    adapter = start()
    updates = draw_updates(1, adapter)
    updates[3] = update_of(3, adapter.weights_P + 1e6, updates[3].report.examples)
    aggregate = STRATEGIES["norm_clipped"](Strategy(kind="norm_clipped", max_norm=0.2))
    _, found = aggregate.update(None, adapter, iter(updates))
    assert float((found.weights_P - adapter.weights_P).norm()) <= 0.2 + 1e-9
    loose = STRATEGIES["norm_clipped"](Strategy(kind="norm_clipped", max_norm=1e9))
    _, same = loose.update(None, adapter, iter(draw_updates(1, adapter)))
    torch.testing.assert_close(same.weights_P, ours(Strategy())[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["fedmedian", "trimmed_mean", "krum", "multi_krum", "bulyan"])
def test_robust_rules_are_not_moved_by_one_liar(kind: str) -> None:
    adapter = start()
    honest = draw_updates(1, adapter)
    lied = [*honest[:-1], update_of(CLIENTS - 1, torch.full((17,), 1e9, dtype=torch.float64), 1000)]
    malicious = {"malicious": 1} if "malicious" in STRATEGY_DEFAULTS[kind] else {}
    aggregate = STRATEGIES[kind](Strategy(kind=kind, **malicious))
    _, found = aggregate.update(None, adapter, iter(lied))
    lowest, highest = (
        torch.stack([u.adapter.weights_P for u in honest[:-1]]).amin(0),
        torch.stack([u.adapter.weights_P for u in honest[:-1]]).amax(0),
    )
    assert bool(((found.weights_P >= lowest) & (found.weights_P <= highest)).all())
    _, mean = STRATEGIES["fedavg"](Strategy()).update(None, adapter, iter(lied))
    assert float(mean.weights_P.norm()) > 1e6, "which the mean is"


@pytest.mark.parametrize("kind", sorted(STRATEGIES))
def test_the_order_of_arrival_does_not_matter(kind: str) -> None:
    def final(order: Callable[[list[ClientUpdate]], Iterable[ClientUpdate]]) -> torch.Tensor:
        aggregate, adapter = STRATEGIES[kind](Strategy(kind=kind)), start()
        state = aggregate.init(adapter)
        for round in (1, 2):
            state, adapter = aggregate.update(state, adapter, iter(order(draw_updates(round, adapter))))
        return adapter.weights_P

    torch.testing.assert_close(final(lambda updates: updates), final(lambda u: u[::-1]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", first(sorted(STRATEGIES), keep=2))
def test_every_strategy_runs_from_a_recipe(kind: str, tmp_path: Any) -> None:
    recipe = make_recipe(data={"clients": 5}, federation={"rounds": 2, "strategy": {"kind": kind}})
    finished = run(recipe, tmp_path / "run", Observer())
    assert len({record["adapter_sha256"] for record in finished.rounds}) == 3


@pytest.mark.parametrize(
    ("strategy", "clients", "least"),
    [
        ({"kind": "krum", "malicious": 1}, 4, 5),
        ({"kind": "multi_krum", "keep": 5}, 4, 5),
        ({"kind": "bulyan", "malicious": 1}, 6, 7),
        ({"kind": "krum"}, 2, 3),
        ({"kind": "trimmed_mean"}, 4, 5),
        ({"kind": "trimmed_mean", "trim": 0.1}, 9, 10),
        ({"kind": "trimmed_mean", "trim": 0.3}, 3, 4),
        ({"kind": "trimmed_mean", "trim": 0.001}, 999, 1000),
        ({"kind": "trimmed_mean", "trim": 0.0}, 0, 1),
    ],
)
def test_too_few_clients_are_refused(strategy: dict[str, Any], clients: int, least: int) -> None:
    with pytest.raises(RecipeError, match=f"needs {least} clients in a round, and {clients} take part"):
        check_strategy(Strategy(**strategy), clients)
    check_strategy(Strategy(**strategy), least)


def test_too_few_clients_are_refused_before_anything_is_loaded() -> None:
    recipe = make_recipe(data={"source": "no/such/data"}, federation={"strategy": {"kind": "bulyan", "malicious": 1}})
    with pytest.raises(RecipeError, match="needs 7 clients"):
        plan(recipe)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("federation.strategy.momentum=0.5", 'kind "fedavg" does not use momentum'),
        ('federation.strategy={kind="krum", weight_by="tokens"}', "gives every client the same weight"),
        ('federation.strategy={kind="trimmed_mean", trim=0.5}', "less than 0.5"),
        ('federation.strategy={kind="fedavgmm"}', "fedavgm"),
    ],
)
def test_settings_that_make_no_sense_are_refused(override: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load_recipe("tiny", [override])
