"""The report's section for those who own the documents: what each client has of taking part, in words.

It knows clients by their numbers and documents by their losses: no text of theirs is in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedloom.records.run import Record, Run
from fedloom.report import figures
from fedloom.report.document import Block, Bullets, Table, Text
from fedloom.text import count, format_number


@dataclass(frozen=True)
class Worth:
    """Worth of the federation to one client, and of the client to it, in nats per token; None: not on record.

    The first four are losses of its own hold-out, under each adapter that it could use.
    """

    before: float | None = None
    """Loss of the model as it was."""
    alone: float | None = None
    together: float | None = None
    """Loss of the global adapter."""
    personalised: float | None = None
    """Loss of the global adapter after the client went on from it by itself."""
    brings: float | None = None
    """Fall of the others' loss that comes of its being there."""
    shapley: float | None = None
    """Its share of what all of them bring together."""
    shapley_error: float | None = None
    """Standard error of that: 0 where it is no estimate."""

    @property
    def gain(self) -> float | None:
        """Nats per token by which the global adapter beats the client's own; None: not known.

        What going on by itself brought is no part of it: a client alone did not train that much longer.
        """
        return None if self.alone is None or self.together is None else self.alone - self.together

    @property
    def went_on(self) -> float | None:
        """Nats per token by which the loss fell as the client went on by itself; None: not known."""
        return None if self.together is None or self.personalised is None else self.together - self.personalised


@dataclass(frozen=True)
class Column:
    """A column of the table: its title, and the format of its numbers."""

    title: str
    form: str = ".4f"


COLUMNS = {
    "before": Column("Untrained"),
    "alone": Column("Alone"),
    "together": Column("Together"),
    "personalised": Column("Together, then by itself"),
    "gain": Column("Gain over alone", "+.4f"),
    "brings": Column("Brings to the others", "+.4f"),
    "shapley": Column("Shapley value", "+.4f"),
}
"""Columns of the table by what of a client they show."""


def worth_of(run: Run) -> dict[int, Worth]:
    """Return what is on record of each client; empty for a run that was asked for nothing of it."""
    alone, own = run.baselines.get("local", {}), run.personalised.get("clients", {})
    brought, shares = run.contributions.get("leave_one_out", {}), run.contributions.get("shapley", {})
    if not run.rounds or not (alone or own or brought):
        return {}
    first, best = (run.record_of(number).get("client_losses", {}) for number in (0, run.best_round or 0))
    found = {}
    for client in sorted({*alone, *own, *brought}, key=int):
        went_on, share = own.get(client, {}), shares.get(client, {})
        found[int(client)] = Worth(
            before=first.get(client),
            alone=alone.get(client, {}).get("own_loss"),
            together=went_on.get("global_loss", best.get(client)),
            personalised=went_on.get("loss"),
            brings=brought.get(client),
            shapley=share.get("value"),
            shapley_error=share.get("standard_error"),
        )
    return {client: worth for client, worth in found.items() if worth != Worth()}


def show_worth(run: Run) -> list[Block]:
    """Show a row and a sentence for each client; nothing where nothing is on record."""
    found = worth_of(run)
    if not found:
        return []
    central = run.plan.get("central_tokens", 0) > 0
    known = [key for key in COLUMNS if any(getattr(worth, key) is not None for worth in found.values())]
    rows = [[f"client {client}", *(_cell(worth, key) for key in known)] for client, worth in found.items()]
    sentences = [*_failures(run)]
    sentences += [sentence for client, worth in found.items() if (sentence := _say(client, worth, central=central))]
    return [
        *(
            [Text(" ".join(explain(run) for key, explain in _OWN.items() if key in known))]
            if {*_OWN} & {*known}
            else []
        ),
        *([Text(_OWN_PART)] if run.recipe["federation"].get("lora_rule") == "fedsa" and "together" in known else []),
        *([Text(_explain_brought(run, central=central))] if "brings" in known else []),
        *([Text(_explain_shapley(run.contributions))] if "shapley" in known else []),
        Table(["Client", *(COLUMNS[key].title for key in known)], rows),
        *([Text(verdict)] if (verdict := _decide(run, found)) else []),
        *([Bullets(sentences)] if sentences else []),
    ]


