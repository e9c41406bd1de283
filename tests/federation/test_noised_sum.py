"""The noised sum of clients' changes: what one client can move, what covers it, and broken twins that are found."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from support.marks import first
from support.tiny import make_update
from torch import Tensor

from fedloom.adapters.adapter import Adapter, Layout
from fedloom.federation.aggregation import STRATEGIES, Aggregate
from fedloom.federation.noised_sum import ClippedSum, noised_sum, norm_of
from fedloom.privacy.central import CentralNoise, CentralTerms, RoundNoise
from fedloom.recipe.sections import SERVER_OPTIMIZERS, Strategy
from fedloom.records.state import pack, unpack
from fedloom.training.jobs import ClientUpdate

LAYOUT = Layout(("a", "b"), (torch.Size([4, 5]), torch.Size([20])))
START = Adapter(LAYOUT, torch.randn(40, generator=torch.Generator().manual_seed(1)))
TERMS = CentralTerms(noise_multiplier=1.0, max_norm=0.5, clients=60, rate=0.2, delta=1e-3)
SECRET = bytes(range(32))

Mean = Callable[[Sequence[Tensor], Sequence[int]], Tensor]
"""What a round makes of clients' changes and their numbers of documents: [P]."""


def aggregate(terms: CentralTerms = TERMS, kind: str = "fedavg", part_P: Tensor | None = None) -> Aggregate:
    strategy = STRATEGIES[kind](Strategy(kind=kind, weight_by="equal"))
    return noised_sum(strategy, CentralNoise(terms, SECRET, ("a recipe",)), lambda round: part_P)


def changed(change_P: Tensor, examples: int = 1, client: int = 0) -> ClientUpdate:
    weights_P = START.weights_P.double() + change_P
    return make_update(Adapter(LAYOUT, weights_P.float()), client, examples=examples)


def make_changes(number: int = 12, seed: int = 0) -> list[Tensor]:
    """Changes of norms from a tenth of C to a hundred times that."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(40, generator=generator).double() for _ in range(number)]
    return [
        TERMS.max_norm * 10 ** (3 * place / number - 1) * one / one.norm() for place, one in enumerate(drawn, start=1)
    ]


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mechanism without its noise, to see what it does beside."""
    monkeypatch.setattr(RoundNoise, "for_changes", lambda self, norm, size: torch.zeros(size, dtype=torch.float64))


