"""Observations on a run, a sentence each. Every sentence has its rule, which returns None if it is not true."""

from __future__ import annotations

from collections.abc import Callable

from fedloom.records.run import Run
from fedloom.report.baselines_section import did_it_help
from fedloom.report.figures import (
    bytes_moved,
    client_series,
    find_rise,
    full_model_bytes,
    judged_series,
    largest_shares,
    phase_shares,
    series,
    train_gap,
    trained_rounds,
    update_bytes,
)
from fedloom.report.tasks_section import tell_tasks
from fedloom.text import count, format_bytes, format_seconds, list_some

NEWEST = 3
"""Newest rounds with a loss, whose pace says if it still falls; nothing does where they are half of all or more."""
STILL_FALLS = 0.05
"""Share of the mean round's gain that each of the newest must bring, on average, to call the loss still falling."""
CLIENTS_DIFFER = 0.05
"""Share of the mean by which clients' hold-out losses must differ to be worth a sentence."""
DOMINATES = 0.5
"""Share of the time that a phase must take to be worth a sentence."""
HALF = 0.5 + 1e-6
"""Share of the weight above which a client is named; two that are equal have as much, by rounding."""
SHOWN = 5e-5
"""Nats that show in four digits after the point; losses nearer to one another may differ by rounding alone."""
GAP = 0.1
"""Nats per token by which training loss must lie below held-out loss to be worth a sentence."""


def the_fall(run: Run) -> str | None:
    """Say by how much the loss fell or rose over the run."""
    name, rounds, losses = judged_series(run)
    if len(losses) < 2:
        return None
    change = losses[-1] - losses[0]
    in_rounds = f"in {rounds[-1]} round{'s' if rounds[-1] > 1 else ''}"
    if abs(change) < SHOWN:
        return f"The {name} loss stayed at {losses[-1]:.4f} nats a token, {in_rounds}."
    word = "fell" if change < 0 else "rose"
    return (
        f"The {name} loss {word} by {abs(change):.4f} nats a token, from {losses[0]:.4f} to {losses[-1]:.4f}"
        f" ({100 * change / losses[0]:+.1f} %), {in_rounds}."
    )


def its_pace(run: Run) -> str | None:
    """Say what the first and the newest rounds brought; of enough rounds, if the loss was still falling.

    None if the last round is not the best: whether the loss fell or levelled off before is then beside the point.
    """
    name, rounds, losses = judged_series(run)
    if len(losses) < 4 or losses[-1] > min(losses) or losses[-1] >= losses[0]:
        return None
    gain, begin, brought = losses[0] - losses[1], _rounds(rounds[1] - rounds[0]), ""
    first = f"The first {begin} brought {gain:.4f} of it"
    if gain < 0:
        first, brought = f"In the first {begin} it rose by {-gain:.4f}", " brought"
    if len(losses) <= 2 * NEWEST + 1:
        last = f"the last {_rounds(rounds[-1] - rounds[-2])}{brought} {losses[-2] - losses[-1]:.4f}"
        ever = f"the {name} loss was lower in round {rounds[-1]} than ever"
        return f"{first} and {last}: {ever}, and so few rounds can't tell what more would bring."
    newest, whole = rounds[-1] - rounds[-1 - NEWEST], rounds[-1] - rounds[0]
    pace = (losses[-1 - NEWEST] - losses[-1]) / newest
    text = f"{first}, each of the last {newest}{brought} {pace:.4f} on average"
    if pace >= STILL_FALLS * (losses[0] - losses[-1]) / whole:
        return f"{text}: the {name} loss was still falling in round {rounds[-1]}, so more rounds may help."
    return f"{text}: the {name} loss had levelled off."


def _rounds(number: int) -> str:
    """Return what goes with "the first": where not every round is evaluated, several bring one fall."""
    return "round" if number == 1 else f"{number} rounds"


def the_best_round(run: Run) -> str | None:
    """Name the best round, unless it is the last."""
    name, rounds, losses = judged_series(run)
    if len(losses) < 2 or losses[-1] == min(losses):
        return None
    best = losses.index(min(losses))
    return (
        f"The best round is {rounds[best]} ({losses[best]:.4f}), not the last: the {name} loss was"
        f" {losses[-1] - losses[best]:.4f} higher at the end."
    )


