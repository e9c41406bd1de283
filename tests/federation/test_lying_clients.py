"""Clients that lie about their sizes, their steps and their hold-outs set neither the model nor the judgement."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from statistics import median_low
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.marks import first
from support.tiny import make_adapted, make_blocks, make_job, make_recipe, make_update, run_of

from fedloom.adapters.adapter import Adapter, Layout
from fedloom.deployment.message_fields import REPORT
from fedloom.deployment.message_kinds import Count, Either, Real
from fedloom.errors import TrainingError
from fedloom.evaluation.held_out import Score
from fedloom.federation import open_round
from fedloom.federation.admission import Admission, ClientSize
from fedloom.federation.aggregation import STRATEGIES
from fedloom.federation.fleet import ClientPreview
from fedloom.federation.lora_rules import LORA_RULES
from fedloom.federation.rounds import FederatedRun, RoundResult, run_rounds
from fedloom.federation.shares import cap_weights, mean_loss, to_shares
from fedloom.training.jobs import ClientResult, ClientTask, ClientUpdate
from fedloom.training.reference import train_client

LAYOUT = Layout(("model.q_proj.lora_A.weight", "model.q_proj.lora_B.weight"), (torch.Size((2, 6)), torch.Size((4, 2))))
START = Adapter(LAYOUT, torch.cat([torch.linspace(-0.1, 0.1, 12), torch.zeros(8)]))
LIMITS: dict[str, Any] = {"max_share": 0.5, "max_change": 10.0}
"""Limits of a deployment."""
HONEST = 100
"""Blocks of an honest client."""
NOISE = torch.randn(20, generator=torch.Generator().manual_seed(0))


def update(task: ClientTask, times: float = 1.0, blocks: int = HONEST) -> ClientUpdate:
    """Answer as a client that moves each weight by a hundredth, or so many times as far, into the noise's direction."""
    direction = NOISE if times != 1.0 else torch.linspace(0.5, 1.5, 20)
    start_P = task.adapter.weights_P
    moved = replace(task.adapter, weights_P=(start_P.double() + 0.01 * times * direction).float())
    made = make_update(moved, task.client, round=task.round, examples=blocks, tokens=blocks)
    return replace(made, report=replace(made.report, steps=blocks))


class Elsewhere:
    """Clients elsewhere, the last of which answers as a test says; all updates are shown before the first counts."""

    away: Mapping[int, float] = MappingProxyType({})

    def __init__(
        self,
        hostile: Callable[[ClientTask], ClientUpdate],
        scores: Callable[[int], dict[int, Score]] = lambda round: {0: Score(1.0, 0, 1)},
        clients: int = 3,
    ) -> None:
        self.clients: Sequence[int] = range(clients)
        self._hostile, self._scores, self._round = hostile, scores, -1

    def train(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult | ClientPreview]:
        found = [self._hostile(task) if task.client == self.clients[-1] else update(task) for task in tasks]
        yield from map(ClientPreview, reversed(found))
        yield from found

    def evaluate(self, adapter: Adapter) -> dict[int, Score]:
        self._round += 1
        return self._scores(self._round)


def make_run(fleet: Elsewhere, *, blocks: int = HONEST, training: Any = None, **section: Any) -> FederatedRun:
    federation = {"rounds": 2, "max_lost_clients": 1, **LIMITS, **section}
    recipe = make_recipe(data={"clients": len(fleet.clients)}, federation=federation, training=training or {})
    sizes = {client: ClientSize(HONEST, HONEST) for client in fleet.clients[:-1]}
    sizes[fleet.clients[-1]] = ClientSize(blocks, blocks)
    aggregate = LORA_RULES[recipe.federation.lora_rule](recipe.federation)
    return run_of(recipe, fleet, aggregate, lambda adapter: None, START, sizes=sizes)


def attack(times: float, blocks: int, clients: int = 3, **section: Any) -> list[RoundResult]:
    """Run two rounds with a client that says it has so many blocks, and sends so many times a change of noise."""
    fleet = Elsewhere(lambda task: update(task, times, blocks), clients=clients)
    return list(run_rounds(make_run(fleet, blocks=blocks, **section), fleet))


def moved(results: Sequence[RoundResult]) -> float:
    return float((results[-1].adapter.weights_P.double() - START.weights_P).norm())


PAIRS = [(times, blocks) for times in (1e3, 1e6, 1e9, 1e12) for blocks in (HONEST, 10**6, 10**9, 4 * 10**18)]
SETTINGS: dict[str, dict[str, float]] = {"trimmed_mean": {"trim": 0.34}, "multi_krum": {"keep": 3}}
CASES: list[dict[str, Any]] = [
    *({"strategy": {"kind": kind, **SETTINGS.get(kind, {})}} for kind in STRATEGIES),
    *({"lora_rule": rule} for rule in LORA_RULES if rule not in ("factors", "rolora")),
]


