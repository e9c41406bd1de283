"""The mean, its weights, and what it does not keep."""

from collections.abc import Iterator

import pytest
import torch
from support.tiny import make_update

from fedloom.adapters.adapter import Adapter, Layout
from fedloom.federation.aggregation import STRATEGIES, WEIGHTS, weighted_mean
from fedloom.recipe.sections import Strategy
from fedloom.training.jobs import ClientUpdate

LAYOUT = Layout(("a", "b"), (torch.Size([2, 3]), torch.Size([4])))
ZERO = Adapter(LAYOUT, torch.zeros(10))


def update_of(client: int, weights_P: torch.Tensor, examples: int = 1, tokens: int = 1) -> ClientUpdate:
    return make_update(Adapter(LAYOUT, weights_P), client, examples=examples, tokens=tokens)


def test_the_mean_is_weighted_by_examples_or_tokens() -> None:
    updates = [update_of(0, torch.zeros(10), 30, 100), update_of(1, torch.ones(10), 10, 300)]
    for weight_by, expected in (("examples", 0.25), ("tokens", 0.75)):
        aggregate = STRATEGIES["fedavg"](Strategy(weight_by=weight_by))
        _, adapter = aggregate.update(aggregate.init(updates[0].adapter), updates[0].adapter, iter(updates))
        assert adapter.weights_P.tolist() == pytest.approx([expected] * 10)
        assert adapter.layout == LAYOUT


def test_the_mean_equals_numpys_average() -> None:
    generator = torch.Generator().manual_seed(0)
    updates = [update_of(k, torch.randn(10, generator=generator), examples=k + 1) for k in range(5)]
    numpy = pytest.importorskip("numpy")
    expected = numpy.average([u.adapter.weights_P.double().numpy() for u in updates], axis=0, weights=[1, 2, 3, 4, 5])
    mean = weighted_mean(ZERO, updates, WEIGHTS["examples"])
    torch.testing.assert_close(mean.weights_P.double(), torch.from_numpy(expected), rtol=1e-7, atol=1e-7)
    assert mean.weights_P.dtype == torch.float32


def test_equal_updates_are_their_own_mean_to_the_bit() -> None:
    weights_P = torch.randn(10, generator=torch.Generator().manual_seed(1))
    updates = [update_of(k, weights_P.clone(), examples=k + 3) for k in range(7)]
    assert torch.equal(weighted_mean(ZERO, updates, WEIGHTS["examples"]).weights_P, weights_P)


def test_the_order_of_arrival_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(2)
    updates = [update_of(k, torch.randn(10, generator=generator), examples=k + 3) for k in range(7)]
    forwards, backwards = (weighted_mean(ZERO, u, WEIGHTS["examples"]) for u in (updates, updates[::-1]))
    assert torch.equal(forwards.weights_P, backwards.weights_P)


def test_updates_are_consumed_as_they_arrive() -> None:
    import weakref

    alive: list[weakref.ref[Adapter]] = []

    def arriving() -> Iterator[ClientUpdate]:
        for client in range(50):
            update = update_of(client, torch.full((10,), float(client)))
            alive.append(weakref.ref(update.adapter))
            assert sum(ref() is not None for ref in alive) <= 2
            yield update

    assert weighted_mean(ZERO, arriving(), WEIGHTS["examples"]).weights_P[0] == pytest.approx(24.5)
