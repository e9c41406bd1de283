"""Branch: clients that answer as one come to what they come to alone, up to a rounding, or it is said why not."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from support.tiny import make_recipe, make_update, run_of

from fedloom.adapters.adapter import Adapter, Layout
from fedloom.errors import TrainingError
from fedloom.evaluation.held_out import Score
from fedloom.federation.admission import ClientSize
from fedloom.federation.branch import ADD_UP, Branch, join_reports
from fedloom.federation.lora_rules import LORA_RULES
from fedloom.federation.rounds import run_rounds
from fedloom.training.client_report import ClientReport
from fedloom.training.jobs import ClientFailure, ClientResult, ClientTask

P, ROUNDS = 512, 3
START = Adapter(Layout(("w",), (torch.Size([P]),)), torch.randn(P, generator=torch.Generator().manual_seed(0)))
EXAMPLES = [3, 40, 7, 11, 5, 90]
ROUNDING = 2.0**-24
"""Part of a number by which its nearest float32 may differ from it."""


def moved(client: int, task: ClientTask) -> ClientResult:
    """What a client trains: it moves from where it began, by its own number and the round's."""
    generator = torch.Generator().manual_seed(100 * task.round + client)
    weights_P = task.adapter.weights_P + 0.01 * torch.randn(P, generator=generator)
    examples = EXAMPLES[client]
    trained = replace(task.adapter, weights_P=weights_P)
    return make_update(trained, client, round=task.round, examples=examples, tokens=7 * examples + client)


