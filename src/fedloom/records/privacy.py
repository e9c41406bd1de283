"""The words in which plans, reports and cards say what a run promises about one unit: a document, a client.

No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedloom.recipe.privacy_section import CLIENT, DOCUMENT
from fedloom.text import count, format_share

NOT_PRIVATE = "NOT PRIVATE: its noise comes from the recipe's seed, which whoever has the recipe can take off"
NO_BOUND = (
    "Nothing bounds what the clients' updates tell of their documents: whoever saw them may be able to tell which"
    " documents were there, and read parts of them ([privacy] sets a bound)."
)
CENTRAL = "the server is trusted, and sees every update as it is"
WORTH, NOISE_ALONE = 0.2, 1.0
"""Noise over signal below which a private run is worth trying, and above which noise moves more: a rule of thumb."""


def count_units(unit: str, number: int) -> str:
    """Count units: `12 documents`, or `12 values of "author"`."""
    return count(number, DOCUMENT) if unit == DOCUMENT else f'{count(number, "value")} of "{unit}"'


def name_units(unit: str) -> str:
    """Name units: `documents`, or `values of "author"`."""
    return "documents" if unit == DOCUMENT else f'values of "{unit}"'


def name_unit(unit: str) -> str:
    """Name any one unit: `any one document`, or `all documents of any one author together`."""
    return f"any one {unit}" if unit in (DOCUMENT, CLIENT) else f"all documents of any one {unit} together"


def each_unit(unit: str) -> str:
    """Name each unit by itself: `each document`, or `all documents of one author together`."""
    return f"each {unit}" if unit in (DOCUMENT, CLIENT) else f"all documents of one {unit} together"


def name_worst(privacy: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the client whose units have the largest ε, and its terms."""
    client: str = max(privacy["clients"], key=lambda number: privacy["clients"][number]["epsilon"])
    return client, privacy["clients"][client]


def terms_of(privacy: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the terms that a run's promise rests on: those of the server, or of the client that they are least for."""
    terms: Mapping[str, Any] = privacy["central"] if "central" in privacy else name_worst(privacy)[1]
    return terms


def explain_privacy(privacy: Mapping[str, Any]) -> str:
    """Say in a line what is promised of one unit, at the client that it is least for."""
    terms, unit = terms_of(privacy), privacy["unit"]
    told = (
        f"ε = {terms['epsilon']:.3g}, δ = {privacy['delta']:g} for {each_unit(unit)}, over the whole run; an attack"
        f" with 1 % false alarms recognises at most {format_share(terms['recognised'])} of them"
    )
    if repeated := privacy.get("repeated"):
        told += f"; {count_units(unit, repeated)} left out, each equal to another one"
    if privacy.get("copies", 1) > 1:
        told += f"; {explain_copies(privacy)}"
    if "central" in privacy:
        told += f"; {CENTRAL}"
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
    share = privacy["noise_over_signal"]
    if share < WORTH:
        verdict = "worth trying"
    elif share > NOISE_ALONE:
        verdict = "noise moves more than training can, so most of what is learnt may be lost in it"
    else:
        verdict = "some of what is learnt may be lost in it"
    how = _explain_rounds(privacy) if "central" in privacy else _explain_steps(privacy)
    return (
        f"{how}; noise over signal after the run {share:.2g}: {verdict} (a rule of thumb, with bounds at {WORTH:g}"
        f" and {NOISE_ALONE:g}; the held-out loss tells what was learnt)"
    )


def _explain_steps(privacy: Mapping[str, Any]) -> str:
    """Say what each step of a client does to its units' gradients: of clients that differ, the one it is least for."""
    (client, terms), unit = name_worst(privacy), privacy["unit"]
    how = {(told["rate"], told["noise_multiplier"], told["steps"]) for told in privacy["clients"].values()}
    whose = f"at client {client}, whose ε is the largest, " if len(how) > 1 else ""
    noise = f"{terms['noise_multiplier']:.3g} times that, {terms['steps']:,} times a round"
    drawn, taken = ("a document", "") if unit == DOCUMENT else (f"each {unit}", "takes one of its texts by chance, ")
    return (
        f"{whose}each step draws {drawn} with probability {terms['rate']:.3g}, {taken}scales its gradient to a norm of"
        f" at most {privacy['max_norm']:g}, and adds noise of {noise}"
    )


def _explain_rounds(privacy: Mapping[str, Any]) -> str:
    """Say what each round does to its clients' changes."""
    terms = privacy["central"]
    expected = terms["rate"] * terms["clients"]
    led = f", led to leave {100 * terms['quantile']:g} % of them as they are" if "quantile" in terms else ""
    return (
        f"each round draws each of {terms['clients']:,} clients with probability {terms['rate']:.3g}, scales its change"
        f" to a norm of at most {privacy['max_norm']:g}{led}, adds noise of {terms['change_noise']:.3g} times that, and"
        f" divides by {expected:.4g}: noise {terms['noise_over_norm']:.2g} times the norm"
    )


def list_promises(privacy: Mapping[str, Any], spent: float | None) -> list[str]:
    """Return paragraphs for a report: what is promised, how, and what is not."""
    terms, unit, central = terms_of(privacy), privacy["unit"], "central" in privacy
    so_far = "" if spent is None else f" The rounds of this run have spent ε = {spent:.3g}."
    seen = (
        "the adapters of all rounds" if central else "everything that left the clients (every adapter of every round)"
    )
    others = f"that {unit}" if unit in (DOCUMENT, CLIENT) else "them"
    return [
        *([f"This run is {NOT_PRIVATE}."] if privacy["noise"] == "seed" else []),
        f"Whoever sees {seen} learns little about {name_unit(unit)}: ε = {terms['epsilon']:.3g}, δ ="
        f" {privacy['delta']:g}, against the same run with {others} left out.{so_far} An attack that accepts 1 % false"
        f" alarms recognises at most {format_share(terms['recognised'])} of them.",
        f"How: {explain_noise(privacy)}.",
        _list_not_promised_of_clients() if central else _list_not_promised_of_units(privacy),
    ]


def _list_not_promised_of_units(privacy: Mapping[str, Any]) -> str:
    unit, copies = privacy["unit"], f" ({explain_copies(privacy)})" if privacy.get("copies", 1) > 1 else ""
    beyond, those = (
        ("documents of one person together", "documents")
        if unit == DOCUMENT
        else (f"one person's texts under two values of {unit}", "of them")
    )
    return (
        f"Not promised: {beyond}; copies{copies}; how many {those} a client has; how long it took; what the base model"
        " knew before; attacks on the rounding of floating-point numbers; that the server averaged honestly."
    )


def _list_not_promised_of_clients() -> str:
    return (
        "Not promised: anything against the server, which sees every update as it is; anything about this folder,"
        " which names who took part in a round and tells their losses: give away adapters and their cards alone;"
        " one person's documents at several clients; how many clients there are; what the base model knew before;"
        " attacks on the rounding of floating-point numbers."
    )