def _explain_alone(run: Run) -> str:
    """Say how long a client trained alone, beside how often it took part."""
    alone = max(len(told.get("losses", ())) for told in run.baselines["local"].values()) - 1
    took_part = figures.count_rounds(run).values()
    if {*took_part} <= {alone} or alone < 1:
        return "Alone, a client trained as long as it did in the federation."
    low, high = min(took_part), max(took_part)
    times = f"{low} to {count(high, 'round')}" if low < high else count(low, "round")
    return f"Alone, a client trained for {count(alone, 'round')}; in the federation it took part in {times}."


_OWN: Mapping[str, Callable[[Run], str]] = {
    "together": lambda run: (
        "What a client has of taking part is measured on its own documents, on those that it held"
        " out and that nobody trained on. A loss says how much the next piece of a text surprises the model: lower is"
        " better."
    ),
    "alone": _explain_alone,
    "personalised": lambda run: "By itself afterwards, it trained on top of the federation's rounds.",
    "gain": lambda run: (
        "Its gain is by how much the shared adapter beats the one that it trained alone."
        + " What going on by itself brought is not in it: alone, no client trained that much longer."
        * any("loss" in told for told in run.personalised.get("clients", {}).values())
    ),
}
"""Explanation of a client's own losses, by the column that it explains."""
_OWN_PART = (
    'Together, each client has a part of the adapter of its own (lora_rule = "fedsa"), and is measured with that beside'
    " the shared part."
)


def _explain_brought(run: Run, *, central: bool) -> str:
    """Explain what a client brings to the others, by the documents on which that is measured."""
    if central:
        where = f"on the {count(run.plan['central_documents'], 'document')} that were held out for all"
    else:
        able = [client for client in run.plan["clients"] if client.get("holdout_tokens", 0)]
        scored = len(run.rounds[0].get("client_losses", {}))
        some = f" ({scored} of {len(able)} hold-outs were scored)" if scored < len(able) else ""
        where = f"over all tokens that the others held out{some}"
    return (
        f"What a client brings to the others is by how much the loss falls {where}, against a federation of the others"
        " without it."
    )


def _explain_shapley(contributions: Record) -> str:
    """Explain Shapley values, and how they were found."""
    text = (
        "Without one client, another may stand in for it. The Shapley value lets the clients come in one after another,"
        " in every order, and is the mean of what each brings when it comes; all of them add up to what the federation"
        " brought."
    )
    if not any(share["standard_error"] for share in contributions["shapley"].values()):
        return text
    return f"{text} {contributions['orders']} orders were drawn, and behind ± stands the standard error over them."


def _failures(run: Run) -> Iterator[str]:
    """Say what could not be found out, and why."""
    for client, told in run.personalised.get("clients", {}).items():
        if "error" in told:
            yield f"Client {client} could not go on by itself: {told['error']}"
    for told in run.contributions.get("coalitions", ()):
        if "error" in told:
            yield f"The federation of {', '.join(map(str, told['clients']))} failed: {told['error']}"


def _cell(worth: Worth, key: str) -> str:
    error = f" ± {worth.shapley_error:.4f}" if key == "shapley" and worth.shapley_error else ""
    return format_number(getattr(worth, key), COLUMNS[key].form) + error


