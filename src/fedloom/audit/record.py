"""Record of an audit, as `audit.json` has it. Neither words of documents nor scores of single ones are in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from fedloom import __version__
from fedloom.audit.attack import Attack
from fedloom.privacy.ration import Terms
from fedloom.recipe.privacy_section import Privacy


def describe(kind: str, recipe: str, clients: Mapping[str, Sequence[Attack]], **facts: Any) -> dict[str, Any]:
    """Return the record of what was found of each client, by name, with facts about how."""
    return {
        "fedloom": __version__,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "kind": kind,
        "recipe": recipe,
        **facts,
        "clients": {name: [attack.to_json() for attack in attacks] for name, attacks in clients.items()},
    }


def describe_terms(terms: Terms, bound: Privacy, rounds: int) -> dict[str, Any]:
    """Return what a client's terms promise over all rounds."""
    return {
        "unit": bound.unit,
        "epsilon": terms.epsilon(rounds),
        "delta": terms.delta,
        "noise_multiplier": terms.noise_multiplier,
        "rate": terms.rate,
        "steps": rounds * terms.steps,
        "max_norm": terms.max_norm,
        "noise": bound.noise,
    }
