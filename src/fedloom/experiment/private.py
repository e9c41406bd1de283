"""Private runs: the terms of each client in the plan, and the rations that clients in this process train on."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedloom.adapters.adapter import Layout
from fedloom.data.tokens import ClientBlocks, count_copies
from fedloom.errors import RecipeError, RunError
from fedloom.experiment.central import describe_central, set_run_terms
from fedloom.federation.aggregation import Aggregate
from fedloom.federation.lora_rules import build_aggregate, trained_part
from fedloom.federation.noised_sum import noised_sum
from fedloom.host.files import hash_text, replace_file, writing
from fedloom.privacy.accounting import epsilon
from fedloom.privacy.central import CentralNoise
from fedloom.privacy.noise import SECRET_BYTES, check_cipher, derive_key
from fedloom.privacy.ration import Ration, Terms, set_terms
from fedloom.recipe.recipe import Recipe
from fedloom.records.plan import Plan
from fedloom.records.privacy import count_units
from fedloom.records.state import hash_tensors
from fedloom.text import round_down
from fedloom.training.jobs import ClientTask

SECRET = "secret"
"""File of a run directory from which its noise comes; it is removed once the run is done."""


def plan_privacy(plan: Plan, recipe: Recipe, clients: Sequence[ClientBlocks]) -> Plan:
    """Return the plan with what a private run promises of one unit; as it is where the recipe has no bound.

    Raises:
        RecipeError: the package with the cipher is missing, or δ is too large for so few units.
    """
    if recipe.privacy is None:
        return plan
    check_cipher()
    if recipe.bounds_clients:
        return replace(plan, privacy=describe_central(recipe, plan))
    able = {client: held.train for client, held in enumerate(clients) if len(held.train)}
    terms = {client: set_client_terms(recipe, train.num_units) for client, train in able.items()}
    copies, repeated = max(map(count_copies, able.values())), sum(train.repeated for train in able.values())
    return promise(plan, recipe, terms, copies=copies, repeated=repeated)


def promise(plan: Plan, recipe: Recipe, terms: Mapping[int, Terms], **known: Any) -> Plan:
    """Return the plan of a private run with what its clients' terms promise, and what else is `known`."""
    assert recipe.privacy is not None, "a recipe without a bound"
    rounds = recipe.federation.rounds
    worst = max(terms.values(), key=lambda one: one.noise_over_signal(plan.trainable_parameters, rounds, 1))
    return replace(
        plan,
        privacy={
            "unit": recipe.privacy.unit,
            "adjacency": "zero-out",
            "delta": recipe.privacy.delta,
            "max_norm": recipe.privacy.max_norm,
            "noise": recipe.privacy.noise,
            **known,
            "noise_over_signal": worst.noise_over_signal(plan.trainable_parameters, rounds, plan.clients_per_round),
            "clients": {
                str(client): {
                    "units": one.units,
                    "rate": one.rate,
                    "noise_multiplier": one.noise_multiplier,
                    "steps": one.steps,
                    "epsilon": one.epsilon(rounds),
                    "recognised": one.recognised(rounds),
                }
                for client, one in terms.items()
            },
        },
    )


def set_client_terms(recipe: Recipe, units: int, least_noise: float = 0.0) -> Terms:
    """Return the terms of a client with so many units, with its own least noise where the recipe has less.

    Raises:
        RecipeError: δ is above one over their number, at which a whole one may be told.
    """
    assert recipe.privacy is not None, "a recipe without a bound"
    if recipe.privacy.delta > 1 / units:
        raise RecipeError(
            f"{recipe.privacy.delta:g} is more than one over the {count_units(recipe.privacy.unit, units)} of a client:"
            " to tell one whole would keep it",
            where="privacy.delta",
            mend=f"at most {round_down(1 / units)}, better a hundredth of that",
        )
    terms = set_terms(
        units=units,
        batch=recipe.training.step_size,
        steps=recipe.training.steps_of(units),
        rounds=recipe.federation.rounds,
        max_norm=recipe.privacy.max_norm,
        delta=recipe.privacy.delta,
        target=recipe.privacy.epsilon,
        noise_multiplier=recipe.privacy.noise_multiplier,
    )
    return replace(terms, noise_multiplier=max(terms.noise_multiplier, least_noise))


