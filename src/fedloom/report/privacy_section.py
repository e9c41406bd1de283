"""The report's section about privacy: what is promised of one unit and what is not, or that nothing is."""

from __future__ import annotations

from fedloom.recipe.privacy_section import DOCUMENT
from fedloom.records.privacy import NO_BOUND, list_promises
from fedloom.records.run import Run
from fedloom.report.document import Block, Table, Text

SHOWN = 20
"""Clients whose terms are shown, those with the largest ε."""


def show_privacy(run: Run) -> list[Block]:
    """Show what a run promises of one unit, with each client's terms."""
    privacy = run.plan.get("privacy")
    if not privacy:
        return [Text(NO_BOUND)]
    spent = run.rounds[-1].get("epsilon") if run.rounds else None
    clients = sorted(privacy["clients"].items(), key=lambda pair: -pair[1]["epsilon"])
    rows = [
        [
            client,
            f"{told['units']:,}",
            f"{told['noise_multiplier']:.3g}",
            f"{told['epsilon']:.3g}",
            f"{100 * told['recognised']:.2g} %",
        ]
        for client, told in clients[:SHOWN]
    ]
    unit = "Documents" if privacy["unit"] == DOCUMENT else f"Values of {privacy['unit']}"
    columns = ["Client", unit, "Noise multiplier", "ε of the run", "Recognised at 1 % false alarms"]
    return [*map(Text, list_promises(privacy, spent)), Table(columns, rows)]