def mechanism(changes: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    whole = aggregate()
    updates = [changed(*pair) for pair in zip(changes, sizes, strict=True)]
    _, made = whole.update(whole.init(START), START, updates)
    return made.weights_P.double() - START.weights_P


def clip(change_P: Tensor, norm: float = TERMS.max_norm) -> Tensor:
    return change_P * min(1.0, norm / float(change_P.norm()))


def by_size(changes: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Weights n_k / n of those that came, as FedAvg has them."""
    shares = [size / sum(sizes) for size in sizes]
    return sum((share * clip(one) for share, one in zip(shares, changes, strict=True)), torch.zeros(40))


def by_those_that_came(changes: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    return torch.stack([clip(one) for one in changes]).mean(0)


def clipped_after_averaging(changes: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    return clip(torch.stack([*changes]).sum(0) / TERMS.expected)


def norm_of_each_tensor(changes: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    return torch.stack([torch.cat([clip(one[:20]), clip(one[20:])]) for one in changes]).sum(0) / TERMS.expected


def element_by_element(changes: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    return torch.stack([one.clamp(-TERMS.max_norm, TERMS.max_norm) for one in changes]).sum(0) / TERMS.expected


def not_clipped(changes: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    return torch.stack([*changes]).sum(0) / TERMS.expected


def sensitivity(mean: Mean) -> float:
    """How far any client of a small or a large cohort moves what comes out, in what the noise is made for: C / (qK)."""
    found = []
    for came in (4, 12):
        changes, sizes = make_changes(came), [1, 50] * (came // 2)
        whole = mean(changes, sizes)
        rest = (mean(changes[:k] + changes[k + 1 :], sizes[:k] + sizes[k + 1 :]) for k in range(came))
        found += [float((whole - one).norm()) * TERMS.expected / TERMS.max_norm for one in rest]
    return max(found)


def test_no_client_moves_the_mean_by_more_than_the_noise_is_made_for(silent: None) -> None:
    assert sensitivity(mechanism) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "twin",
    [by_size, by_those_that_came, clipped_after_averaging, norm_of_each_tensor, element_by_element, not_clipped],
    ids=lambda twin: twin.__name__,
)
def test_a_broken_twin_lets_one_client_move_more(twin: Mean) -> None:
    assert sensitivity(twin) > 1.2


def test_it_is_the_clipped_sum_with_noise_over_the_expected_number() -> None:
    changes = make_changes(7)
    noise_P = CentralNoise(TERMS, SECRET, ("a recipe",)).open(1, START.sha256()).for_changes(0.5, 40)
    expected = (sum((clip(one) for one in changes), torch.zeros(40)) + noise_P) / 12
    # float32's rounding, and the millionth by which a change is scaled further down.
    assert torch.allclose(mechanism(changes, [1] * 7), expected, atol=3e-7)


def spread(rounds: int = 60) -> tuple[float, float]:
    """Deviation of what comes out from the sum of the same changes, in σC/(qK), and its correlation over rounds."""
    terms = replace(TERMS, quantile=0.1, norm_rate=0.9, clients=1000)
    whole, found = aggregate(terms), []
    state, adapter = whole.init(START), START
    for _ in range(rounds):
        # The norm is led down by a third each time, and begins anew here.
        state, made = whole.update((state[0], TERMS.max_norm, state[2]), adapter, [])
        assert norm_of(state) < 0.8 * TERMS.max_norm
        scale = terms.change_noise * TERMS.max_norm / terms.expected
        found.append((made.weights_P.double() - adapter.weights_P) / scale)
    stacked = torch.stack(found)
    pairs = (stacked[1:] * stacked[:-1]).mean() / stacked.square().mean()
    return float(stacked.std()), float(pairs)


TRUE_NOISE = RoundNoise.for_changes
TWINS: dict[str, Callable[[RoundNoise, float, int], Tensor]] = {
    "no noise": lambda self, norm, size: torch.zeros(size, dtype=torch.float64),
    "half the noise": lambda self, norm, size: TRUE_NOISE(self, norm, size) / 2,
    # Flower 1.41 leads the norm before it adds the noise.
    "the next round's norm": lambda self, norm, size: TRUE_NOISE(self, self.terms.adapt_norm(norm, 0.0, 0.0), size),
    "the number of clients, not the norm": lambda self, norm, size: TRUE_NOISE(self, 1.0, size) / self.terms.expected,
}


def test_the_noise_is_as_large_as_accounted_and_new_each_round() -> None:
    deviation, again = spread()
    assert deviation == pytest.approx(1, rel=0.04)
    assert abs(again) < 0.1


@pytest.mark.parametrize("twin", TWINS)
def test_a_twin_with_less_noise_is_found(twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RoundNoise, "for_changes", TWINS[twin])
    deviation, _ = spread()
    assert deviation < 0.8


def test_the_same_noise_in_each_round_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CentralNoise, "open", lambda self, round, start: RoundNoise(self.terms, bytes(32)))
    _, again = spread()
    assert again > 0.9


def outcome(seed: int, clients: int = 1000, rounds: int = 4) -> tuple[Tensor, Tensor]:
    """Who was there at all, and what came out at each client's own weight, which it changes ten times too far."""
    terms = CentralTerms(4.0, 0.3, clients, 0.5, 1e-5)
    layout = Layout(("a",), (torch.Size([clients]),))
    adapter = Adapter(layout, torch.zeros(clients))
    whole = noised_sum(
        STRATEGIES["fedavg"](Strategy(weight_by="equal")), CentralNoise(terms, bytes([seed] * 32), ()), lambda _: None
    )
    assert whole.draw is not None
    member = torch.rand(clients, generator=torch.Generator().manual_seed(seed)) < 0.5
    state = whole.init(adapter)
    for round in range(1, rounds + 1):
        total = whole.open(state, adapter)
        for client in whole.draw(range(clients), round, adapter):
            if member[client]:
                weights_P = adapter.weights_P.clone()
                weights_P[client] += 3.0
                total.add(make_update(replace(adapter, weights_P=weights_P), client))
        state, adapter = total.finish()
    return member, adapter.weights_P.double()


IN_THEORY = 4 * 0.5 / math.sqrt(4 * 16.0 + 4 * 0.25 / 2)
"""Distance of those in from those out, in standard deviations: T q / √(T σ² + T q (1 − q) / 2)."""


def distance(member: Tensor, score: Tensor) -> float:
    return float(
        (score[member].mean() - score[~member].mean()) / ((score[member].var() + score[~member].var()) / 2).sqrt()
    )


SEEDS = 4
FAR = 4 * 0.063 / math.sqrt(SEEDS)
"""Four standard errors of the mean distance."""


def mean_distance() -> float:
    return sum(distance(*outcome(seed)) for seed in range(SEEDS)) / SEEDS


def test_a_whole_run_tells_clients_apart_as_far_as_accounted_and_no_further() -> None:
    assert mean_distance() == pytest.approx(IN_THEORY, abs=FAR)


def twice(total: ClippedSum, update: ClientUpdate) -> None:
    """As of a client with twice the weight of the others."""
    ADD(total, update)
    ADD(total, update)


def as_it_is(total: ClippedSum, update: ClientUpdate) -> None:
    total.sum_P += update.adapter.weights_P.double() - total._start_P


ADD = ClippedSum.add


@pytest.mark.parametrize(
    ("place", "name", "twin"),
    [
        (RoundNoise, "for_changes", TWINS["half the noise"]),
        (ClippedSum, "add", twice),
        (ClippedSum, "add", as_it_is),
    ],
    ids=["half the noise", "twice the weight", "not clipped"],
)
def test_a_broken_run_tells_them_further_apart(
    place: type, name: str, twin: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, name, twin)
    assert mean_distance() > IN_THEORY + FAR


@pytest.mark.parametrize("kind", SERVER_OPTIMIZERS)
def test_a_servers_optimizer_sees_the_noised_mean_alone(kind: str) -> None:
    plain, strategy = aggregate(), STRATEGIES[kind](Strategy(kind=kind))
    whole = aggregate(kind=kind)
    state, held, adapter = whole.init(START), strategy.init(START), START
    for round in range(3):
        updates = [changed(one) for one in make_changes(5, seed=round)]
        updates = [
            replace(u, adapter=replace(u.adapter, weights_P=u.adapter.weights_P - START.weights_P + adapter.weights_P))
            for u in updates
        ]
        _, mean = plain.update((round, TERMS.max_norm, None), adapter, updates)
        held, expected = strategy.update(held, adapter, [make_update(mean)])
        state, adapter = whole.update(state, adapter, updates)
        assert torch.equal(adapter.weights_P, expected.weights_P)


def test_a_round_without_clients_moves_by_noise_alone() -> None:
    whole = aggregate()
    state, made = whole.update(whole.init(START), START, [])
    moved = made.weights_P.double() - START.weights_P
    assert float(moved.norm()) == pytest.approx(TERMS.noise_over_norm(40) * TERMS.max_norm, rel=0.4)
    assert state[0] == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_change_that_is_no_number_counts_as_nothing(bad: float, silent: None) -> None:
    broken = make_changes(1)[0]
    broken[3] = bad
    changes = make_changes(3)
    assert torch.equal(mechanism([*changes, broken], [1] * 4), mechanism(changes, [1] * 3))
    total = ClippedSum(START, 0.5, None)
    total.add(changed(broken))
    assert total.centred == 0
    # A change of nothing is within any norm, and divides by nothing.
    total.add(changed(torch.zeros(40)))
    assert (total.centred, float(total.sum_P.norm())) == (0.5, 0.0)


def test_what_is_not_trained_neither_counts_nor_moves() -> None:
    part_P = torch.arange(40) < 20
    change_P = torch.full((40,), 0.1, dtype=torch.float64)
    total = ClippedSum(START, 0.5, part_P)
    total.add(changed(change_P))
    assert total.centred == 0.5, "√20 · 0.1 is within 0.5, and √40 · 0.1 is not"
    whole = aggregate(part_P=part_P)
    _, made = whole.update(whole.init(START), START, [changed(change_P)])
    assert torch.equal(made.weights_P[20:], START.weights_P[20:])
    assert not torch.equal(made.weights_P[:20], START.weights_P[:20])


def test_what_it_remembers_can_be_saved() -> None:
    whole = aggregate(kind="fedadam")
    state, _ = whole.update(whole.init(START), START, [changed(one) for one in make_changes(3)])
    told, tensors = pack(state)
    again = unpack(told, tensors)
    assert again[:2] == state[:2]
    assert torch.equal(again[2][1], state[2][1])


# ---- the norm that is led


def lead(first: float, rounds: int, adapt: Callable[[CentralTerms, float, float, float], float]) -> list[float]:
    """The norms of a run whose clients' changes have a median norm of 1, by any rule that leads it."""
    terms = CentralTerms(1.0, first, 1000, 0.1, 1e-4, quantile=0.5)
    central, generator, norms = CentralNoise(terms, SECRET, ()), torch.Generator().manual_seed(3), [first]
    zero = Adapter(Layout(("a",), (torch.Size([8]),)), torch.zeros(8))
    for round in range(1, rounds + 1):
        noise, total = central.open(round, zero.sha256()), ClippedSum(zero, norms[-1], None)
        for _ in noise.draw():
            drawn = torch.randn(8, generator=generator)
            drawn *= float(torch.exp(torch.randn(1, generator=generator))) / drawn.norm()
            total.add(make_update(replace(zero, weights_P=drawn)))
        norms.append(adapt(terms, norms[-1], total.centred, noise.for_number()))
    return norms


@pytest.mark.parametrize("first", first([0.05, 20.0]))
def test_the_norm_finds_the_median_from_both_sides(first: float) -> None:
    norms = lead(first, 60, CentralTerms.adapt_norm)
    assert all(0.75 < norm < 1.33 for norm in norms[-10:])


@pytest.mark.parametrize("first", first([0.5, 2.0]))
def test_a_step_in_the_other_direction_runs_away(first: float) -> None:
    """Flower 1.41 counts the changes that were clipped, and keeps the sign for those that were not."""
    found = lead(first, 60, lambda terms, norm, centred, noise: terms.adapt_norm(norm, -centred, noise))
    assert not 0.1 < found[-1] < 10


def test_what_the_count_costs_is_paid_by_more_noise_on_the_changes() -> None:
    terms = replace(TERMS, quantile=0.5, clients=1000)
    assert terms.change_noise > terms.noise_multiplier
    assert terms.change_noise**-2 + (2 * terms.bit_noise) ** -2 == pytest.approx(terms.noise_multiplier**-2)
    assert replace(TERMS).change_noise == TERMS.noise_multiplier
    # 12 clients a round: noise of 1.2 on their number is all that there could be.
    for noise, able in ((1.19, True), (1.21, False)):
        few = replace(TERMS, quantile=0.5, noise_multiplier=noise)
        assert few.can_adapt == able
    with pytest.raises(AssertionError, match="no noise on the changes makes up"):
        _ = few.change_noise


def test_one_client_moves_the_count_by_a_half_at_most() -> None:
    total = ClippedSum(START, 0.5, None)
    for change in make_changes():
        before = total.centred
        total.add(changed(change))
        assert abs(total.centred - before) == 0.5


# ---- the draw


def test_clients_are_drawn_each_by_itself_and_anew_each_round() -> None:
    whole = aggregate()
    assert whole.draw is not None
    ids, rounds = [*range(100, 160)], 3000
    drawn = torch.zeros(rounds, 60)
    for round in range(rounds):
        drawn[round, [client - 100 for client in whole.draw(ids, round, START)]] = 1
    assert (drawn.mean(0) - 0.2).abs().max() < 4 * math.sqrt(0.2 * 0.8 / rounds)
    sizes = drawn.sum(1)
    assert float(sizes.var()) == pytest.approx(60 * 0.2 * 0.8, rel=0.1), "a fixed number would have none"
    pairs = ((drawn - 0.2).T @ (drawn - 0.2) / rounds).fill_diagonal_(0)
    assert pairs.abs().max() < 5 * 0.16 / math.sqrt(rounds)
    few = aggregate(replace(TERMS, rate=0.01))
    assert few.draw is not None
    assert any(not few.draw(ids, round, START) for round in range(20)), "and sometimes nobody"


def test_a_round_has_a_key_of_its_own() -> None:
    central = CentralNoise(TERMS, SECRET, ("a recipe", "documents"))
    moved = replace(START, weights_P=START.weights_P + 1e-6)
    keys = [
        central.open(1, START.sha256()).key,
        central.open(2, START.sha256()).key,
        central.open(1, moved.sha256()).key,
        replace(central, facts=("a recipe", "other documents")).open(1, START.sha256()).key,
        replace(central, secret=bytes(32)).open(1, START.sha256()).key,
    ]
    assert len(set(keys)) == len(keys)
    assert central.open(1, START.sha256()).key == keys[0]
    assert SECRET.hex() not in repr(central)
    assert str(SECRET) not in repr(central)


def test_it_holds_no_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that memory does not grow with the clients."""
    import weakref

    total, alive = aggregate().open((0, 0.5, None), START), []
    for change in make_changes():
        update = changed(change)
        alive.append(weakref.ref(update.adapter))
        total.add(update)
        del update
    assert not [one for one in alive if one()]
