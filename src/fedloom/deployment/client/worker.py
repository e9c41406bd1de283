"""Worker of a client: holds the base model and the client's own documents as long as the node lives, and answers.

It answers questions on a Unix socket: who are you (`meet`), how good is this adapter (`evaluate`), train it (`train`).
The recipe comes from the server, the documents from this machine's command line, and never the other way round.
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedloom import __version__
from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.deployment.client.account import Account
from fedloom.deployment.client.documents import gather_client
from fedloom.deployment.client.journal import Journal
from fedloom.deployment.client.policy import Policy, as_owner_wrote, check_model, check_policy, load_policy
from fedloom.deployment.frames import Frame, receive_frame, send_frame
from fedloom.deployment.messages import (
    ClientFacts,
    pack_facts,
    pack_score,
    pack_update,
    unpack_adapter,
    unpack_recipe,
    unpack_task,
)
from fedloom.errors import DataError, FedloomError, MessageError, RecipeError
from fedloom.evaluation.held_out import Score, evaluate
from fedloom.experiment.building import adapt, load_base
from fedloom.experiment.session import hash_base, tensors_of
from fedloom.progress import Progress
from fedloom.recipe.recipe import Recipe
from fedloom.records.state import hash_tensors
from fedloom.text import count, show_controls
from fedloom.training.engines import choose_engine, open_engine
from fedloom.training.jobs import ClientFailure, ClientJob, ClientTask

LOOK_SECONDS = 15.0
"""Time between two looks for the end of a run, while nothing is asked."""


class ClientModel:
    """Base model of one recipe with an adapter on it, and this client's blocks: answers are made from these."""

    def __init__(self, recipe: Recipe, name: str, path: Path, policy: Policy) -> None:
        data = gather_client(recipe, path, policy)
        self._blocks = data.blocks
        self._recipe = recipe
        base = load_base(recipe, data.source)
        # Before the adapter is put on it: what its owner can pin is the hash of the weights alone.
        weights = hash_tensors(base.state_dict().values())
        say("model", f"{data.source.name}@sha256:{weights}")
        self._adapted = adapt(base, recipe, data.source)
        check_model(policy, recipe, weights=weights, **measure(self._adapted))
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

    @property
    def holds_out(self) -> bool:
        """Return whether there is a hold-out to score adapters on."""
        return len(self._blocks.holdout) > 0

    def read_adapter(self, asked: Frame) -> Adapter:
        """Read the adapter in a question.

        Raises:
            MessageError: it is not one of this recipe.
        """
        return unpack_adapter(asked, self._adapted.layout)

    def evaluate(self, adapter: Adapter) -> Frame:
        """Score an adapter on this client's own hold-out."""
        return Frame({"score": pack_score(self._score(adapter))})

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
            self._scored = digest, self._evaluate(adapter) if self.holds_out else None
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


def measure(adapted: AdaptedModel) -> dict[str, Any]:
    """Return how large a share of a model's weights is trained, and whether some lie in its embedding."""
    trained = {id(value) for value in adapted.model.parameters() if value.requires_grad}
    embedding = any(id(value) in trained for value in adapted.base.get_input_embeddings().parameters())
    return {"share": adapted.layout.size / adapted.num_parameters, "embedding": embedding}


class Worker:
    """Client's answers to questions, one after another."""

    def __init__(self, name: str, data: Path, policy: Policy, journal: Journal, server: str = "") -> None:
        self._name, self._data, self._policy = name, data, policy
        self.account = Account(policy, journal, say, server)
        self._told: Mapping[str, Any] | None = None
        self._model: ClientModel | None = None
        self._last: tuple[Frame, Frame] | None = None

    def answer(self, asked: Frame) -> Frame:
        """Do what is asked, or say why not, in words that hold nothing of this client's documents or paths."""
        # The same question again: the answer was lost on its way. It is given again, not worked out again.
        if self._last and self._last[0] == asked:
            return self._last[1]
        try:
            model, do = self._open(asked.manifest.get("recipe")), asked.manifest.get("do")
            self.account.is_asked()
            if do == "meet":
                found = Frame(pack_facts(model.facts))
                say("told", describe_facts(model.facts))
            elif do == "evaluate":
                adapter = model.read_adapter(asked)
                found = model.evaluate(adapter) if self._may_judge(model, adapter) else Frame({"score": None})
            elif do == "train":
                task = self._admit(asked, model)
                judge = bool(asked.manifest.get("judge")) and self._may_judge(model, task.adapter)
                found = model.train(task, judge=judge)
                say("told", f"the adapter of round {task.round}, {len(found.payload):,} bytes")
            else:
                raise MessageError("this version of fedloom does not know the question")
        except DataError as error:
            say("error", str(error))
            return Frame({"name": self._name, "error": "its documents can't be used: its owner sees why"})
        except FedloomError as error:
            say("refused" if isinstance(error, RecipeError) else "error", str(error))
            return Frame({"name": self._name, "error": str(error)})
        found = replace(found, manifest={**found.manifest, "progress": model.take_progress()})
        self._last = asked, found
        return found

    def _open(self, told: Any) -> ClientModel:
        if self._model is None or told != self._told:
            recipe = unpack_recipe(told)
            self.account.begin(recipe, told)
            # The former model is let go first: two may not fit in memory.
            self._model = self._told = None
            recipe = as_owner_wrote(self._policy, recipe)
            self._model, self._told = ClientModel(recipe, self._name, self._data, self._policy), told
        return self._model

    def _admit(self, asked: Frame, model: ClientModel) -> ClientTask:
        """Read a task, refuse it unless its recipe and the policy allow it, and write it into the journal."""
        recipe, task = unpack_recipe(self._told), model.read_task(asked)
        check_policy(self._policy, recipe, task)
        known, training = (part.model_dump(exclude={"proximal_mu", "clients_at_once"})
                           for part in (recipe.training, task.training))  # fmt: skip
        if training != known or not 1 <= task.round <= task.rounds == recipe.federation.rounds:
            raise MessageError("the task is not as its recipe says")
        self.account.train(asked, task, model.describe(task))
        return task

    def _may_judge(self, model: ClientModel, adapter: Adapter) -> bool:
        return model.holds_out and self.account.may_tell_loss(adapter.sha256())


def describe_facts(facts: ClientFacts) -> str:
    """Describe what was told of the documents."""
    held_out = count(facts.holdout_documents, "document")
    return (
        f"{count(facts.train_documents, 'document')}, {count(facts.blocks, 'block')},"
        f" {count(facts.tokens, 'token')} to train on; {held_out} held out"
    )


def say(what: str, detail: str) -> None:
    """Print a line for whoever watches `fedloom join`."""
    print(show_controls(f"{what:<10}{detail}"), flush=True)


def serve(listener: socket.socket, worker: Worker) -> None:
    """Answer until the process ends."""
    listener.settimeout(LOOK_SECONDS)
    while True:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            worker.account.look()
            continue
        with connection:
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
    for option in ("--socket", "--name", "--data", "--policy", "--journal", "--server"):
        parser.add_argument(option, default="")
    chosen = parser.parse_args()
    policy = load_policy(Path(chosen.policy) if chosen.policy else None)
    worker = Worker(chosen.name, Path(chosen.data), policy, Journal(Path(chosen.journal)), chosen.server)
    with socket.socket(socket.AF_UNIX) as listener:
        Path(chosen.socket).unlink(missing_ok=True)
        listener.bind(chosen.socket)
        os.chmod(chosen.socket, 0o600)
        listener.listen()
        serve(listener, worker)


if __name__ == "__main__":
    main()