def seed_secret(recipe: Recipe) -> bytes:
    """Return what noise of the recipe's seed comes from: the same wherever it is trained, and no secret."""
    return bytes.fromhex(hash_text(f"not private: {recipe.seed}"))


def derive_ration(secret: bytes, terms: Terms, documents: str, task: ClientTask) -> Ration:
    """Return the ration of a task: its noise depends on all that the answer depends on, and on the secret."""
    facts = (
        *(task.round, task.client, task.trial, task.rounds, task.seed),
        # Which devices of a machine train changes nothing, and a run never goes on with others.
        *(task.adapter.sha256(), task.training.model_dump_json(exclude={"devices"}), documents, asdict(terms)),
    )
    return Ration(terms, derive_key(secret, *map(str, facts)))


class Rations:
    """Rations of the clients in this process, each for one task of its client, with an owner's least noise."""

    def __init__(
        self, recipe: Recipe, clients: Sequence[ClientBlocks], secret: bytes, least_noise: float = 0.0
    ) -> None:
        self._secret = secret
        self._held = {
            client: (set_client_terms(recipe, held.train.num_units, least_noise), hash_tensors(held.train.tensors))
            for client, held in enumerate(clients)
            if len(held.train)
        }

    def __call__(self, task: ClientTask) -> Ration:
        """Return the ration for a task."""
        return derive_ration(self._secret, *self._held[task.client], task)


def open_rations(recipe: Recipe, clients: Sequence[ClientBlocks], folder: Path) -> Rations | None:
    """Return the rations of a run that is kept in a folder; None where the recipe has no bound.

    Raises:
        RunError: the run's secret is damaged.
    """
    if not recipe.bounds_documents:
        return None
    return Rations(recipe, clients, _open_secret(recipe, folder / SECRET))


def open_aggregate(recipe: Recipe, clients: Sequence[ClientBlocks], layout: Layout, folder: Path) -> Aggregate:
    """Return the recipe's strategy for a run that is kept in a folder, noised where its clients are protected.

    Raises:
        RunError: the run's secret is damaged.
    """
    strategy = build_aggregate(recipe.federation)
    if not recipe.bounds_clients:
        return strategy
    able = [held.train for held in clients if len(held.train)]
    documents = hash_tensors(tensor for train in able for tensor in train.tensors)
    terms = set_run_terms(recipe, len(able))
    told = recipe.model_dump_json(exclude={"training": {"devices"}}), documents
    central = CentralNoise(terms, _open_secret(recipe, folder / SECRET), told)
    return noised_sum(strategy, central, partial(trained_part, layout, recipe.federation.lora_rule))


def _open_secret(recipe: Recipe, path: Path) -> bytes:
    """Return a run's secret, a new one where it has none yet; its owner alone may read it."""
    assert recipe.privacy is not None, "a recipe without a bound"
    if recipe.privacy.noise == "seed":
        return seed_secret(recipe)
    if not path.exists():
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, os.urandom(SECRET_BYTES), 0o600)
    secret = path.read_bytes()
    if len(secret) != SECRET_BYTES:
        raise RunError(
            "the secret of a private run is damaged", where=str(path), mend="remove it: later rounds have other noise"
        )
    return secret


class Account:
    """Account of what a run's rounds have spent: each is added once, when it is complete; `privacy` is a plan's."""

    def __init__(self, privacy: Mapping[str, Any]) -> None:
        self._privacy = privacy
        self._rounds = 0
        self._taken = Counter[int]()

    def add(self, round: int, clients: Sequence[int]) -> None:
        """Add a round, and the clients whose updates it took."""
        # Round 0 only evaluates.
        self._rounds += round > 0
        self._taken.update(clients)

    @property
    def epsilon(self) -> float:
        """Return the largest ε that a client's documents have spent, or that a client has, where those are noised."""
        told = self._privacy
        if "central" in told:
            return epsilon(told["central"]["rate"], told["central"]["noise_multiplier"], self._rounds, told["delta"])
        costs = {
            (one["rate"], one["noise_multiplier"], self._taken[int(client)] * one["steps"])
            for client, one in told["clients"].items()
        }
        return max(epsilon(*cost, told["delta"]) for cost in costs)
