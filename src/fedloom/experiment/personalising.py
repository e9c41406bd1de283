"""Clients' own adapters: when the rounds are over, each client goes on by itself from the best global adapter.

It is the training of one more round, on the client's own documents, without the proximal term, and with a schedule of
its own; nothing of it is averaged. Its adapter is the client's: no other client is told of it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fedloom.adapters.adapter import Adapter
from fedloom.experiment.session import Session
from fedloom.experiment.trial import Trial
from fedloom.federation.fleet import LocalFleet
from fedloom.federation.lora_rules import adapter_of_rank, open_own_parts, trained_part
from fedloom.host.failpoints import failpoint
from fedloom.host.files import clear_unfinished, writing
from fedloom.recipe.recipe import Recipe
from fedloom.recipe.sections import Personalise
from fedloom.records.card import Owner, write_card
from fedloom.records.run import read_run
from fedloom.text import count
from fedloom.training.jobs import ClientFailure, ClientTask


def personalise(trial: Trial, session: Session, section: Personalise) -> None:
    """Let every client go on, keep its adapter in `clients/N/adapter`, and write down how it does on its own hold-out.

    All of them train in one pass, where the engine can.
    """
    folder = trial.recorder.writer.folder
    session.begin_stage("personalise")
    best = session.adapted.open(folder / "adapters" / "best")
    fleet = LocalFleet(
        trial.prepared.clients, session.train_clients, session.scorer(trial.recipe.evaluation.batch_size)
    )
    before = fleet.evaluate(best)
    run = read_run(folder)
    found: dict[int, dict[str, Any]] = {}
    for result in fleet.train(_tasks(trial, best)):
        client = result.client
        if isinstance(result, ClientFailure):
            found[client] = {"error": str(result.error)}
            continue
        report = result.report
        losses = {
            "global_loss": before[client].loss if client in before else None,
            "loss": report.holdout_loss_after,
        }
        found[client] = {
            "tokens": report.tokens,
            "steps": report.steps,
            **{name: loss for name, loss in losses.items() if loss is not None and math.isfinite(loss)},
            "adapter_sha256": result.adapter.sha256(),
        }
        owner = Owner(client, _explain(section, found[client].get("global_loss")))
        card = _card(trial, run.best_round or 0, found[client].get("loss"), owner)
        _save(session, folder, client, result.adapter, card)
    told = {"round": run.best_round, "clients": {str(client): found[client] for client in sorted(found)}}
    trial.recorder.writer.write_json("personalised.json", told)
    failpoint("personalised.written")


def write_own_adapters(trial: Trial, session: Session) -> None:
    """Keep each client's own adapter as it was after the last round, where the rule leaves it a part of its own."""
    adapted, folder = session.adapted, trial.recorder.writer.folder
    own = open_own_parts(
        adapted.layout, trial.recipe.federation.lora_rule, lambda: adapted.open(folder / "adapters" / "initial")
    )
    if own is None:
        return
    own.restore(trial.fleet.own_parts)
    losses = trial.past_rounds()[-1].get("client_losses", {})
    found = {}
    for client in trial.fleet.clients:
        adapter = own.adapter_of(client, trial.run.adapter)
        owner = Owner(
            client, f"In the place of the mean of all clients' B it has client {client}'s own, which no other has."
        )
        _save(session, folder, client, adapter, _card(trial, trial.run.completed, losses.get(str(client)), owner))
        found[str(client)] = {"adapter_sha256": adapter.sha256()}
    trial.recorder.writer.write_json("personalised.json", {"round": trial.run.completed, "clients": found})


def _card(trial: Trial, round: int, loss: float | None, owner: Owner) -> str:
    """Return the card of a client's own adapter, with the loss on what that client holds out, if there is one."""
    figures = {} if loss is None else {"own_loss": loss}
    return write_card(trial.recipe, trial.prepared.plan, {"round": round, **figures}, owner)


def _save(session: Session, folder: Path, client: int, adapter: Adapter, card: str) -> None:
    home = folder / "clients" / str(client)
    clear_unfinished(home)
    with writing(home):
        session.adapted.save(adapter, home / "adapter", card)


def _tasks(trial: Trial, best: Adapter) -> list[ClientTask]:
    """Return the task of each client that has something to train on: one more round than the run had."""
    able = [client for client, held in enumerate(trial.prepared.clients) if len(held.train)]
    return [personal_task(trial.recipe, best, client, trial.run.completed + 1) for client in able]


def personal_task(recipe: Recipe, best: Adapter, client: int, round: int) -> ClientTask:
    """Return what a client goes on with by itself, wherever it is, over as many epochs as `personalise` says.

    `round` is one more than the run had.
    """
    assert recipe.personalise is not None, "a recipe without it asks for none"
    ranks = recipe.federation.client_ranks
    rank = ranks[client] if ranks else None
    return ClientTask(
        round=round,
        client=client,
        adapter=adapter_of_rank(best, rank),
        training=recipe.personalise.alone(recipe.training),
        rounds=round,
        seed=recipe.seed,
        # Both factors, also where the federation's rule trains one after the other.
        trains_P=trained_part(best.layout, "factors", round, rank),
    )


def _explain(section: Personalise, before: float | None) -> str:
    """Return what the card of a client's own adapter says of how it came about."""
    began = "" if before is None else f", whose loss on what this client holds out is {before:.4f},"
    return (
        f"From the best adapter of all clients{began} it went on by itself,"
        f" {count(section.epochs, 'epoch')} over this client's documents."
    )
