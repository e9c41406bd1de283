"""Sums in a tree of servers: which rules come to the same in any groups, to the bit, to rounding, or not at all."""

import random
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from support.exact_sum import LIMB_BITS, ExactSum
from support.tiny import make_update
from torch import Tensor

from fedloom.adapters.adapter import Adapter, Layout
from fedloom.federation.aggregation import STRATEGIES, WEIGHTS, Aggregate, weighted_mean
from fedloom.federation.lora_rules import LORA_RULES
from fedloom.recipe.sections import STRATEGY_DEFAULTS, Strategy
from fedloom.training.jobs import ClientUpdate

P, CLIENTS = 4096, 12
ROBUST = ("fedmedian", "trimmed_mean", "krum", "multi_krum", "bulyan")
"""Rules that compare updates with each other, so that a node's one answer can't stand for its clients."""
LAYOUT = Layout(("w",), (torch.Size([P]),))


def draw(seed: int, clients: int = CLIENTS, spread: float = 1.0) -> list[tuple[Tensor, float]]:
    """Updates as training makes them, of weights that differ by much in size, and their clients' examples."""
    generator = torch.Generator().manual_seed(seed)
    sizes_P = 10.0 ** (spread * (6 * torch.rand(P, generator=generator) - 6))
    numbers = random.Random(seed)
    return [(torch.randn(P, generator=generator) * sizes_P, numbers.randint(1, 10**6)) for _ in range(clients)]


def grouped(seed: int, count: int, groups: int) -> list[list[int]]:
    """Any places in groups, in any order; none is empty."""
    places, numbers = list(range(count)), random.Random(seed)
    numbers.shuffle(places)
    cuts = sorted(numbers.sample(range(1, count), groups - 1))
    return [places[start:end] for start, end in zip([0, *cuts], [*cuts, count], strict=True)]


def exactly(updates: Sequence[tuple[Tensor, float]]) -> ExactSum:
    found = ExactSum(P)
    for weights_P, weight in updates:
        found.add(weights_P, weight)
    return found


def in_a_tree(updates: Sequence[tuple[Tensor, float]], seed: int, depth: int = 2) -> ExactSum:
    """What the root of a tree has that many levels of nodes below it, grouped anyhow."""
    if depth == 0 or len(updates) < 4:
        return exactly(updates)
    found = ExactSum(P)
    for group in grouped(seed, len(updates), 3):
        found.merge(in_a_tree([updates[place] for place in group], seed + 1, depth - 1))
    return found


def as_update(client: int, weights_P: Tensor, weight: float) -> ClientUpdate:
    return make_update(Adapter(LAYOUT, weights_P), client, examples=int(weight), tokens=int(weight))


@pytest.mark.parametrize("seed", range(8))
def test_a_weighted_mean_in_fixed_point_is_the_same_to_the_bit_in_any_tree(seed: int) -> None:
    updates = draw(seed)
    flat, tree = exactly(updates), in_a_tree(updates, seed)
    assert torch.equal(flat.limbs_LP, tree.limbs_LP)
    assert torch.equal(flat.mean(), tree.mean())


@pytest.mark.parametrize("seed", range(4))
def test_so_it_is_with_weights_that_are_no_whole_numbers(seed: int) -> None:
    """As where `federation.max_share` caps them: each update rounds once, by itself, before anything is added."""
    updates = [(weights_P, weight * 0.3) for weights_P, weight in draw(seed)]
    assert torch.equal(exactly(updates).limbs_LP, in_a_tree(updates, seed).limbs_LP)


def test_it_is_the_sum_that_fractions_come_to() -> None:
    """Of sizes from the least float32 to the largest that fit: nothing is lost."""
    weights_P = torch.tensor([2.0**-149, 1e-30, -1.5e-7, 3.3e-3, -(2.0**20) + 0.5])
    updates = [(weights_P.roll(place), 10**6 + place) for place in range(5)]
    found = ExactSum(5)
    for update, weight in updates:
        found.add(update, weight)
    for place in range(5):
        expected = sum(Fraction(float(update[place])) * int(weight) for update, weight in updates)
        limbs = [int(limb) for limb in found.limbs_LP[:, place]]
        assert sum(Fraction(limb, 2 ** (LIMB_BITS * number)) for number, limb in enumerate(limbs)) == expected


