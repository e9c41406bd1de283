"""Worker of a client: holds the base model and the client's own documents while a run goes on, and answers.

It answers questions on a Unix socket: who are you (`meet`), how good is this adapter (`evaluate`), train it (`train`).
The recipe comes from the server, the documents from this machine's command line, and never the other way round.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedloom.deployment.client.account import Account
from fedloom.deployment.client.answers import answer_path, find_answer, keep_answer
from fedloom.deployment.client.client_model import ClientModel, Training
from fedloom.deployment.client.display import say, speaking_of
from fedloom.deployment.client.journal import Journal
from fedloom.deployment.client.own_adapter import Places
from fedloom.deployment.client.own_documents import mend_of_server
from fedloom.deployment.client.policy import Policy
from fedloom.deployment.client.refusals import check_policy, mend_policy
from fedloom.deployment.client.secret import read_secret, secret_path
from fedloom.deployment.client.shared_base import Bases, Wanted, check_time, train_together
from fedloom.deployment.client.task_file import read_task_file
from fedloom.deployment.messages import (
    ClientFacts,
    pack_facts,
    pack_refusal,
    read_question,
    unpack_facts,
    unpack_recipe,
)
from fedloom.errors import (
    DataError,
    DeploymentError,
    FedloomError,
    LateError,
    MessageError,
    ModelError,
    PolicyError,
    RecipeError,
    RunError,
    ShortageError,
    SpentError,
    TrainingError,
)
from fedloom.host.frames import Frame
from fedloom.model.shortage import is_shortage
from fedloom.recipe.privacy_section import DOCUMENT
from fedloom.records.privacy import count_units
from fedloom.text import count, format_bytes
from fedloom.training.jobs import ClientResult, ClientTask


class Worker:
    """Client's answers to questions, one after another."""

    def __init__(
        self,
        name: str,
        data: Path,
        policy: Policy,
        journal: Journal,
        open_question: Callable[[Frame], Frame] | None = None,
        server: str = "",
        policy_file: Path | None = None,
        keep: Path | None = None,
        tasks: str = "",
        bases: Bases | None = None,
    ) -> None:
        """Make a worker; `open_question` lets a question through, or raises MessageError (`Verifier.open`).

        `server` is the server's address, for the journal; `policy_file` is where the policy's owner can change it;
        `keep` is a folder for adapters of the client's own, beside the journal if left out; `tasks` is a file of its
        own. With `bases`, its base model is one with the other clients' of this process; its lines bear its name then.
        """
        self._name, self._policy, self._secret = name, policy, secret_path(journal.path)
        self._places, self._tasks = Places.of(data, journal.path, keep), tasks
        self._policy_file, self._answer = policy_file, answer_path(journal.path)
        self.account = Account(policy, journal, say, server)
        self._open_question = open_question or (lambda asked: asked)
        self._told: Mapping[str, Any] | None = None
        self._model: ClientModel | None = None
        self._last: tuple[Frame, Frame] | None = None
        self._bases, self.whose = bases or Bases(), name if bases else ""
        self._bases.users.append(self.let_go)
        self.is_spent = False
        """True where this process can answer nothing more."""
        self.opening_seconds = 0.0
        """Time that the base model, with the documents, took to open."""

    def answer(self, asked: Frame, came: float | None = None) -> Frame:
        """Do what is asked, or say in one word of a list why not; the reason is shown here alone.

        `came` is when the question came, on the monotonic clock; now, if left out.
        """
        one = UnderWay(self, asked, time.monotonic() if came is None else came)
        for _ in finish([one]):
            pass
        assert one.answer, "all its trainings were carried out"
        return one.answer

    def begin(self, asked: Frame, came: float) -> Training[Frame]:
        """Begin with a question as `answer` does, and leave the trainings that it needs to others."""
        try:
            asked, seconds = read_question(self._open_question(asked))
            # The same question, asked again: the answer was lost on its way. It is given again, not worked out again.
            if self._last and self._last[0] == asked and not self.account.is_over:
                return self._last[1]
            check_time(came + seconds)
            found = yield from self._work(asked, came + seconds, seconds)
        # Of any kind: what is a bug here must not be one that a server can end this client with.
        except Exception as error:
            return self._refuse(error, asked)
        self._last = asked, found
        return found

    def _work(self, asked: Frame, until: float, seconds: float) -> Training[Frame]:
        """Answer a question that was read, for which there are so many seconds.

        Raises:
            Exception: of any kind.
        """
        model = self._open(asked)
        self.account.is_asked(seconds)
        model.until = until
        model.take_progress()  # that of a question which was given up
        match asked.manifest["do"]:
            case "meet":
                found = model.tell("meet", pack_facts(model.facts))
                say("told", describe_facts(unpack_facts(found, private=model.is_private), model.unit))
            case "evaluate":
                found = model.tell("evaluate", model.evaluate(asked))
            case "train":
                found = yield from self._train(asked, model)
            case "tasks":
                found = model.tell("tasks", model.answer_tasks(asked))
            case "keep":
                found = yield from self._keep(asked, model)
        self.account.has_answered()
        return found

    def _keep(self, asked: Frame, model: ClientModel) -> Training[Frame]:
        """Keep an adapter of one's own, which is in the journal before it is made.

        Raises:
            Exception: of any kind.
        """
        check_policy(self._policy, model.recipe)
        task = model.read_personal_task(asked)
        self.account.keep(asked, model.describe(task) if task else {"round": asked.manifest["round"]})
        found = model.tell("keep", (yield from model.keep(asked, task)))
        check_time(model.until)
        return found

    def _train(self, asked: Frame, model: ClientModel) -> Training[Frame]:
        """Train for a round that is in the journal before it begins; with noise, its answer is on disk before it goes.

        Raises:
            Exception: of any kind.
        """
        task = self._read(asked, model)
        if model.bound and (kept := find_answer(self._answer, asked)):
            if not self.account.has_noted_answer(asked):
                self.account.note_answer(asked)
            say("told", f"the same adapter of round {task.round} as before, which costs nothing more")
            return kept
        attempt = self.account.train(asked, task, model.describe(task), model.bound, model.facts.documents)
        try:
            update, work = yield from model.train(asked, task, attempt)
            found = model.tell("train", update)
            check_time(model.until)
        except LateError:
            # Nothing of it left this machine, so it is no round of those that the owner counts.
            self.account.give_up()
            raise
        if model.bound:
            keep_answer(self._answer, asked, found)
            self.account.note_answer(asked)
        say("told", f"the adapter of round {task.round}, {format_bytes(len(found.payload))}: {work}")
        return found

    def _refuse(self, error: Exception, asked: Frame) -> Frame:
        """Show here why a question has no answer, and what its owner can do; return the word for it."""
        word = refusal_of(error)
        say("refused", f"{error if isinstance(error, FedloomError) else type(error).__name__} (told: {word})")
        if isinstance(error, PolicyError):
            say("mend", mend_policy(error.keys, self._policy_file))
        elif isinstance(error, FedloomError) and (mend := mend_of_server(error)):
            say("mend", mend)
        # A server asks who refused its run for the next one alone. Of a damaged question it may send another.
        if asked.manifest.get("do") == "meet" and not isinstance(error, MessageError):
            say(
                "waiting",
                "for another run of this server; to be asked for this one again, leave (Ctrl-C) and join anew",
            )
        if word == "internal":
            traceback.print_exception(error)
            self._bases.let_go()
            # After an error of CUDA's own a process can do nothing more with it. `fedloom join` starts another.
            self.is_spent = torch.cuda.is_initialized()
        return pack_refusal(self._name, word)

    def let_go(self) -> None:
        """Let go of the model and the documents: the next question opens them again."""
        self._model = self._told = None

    def look(self) -> None:
        """Note that the run is over, where none of its questions came for long enough."""
        with speaking_of(self.whose):
            self.account.look()

    @property
    def may_train(self) -> bool:
        """Return whether it is in a run, and so may be asked to train at any moment."""
        return self._model is not None and self.account.goes_on

    @property
    def holds_former(self) -> bool:
        """Return whether documents are in memory that are no more where they were read."""
        return self._model is not None and self._model.is_outdated()

    def _open(self, asked: Frame) -> ClientModel:
        """Return the model of a question's recipe, with the documents that the server counted.

        Raises:
            Exception: of any kind.
        """
        told, model = asked.manifest["recipe"], self._model
        # In a run they stay what was counted. The next begins with what is there then, and what is back is counted.
        is_due = model is not None and (self.account.is_over or not model.has_counted(asked))
        if model is None or told != self._told or (is_due and model.is_outdated()):
            recipe = unpack_recipe(told)
            self.account.begin(recipe, told)
            # The former model is let go first: two may not fit in memory.
            model = None
            self.let_go()
            started, secret = time.monotonic(), read_secret(self._secret)
            tasks = read_task_file(self._tasks) if self._tasks else ()
            model = ClientModel(recipe, self._name, self._places, self.account, secret, self._bases, tasks)
            self._model, self._told = model, told
            self.opening_seconds = time.monotonic() - started
        if not model.has_counted(asked):
            raise DataError(
                "the documents are not those that were counted for this run",
                where="--data",
                mend="bring back what was there, or take part in a later run with these",
            )
        return model

    def _read(self, asked: Frame, model: ClientModel) -> ClientTask:
        """Read a task, and refuse it unless its recipe and the policy allow it."""
        recipe, task = model.recipe, model.read_task(asked)
        check_policy(self._policy, recipe, task)
        known, training = (part.model_dump(exclude={"proximal_mu", "clients_at_once"})
                           for part in (recipe.training, task.training))  # fmt: skip
        if training != known or not 1 <= task.round <= task.rounds == recipe.federation.rounds:
            raise MessageError("the task is not as its recipe says")
        return task