def show_worth_over_seeds(groups: Mapping[str, Sequence[Run]]) -> list[Block]:
    """Show each client over runs that differ only in their seed; nothing where none of them has anything on record."""
    rows = []
    for title, runs in groups.items():
        found = [worth for run in runs if (worth := worth_of(run))]
        for client in sorted(set().union(*found)):
            cells = []
            for key, column in _OVER_SEEDS.items():
                values = [value for worth in found if (value := getattr(worth.get(client), key, None)) is not None]
                cells.append(_spread(values, column.form))
            rows.append([title, f"client {client}", *cells])
    if not rows:
        return []
    return [
        Text(
            "Runs that differ only in their seed, taken together: mean and standard deviation over seeds. A seed also"
            " says which documents a client holds, unless they are divided by a column."
        ),
        Table(["Runs", "Client", *(column.title for column in _OVER_SEEDS.values())], rows, text_columns=2),
    ]


def _spread(values: Sequence[float], form: str) -> str:
    """Format the mean of values, and their spread where there are several."""
    if not values:
        return ""
    spread = figures.spread(values)
    return f"{spread.mean:{form}}" + (f" ± {spread.deviation:.4f}" if len(values) > 1 else "")


_OVER_SEEDS = {key: column for key, column in COLUMNS.items() if key != "before"}


def likelier(nats: float) -> str:
    """Compare in words how likely the right next piece of a text is, with a loss lower by so many nats per token."""
    if figures.are_alike(nats):
        return "as likely as"
    times = math.exp(min(abs(nats), 50.0))
    if nats < 0:
        return f"{100 * (1 - 1 / times):.1f} % less likely than"
    return f"{times:,.1f} times as likely as" if times >= 2 else f"{100 * (times - 1):.1f} % more likely than"


def _decide(run: Run, found: Mapping[int, Worth]) -> str:
    """Say for how many clients taking part was worth it, and apart, going on; nothing where that is not known."""
    gains = {client: gain for client, worth in found.items() if (gain := worth.gain) is not None}
    moved = [moved for worth in found.values() if (moved := worth.went_on) is not None]
    if not gains:
        return ""
    held = [run.plan["clients"][client]["holdout_documents"] for client in gains]
    least, most = min(held), max(held)
    each = f"{least} to {count(most, 'document')}" if least < most else count(least, "document")
    better = _count_better(list(gains.values()), "by taking part than alone")
    text = f"Judged by each client's own hold-out ({each}), {better}."
    if moved:
        text += f" When they had gone on by themselves, {_count_better(moved, 'than before')}."
    if few := sum(number < figures.ENOUGH for number in held):
        whose = "each of them has" if few == len(held) else f"{few} of them {'has' if few == 1 else 'have'}"
        text += f" Fewer than {figures.ENOUGH} documents, as {whose}, are too few to tell that from chance."
    return text


def _count_better(gains: Sequence[float], than: str) -> str:
    """Say of how many clients the loss is lower, and of how many higher, by so many nats per token each."""
    apart = [gain for gain in gains if not figures.are_alike(gain)]
    better, alike = sum(gain > 0 for gain in apart), len(gains) - len(apart)
    said = [f"{better} {'has' if better == 1 else 'have'} a lower loss {than}"]
    said += [f"{len(apart) - better} a higher one"] * (better < len(apart))
    said += [f"with {alike} the two are alike"] * (alike > 0)
    return f"of {count(len(gains), 'client')} {', '.join(said)}"


def _say(client: int, worth: Worth, *, central: bool) -> str:
    """Say what one client has of the federation, and what it brings; nothing where too little is known."""
    word, said = "the right next word of its own texts", []
    if worth.alone is not None and worth.together is not None:
        change = likelier(worth.alone - worth.together)
        said.append(f"with the shared adapter, {word} is {change} with the one that it trained alone")
    if worth.personalised is not None and worth.together is not None:
        change = likelier(worth.together - worth.personalised)
        said.append(f"when it has gone on by itself, {'it' if said else word} is {change} before")
    if worth.brings is not None:
        texts = "the texts held out for all" if central else "the others' texts"
        said.append(f"without it, the right next word of {texts} is {likelier(-worth.brings)} with it")
    return f"Client {client}: {'; '.join(said)}." if said else ""
