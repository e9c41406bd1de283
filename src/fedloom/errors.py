"""The errors that a person can cause and mend, as a tree.

FedloomError
├── RecipeError      a key, a value or a combination in the recipe
├── DataError        documents that can't be found, read, split or tokenised
├── ModelError       a base model or an adapter that can't be had
├── RunError         a run directory that exists, is missing or can't be read
├── DeploymentError  a server, a client or what they need of each other that can't be had
├── MessageError     what a client or a server sent and can't be what was asked for
└── TrainingError    a loss or weights that are no numbers any more; names round, client, step or stage

A message is one line that a terminal shows as it stands, without passwords and tokens, whatever it quotes.
The command line prints one as a line and exits with 2. Everything else is a bug and shows its traceback.
"""

from __future__ import annotations

from fedloom.text import hide_secrets, show_controls


class FedloomError(Exception):
    """What is wrong, where (file and dotted key), and what to do about it."""

    def __init__(self, what: str, *, where: str = "", mend: str = "") -> None:
        self.what, self.where, self.mend = what, where, mend
        one_line = " ".join("".join((where and f"{where}: ", what, mend and f"; {mend}")).split())
        super().__init__(hide_secrets(show_controls(one_line)))


class RecipeError(FedloomError):
    """A key, a value or a combination in the recipe."""


class DataError(FedloomError):
    """Documents that can't be found, read, split or tokenised."""


class ModelError(FedloomError):
    """A base model or an adapter that can't be had."""


class RunError(FedloomError):
    """A run directory that exists, is missing or can't be read."""


class DeploymentError(FedloomError):
    """A server, a client or what they need of each other that can't be had."""


class MessageError(FedloomError):
    """What a client or a server sent and can't be what was asked for."""


class TrainingError(FedloomError):
    """Work on an adapter that can't go on."""

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
