"""Baselines that a federation is set against: no training, each client alone, and all documents together.

Each baseline starts from the run's own adapter, trains as the run does but for the proximal term, on as many tokens as
the federation had for the same documents, and is judged on the same hold-out, by the same measure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fedloom.adapters.adapter import Adapter
from fedloom.data.tokens import ClientBlocks, TokenBlocks, join_blocks
from fedloom.errors import TrainingError
from fedloom.evaluation.held_out import Score
from fedloom.federation.fleet import LocalFleet, Scorer
from fedloom.federation.lora_rules import build_aggregate
from fedloom.federation.rounds import FederatedRun, RoundResult
from fedloom.federation.schedule import cohort_size
from fedloom.recipe.sections import Federation
from fedloom.training.jobs import TrainClients

if TYPE_CHECKING:
    from fedloom.recipe.recipe import Recipe


@dataclass
class Baseline:
    """A run of one client that stands for a client alone; or, where `client` is None, for all of them together."""

    client: int | None
    run: FederatedRun
    fleet: LocalFleet
    rounds: int
    """Rounds after which it ends."""
    losses: list[float] = field(default_factory=list)
    """Losses on the run's own hold-out, round 0 first."""
    tokens: int = 0
    """Tokens trained on."""
    score_own: Callable[[Adapter], Score] | None = None
    """Scores an adapter on what the client itself holds out, where it does."""
    own_loss: float | None = None
    """Loss of the best adapter there."""
    best: Adapter | None = None
    """Adapter with the lowest loss so far: of equal ones, the last."""
    error: str | None = None

    def note(self, result: RoundResult | TrainingError) -> None:
        """Keep the baseline's next round, or why it ended."""
        if isinstance(result, TrainingError):
            self.error = str(result)
        else:
            assert result.judged_loss is not None, "a baseline is evaluated after every round"
            if all(result.judged_loss <= loss for loss in self.losses):
                self.best = result.adapter
                self.own_loss = self.score_own(result.adapter).loss if self.score_own else None
            self.losses.append(result.judged_loss)
            self.tokens += sum(report.tokens for report in result.reports)
            if result.round == self.rounds:
                self.run.stop("as many rounds as the run has")


class _Alone(LocalFleet):
    """Fleet of one that trains, whose adapters are judged on what clients of the run hold out: by number, `judges`."""

    def __init__(
        self, train: TokenBlocks, train_clients: TrainClients, scorer: Scorer, judges: Mapping[int, TokenBlocks]
    ) -> None:
        nothing = train.take(torch.zeros(0, dtype=torch.int64))
        super().__init__([ClientBlocks(train, nothing)], train_clients, scorer, scored_clients=())
        self._judges = judges

    def evaluate(self, adapter: Adapter) -> dict[int, Score]:
        """Score an adapter on each of those hold-outs."""
        scores = self._scorer.score([(adapter, blocks) for blocks in self._judges.values()])
        return dict(zip(self._judges, scores, strict=True))


def baseline_rounds(recipe: Recipe, able: int, rounds: int) -> int:
    """Return the rounds of a baseline that has as many tokens as so many rounds of so many able clients have."""
    return max(1, round(rounds * cohort_size(able, recipe.federation) / able))


def set_up_baselines(
    recipe: Recipe,
    clients: Sequence[ClientBlocks],
    central: TokenBlocks,
    initial: Adapter,
    train_clients: TrainClients,
    scorer: Scorer,
    *,
    rounds: int,
    scored_clients: Sequence[int],
    first_trial: int = 0,
) -> list[Baseline]:
    """Return the recipe's baselines, ready to begin, for a federation of so many rounds.

    `scored_clients` are those whose hold-outs judge where there is no central one, as they judge the run.
    """
    able = {number: client.train for number, client in enumerate(clients) if len(client.train)}
    training = recipe.training.model_copy(update={"proximal_mu": 0.0, "proximal_schedule": "constant"})
    # As many are planned as the run has planned, so that a schedule of all rounds is where the run's is as it ends.
    section = recipe.federation
    planned, rounds = (baseline_rounds(recipe, len(able), number) for number in (section.rounds, rounds))
    federation = Federation(rounds=planned, max_share=section.max_share)
    judges = {} if len(central) else {client: clients[client].holdout for client in scored_clients}

    def score_central(adapter: Adapter) -> Score | None:
        return _score_on(scorer, central, adapter) if len(central) else None

    data: dict[int | None, TokenBlocks] = {}
    if "pooled" in recipe.baselines:
        data[None] = join_blocks([*able.values()])
    if "local" in recipe.baselines:
        data |= dict(able.items())
    found: list[Baseline] = []
    for trial, (client, blocks) in enumerate(data.items(), start=first_trial):
        fleet = _Alone(blocks, train_clients, scorer, judges)
        aggregate = build_aggregate(federation)
        told = training
        if client is None and training.max_steps:
            steps = sum(training.steps_of(len(part)) for part in able.values())
            told = training.model_copy(update={"max_steps": steps})
        run = FederatedRun(told, federation, recipe.seed, fleet, aggregate, score_central, initial, trial=trial)
        baseline = Baseline(client, run, fleet, rounds)
        if client is not None and len(own := clients[client].holdout):
            baseline.score_own = partial(_score_on, scorer, own)
        found.append(baseline)
    return found


def _score_on(scorer: Scorer, blocks: TokenBlocks, adapter: Adapter) -> Score:
    (found,) = scorer.score([(adapter, blocks)])
    return found


def describe(baselines: Sequence[Baseline], run: FederatedRun, wanted: Sequence[str]) -> dict[str, Any]:
    """Return what `baselines.json` holds of each baseline: losses by round, tokens, its adapter, or why it failed.

    A client alone has `own_loss` too: that of its best adapter on its own hold-out.
    """

    def one(baseline: Baseline) -> dict[str, Any]:
        told: dict[str, Any] = {"losses": baseline.losses, "tokens": baseline.tokens}
        if baseline.own_loss is not None and math.isfinite(baseline.own_loss):
            told["own_loss"] = baseline.own_loss
        if baseline.error is not None:
            return {**told, "error": baseline.error}
        return told if baseline.best is None else {**told, "adapter_sha256": baseline.best.sha256()}

    record: dict[str, Any] = {"round0": {"losses": run.losses[:1], "tokens": 0}} if "round0" in wanted else {}
    for baseline in baselines:
        if baseline.client is None:
            record["pooled"] = one(baseline)
        else:
            record.setdefault("local", {})[str(baseline.client)] = one(baseline)
    return record
