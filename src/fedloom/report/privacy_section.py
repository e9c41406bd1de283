"""The report's section about privacy: what is promised of one unit and what is not, or that nothing is."""

from __future__ import annotations

from fedloom.recipe.privacy_section import DOCUMENT
from fedloom.records.privacy import NO_BOUND, list_promises
from fedloom.records.run import Run
from fedloom.report.document import Block, Table, Text
from fedloom.text import format_share

SHOWN = 20
"""Clients whose terms are shown, those with the largest ε."""


def show_privacy(run: Run) -> list[Block]:
    """Show what a run promises of one unit, with each client's terms where these noise for themselves."""
    privacy = run.plan.get("privacy")
    if not privacy:
        return [Text(NO_BOUND)]
    spent = run.rounds[-1].get("epsilon") if run.rounds else None
    promises: list[Block] = [*map(Text, list_promises(privacy, spent))]
    if "central" in privacy:
        if run.rounds and "next_max_norm" in run.rounds[-1]:
            norms = [record["next_max_norm"] for record in run.rounds]
            promises.append(Text(f"The norm was led from {norms[0]:.3g} to {norms[-1]:.3g}."))
        return promises
    elsewhere = run.plan.get("elsewhere", ())
    clients = sorted(privacy["clients"].items(), key=lambda pair: -pair[1]["epsilon"])
    rows = [
        [
            f"{client} ({elsewhere[int(client)]})" if elsewhere else client,
            f"{told['units']:,}",
            f"{told['noise_multiplier']:.3g}",
            f"{told['epsilon']:.3g}",
            format_share(told["recognised"]),
        ]
        for client, told in clients[:SHOWN]
    ]
    unit = "Documents" if privacy["unit"] == DOCUMENT else f"Values of {privacy['unit']}"
    columns = ["Client", unit, "Noise multiplier", "ε of the run", "Recognised at 1 % false alarms"]
    return [*promises, Table(columns, rows)]
