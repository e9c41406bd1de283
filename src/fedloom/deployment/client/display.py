"""Lines for whoever watches `fedloom join`. No torch here."""

from __future__ import annotations

from fedloom.text import show_controls


def say(what: str, detail: str) -> None:
    """Print a line for whoever watches `fedloom join`."""
    print(show_controls(f"{what:<10}{detail}"), flush=True)
