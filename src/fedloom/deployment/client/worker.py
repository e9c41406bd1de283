"""Worker of a client: holds the base model and the client's own documents as long as the node lives, and answers.

It answers questions on a Unix socket: who are you (`meet`), how good is this adapter (`evaluate`), train it (`train`).
The recipe comes from the server, the documents from this machine's command line, and never the other way round.
"""

from __future__ import annotations

import argparse
import select
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

import torch

from fedloom import __version__
from fedloom.adapters.adapter import Adapter
from fedloom.deployment.client.documents import gather_client
from fedloom.deployment.client.journal import Journal, hash_task
from fedloom.deployment.client.policy import Policy, check_policy, load_policy
from fedloom.deployment.client.secret import read_secret, secret_path, sign_documents
from fedloom.deployment.frames import Frame, accept, listen, receive_frame, send_frame
from fedloom.deployment.messages import (
    ClientFacts,
    pack_facts,
    pack_progress,
    pack_refusal,
    pack_score,
    pack_update,
    read_question,
    unpack_adapter,
    unpack_recipe,
    unpack_task,
)
from fedloom.deployment.processes import take_arguments
from fedloom.deployment.signing import Verifier
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
from fedloom.evaluation.held_out import Score, evaluate
from fedloom.experiment.building import load_adapted_model
from fedloom.experiment.session import hash_base, tensors_of
from fedloom.progress import Progress
from fedloom.recipe.recipe import Recipe
from fedloom.records.state import hash_tensors
from fedloom.text import show_controls
from fedloom.training.engines import choose_engine, open_engine
from fedloom.training.jobs import ClientFailure, ClientJob, ClientTask, is_shortage

MOST_WAITING = 8
"""Questions that are kept while another is answered: their time is counted from when they came."""


