"""Errors that a person can cause and mend, as a tree.

FedloomError
├── RecipeError      a key, a value or a combination in the recipe
│   └── PolicyError  a wish that the owner of a client's documents does not allow; names every key that says so
├── DataError        documents that can't be found, read, split or tokenised
├── ModelError       a base model or an adapter that can't be found, loaded or used
├── RunError         a run directory that exists already, is missing or can't be read
├── DeploymentError  a server or a client that can't start, or can't reach the other
│   └── SpentError   a question about documents of which all that its recipe bounds was told
├── MessageError     a message between server and client that is damaged or was not asked for
│   └── LateError    work for a message whose time is up
└── TrainingError    a loss or weights that are not finite numbers; names round, client, step or stage
    └── ShortageError  too little memory to train even one client

A message is one line that is safe to show in a terminal: whatever it quotes, it has no control characters, passwords
or tokens.
The command line prints the message and exits with 2. Everything else is a bug and shows its traceback.
"""

from __future__ import annotations

import re

from fedloom.text import hide_secrets, show_controls

_BREAK = re.compile(r"\s*[\t\n\r]\s*")


class FedloomError(Exception):
    """An error that says what is wrong, where (file and dotted key), and how to mend it."""

    def __init__(self, what: str, *, where: str = "", mend: str = "") -> None:
        self.what, self.where, self.mend = what, where, mend
        # A message may quote a file, a path or another machine's answer, and those may hold anything.
        # Spaces stay as they are: a command that is to be typed may have a path with two of them.
        one_line = _BREAK.sub(" ", "".join((where and f"{where}: ", what, mend and f"; {mend}"))).strip()
        super().__init__(hide_secrets(show_controls(one_line)))


class RecipeError(FedloomError):
    """A key, a value or a combination in the recipe."""


class PolicyError(RecipeError):
    """A wish that the owner of a client's documents does not allow; carries the policy's keys that say so."""

    def __init__(self, first: tuple[str, str], *others: tuple[str, str]) -> None:
        """Make one error of all refusals: each is a key, and what stands behind "its policy"."""
        self.keys = tuple(key for key, _ in (first, *others))
        more = (f"policy.{key}: its policy {why}" for key, why in others)
        super().__init__("; ".join((f"its policy {first[1]}", *more)), where=f"policy.{first[0]}")


class DataError(FedloomError):
    """Documents that can't be found, read, split or tokenised."""


class ModelError(FedloomError):
    """A base model or an adapter that can't be found, loaded or used."""


class RunError(FedloomError):
    """A run directory that exists already, is missing or can't be read."""


class DeploymentError(FedloomError):
    """A server or a client that can't start, or can't reach the other."""


class SpentError(DeploymentError):
    """A question about documents of which all that its recipe bounds was told."""


class MessageError(FedloomError):
    """A message between server and client that is damaged or was not asked for."""


class LateError(MessageError):
    """Work for a message whose time is up: whoever asked no longer waits for it."""


class TrainingError(FedloomError):
    """A loss or weights that are not finite numbers; carries the round, and the client, step or stage if known."""

    def __init__(
        self,
        what: str,
        *,
        round: int,
        client: int | None = None,
        step: int | None = None,
        stage: str = "",
        mend: str = "",
    ) -> None:
        self.round, self.client, self.step, self.stage = round, client, step, stage
        parts = (
            f"round {round}",
            "" if client is None else f"client {client}",
            "" if step is None else f"step {step}",
            stage,
        )
        super().__init__(what, where=", ".join(filter(None, parts)), mend=mend)


class ShortageError(TrainingError):
    """Too little memory to train even one client."""