@dataclass
class Clients:
    """Fleet of clients that do what they are told to, in this process."""

    clients: Sequence[int]
    work: Callable[[int, ClientTask], ClientResult] = moved
    scores: dict[int, Score] = field(default_factory=dict)
    away: dict[int, float] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[int, ClientSize]:
        return {client: ClientSize(EXAMPLES[client], 7 * EXAMPLES[client] + client) for client in self.clients}

    def foresee(self, tasks: Sequence[ClientTask]) -> dict[int, ClientSize]:
        return self.sizes

    def train(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        for task in tasks:
            yield self.work(task.client, task)

    def evaluate(self, adapter: Adapter) -> dict[int, Score]:
        self.scores = {
            client: Score(2.0 * EXAMPLES[client] + client, client, EXAMPLES[client]) for client in self.clients
        }
        return self.scores

    def forget_scores(self) -> None:
        self.scores = {}


@dataclass
class Branches:
    """Fleet whose clients are branches."""

    branches: Sequence[Branch]
    scores: dict[int, Score] = field(default_factory=dict)
    away: dict[int, float] = field(default_factory=dict)
    sizes: dict[int, ClientSize] = field(default_factory=dict)

    def foresee(self, tasks: Sequence[ClientTask]) -> dict[int, ClientSize]:
        return {}

    @property
    def clients(self) -> Sequence[int]:
        return range(len(self.branches))

    def train(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        for task in tasks:
            try:
                yield self.branches[task.client].train(task)
            except TrainingError as error:
                yield ClientFailure(task.client, error)

    def evaluate(self, adapter: Adapter) -> dict[int, Score]:
        found = {number: branch.evaluate(adapter) for number, branch in enumerate(self.branches)}
        return {number: score for number, score in found.items() if score}


def section_of(clients: int, strategy: Mapping[str, Any] = {}, **keys: Any) -> Any:
    return make_recipe(
        data={"clients": clients}, federation={"rounds": ROUNDS, "strategy": dict(strategy), **keys}
    ).federation


def final(fleet: Any, clients: int, strategy: Mapping[str, Any] = {}, **keys: Any) -> torch.Tensor:
    recipe = make_recipe(data={"clients": clients}, federation={"rounds": ROUNDS, "strategy": dict(strategy), **keys})
    run = run_of(recipe, fleet, LORA_RULES["factors"](recipe.federation), lambda adapter: Score(1.0, 0, 1), START)
    return [*run_rounds(run, fleet)][-1].adapter.weights_P


def grow(groups: Sequence[Sequence[int]], strategy: Mapping[str, Any] = {}, **keys: Any) -> Branches:
    said = lambda what, detail: None  # noqa: E731
    return Branches(
        [Branch(Clients(group), section_of(len(group), strategy, **keys), said) for group in groups]  # type: ignore[arg-type]
    )


def off(found_P: torch.Tensor, expected_P: torch.Tensor) -> float:
    """Return the largest difference, in roundings of the larger of a weight and a step."""
    return float(((found_P - expected_P).abs() / expected_P.abs().clamp(min=0.1)).max()) / ROUNDING


BOUND = 4.0 * ROUNDS
"""Roundings by which a tree may differ: in a round, of a branch's mean, either server's and a client's own step."""


@pytest.mark.parametrize("weight_by", ["examples", "tokens"])
@pytest.mark.parametrize("groups", [((0, 1, 2), (3, 4, 5)), ((5,), (4, 3, 1, 0), (2,))])
def test_branches_come_to_what_their_clients_do_up_to_rounding(groups: Sequence[Sequence[int]], weight_by: str) -> None:
    strategy = {"weight_by": weight_by}
    flat, tree = final(Clients(range(6)), 6, strategy), final(grow(groups, strategy), len(groups), strategy)
    assert off(tree, flat) <= BOUND


def test_so_do_branches_of_branches() -> None:
    lower = grow(((0, 1), (2, 3)))
    between: Any = lower
    above = Branches([Branch(between, section_of(2), print), *grow(((4, 5),)).branches])
    assert off(final(above, 2), final(Clients(range(6)), 6)) <= BOUND


@pytest.mark.parametrize("kind", ADD_UP)
def test_whatever_the_server_above_makes_of_means_branches_tell_it_the_mean(kind: str) -> None:
    strategy = {"kind": kind}
    flat = final(Clients(range(6)), 6, strategy)
    tree = final(grow(((0, 1, 2), (3, 4, 5)), strategy), 2, strategy)
    # Adaptive steps are as long where a weight hardly moved, so that there a rounding shows.
    torch.testing.assert_close(tree, flat, rtol=1e-5, atol=1e-4 if "ada" in kind else 1e-6)
    assert not torch.allclose(flat, START.weights_P, atol=1e-4)


@pytest.mark.parametrize("twin", ["branches that count alike", "clients that count alike", "clients numbered alike"])
def test_the_comparison_finds_a_tree_that_is_another(twin: str) -> None:
    """Each of these is a tree that came to something else without anybody's being told."""
    above, below, groups = {}, {}, [[0, 1, 2], [3, 4, 5]]
    if twin == "branches that count alike":
        above = {"weight_by": "equal"}
    elif twin == "clients that count alike":
        below = {"weight_by": "equal"}
    else:
        groups = [[0, 1, 2], [0, 1, 2]]
    assert off(final(grow(groups, below), 2, above), final(Clients(range(6)), 6)) > 100 * BOUND


def task_of(round: int = 1) -> ClientTask:
    recipe = make_recipe()
    return ClientTask(round, 1, START, recipe.training, 3, 7)


def branch_of(work: Callable[[int, ClientTask], ClientResult], **keys: Any) -> tuple[Branch, list[str]]:
    said: list[str] = []
    fleet: Any = Clients((0, 1, 2), work)
    return Branch(fleet, section_of(3, **keys), lambda what, detail: said.append(f"{what} {detail}")), said


def without(number: int, task: ClientTask) -> ClientResult:
    if number == 1:
        return ClientFailure(1, TrainingError("no answer", round=task.round, client=1))
    return moved(number, task)


def with_nan(number: int, task: ClientTask) -> ClientResult:
    update = moved(number, task)
    if number == 1:
        update = replace(update, adapter=replace(START, weights_P=START.weights_P * float("nan")))  # type: ignore[type-var]
    return update


def of_another_size(number: int, task: ClientTask) -> ClientResult:
    update: Any = moved(number, task)
    return replace(update, report=replace(update.report, examples=10**9)) if number == 1 else update


@pytest.mark.parametrize("work", [without, with_nan, of_another_size])
def test_a_client_that_is_lost_or_lies_counts_nothing_and_is_said(
    work: Callable[[int, ClientTask], ClientResult],
) -> None:
    branch, said = branch_of(work, max_lost_clients=1)
    update = branch.train(task_of())
    others: Any = Clients((0, 2))
    expected = Branch(others, section_of(2), print).train(task_of())
    assert torch.equal(update.adapter.weights_P, expected.adapter.weights_P)
    assert update.report == expected.report
    assert update.report.examples == EXAMPLES[0] + EXAMPLES[2]
    (line,) = said
    assert line.startswith("lost round 1, client 1")


@pytest.mark.parametrize("work", [without, with_nan, of_another_size])
def test_a_branch_with_too_few_clients_has_no_answer(work: Callable[[int, ClientTask], ClientResult]) -> None:
    branch, _ = branch_of(work)
    with pytest.raises(TrainingError, match="client 1"):
        branch.train(task_of())


def test_of_a_branch_that_is_lost_all_clients_are() -> None:
    fleet = grow(((0, 1, 2), (3, 4, 5)))
    lost: Any = Clients((3, 4, 5), lambda number, task: ClientFailure(number, TrainingError("gone", round=task.round)))
    fleet.branches = [fleet.branches[0], Branch(lost, section_of(3), print)]
    alone = final(Clients((0, 1, 2)), 3)
    assert off(final(fleet, 2, max_lost_clients=1), alone) <= BOUND


def test_shares_are_capped_among_a_branchs_own_clients_and_it_is_said() -> None:
    branch, said = branch_of(moved, max_share=0.5)
    branch.train(task_of())
    assert said == ["capped round 1, client 1: 50% of this branch's weight, by federation.max_share"]


def test_scores_add_up_over_clients() -> None:
    branch, _ = branch_of(moved)
    assert branch.evaluate(START) == Score(2.0 * (3 + 40 + 7) + 3, 3, 50)
    nobody: Any = Clients(())
    assert Branch(nobody, section_of(1), print).evaluate(START) is None


def test_numbers_of_a_branch_are_sums_means_over_tokens_and_the_longest_time() -> None:
    def report(client: int, **told: Any) -> ClientReport:
        return replace(make_update(START, client).report, **told)

    found = join_reports(
        [
            report(4, examples=2, tokens=10, steps=3, loss_first=1.0, loss_mean=4.0, seconds=9.0, evaluate_seconds=1.0,
                   holdout_loss_before=2.0, holdout_loss_after=1.0),
            report(5, examples=3, tokens=30, steps=2, loss_first=3.0, loss_mean=8.0, seconds=4.0, evaluate_seconds=2.0,
                   holdout_loss_before=6.0, holdout_loss_after=5.0),
            report(6, examples=1, tokens=40, steps=1, loss_first=2.0, loss_mean=0.0),  # and nothing held out
        ],
        client=1,
        drift=0.25,
        scores={4: Score(1.0, 0, 30), 5: Score(1.0, 0, 10)},
    )  # fmt: skip
    assert (found.client, found.examples, found.tokens, found.steps) == (1, 6, 80, 3)
    assert (found.loss_first, found.loss_mean) == pytest.approx(((10 + 90 + 80) / 80, (40 + 240) / 80))
    assert (found.holdout_loss_before, found.holdout_loss_after) == pytest.approx((3.0, 2.0))
    assert (found.drift, found.seconds, found.evaluate_seconds) == (0.25, 9.0, 2.0)


def test_a_run_that_begins_again_is_not_judged_by_the_one_before() -> None:
    """Of a change of 1 no 10,000 middle changes were made where the run before had moved by a millionth."""
    sizes = random.Random(0)

    def far(number: int, task: ClientTask) -> ClientResult:
        update: Any = moved(number, task)
        step = 1e-6 if task.round > 1 else 1.0
        weights_P = START.weights_P + step * (1 + 0.1 * sizes.random())
        return replace(update, adapter=replace(START, weights_P=weights_P))

    branch, _ = branch_of(far)
    for round in (2, 3, 1):
        branch.train(task_of(round))