def test_equal_updates_are_their_own_mean() -> None:
    ((weights_P, _),) = draw(1, clients=1)
    assert torch.equal(exactly([(weights_P, number + 3) for number in range(7)]).mean(), weights_P)


def test_it_differs_from_the_mean_of_a_run_by_rounding_alone() -> None:
    updates = draw(3)
    plain = weighted_mean(
        Adapter(LAYOUT, torch.zeros(P)),
        [as_update(k, *update) for k, update in enumerate(updates)],
        WEIGHTS["examples"],
    )
    torch.testing.assert_close(exactly(updates).mean(), plain.weights_P, rtol=2**-23, atol=0)


def test_sums_in_float64_are_the_same_in_a_tree_to_rounding_and_not_to_the_bit() -> None:
    def total(updates: Sequence[tuple[Tensor, float]]) -> Tensor:
        found_P = torch.zeros(P, dtype=torch.float64)
        for weights_P, weight in updates:
            found_P.add_(weights_P, alpha=weight)
        return found_P

    updates = draw(0)
    flat_P = total(updates)
    tree_P = sum(total([updates[place] for place in group]) for group in grouped(0, CLIENTS, 3))
    assert isinstance(tree_P, Tensor)
    assert not torch.equal(flat_P, tree_P)
    scale_P = total([(weights_P.abs(), weight) for weights_P, weight in updates])
    assert float(((flat_P - tree_P).abs() / scale_P).max()) < CLIENTS * 2**-52


@pytest.mark.parametrize("kind", sorted(set(STRATEGIES) - set(ROBUST)))
def test_a_rule_that_is_a_function_of_the_mean_takes_a_nodes_sum_for_its_clients(kind: str) -> None:
    """A node tells the mean of its clients with their whole weight. `norm_clipped` clips each client's change first,
    which a node does for its own: here none is beyond the norm."""
    settings = {"max_norm": 1e9} if kind == "norm_clipped" else {}
    start = Adapter(LAYOUT, torch.zeros(P))
    updates = draw(5)
    nodes = []
    for number, group in enumerate(grouped(5, CLIENTS, 3)):
        part = exactly([updates[place] for place in group])
        nodes.append((number, part.mean(), part.total))

    def made(told: Sequence[tuple[int, Tensor, float]]) -> Tensor:
        strategy: Aggregate = STRATEGIES[kind](Strategy(kind=kind, **settings))
        return strategy.update(strategy.init(start), start, [as_update(*one) for one in told])[1].weights_P

    flat_P, tree_P = made([(k, *update) for k, update in enumerate(updates)]), made(nodes)
    # Means of nodes were rounded to float32 on their way.
    torch.testing.assert_close(tree_P, flat_P, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ROBUST)
def test_a_robust_rule_comes_to_something_else_in_a_tree(kind: str) -> None:
    """So a tree has to refuse it. Seven nodes of seven clients, as few as all of these rules take; one client lies."""
    settings = {"malicious": 1} if "malicious" in STRATEGY_DEFAULTS[kind] else {}
    settings |= {"keep": 2} if "keep" in STRATEGY_DEFAULTS[kind] else {}
    settings |= {"trim": 0.2} if "trim" in STRATEGY_DEFAULTS[kind] else {}
    strategy = STRATEGIES[kind](Strategy(kind=kind, **settings))
    start = Adapter(LAYOUT, torch.zeros(P))

    def rule(told: Sequence[Tensor]) -> Tensor:
        updates = [as_update(k, weights_P, 1) for k, weights_P in enumerate(told)]
        return strategy.update(strategy.init(start), start, updates)[1].weights_P

    honest = [torch.randn(P, generator=torch.Generator().manual_seed(seed)) for seed in range(48)]
    told = [*honest, torch.full((P,), 50.0)]
    flat_P = rule(told)
    tree_P = rule([rule(told[first : first + 7]) for first in range(0, 49, 7)])
    assert float((tree_P - flat_P).norm() / flat_P.norm()) > 0.1


def test_every_rule_is_either_a_function_of_a_mean_or_refused() -> None:
    """A rule that is new has to be looked at: docs/scale.md says which a tree can carry out."""
    assert set(ROBUST) | {"fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "norm_clipped"} == set(STRATEGIES)
    assert set(LORA_RULES) == {"factors", "ffa", "rolora", "fedsa", "svd", "fedex"}