def overfitting(run: Run) -> str | None:
    """Name the round from which the loss stayed above its best, and say whether that is overfitting."""
    rise = find_rise(run)
    if rise is None:
        return None
    above = f"the {judged_series(run)[0]} loss stays above its best"
    if rise.kind == "overfitting":
        return f"Overfitting sets in at round {rise.round}: from there {above} while the training loss falls."
    told = f"From round {rise.round} on {above}"
    if rise.kind == "divergence":
        return f"{told}, and the training loss did not fall either: it diverges, which a smaller step may mend."
    return f"{told}."


def the_gap(run: Run) -> str | None:
    """Say how far the training loss is below the held-out loss, if it is far."""
    found = train_gap(run)
    if found is None or found[1] < GAP:
        return None
    return f"In round {found[0]} the training loss is {found[1]:.4f} below the {judged_series(run)[0]} loss."


def the_clients(run: Run) -> str | None:
    """Name the clients with the lowest and the highest loss under the last adapter, if they differ much."""
    last = {
        client: losses[-1]
        for client in range(len(run.plan.get("clients", ())))
        if (losses := client_series(run, client)[1])
    }
    if len(last) < 2:
        return None
    worst, best = max(last, key=last.__getitem__), min(last, key=last.__getitem__)
    apart, mean = last[worst] - last[best], sum(last.values()) / len(last)
    if apart < CLIENTS_DIFFER * mean:
        return None
    return (
        f"Clients differ: on its own hold-out, client {best} ends at {last[best]:.4f} and client {worst} at"
        f" {last[worst]:.4f}, {100 * apart / mean:.0f} % of the mean apart."
    )


def the_unscored(run: Run) -> str | None:
    """Name the clients whose hold-outs were not scored in every round, though the recipe asks for them."""
    scored = [record["client_losses"] for record in run.rounds if record.get("client_losses")]
    held = {str(client) for client, told in enumerate(run.plan["clients"]) if told.get("holdout_tokens")}
    asked = set().union(*scored) | (set() if run.recipe["evaluation"].get("clients") else held)
    lacks = {client: sum(client not in one for one in scored) for client in sorted(asked, key=int)}
    named = [f"client {client}'s in {rounds} of {len(scored)} rounds" for client, rounds in lacks.items() if rounds]
    if not named:
        return None
    return (
        f"Hold-outs were not always scored ({list_some(named, 8)}): the clients' hold-out loss of those rounds is over"
        " the others' documents, and says nothing beside that of other rounds."
    )


def the_proximal_term(run: Run) -> str | None:
    """Compare the proximal term's gradient with that of the loss."""
    mus = series(run, "proximal_mu")[1] or [run.recipe["training"]["proximal_mu"]]
    _, ratios = series(run, "proximal_ratio")
    if not any(mus) or not ratios:
        return None
    low, high = min(mus), max(mus)
    said = f"= {low:g}" if low == high else f"from {low:g} to {high:g}"
    # Where a client's own optimum is reached, the two are equal: a pull that is stronger came from a step too far.
    advice = " With more than its own, clients are thrown back rather than held: try a smaller μ." * (ratios[-1] > 1)
    return (
        f"With μ {said} the proximal gradient was {_as_part(ratios[-1])} the loss gradient in the last round"
        f" (at most {_as_part(max(ratios))} it in any round).{advice}"
    )


def _as_part(ratio: float) -> str:
    """Return a ratio of what is named after it: `4.6 % of`, `16 times`."""
    return (
        f"{100 * ratio:.2g} % of" if ratio < 0.995 else f"{ratio:,.2g} times" if ratio < 99.5 else f"{ratio:,.0f} times"
    )


def the_time(run: Run) -> str | None:
    """Name the phase that took most of the time in rounds, if one took half or more."""
    shares = phase_shares(run)
    phase = max(shares, key=shares.__getitem__)
    if shares[phase] < DOMINATES:
        return None
    return f"{phase.capitalize()} took {100 * shares[phase]:.0f} % of the time in rounds."


def the_lost(run: Run) -> str | None:
    """Name the rounds that lost clients' updates, and the last reason."""
    lost = {record["round"]: record["lost"] for record in trained_rounds(run) if record.get("lost")}
    if not lost:
        return None
    named = "; ".join(f"round {round}: {', '.join(map(str, clients))}" for round, clients in list(lost.items())[:5])
    told = f"Updates were lost in {len(lost)} of {len(trained_rounds(run))} rounds ({named})."
    why = [why for record in trained_rounds(run) for why in record.get("lost_because", {}).values()]
    return f"{told} The last reason: {why[-1]}" if why else told


