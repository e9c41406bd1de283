"""The words in which plans, reports and cards say what a run promises about one document. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOT_PRIVATE = "NOT PRIVATE: its noise comes from the recipe's seed, which whoever has the recipe can take off"
NO_BOUND = (
    "Nothing bounds what the clients' updates tell of their documents: whoever saw them may be able to tell which"
    " documents were there, and read parts of them ([privacy] sets a bound)."
)
WORTH, NOISE_ALONE = 0.2, 1.0
"""Noise over signal below which a private run is worth trying, and above which it learns noise: a rule of thumb."""


def name_worst(privacy: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the client whose documents have the largest ε, and its terms."""
    client: str = max(privacy["clients"], key=lambda number: privacy["clients"][number]["epsilon"])
    return client, privacy["clients"][client]


def explain_privacy(privacy: Mapping[str, Any]) -> str:
    """Say in a line what is promised of one document, at the client that it is least for."""
    _, terms = name_worst(privacy)
    told = (
        f"ε = {terms['epsilon']:.3g}, δ = {privacy['delta']:g} for each {privacy['unit']} over the whole run; an attack"
        f" with 1 % false alarms recognises at most {100 * terms['recognised']:.2g} % of them"
    )
    return f"{told}; {NOT_PRIVATE}" if privacy["noise"] == "seed" else told


def explain_noise(privacy: Mapping[str, Any]) -> str:
    """Say in a line how that is kept, and whether there is anything left to learn."""
    _, terms = name_worst(privacy)
    share = privacy["noise_over_signal"]
    verdict = "worth trying" if share < WORTH else "lost in noise" if share > NOISE_ALONE else "on the border"
    noise = f"{terms['noise_multiplier']:.3g} times that, {terms['steps']:,} times a round"
    return (
        f"each step draws a document with probability {terms['rate']:.3g}, scales its gradient to a norm of at most"
        f" {privacy['max_norm']:g}, and adds noise of {noise}; noise over signal after the run {share:.2g}, {verdict}"
        f" (below {WORTH:g} it may learn, above {NOISE_ALONE:g} it learns noise)"
    )


def list_promises(privacy: Mapping[str, Any], spent: float | None) -> list[str]:
    """Return paragraphs for a report: what is promised, how, and what is not."""
    _, terms = name_worst(privacy)
    so_far = "" if spent is None else f" The rounds of this run have spent ε = {spent:.3g}."
    copies = privacy.get("copies", 1)  # of clients on other machines nobody knows
    more = f" (the largest group of equal ones at a client: {copies}, for which ε is {copies} times as large)"
    return [
        *([f"This run is {NOT_PRIVATE}."] if privacy["noise"] == "seed" else []),
        f"Whoever sees everything that left the clients (every adapter of every round) learns little about any one"
        f" {privacy['unit']}: ε = {terms['epsilon']:.3g}, δ = {privacy['delta']:g}, against the same run with that"
        f" {privacy['unit']} left out.{so_far} An attack that accepts 1 % false alarms recognises at most"
        f" {100 * terms['recognised']:.2g} % of the documents.",
        f"How: {explain_noise(privacy)}.",
        f"Not promised: documents of one person together; copies{more if copies > 1 else ''}; how many documents a"
        " client has; how long it took; what the base model knew before; attacks on the rounding of floating-point"
        " numbers; that the server averaged honestly.",
    ]