def replaced(case: dict[str, Any], **without: Any) -> list[tuple[float, int]]:
    """List the attacks after which the adapter is further from its start than honest clients take it, by an order."""
    honest = moved(attack(1.0, HONEST, **case))
    return [(times, blocks) for times, blocks in PAIRS if moved(attack(times, blocks, **case, **without)) > 12 * honest]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_client_of_three_replaces_the_adapter_in_none_of_sixteen_attacks(case: dict[str, Any]) -> None:
    assert replaced(case) == []


def test_an_attack_is_refused_or_scaled_down_by_name_in_round_one() -> None:
    for times, blocks in PAIRS:
        _, first, _ = attack(times, blocks)
        assert first.lost.keys() | first.scaled.keys() == {2}, (times, blocks)
        assert max(first.shares.values()) <= 0.5 + 1e-9
        assert list(first.capped) == ([2] if blocks > HONEST and not first.lost else [])


def test_servers_that_take_a_client_at_its_word_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twins: no limits; a share that is cut and not spread; a change measured by the step."""
    fedavg = CASES[0]
    without = replaced(fedavg, max_share=None, max_change=None)
    assert len(without) >= 3
    assert replaced(fedavg, max_change=None), "the share alone does not hold it"

    def cut(weights: dict[int, float], most: float | None) -> dict[int, float]:
        shares = to_shares(weights)
        return {client: min(share, most or 1.0) for client, share in shares.items()}

    monkeypatch.setattr(open_round, "cap_weights", cut)
    assert max(attack(1e3, 10**9)[1].shares.values()) > 0.9
    monkeypatch.undo()

    measure = Admission._measure
    monkeypatch.setattr(
        Admission, "_measure", lambda self, update, task: measure(self, update, task) / update.report.steps
    )
    assert replaced(fedavg), "a bound that grows with the steps that a client says it took"


@pytest.mark.parametrize("times", [1e3, 1e6])
def test_of_two_clients_neither_moves_the_adapter_far_beyond_the_other(times: float) -> None:
    """Which of them is honest can't be known: one can hold the other back, and can't replace it."""
    honest = moved(attack(1.0, HONEST, clients=2))
    assert moved(attack(times, 10**9, clients=2)) <= 12 * honest
    _, first, _ = attack(1e3, 10**9, clients=2)
    assert first.shares == {0: pytest.approx(0.5), 1: pytest.approx(0.5)}
    held_back = attack(1e-6, HONEST, clients=2)
    assert set(held_back[1].scaled) == {0}, "which is said"


def test_honest_clients_are_as_they_would_be_without_limits() -> None:
    fleets = [Elsewhere(lambda task: update(task, blocks=2 * HONEST)) for _ in range(2)]
    with_limits, without = (
        list(run_rounds(make_run(fleet, blocks=2 * HONEST, **limits), fleet))[-1]
        for fleet, limits in zip(fleets, (LIMITS, dict.fromkeys(LIMITS)), strict=True)
    )
    assert with_limits.adapter.sha256() == without.adapter.sha256()
    assert with_limits.shares == without.shares == {0: 0.25, 1: 0.25, 2: 0.5}
    assert [*with_limits.capped, *with_limits.scaled, *with_limits.lost] == []


@pytest.mark.parametrize(("optimizer", "rate"), first([("adamw", 1e-4), ("sgd", 1.0), ("adamw", 1e-2), ("sgd", 1e-2)]))
def test_honest_clients_of_very_different_sizes_are_never_refused(optimizer: str, rate: float) -> None:
    """Clients that train a fresh LoRA, whose B is 0, on 1, 12 and 100 blocks, in whatever order they answer."""
    adapted = make_adapted()
    start, sizes, updates = adapted.read(), {}, {}
    training = {"optimizer": optimizer, "learning_rate": rate, "batch_size": 1, "epochs": 1}
    for client, blocks in enumerate((1, 12, 100)):
        held = make_blocks(blocks, seed=client)
        sizes[client] = ClientSize(blocks, held.num_tokens)
        updates[client] = train_client(adapted, make_job(held, start, client=client, **training))
    task = ClientTask(1, 0, start, make_recipe(training=training).training, 3, 7)
    for shown in (True, False):
        for order in permutations(updates):
            admission = Admission(sizes, 10.0)
            admission.open([replace(task, client=client) for client in updates])
            for client in order if shown else ():
                admission.preview(updates[client])
            for client in order:
                admission.check(updates[client])
            assert set(admission.scaled) <= {2}, "whose change may be scaled down, and counts"


SIZES = st.lists(st.integers(1, 10**6) | st.sampled_from([1, 10**18, 9 * 10**18]), min_size=1, max_size=9)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(sizes=SIZES, most=st.floats(0.01, 1.0))
def test_no_share_is_above_the_cap_and_the_others_keep_their_proportions(sizes: list[int], most: float) -> None:
    weights = dict(enumerate(sizes))
    capped = cap_weights(weights, most)
    shares, cap = to_shares(capped), max(most, 1 / len(sizes))
    assert math.isclose(sum(shares.values()), 1.0)
    assert max(shares.values()) <= cap * (1 + 1e-6)
    lowered = {client for client in weights if capped[client] < weights[client]}
    assert all(math.isclose(shares[client], cap, rel_tol=1e-6) for client in lowered), "no more than it must"
    assert all(capped[client] == weights[client] for client in weights if client not in lowered)
    assert cap_weights(weights, None) == weights


def judged(scores: Callable[[int], dict[int, Score]], rounds: int = 6, **section: Any) -> list[RoundResult]:
    fleet = Elsewhere(update, scores)
    training = {"proximal_schedule": "adaptive"}
    return list(run_rounds(make_run(fleet, rounds=rounds, training=training, **section), fleet))


def course(results: Sequence[RoundResult]) -> tuple[int, int, list[float | None]]:
    """Return the best round, the last one, and the course of μ."""
    losses = [result.judged_loss for result in results]
    return losses.index(min(losses)), len(losses) - 1, [result.proximal_mu for result in results]


TRUE = [5.0, 4.0, 3.5, 3.2, 3.4, 3.6, 3.9]
"""Losses of two honest clients by round: round 3 is the best, and it rises from there."""


def lies(told: Callable[[int], float], tokens: int) -> Callable[[int], dict[int, Score]]:
    def scores(round: int) -> dict[int, Score]:
        found = {client: Score(100 * (TRUE[round] + client), 0, 100) for client in (0, 1)}
        return {**found, 2: Score(told(round) * tokens, 0, tokens)}

    return scores


LIES: dict[str, Callable[[int], float]] = {
    "always the same": lambda round: 0.0001,
    "round 1 is the best": lambda round: 0.0 if round == 1 else 1e9,
    "it never gets better": lambda round: float(round),
    "it always gets better": lambda round: 10.0 - round,
    "up and down": lambda round: 1e250 if round % 2 else 0.0,
}


@pytest.mark.parametrize("what", LIES)
def test_one_client_of_three_decides_neither_best_nor_stop_nor_mu(what: str) -> None:
    expected = course(judged(lies(lambda round: TRUE[round], 100), early_stop={"patience": 2}))
    assert expected[:2] == (3, 5)
    found = judged(lies(LIES[what], 9 * 10**17), early_stop={"patience": 2})
    assert course(found) == expected
    capped = mean_loss(found[3].clients, 0.5)
    assert found[3].client_loss == capped
    if LIES[what](3) < 0.001:
        assert capped == pytest.approx(0.5 * (TRUE[3] + 0.5), abs=1e-3), "half of it is the honest clients'"


def test_a_server_that_adds_up_what_clients_say_would_be_caught() -> None:
    honest = course(judged(lies(lambda round: TRUE[round], 100), early_stop={"patience": 2}))
    decided = {what: judged(lies(told, 9 * 10**17), early_stop={"patience": 2}, max_share=None)
               for what, told in LIES.items()}  # fmt: skip
    assert all(course(decided[what]) != honest for what in LIES if what != "always the same")
    assert decided["always the same"][3].judged_loss == pytest.approx(0.0001), "what the filed attack showed"


def test_of_two_hold_outs_none_alone_makes_an_adapter_look_better() -> None:
    def scores(round: int) -> dict[int, Score]:
        return {0: Score(100 * TRUE[round], 0, 100), 1: Score(0.0 if round == 6 else 500.0 - round, 0, 100)}

    found = [result.judged_loss - 5.0 for result in judged(scores)]
    assert all(loss >= true - 5.0 for loss, true in zip(found, TRUE, strict=True))
    assert found[3] == pytest.approx(-0.03), "it can hold the other back: of two, nobody knows which to believe"


def test_the_judgement_goes_on_where_it_was() -> None:
    scores = lies(LIES["up and down"], 7)
    whole = judged(scores)
    fleet = Elsewhere(update, scores)
    run = make_run(fleet, rounds=6, training={"proximal_schedule": "adaptive"})
    begun = [result for _, result in zip(range(3), run_rounds(run, fleet), strict=False)]
    again = make_run(fleet, rounds=6, training={"proximal_schedule": "adaptive"})
    again.restore(run.adapter, run.strategy_state, run.losses, run.admission.norms, run.began)
    results = [*begun, *run_rounds(again, fleet)]
    assert [r.judged_loss for r in results] == [r.judged_loss for r in whole]
    assert results[-1].adapter.sha256() == whole[-1].adapter.sha256()


def test_equal_weights_count_every_client_alike() -> None:
    _, first, _ = attack(1.0, 10**9, strategy={"kind": "fedavg", "weight_by": "equal"})
    assert first.shares == {client: pytest.approx(1 / 3) for client in range(3)}
    assert not first.capped


def test_the_middle_change_is_that_of_the_round_and_of_rounds_before() -> None:
    results = attack(1e3, HONEST)
    honest = float(
        update(ClientTask(1, 0, START, make_recipe().training, 2, 7)).adapter.weights_P.sub(START.weights_P).norm()
    )
    assert results[1].scaled[2] == pytest.approx(
        1e3 * float(NOISE.norm()) * 0.01 / median_low([honest, honest]), rel=1e-3
    )


def test_a_change_of_nobody_else_is_not_scaled_to_nothing() -> None:
    """Where most did not move, the middle says nothing; what no training makes is refused all the same."""
    admission = Admission(max_change=10.0)
    task = ClientTask(1, 0, START, make_recipe().training, 2, 7)
    still = {client: make_update(START, client) for client in (0, 1)}
    small = update(replace(task, client=2), 2.0, 1)
    admission.open([replace(task, client=client) for client in range(3)])
    for one in (*still.values(), small):
        admission.preview(one)
    assert admission.check(small) is small
    with pytest.raises(TrainingError, match="too large"):
        admission.check(update(replace(task, client=2), 1e9, 1))


def bounds() -> Iterator[tuple[str, float]]:
    """Yield each number of a client's report with both of its bounds."""
    for field in REPORT.fields:
        kinds = field.kind.kinds if isinstance(field.kind, Either) else (field.kind,)
        for kind in kinds:
            if isinstance(kind, Count | Real):
                yield from ((field.name, value) for value in (kind.least, kind.most))