class ClientModel:
    """Base model of one recipe with an adapter on it, and this client's blocks: answers are made from these."""

    def __init__(self, recipe: Recipe, name: str, path: Path, policy: Policy, secret: bytes) -> None:
        data = gather_client(recipe, path)
        self._blocks = data.blocks
        self.recipe, self._policy = recipe, policy
        self.until = float("inf")
        """Time, on the monotonic clock, after which nobody waits for what is worked on."""
        say("model", data.source.name)
        self._adapted = load_adapted_model(recipe, data.source)
        engine = choose_engine(recipe.adapter, recipe.training, recipe.model, self._adapted)
        self._engine = open_engine(engine, self._adapted, recipe.data.max_length, self._note, say)
        self._progress: list[Progress] = []
        self._scored: tuple[str, Score | None] = "", None
        # Of the keys that were told: a later version may have others, and the documents are the same.
        base, read = hash_base(self._adapted), recipe.data.model_dump_json(exclude_unset=True)
        blocks = hash_tensors(tensors_of([data.blocks.train, data.blocks.holdout]))
        self.facts = ClientFacts(
            name=name,
            version=__version__,
            base=base,
            documents=sign_documents(secret, base, str(recipe.seed), read, blocks),
            train_documents=len(data.documents.train),
            holdout_documents=len(data.documents.holdout),
            blocks=len(data.blocks.train),
            tokens=data.blocks.train.num_tokens,
            holdout_blocks=len(data.blocks.holdout),
            holdout_tokens=data.blocks.holdout.num_tokens,
            shared_blocks=data.shared_blocks,
            dropped=data.dropped,
            leaks=data.leaks,
        )

    def take_progress(self) -> list[Progress]:
        """Return the batches worked on since this was last called: the server counts them as its own run's."""
        taken, self._progress = self._progress, []
        return taken

    def _note(self, progress: Progress) -> None:
        """Count a step or a batch that is done, and give up where nobody waits for the next.

        Raises:
            LateError
        """
        self._progress.append(progress)
        check_time(self.until)

    def evaluate(self, asked: Frame) -> Frame:
        """Score an adapter on this client's own hold-out."""
        return pack_score(self._score(unpack_adapter(asked, self._adapted.layout, self.recipe.federation.lora_rule)))

    def read_task(self, asked: Frame) -> ClientTask:
        """Read the task in a question.

        Raises:
            MessageError: it is not a task of this recipe.
        """
        return unpack_task(asked, self._adapted.layout, self.recipe.federation)

    def describe(self, task: ClientTask) -> dict[str, Any]:
        """Describe a task for its owner's journal."""
        epochs, blocks = task.training.epochs, self._blocks.train
        return {
            "recipe": self.recipe.name,
            "model": self.recipe.model.source,
            "round": task.round,
            "epochs": epochs,
            "steps": epochs * -(-len(blocks) // task.training.batch_size),
            "tokens": epochs * blocks.num_tokens,
        }

    def train(self, task: ClientTask, *, judge: bool) -> Frame:
        """Train for a round; with `judge`, score the adapter before and after it."""
        before = self._score(task.adapter) if judge else None
        say(f"round {task.round}", "training")
        job = ClientJob(**vars(task), blocks=self._blocks.train)
        (result,) = self._engine.train([job])
        if isinstance(result, ClientFailure):
            raise result.error
        report = result.report
        if before:
            started = time.perf_counter()
            after = self._evaluate(result.adapter)
            report = replace(report, holdout_loss_before=before.loss, holdout_loss_after=after.loss,
                             evaluate_seconds=time.perf_counter() - started)  # fmt: skip
        say(f"round {task.round}", f"{report.steps} steps, loss {report.loss_first:.4f} → {report.loss_last:.4f}")
        return pack_update(replace(result, report=report), task.trains_P)

    def _score(self, adapter: Adapter) -> Score | None:
        """Score an adapter, once where it is asked for again: the one door for whatever tells of the hold-out.

        None stands where nothing is held out, and where this client's owner lets nothing be told of it.
        """
        if not self._policy.tell_holdout_loss or not len(self._blocks.holdout):
            return None
        # The adapter that a round ends with is the one that the next begins with: the server asks twice.
        digest = adapter.sha256()
        if self._scored[0] != digest:
            self._scored = digest, self._evaluate(adapter)
        return self._scored[1]

    def _evaluate(self, adapter: Adapter) -> Score:
        return evaluate(
            self._adapted,
            adapter,
            self._blocks.holdout,
            batch_size=self.recipe.evaluation.batch_size,
            watch=self._note,
            lower=lambda size: say("memory", f"not enough: evaluation takes {size} blocks at once"),
        )


class Worker:
    """Client's answers to questions, one after another."""

    def __init__(
        self,
        name: str,
        data: Path,
        policy: Policy,
        journal: Journal,
        open_question: Callable[[Frame], Frame] = lambda asked: asked,
    ) -> None:
        """Make a worker; `open_question` lets a question through, or raises MessageError (`Verifier.open`)."""
        self._name, self._data, self._policy, self._journal = name, data, policy, journal
        self._open_question = open_question
        self._told: Mapping[str, Any] | None = None
        self._model: ClientModel | None = None
        self._last: tuple[Frame, Frame] | None = None
        self.is_spent = False
        """True where this process can answer nothing more."""

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
            found, progress = self._work(asked, came + seconds)
        # Of any kind: what is a bug here must not be one that a server can end this client with.
        except Exception as error:
            return self._refuse(error)
        found = pack_progress(found, progress)
        self._last = asked, found
        return found

    def _work(self, asked: Frame, until: float) -> tuple[Frame, list[Progress]]:
        """Answer a question that was read; return what was worked on, too.

        Raises:
            Exception: of any kind.
        """
        model = self._open(asked.manifest["recipe"])
        model.until = until
        model.take_progress()  # that of a question which was given up
        match asked.manifest["do"]:
            case "meet":
                found = pack_facts(model.facts)
            case "evaluate":
                found = model.evaluate(asked)
            case "train":
                found = self._train(asked, model)
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
            self._journal.give_up(hash_task(asked))
            raise
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
            recipe = unpack_recipe(told, self._policy.models or ())
            check_policy(self._policy, recipe)
            # The former model is let go first: two may not fit in memory.
            self._model = self._told = None
            secret = read_secret(secret_path(self._journal.path))
            self._model, self._told = ClientModel(recipe, self._name, self._data, self._policy, secret), told
        return self._model

    def _admit(self, asked: Frame, model: ClientModel) -> ClientTask:
        """Read a task, refuse it unless its recipe and the policy allow it, and write it into the journal."""
        recipe, task = model.recipe, model.read_task(asked)
        check_policy(self._policy, recipe, task)
        known, training = (part.model_dump(exclude={"proximal_mu", "clients_at_once"})
                           for part in (recipe.training, task.training))  # fmt: skip
        if training != known or not 1 <= task.round <= task.rounds == recipe.federation.rounds:
            raise MessageError("the task is not as its recipe says")
        self._journal.note(hash_task(asked), model.describe(task), at_most=self._policy.max_rounds_a_day)
        return task


def refusal_of(error: Exception) -> str:
    """Return the word of `REFUSALS` that a server is told of an error."""
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


def check_time(until: float) -> None:
    """Refuse to go on with what nobody waits for any more.

    Raises:
        LateError
    """
    if time.monotonic() > until:
        raise LateError("the time for an answer is over: the work is given up")


def say(what: str, detail: str) -> None:
    """Print a line for whoever watches `fedloom join`."""
    print(show_controls(f"{what:<10}{detail}"), flush=True)


class Arrived(NamedTuple):
    """Question that came, who waits for its answer, and when it came, on the monotonic clock."""

    connection: socket.socket
    asked: Frame
    came: float


def serve(listener: socket.socket, worker: Worker) -> None:
    """Answer until the worker is spent, or the process ends."""
    waiting: Queue[Arrived] = Queue(MOST_WAITING)
    # Taken in while another is answered: in the socket's own queue their time would not be counted.
    threading.Thread(target=_take_in, args=(listener, waiting), daemon=True).start()
    while not worker.is_spent:
        connection, asked, came = waiting.get()
        with connection:
            # Given up while this process was stopped or the machine slept, when no clock of its own went on.
            if is_gone(connection):
                say("late", "nobody waits for the answer any more: the question is left out")
                continue
            try:
                send_frame(connection, worker.answer(asked, came))
            # The process that asked may have been killed. The server asks again.
            except OSError as error:
                say("retry", f"the connection broke before the answer was sent ({type(error).__name__})")


def is_gone(connection: socket.socket) -> bool:
    """Return whether the other side has closed a connection."""
    look = select.poll()
    look.register(connection, getattr(select, "POLLRDHUP", select.POLLHUP))
    return bool(look.poll(0))


def _take_in(listener: socket.socket, waiting: Queue[Arrived]) -> None:
    """Read questions as they come."""
    while True:
        connection = accept(listener)
        connection.settimeout(60.0)
        try:
            asked = receive_frame(connection)
        except OSError as error:
            connection.close()
            say("retry", f"the connection broke before the question was read ({type(error).__name__})")
            continue
        waiting.put(Arrived(connection, asked, time.monotonic()))


def main() -> None:
    """Run a worker: `fedloom join` starts `python -m fedloom.deployment.client.worker`, never a person."""
    parser = argparse.ArgumentParser()
    for option in ("--socket", "--name", "--data", "--policy", "--journal", "--signer"):
        parser.add_argument(option, default="")
    chosen = parser.parse_args(take_arguments())
    policy = load_policy(Path(chosen.policy)) if chosen.policy else Policy()
    checks = (Verifier(chosen.signer, chosen.name).open,) if chosen.signer else ()  # none in a kit without TLS
    worker = Worker(chosen.name, Path(chosen.data), policy, Journal(Path(chosen.journal)), *checks)
    with listen(chosen.socket) as listener:
        serve(listener, worker)


if __name__ == "__main__":
    main()
