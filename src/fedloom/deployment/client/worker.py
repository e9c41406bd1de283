"""Worker of a client: holds the base model and the client's own documents while a run goes on, and answers.

It answers questions on a Unix socket: who are you (`meet`), how good is this adapter (`evaluate`), train it (`train`).
The recipe comes from the server, the documents from this machine's command line, and never the other way round.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fedloom.deployment.client.account import Account
from fedloom.deployment.client.client_model import ClientModel, check_time
from fedloom.deployment.client.display import say
from fedloom.deployment.client.journal import Journal
from fedloom.deployment.client.policy import Policy, check_policy
from fedloom.deployment.client.secret import read_secret, secret_path
from fedloom.deployment.frames import Frame
from fedloom.deployment.messages import (
    ClientFacts,
    pack_facts,
    pack_progress,
    pack_refusal,
    read_question,
    unpack_recipe,
)
from fedloom.errors import (
    DataError,
    DeploymentError,
    FedloomError,
    LateError,
    MessageError,
    ModelError,
    RecipeError,
    ShortageError,
    TrainingError,
)
from fedloom.progress import Progress
from fedloom.text import count
from fedloom.training.jobs import ClientTask, is_shortage


class Worker:
    """Client's answers to questions, one after another."""

    def __init__(
        self,
        name: str,
        data: Path,
        policy: Policy,
        journal: Journal,
        open_question: Callable[[Frame], Frame] = lambda asked: asked,
        server: str = "",
    ) -> None:
        """Make a worker; `open_question` lets a question through, or raises MessageError (`Verifier.open`).

        `server` is the server's address, for the journal.
        """
        self._name, self._data, self._policy, self._secret = name, data, policy, secret_path(journal.path)
        self.account = Account(policy, journal, say, server)
        self._open_question = open_question
        self._told: Mapping[str, Any] | None = None
        self._model: ClientModel | None = None
        self._last: tuple[Frame, Frame] | None = None
        self.is_spent = False
        """True where this process can answer nothing more."""
        self.opening_seconds = 0.0
        """Time that the base model, with the documents, took to open."""

    def answer(self, asked: Frame, came: float | None = None) -> Frame:
        """Do what is asked, or say in one word of a list why not; the reason is shown here alone.

        `came` is when the question came, on the monotonic clock; now, if left out.
        """
        came = time.monotonic() if came is None else came
        try:
            asked, seconds = read_question(self._open_question(asked))
            # The same question, asked again: the answer was lost on its way. It is given again, not worked out again.
            if self._last and self._last[0] == asked:
                return self._last[1]
            check_time(came + seconds)
            found, progress = self._work(asked, came + seconds, seconds)
        # Of any kind: what is a bug here must not be one that a server can end this client with.
        except Exception as error:
            return self._refuse(error)
        found = pack_progress(found, progress)
        self._last = asked, found
        return found

    def _work(self, asked: Frame, until: float, seconds: float) -> tuple[Frame, list[Progress]]:
        """Answer a question that was read, for which there are so many seconds; return what was worked on, too.

        Raises:
            Exception: of any kind.
        """
        model = self._open(asked.manifest["recipe"])
        self.account.is_asked(seconds)
        model.until = until
        model.take_progress()  # that of a question which was given up
        match asked.manifest["do"]:
            case "meet":
                found = pack_facts(model.facts)
                say("told", describe_facts(model.facts))
            case "evaluate":
                found = model.evaluate(asked)
            case "train":
                found = self._train(asked, model)
        self.account.has_answered()
        return found, model.take_progress()

    def _train(self, asked: Frame, model: ClientModel) -> Frame:
        """Train for a round that is in the journal before it begins.

        Raises:
            Exception: of any kind.
        """
        task = self._admit(asked, model)
        try:
            found = model.train(task, judge=asked.manifest["judge"])
            check_time(model.until)
        except LateError:
            # Nothing of it left this machine, so it is no round of those that the owner counts.
            self.account.give_up(asked)
            raise
        say("told", f"the adapter of round {task.round}, {len(found.payload):,} bytes")
        return found

    def _refuse(self, error: Exception) -> Frame:
        """Show here why a question has no answer, and return the word for it."""
        word = refusal_of(error)
        say("refused", f"{error if isinstance(error, FedloomError) else type(error).__name__} (told: {word})")
        if word == "internal":
            traceback.print_exception(error)
            self._model = self._told = None
            # After an error of CUDA's own a process can do nothing more with it. `fedloom join` starts another.
            self.is_spent = torch.cuda.is_initialized()
        return pack_refusal(self._name, word)

    def _open(self, told: Mapping[str, Any]) -> ClientModel:
        if self._model is None or told != self._told:
            recipe = unpack_recipe(told, self._policy.named)
            self.account.begin(recipe, told)
            # The former model is let go first: two may not fit in memory.
            self._model = self._told = None
            started, secret = time.monotonic(), read_secret(self._secret)
            self._model, self._told = ClientModel(recipe, self._name, self._data, self.account, secret), told
            self.opening_seconds = time.monotonic() - started
        return self._model

    def _admit(self, asked: Frame, model: ClientModel) -> ClientTask:
        """Read a task, refuse it unless its recipe and the policy allow it, and write it into the journal."""
        recipe, task = model.recipe, model.read_task(asked)
        check_policy(self._policy, recipe, task)
        known, training = (part.model_dump(exclude={"proximal_mu", "clients_at_once"})
                           for part in (recipe.training, task.training))  # fmt: skip
        if training != known or not 1 <= task.round <= task.rounds == recipe.federation.rounds:
            raise MessageError("the task is not as its recipe says")
        self.account.train(asked, task, model.describe(task))
        return task


def describe_facts(facts: ClientFacts) -> str:
    """Describe what was told of the documents."""
    held_out = count(facts.holdout_documents, "document")
    return (
        f"{count(facts.train_documents, 'document')}, {count(facts.blocks, 'block')},"
        f" {count(facts.tokens, 'token')} to train on; {held_out} held out"
    )


def refusal_of(error: Exception) -> str:
    """Return the word of `REFUSALS` that a server is told of an error."""
    # One word for all that is refused of a base model: two would tell whether a name is a folder here.
    if isinstance(error, RecipeError) and error.where == "policy.models":
        return "model"
    if isinstance(error, RecipeError) and error.where.startswith("policy."):
        return "day" if error.where.endswith("_a_day") else "policy"
    if isinstance(error, ShortageError) or is_shortage(error):
        return "memory"
    return next((word for kind, word in WORDS.items() if isinstance(error, kind)), "internal")


WORDS: dict[type[Exception], str] = {
    LateError: "late",
    MessageError: "question",
    DataError: "documents",
    ModelError: "model",
    RecipeError: "recipe",
    TrainingError: "training",
    DeploymentError: "journal",
}
"""Words for kinds of errors; the first kind that an error is of counts."""
