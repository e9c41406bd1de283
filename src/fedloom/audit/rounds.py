"""Rounds of one client by itself, as a recipe has them: what a server would have been sent.

Letters: P adapter parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fedloom.adapters.adapter import Adapter
from fedloom.audit.attack import Sent
from fedloom.data.tokens import ClientBlocks
from fedloom.evaluation.held_out import Asked, Score
from fedloom.federation.fleet import LocalFleet, Scorer
from fedloom.federation.lora_rules import open_own_parts, shared_part, trained_part
from fedloom.federation.schedule import proximal_mu
from fedloom.privacy.ration import Ration
from fedloom.training.jobs import ClientFailure, ClientTask, TrainClients

if TYPE_CHECKING:
    from fedloom.recipe.sections import Federation
    from fedloom.recipe.training_section import Training


def train_alone(
    clients: Sequence[ClientBlocks],
    initial: Adapter,
    train_clients: TrainClients,
    training: Training,
    federation: Federation,
    seed: int,
    rations: Callable[[ClientTask], Ration] | None = None,
) -> list[list[Sent]]:
    """Train each client for all rounds, each from its own last adapter, and return what each would have sent.

    Nobody else is there to be averaged with, and nothing is held out: an adaptive μ stays what it was. The last entry's
    start and change together are the adapter that training ended with, as far as it was sent.

    Raises:
        TrainingError: a client failed.
    """
    layout, rule, rounds = initial.layout, federation.lora_rule, federation.rounds
    shares_P = shared_part(layout, rule)
    own = open_own_parts(layout, rule, lambda: initial)
    fleet = LocalFleet(clients, train_clients, Scorer(_score_nothing), (), own, rations)
    starts, sent = [initial] * len(clients), [list[Sent]() for _ in clients]
    for round in range(1, rounds + 1):
        mu = proximal_mu(training, [None] * round, rounds)
        tasks = [
            ClientTask(
                round=round,
                client=client,
                adapter=starts[client],
                training=training.model_copy(update={"proximal_mu": mu, "clients_at_once": len(clients)}),
                rounds=rounds,
                seed=seed,
                trains_P=trained_part(layout, rule, round),
                shares_P=shares_P,
            )
            for client in range(len(clients))
        ]
        for result in fleet.train(tasks):
            if isinstance(result, ClientFailure):
                raise result.error
            client, start = result.client, fleet.adapter_of(result.client, starts[result.client])
            # A whole model's weights are lent.
            after = Adapter(layout, result.adapter.weights_P.clone(), initial.residual)
            sent[client].append(Sent(starts[client], _shared(after.weights_P - start.weights_P, shares_P)))
            starts[client] = after
    return sent


def adapter_after(sent: Sequence[Sent]) -> Adapter:
    """Return the adapter that updates ended with."""
    start, change_P = sent[-1]
    return Adapter(start.layout, start.weights_P + change_P, start.residual)


def _shared(change_P: Tensor, shares_P: Tensor | None) -> Tensor:
    return change_P if shares_P is None else change_P * shares_P


def _score_nothing(asked: Sequence[Asked]) -> list[Score]:
    raise AssertionError("no client is scored")
