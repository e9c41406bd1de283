"""Journal of a client as people read it: what was asked, and what may still be asked today. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from fedloom.deployment.client.journal import (
    COUNTED,
    Entry,
    Journal,
    Kind,
    begun_within_a_day,
    describe_ledger,
    next_free,
    rounds_of,
    standing,
)
from fedloom.deployment.client.policy import Policy
from fedloom.errors import DeploymentError

WORDS: Mapping[Kind, str] = {
    "train": "round",
    "meet": "documents read",
    "score": "loss told",
    "tasks": "tasks' counts told",
    "own": "adapter of its own",
    "end": "run ended",
    "give_up": "round given up",
    "answer": "answer written",
}
HEAD = ("when (UTC)", "what", "server", "recipe", "run", "round", "epochs", "tokens")
ON_THE_RIGHT = {"round", "epochs", "tokens"}


def read_aloud(path: Path, policy: Policy) -> Iterator[str]:
    """Yield a journal as the lines of a table, and below it what its policy's limits leave.

    Raises:
        DeploymentError: it is not there, can't be read, or a line is damaged.
    """
    if not path.exists():
        raise DeploymentError(
            "no such journal: nothing was asked yet, or it is elsewhere (fedloom join --journal)",
            where=str(path),
            mend="name the kit, or the file that join wrote",
        )
    entries = Journal(path).read()
    rows = [HEAD, *map(_to_row, entries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(HEAD, row, widths, strict=True)
        shown = (cell.rjust(width) if name in ON_THE_RIGHT else cell.ljust(width) for name, cell, width in cells)
        yield "  ".join(shown).rstrip()
    entries = standing(entries)
    yield ""
    yield from describe_limits(entries, policy)
    if keeps_ledger(entries, policy):
        yield describe_ledger(policy.privacy, entries)
    for run in sorted({str(entry.told["run"]) for entry in entries if entry.kind == "train" and "run" in entry.told}):
        yield f"{len(rounds_of(entries, run)):,} of {policy.max_rounds:,} rounds of run {run}"


def keeps_ledger(entries: list[Entry], policy: Policy) -> bool:
    """Return whether what was told of any one unit has a bound, or was to have one."""
    return policy.privacy is not None or any("privacy" in entry.told for entry in entries)


def describe_limits(entries: list[Entry], policy: Policy) -> Iterator[str]:
    """Yield how much of each kind was asked in the past 24 hours, of how much, and when the next may begin."""
    now = datetime.now(UTC)
    for kind, (what, key) in COUNTED.items():
        most, begun = getattr(policy, key), begun_within_a_day(entries, kind, now)
        free = next_free(begun, most)
        when = "now" if free is None else f"on {free:%Y-%m-%d at %H:%M:%S} UTC"
        yield f"{len(begun):,} of {most:,} {what} in the past 24 hours; the next may begin {when}"


def _to_row(entry: Entry) -> tuple[str, ...]:
    told = entry.told
    why = told.get("why", "documents as before a change" if told.get("outdated") else "")
    what = f"{WORDS[entry.kind]}: {why}" if why else WORDS[entry.kind]
    numbers = (f"{told[key]:,}" if isinstance(told.get(key), int) else "" for key in ("round", "epochs", "tokens"))
    return (
        f"{entry.when:%Y-%m-%d %H:%M:%S}",
        what,
        *(" ".join(str(told.get(key, "")).split()) for key in ("server", "recipe", "run")),
        *numbers,
    )
