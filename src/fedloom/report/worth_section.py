"""The report's section for those who own the documents: what each client has of taking part, in words.

It knows clients by their numbers and documents by their losses: no text of theirs is in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from fedloom.records.run import Run
from fedloom.report.document import Block, Bullets, Table, Text
from fedloom.text import count, format_number


@dataclass(frozen=True)
class Worth:
    """Losses of one client's own hold-out, in nats per token, under each adapter that it could use; None: unknown."""

    before: float | None
    """Loss of the model as it was."""
    alone: float | None
    together: float | None
    """Loss of the global adapter."""
    personalised: float | None
    """Loss of the global adapter after the client went on from it by itself."""

    @property
    def shared(self) -> float | None:
        """Loss of what the client has of the federation: its personalised adapter's, or the global one's."""
        return self.together if self.personalised is None else self.personalised

    @property
    def gain(self) -> float | None:
        """Nats per token by which the client is better off than alone; None where one of the two is unknown."""
        return None if self.alone is None or self.shared is None else self.alone - self.shared


SAME = 1.0005
"""Ratio of two probabilities below which they are called the same."""
COLUMNS = {
    "before": "Untrained",
    "alone": "Alone",
    "together": "Together",
    "personalised": "Together, then by itself",
    "gain": "Gain over alone",
}
"""Columns of the table by what they show."""


def worth_of(run: Run) -> dict[int, Worth]:
    """Return what is on record of each client; empty for a run that was asked for nothing of it."""
    alone, own = run.baselines.get("local", {}), run.personalised.get("clients", {})
    if not alone and not own:
        return {}
    start = run.rounds[0].get("client_losses", {}) if run.rounds else {}
    best = run.rounds[run.best_round or 0].get("client_losses", {}) if run.rounds else {}
    found = {}
    for client in sorted({*alone, *own}, key=int):
        went_on = own.get(client, {})
        found[int(client)] = Worth(
            start.get(client),
            alone.get(client, {}).get("own_loss"),
            went_on.get("global_loss", best.get(client)),
            went_on.get("loss"),
        )
    return {client: worth for client, worth in found.items() if worth != Worth(*[None] * len(fields(Worth)))}


def show_worth(run: Run) -> list[Block]:
    """Show a row and a sentence for each client; nothing where nothing is on record."""
    found = worth_of(run)
    if not found:
        return []
    known = [key for key in COLUMNS if any(getattr(worth, key) is not None for worth in found.values())]
    rows = [
        [f"client {client}", *(format_number(getattr(worth, key), _FORMS.get(key, ".4f")) for key in known)]
        for client, worth in found.items()
    ]
    return [
        Text(
            "Each client's row is measured on its own documents, on those that it held out and that nobody trained on."
            " A loss says how much the next piece of a text surprises the model: lower is better. Alone, a client"
            " trained as long as it did in the federation; by itself afterwards, it trained on top of that."
        ),
        Table(["Client", *(COLUMNS[key] for key in known)], rows),
        *([Text(verdict)] if (verdict := _decide(list(found.values()))) else []),
        Bullets([sentence for client, worth in found.items() if (sentence := _say(client, worth))]),
    ]


_FORMS = {"gain": "+.4f"}


def likelier(nats: float) -> str:
    """Compare in words how likely the right next piece of a text is, with a loss lower by so many nats per token.

    A loss is the mean of −log p, so p is exp(nats) times what it was, as a geometric mean over the text.
    """
    times = math.exp(min(abs(nats), 50.0))
    if times < SAME:
        return "as likely as"
    if nats < 0:
        return f"{100 * (1 - 1 / times):.1f} % less likely than"
    return f"{times:,.1f} times as likely as" if times >= 2 else f"{100 * (times - 1):.1f} % more likely than"


def _decide(found: Sequence[Worth]) -> str:
    """Say for how many clients taking part was worth it; nothing where that is not known of any."""
    gains = [gain for worth in found if (gain := worth.gain) is not None]
    better = sum(gain > 0 for gain in gains)
    return f"Of {count(len(gains), 'client')}, {better} did better by taking part than alone." if gains else ""


def _say(client: int, worth: Worth) -> str:
    """Say in a sentence what one client has of the federation; nothing where too little is known."""
    said = []
    if worth.alone is not None and worth.together is not None:
        said.append(f"{likelier(worth.alone - worth.together)} with the adapter that it trained alone")
    if worth.personalised is not None and worth.together is not None:
        said.append(f"then {likelier(worth.together - worth.personalised)} before, when it has gone on by itself")
    if not said:
        return ""
    whose = "with the shared adapter" if worth.alone is not None else "with its own adapter"
    return f"Client {client}: {whose}, the right next word of its own texts is {', '.join(said)}."