class UnderWay:
    """Question that a worker has begun with, its answer, or the training that it needs next."""

    def __init__(self, worker: Worker, asked: Frame, came: float) -> None:
        self.wanted: Wanted | None = None
        self.answer: Frame | None = None
        self._whose, self._work = worker.whose, worker.begin(asked, came)
        self.go_on(None)

    def go_on(self, found: ClientResult | Exception | None) -> None:
        """Go on with what came of the training that it needed; with nothing, where it begins."""
        with speaking_of(self._whose):
            try:
                if isinstance(found, Exception):
                    self.wanted = self._work.throw(found)
                elif found is None:
                    self.wanted = next(self._work)
                else:
                    self.wanted = self._work.send(found)
            except StopIteration as done:
                self.wanted, self.answer = None, done.value


def finish(under_way: Sequence[UnderWay]) -> Iterator[UnderWay]:
    """Carry out the trainings that questions wait for, and yield each question once it is answered."""
    while waiting := [(one, one.wanted) for one in under_way if one.wanted]:
        for place, found in train_together([wanted for _, wanted in waiting]):
            one, _ = waiting[place]
            one.go_on(found)
            if one.answer:
                yield one


def describe_facts(facts: ClientFacts, unit: str) -> str:
    """Describe what was told of the documents, which are protected by units where there is noise."""
    if facts.noise_multiplier is not None:
        places = facts.train_documents
        told = count(places, "row") if unit == DOCUMENT else count_units(unit, places)
        return f"{told}, whatever they say; a noise multiplier of {facts.noise_multiplier:.3g}"
    held_out = count(facts.holdout_documents, "document")
    return (
        f"{count(facts.train_documents, 'document')}, {count(facts.blocks, 'block')},"
        f" {count(facts.tokens, 'token')} to train on; {held_out} held out"
    )


def refusal_of(error: Exception) -> str:
    """Return the word of `REFUSALS` that a server is told of an error."""
    # One word for all that is refused of a base model: two would tell whether a name is a folder here.
    if isinstance(error, PolicyError) and "models" in error.keys:
        return "model"
    if isinstance(error, PolicyError) and any(key.partition(".")[0] == "privacy" for key in error.keys):
        return "privacy"
    if isinstance(error, PolicyError):
        return "day" if error.keys[0].endswith("_a_day") else "policy"
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
    SpentError: "privacy",
    DeploymentError: "journal",
    RunError: "journal",  # an adapter of its own can't be written
}
"""Words for kinds of errors; the first kind that an error is of counts."""