COUNTED = ("examples", "tokens", "steps")
"""Numbers of a report that are held to what the client enrolled with."""
NAMED = ("round", "client")
"""Numbers of a report that say whose it is: another is refused before this."""


@pytest.mark.parametrize(("name", "value"), [one for one in bounds() if one[0] not in NAMED])
def test_a_report_at_its_bounds_moves_neither_weights_nor_judgement_or_is_refused(name: str, value: float) -> None:
    def told(task: ClientTask) -> ClientUpdate:
        made = update(task)
        return replace(made, report=replace(made.report, **{name: value}))

    def course_of(hostile: Callable[[ClientTask], ClientUpdate], **section: Any) -> list[tuple[Any, ...]]:
        scores = lies(lambda round: TRUE[round], 100)
        training = {"proximal_schedule": "adaptive"}
        fleet = Elsewhere(hostile, scores)
        run = make_run(fleet, rounds=3, training=training, **section)
        return [
            (found.adapter.sha256(), found.judged_loss, found.proximal_mu, sorted(found.lost))
            for found in run_rounds(run, fleet)
        ]

    for kind in ("fedavg", "fedadam", "fedmedian"):
        found = course_of(told, strategy={"kind": kind})
        if (name in COUNTED and value > HONEST) or name == "examples":
            assert [lost for *_, lost in found[1:]] == [[2]] * 3, "it has not as many, or too few for its steps"
        else:
            assert found == course_of(update, strategy={"kind": kind})


@pytest.mark.parametrize("told", [0.5, 1e9], ids=["honest", "liar"])
def test_seconds_of_clients_that_evaluate_side_by_side_are_not_added_up(told: float) -> None:
    class Scoring(Elsewhere):
        """Clients of whom each scored for half a second while they were waited for, but for the last one's word."""

        def train(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult | ClientPreview]:
            time.sleep(0.6)
            for result in super().train(tasks):
                made = result.update if isinstance(result, ClientPreview) else result
                assert isinstance(made, ClientUpdate)
                seconds = told if result.client == self.clients[-1] else 0.5
                scored = replace(made, report=replace(made.report, evaluate_seconds=seconds))
                yield ClientPreview(scored) if isinstance(result, ClientPreview) else scored

    fleet = Scoring(update)
    _, round, _ = run_rounds(make_run(fleet), fleet)
    assert round.train_seconds >= 0
    assert round.evaluate_seconds >= 0.5
    if told < 1:
        assert round.train_seconds >= 0.09, "three times half a second is more than all that was waited"
