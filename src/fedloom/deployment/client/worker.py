"""Worker of a client: holds the base model and the client's own documents as long as the node lives, and answers.

It answers questions on a Unix socket: who are you (`meet`), how good is this adapter (`evaluate`), train it (`train`).
The recipe comes from the server, the documents from this machine's command line, and never the other way round.
"""

from __future__ import annotations

import argparse
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedloom import __version__
from fedloom.adapters.adapter import Adapter
from fedloom.deployment.client.documents import gather_client
from fedloom.deployment.client.journal import Journal, hash_task
from fedloom.deployment.client.policy import Policy, check_policy, load_policy
from fedloom.deployment.frames import Frame, accept, listen, receive_frame, send_frame
from fedloom.deployment.messages import (
    ClientFacts,
    pack_facts,
    pack_score,
    pack_update,
    unpack_adapter,
    unpack_recipe,
    unpack_task,
)
from fedloom.deployment.processes import take_arguments
from fedloom.deployment.signing import Verifier
from fedloom.errors import DataError, FedloomError, MessageError
from fedloom.evaluation.held_out import Score, evaluate
from fedloom.experiment.building import load_adapted_model
from fedloom.experiment.session import hash_base, tensors_of
from fedloom.progress import Progress
from fedloom.recipe.recipe import Recipe
from fedloom.records.state import hash_tensors
from fedloom.text import show_controls
from fedloom.training.engines import choose_engine, open_engine
from fedloom.training.jobs import ClientFailure, ClientJob, ClientTask


class ClientModel:
    """Base model of one recipe with an adapter on it, and this client's blocks: answers are made from these."""

    def __init__(self, recipe: Recipe, name: str, path: Path) -> None:
        data = gather_client(recipe, path)
        self._blocks = data.blocks
        self._recipe = recipe
        say("model", data.source.name)
        self._adapted = load_adapted_model(recipe, data.source)
        engine = choose_engine(recipe.adapter, recipe.training, recipe.model, self._adapted)
        self._engine = open_engine(engine, self._adapted, recipe.data.max_length, self._note, say)
        self._progress: list[Progress] = []
        self._scored: tuple[str, Score | None] = "", None
        self.facts = ClientFacts(
            name=name,
            version=__version__,
            base=hash_base(self._adapted),
            documents=hash_tensors(tensors_of([data.blocks.train, data.blocks.holdout])),
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

    def take_progress(self) -> list[list[Any]]:
        """Return the batches worked on since this was last called: the server counts them as its own run's."""
        taken, self._progress = self._progress, []
        return [[*asdict(progress).values()] for progress in taken]

    def _note(self, progress: Progress) -> None:
        self._progress.append(progress)

    def evaluate(self, asked: Frame) -> Frame:
        """Score an adapter on this client's own hold-out."""
        return Frame({"score": pack_score(self._score(unpack_adapter(asked, self._adapted.layout)))})

    def read_task(self, asked: Frame) -> ClientTask:
        """Read the task in a question.

        Raises:
            MessageError: it is not a task of this recipe.
        """
        return unpack_task(asked, self._adapted.layout, self._recipe.federation)

    def describe(self, task: ClientTask) -> dict[str, Any]:
        """Describe a task for its owner's journal."""
        epochs, blocks = task.training.epochs, self._blocks.train
        return {
            "recipe": self._recipe.name,
            "model": self._recipe.model.source,
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
        """Score an adapter, once where it is asked for again, or return None where nothing is held out."""
        # The adapter that a round ends with is the one that the next begins with: the server asks twice.
        digest = adapter.sha256()
        if self._scored[0] != digest:
            self._scored = digest, self._evaluate(adapter) if len(self._blocks.holdout) else None
        return self._scored[1]

    def _evaluate(self, adapter: Adapter) -> Score:
        return evaluate(
            self._adapted,
            adapter,
            self._blocks.holdout,
            batch_size=self._recipe.evaluation.batch_size,
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

    def answer(self, asked: Frame) -> Frame:
        """Do what is asked, or say why not, in words that hold nothing of this client's documents or paths."""
        try:
            asked = self._open_question(asked)
            # The same question, asked again: the answer was lost on its way. It is given again, not worked out again.
            if self._last and self._last[0] == asked:
                return self._last[1]
            model, do = self._open(asked.manifest.get("recipe")), asked.manifest.get("do")
            if do == "meet":
                found = Frame(pack_facts(model.facts))
            elif do == "evaluate":
                found = model.evaluate(asked) if self._policy.tell_holdout_loss else Frame({"score": None})
            elif do == "train":
                task = self._admit(asked, model)
                found = model.train(task, judge=bool(asked.manifest.get("judge")))
            else:
                raise MessageError("this version of fedloom does not know the question")
        except DataError as error:
            say("error", str(error))
            return Frame({"name": self._name, "error": "its documents can't be used: its owner sees why"})
        except FedloomError as error:
            say("error", str(error))
            return Frame({"name": self._name, "error": str(error)})
        found = replace(found, manifest={**found.manifest, "progress": model.take_progress()})
        self._last = asked, found
        return found

    def _open(self, told: Any) -> ClientModel:
        if self._model is None or told != self._told:
            recipe = unpack_recipe(told)
            check_policy(self._policy, recipe)
            # The former model is let go first: two may not fit in memory.
            self._model = self._told = None
            self._model, self._told = ClientModel(recipe, self._name, self._data), told
        return self._model

    def _admit(self, asked: Frame, model: ClientModel) -> ClientTask:
        """Read a task, refuse it unless its recipe and the policy allow it, and write it into the journal."""
        recipe, task = unpack_recipe(self._told), model.read_task(asked)
        check_policy(self._policy, recipe, task)
        known, training = (part.model_dump(exclude={"proximal_mu", "clients_at_once"})
                           for part in (recipe.training, task.training))  # fmt: skip
        if training != known or not 1 <= task.round <= task.rounds == recipe.federation.rounds:
            raise MessageError("the task is not as its recipe says")
        self._journal.note(hash_task(asked), model.describe(task), at_most=self._policy.max_rounds_a_day)
        return task


def say(what: str, detail: str) -> None:
    """Print a line for whoever watches `fedloom join`."""
    print(show_controls(f"{what:<10}{detail}"), flush=True)


def serve(listener: socket.socket, worker: Worker) -> None:
    """Answer until the process ends."""
    while True:
        with accept(listener) as connection:
            connection.settimeout(60.0)
            try:
                asked = receive_frame(connection)
                send_frame(connection, worker.answer(asked))
            # The process that asked may have been killed. The server asks again.
            except OSError as error:
                say("retry", f"the connection broke before the answer was sent ({type(error).__name__})")


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