def the_absent(run: Run) -> str | None:
    """Name the rounds that waited for clients that were away, the longest waits first."""
    waits = [(wait, one["round"], client) for one in run.rounds for client, wait in one.get("away", {}).items()]
    if not waits:
        return None
    longest = sorted(waits, reverse=True)[:5]
    named = "; ".join(f"round {round} for client {client}, {format_seconds(wait)}" for wait, round, client in longest)
    others = len(waits) - len(longest)
    return f"Rounds waited for clients that were away: {named}{f'; and {others} more' if others else ''}."


def the_refused(run: Run) -> str | None:
    """Count the updates that were refused because nobody had asked for them."""
    refused = [why for record in trained_rounds(run) for why in record.get("refused", ())]
    if not refused:
        return None
    updates, were = ("update", "was") if len(refused) == 1 else ("updates", "were")
    return f"{len(refused)} {updates} that nobody had asked for {were} refused, the last: {refused[-1]}."


def the_weight(run: Run) -> str | None:
    """Name the clients that had more than half of a round's weight, and those whose share was capped."""
    found, limit = largest_shares(run), run.recipe["federation"].get("max_share")
    heavy = [client for client, share in found.items() if share > HALF]
    said = []
    if heavy and len(run.plan.get("clients", ())) > 1:
        percents = {client: f"up to {100 * found[client]:.0f} %" for client in heavy}
        named = list_some([f"client {client} ({percent})" for client, percent in percents.items()], 8)
        said.append(
            f"Client {heavy[0]} had {percents[heavy[0]]} of a round's weight, more than all others together."
            if len(heavy) == 1
            else f"In some round, each of these had more of the weight than all others together: {named}."
        )
    capped = sorted({client for record in trained_rounds(run) for client in record.get("capped", ())})
    if capped:
        said.append(
            f"Capped at {100 * limit:g} % of the weight (federation.max_share):"
            f" {'client' if len(capped) == 1 else 'clients'} {', '.join(map(str, capped))}."
        )
    return " ".join(said) or None


def the_scaled(run: Run) -> str | None:
    """Name the clients whose changes were scaled down, and by how much at most."""
    scaled: dict[str, float] = {}
    for record in trained_rounds(run):
        for client, times in record.get("scaled", {}).items():
            scaled[client] = max(times, scaled.get(client, 0.0))
    if not scaled:
        return None
    named = ", ".join(f"client {client} (up to {times:,.0f} times)" for client, times in sorted(scaled.items()))
    return f"Changes that were far larger than the middle one of their round were scaled down: {named}."


def the_memory(run: Run) -> str | None:
    """Say in which round memory ran out, and how many clients trained at once after it."""
    fewer = {record["round"]: record["clients_at_once"] for record in run.rounds if "clients_at_once" in record}
    if not fewer:
        return None
    round, clients = list(fewer.items())[-1]
    return f"Memory was not enough in round {round}: {count(clients, 'client')} at once from then on."


def the_payload(run: Run) -> str | None:
    """Compare the bytes of the adapters exchanged with those of the whole model, unless that is the adapter."""
    moved = bytes_moved(run)
    if not moved or run.recipe["adapter"]["method"] == "full":
        return None
    times = full_model_bytes(run) / update_bytes(run)
    told = f"{times:,.0f}" if times >= 10 else f"{times:.2g}"
    whole = f"the whole model would have been {told} times as much"
    return f"{format_bytes(moved)} of adapters were exchanged in training; {whole}."


RULES: tuple[Callable[[Run], str | None], ...] = (
    the_fall,
    its_pace,
    the_best_round,
    overfitting,
    the_gap,
    the_clients,
    the_unscored,
    the_proximal_term,
    the_time,
    the_absent,
    the_lost,
    the_refused,
    the_weight,
    the_scaled,
    the_memory,
    the_payload,
    did_it_help,
    tell_tasks,
)
"""Rules in the order in which a report shows their sentences."""


def observe(run: Run) -> list[str]:
    """Return every sentence that is true of a run, in the order of RULES."""
    return [sentence for rule in RULES if (sentence := rule(run))]
