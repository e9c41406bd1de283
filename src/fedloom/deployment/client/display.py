"""Lines for whoever watches `fedloom join`. No torch here."""

from __future__ import annotations

import os

from fedloom.deployment.client.hearing import MARKED, WHAT_LETTERS
from fedloom.text import show_controls


def say(what: str, detail: str) -> None:
    """Print a line for whoever watches `fedloom join`."""
    print(f"{os.environ.get(MARKED, '')}{show_controls(f'{what:<{WHAT_LETTERS}}{detail}')}", flush=True)
