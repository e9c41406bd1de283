"""The words in which plans, reports and cards say what a run promises about one unit. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedloom.recipe.privacy_section import DOCUMENT
from fedloom.text import count

NOT_PRIVATE = "NOT PRIVATE: its noise comes from the recipe's seed, which whoever has the recipe can take off"
NO_BOUND = (
    "Nothing bounds what the clients' updates tell of their documents: whoever saw them may be able to tell which"
    " documents were there, and read parts of them ([privacy] sets a bound)."
)
WORTH, NOISE_ALONE = 0.2, 1.0
"""Noise over signal below which a private run is worth trying, and above which it learns noise: a rule of thumb."""


def count_units(unit: str, number: int) -> str:
    """Count units: `12 documents`, or `12 values of "author"`."""
    return count(number, DOCUMENT) if unit == DOCUMENT else f'{count(number, "value")} of "{unit}"'


def name_worst(privacy: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the client whose units have the largest ε, and its terms."""
    client: str = max(privacy["clients"], key=lambda number: privacy["clients"][number]["epsilon"])
    return client, privacy["clients"][client]


def explain_privacy(privacy: Mapping[str, Any]) -> str:
    """Say in a line what is promised of one unit, at the client that it is least for."""
    _, terms = name_worst(privacy)
    unit = privacy["unit"]
    one = "each document" if unit == DOCUMENT else f"all documents of one {unit} together"
    told = (
        f"ε = {terms['epsilon']:.3g}, δ = {privacy['delta']:g} for {one}, over the whole run; an attack with 1 % false"
        f" alarms recognises at most {100 * terms['recognised']:.2g} % of them"
    )
    if repeated := privacy.get("repeated"):
        told += f"; {count_units(unit, repeated)} left out, each equal to another one"
    if privacy["copies"] > 1:
        told += f"; {explain_copies(privacy)}"
    return f"{told}; {NOT_PRIVATE}" if privacy["noise"] == "seed" else told


def explain_copies(privacy: Mapping[str, Any]) -> str:
    """Say what is left of the promise for a text that several units have: of k units, kε and k exp((k - 1)ε) δ."""
    _, terms = name_worst(privacy)
    copies, one = privacy["copies"], terms["epsilon"]
    # Beyond 1, δ promises nothing; far beyond, it is no number of a computer's.
    delta = min(1.0, privacy["delta"] * copies * math.exp(min(100.0, (copies - 1) * one)))
    return (
        f"{count_units(privacy['unit'], copies)} of a client have the same text, for which ε is {copies * one:.3g} and"
        f" δ {delta:.2g}"
    )


def explain_noise(privacy: Mapping[str, Any]) -> str:
    """Say in a line how that is kept, and whether there is anything left to learn."""
    _, terms = name_worst(privacy)
    share = privacy["noise_over_signal"]
    verdict = "worth trying" if share < WORTH else "lost in noise" if share > NOISE_ALONE else "on the border"
    noise = f"{terms['noise_multiplier']:.3g} times that, {terms['steps']:,} times a round"
    unit = privacy["unit"]
    drawn, taken = ("a document", "") if unit == DOCUMENT else (f"each {unit}", "takes one of its texts by chance, ")
    return (
        f"each step draws {drawn} with probability {terms['rate']:.3g}, {taken}scales its gradient to a norm of at most"
        f" {privacy['max_norm']:g}, and adds noise of {noise}; noise over signal after the run {share:.2g}, {verdict}"
        f" (below {WORTH:g} it may learn, above {NOISE_ALONE:g} it learns noise)"
    )


def list_promises(privacy: Mapping[str, Any], spent: float | None) -> list[str]:
    """Return paragraphs for a report: what is promised, how, and what is not."""
    _, terms = name_worst(privacy)
    so_far = "" if spent is None else f" The rounds of this run have spent ε = {spent:.3g}."
    unit, copies = privacy["unit"], f" ({explain_copies(privacy)})" if privacy["copies"] > 1 else ""
    one, others, beyond = (
        ("any one document", "that document", "documents of one person together")
        if unit == DOCUMENT
        else (f"all documents of any one {unit} together", "them", f"one person's texts under two values of {unit}")
    )
    return [
        *([f"This run is {NOT_PRIVATE}."] if privacy["noise"] == "seed" else []),
        f"Whoever sees everything that left the clients (every adapter of every round) learns little about {one}:"
        f" ε = {terms['epsilon']:.3g}, δ = {privacy['delta']:g}, against the same run with {others} left out.{so_far}"
        f" An attack that accepts 1 % false alarms recognises at most {100 * terms['recognised']:.2g} % of them.",
        f"How: {explain_noise(privacy)}.",
        f"Not promised: {beyond}; copies{copies}; how many {'documents' if unit == DOCUMENT else 'of them'} a client"
        " has; how long it took; what the base model knew before; attacks on the rounding of floating-point numbers;"
        " that the server averaged honestly.",
    ]
