"""Round that loses more clients than may be: the run ends, or goes on with the adapter as it was."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import pytest
from support.tiny import make_adapted, make_recipe, make_update, run_of

from fedloom.adapters.adapter import Adapter
from fedloom.errors import TrainingError
from fedloom.evaluation.held_out import Score
from fedloom.federation.lora_rules import LORA_RULES
from fedloom.federation.rounds import FederatedRun, run_rounds
from fedloom.records.writer import round_record
from fedloom.training.jobs import ClientFailure, ClientResult, ClientTask


class LosesTheFirstRound:
    """Two clients: of the first round one update comes, of the others both."""

    clients: Sequence[int] = (0, 1)
    away: Mapping[int, float] = MappingProxyType({})

    def train(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        for task in tasks:
            if task.round == 1 and task.client == 1:
                yield ClientFailure(1, TrainingError("no answer", round=1, client=1))
            else:
                moved = replace(task.adapter, weights_P=task.adapter.weights_P + 1)
                yield make_update(moved, task.client, round=task.round)

    def evaluate(self, adapter: Adapter) -> dict[int, Score]:
        return {}


def open_run(on_quorum_lost: str) -> FederatedRun:
    section = {"on_quorum_lost": on_quorum_lost, "strategy": {"kind": "fedavgm"}}
    recipe, fleet = make_recipe(federation=section), LosesTheFirstRound()
    aggregate = LORA_RULES["factors"](recipe.federation)
    return run_of(recipe, fleet, aggregate, lambda adapter: Score(1.0, 0, 1), make_adapted().read())


def test_a_round_that_is_skipped_leaves_the_adapter_and_the_strategy_as_they_were() -> None:
    run = open_run("skip")
    state = run.strategy_state
    rounds = []
    for result in run_rounds(run, LosesTheFirstRound()):
        rounds.append(result)
        if result.round == 1:
            assert run.strategy_state is state
    before, skipped, after = rounds
    assert skipped.adapter.sha256() == before.adapter.sha256() != after.adapter.sha256()
    assert "no answer" in skipped.lost[1]
    assert not after.lost


@pytest.mark.parametrize("was_asked", [True, False])
def test_what_is_sent_to_nobody_is_not_counted(was_asked: bool) -> None:
    """A client that stays away is asked nothing, and an adapter was counted for it in every round."""

    class LosesWho(LosesTheFirstRound):
        def train(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
            for result in super().train(tasks):
                yield replace(result, was_asked=was_asked) if isinstance(result, ClientFailure) else result

    _, first, second = (round_record(result) for result in run_rounds(open_run("skip"), LosesWho()))
    assert first["bytes_down"] == second["bytes_down"] // (1 if was_asked else 2)
    assert first.get("unasked", []) == ([] if was_asked else [1])


def test_else_the_run_ends_with_the_reason() -> None:
    with pytest.raises(TrainingError, match="no answer"):
        list(run_rounds(open_run("stop"), LosesTheFirstRound()))
