"""Fleet of other machines: tasks and adapters go to them as questions, updates and scores come back as answers.

A round's answers lie on the disk until all are there, so memory does not grow with the number of clients.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fedloom.adapters.adapter import Adapter
from fedloom.deployment.frames import Frame
from fedloom.deployment.messages import pack_adapter, pack_task, unpack_progress, unpack_score, unpack_update
from fedloom.deployment.server.exchange import Exchange
from fedloom.errors import MessageError, TrainingError
from fedloom.evaluation.held_out import Score
from fedloom.federation.admission import ClientSize
from fedloom.federation.fleet import ClientPreview
from fedloom.host.files import writing
from fedloom.progress import Watch, ignore
from fedloom.recipe.sections import Federation
from fedloom.training.jobs import ClientFailure, ClientResult, ClientTask, OptimizerState

DEADLINES = 10
"""Deadlines that a round waits for its quorum, with `on_quorum_lost = "wait"`."""


class AnswerSpool:
    """File of a round's answers, on the disk until their turn comes. It has no name, so it ends with the process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with writing(folder):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed by `__exit__`)
        self._kept: dict[str, tuple[Mapping[str, Any], int, int]] = {}

    def __enter__(self) -> AnswerSpool:
        return self

    def __exit__(self, *ended: object) -> None:
        self._file.close()

    def put(self, name: str, frame: Frame) -> None:
        """Keep an answer.

        Raises:
            RunError: it can't be written.
        """
        told = {key: value for key, value in frame.manifest.items() if key != "progress"}  # which was counted
        with writing(self._folder):
            self._kept[name] = told, self._file.tell(), len(frame.payload)
            self._file.write(frame.payload)
            self._file.flush()

    def take(self, name: str) -> Frame:
        """Read an answer that was kept."""
        manifest, start, length = self._kept[name]
        return Frame(manifest, os.pread(self._file.fileno(), length, start))


@dataclass
class RemoteFleet:
    """Fleet whose clients are other machines. They keep their data; the server keeps their scores."""

    exchange: Exchange
    names: Sequence[str]
    """Names of the clients; a client's number is its place here."""
    federation: Federation
    scored_clients: Collection[int]
    """Clients on whose hold-outs adapters are scored."""
    folder: Path
    """Folder in which answers lie until their turn comes."""
    watch: Watch = ignore
    counted_width: int | None = None
    """Positions of each block that count, where padding does; None where real tokens alone count."""

    def __post_init__(self) -> None:
        facts = self.exchange.facts
        self.clients: Sequence[int] = [client for client, name in enumerate(self.names) if facts[name].blocks]
        self.optimizer_states: dict[int, OptimizerState] = {}
        """States of optimizers between rounds: always empty, for clients keep their own."""
        self.own_parts: dict[int, Tensor] = {}
        """Parts of adapters that clients keep: always empty, for there are none here."""
        self.scores: dict[int, Score] = {}
        self._missing: set[str] = set()

    @property
    def sizes(self) -> dict[int, ClientSize]:
        """Amount of data that each client said it has, when it enrolled."""
        facts = {client: self.exchange.facts[self.names[client]] for client in self.clients}
        return {client: ClientSize(told.blocks, told.tokens) for client, told in facts.items()}

    def restore(
        self, optimizer_states: dict[int, OptimizerState], scores: dict[int, Score], own_parts: dict[int, Tensor]
    ) -> None:
        self.scores = scores

    def forget_scores(self) -> None:
        """Forget the scores: clients are not asked to judge a round whose beginning nobody did."""
        self.scores = {}

    def train(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult | ClientPreview]:
        """Have the clients train: yield a preview of each update as it comes, and all in the order of the tasks.

        The clients train while this waits for previews. All that comes after them is read from the disk.
        """
        waiting = {self.names[task.client]: task for task in tasks}
        lost: dict[str, ClientFailure] = {}
        with AnswerSpool(self.folder) as spool:
            for _ in range(DEADLINES):
                # Here the clients train: `ask` waits for them.
                for name, found in self.exchange.ask(self._questions(waiting), self._missing):
                    self._note(name, found, "train")
                    result = self._read(waiting[name], found)
                    if isinstance(result, ClientFailure):
                        lost[name] = result
                    else:
                        lost.pop(name, None)
                        assert isinstance(found, Frame), "an update in no answer"
                        spool.put(name, found)
                        yield ClientPreview(result)
                if self.federation.on_quorum_lost != "wait" or len(lost) <= self.federation.max_lost_clients:
                    break
                self.exchange.say(
                    "waiting", f"for {', '.join(sorted(lost))}: the round has too few updates without them"
                )
                self._missing.clear()
                waiting = {name: waiting[name] for name in lost}
            # Sums of floats depend on their order: in that of the tasks they are those of a run on one machine.
            for task in tasks:
                name = self.names[task.client]
                yield lost[name] if name in lost else self._read(task, spool.take(name))

    def evaluate(self, adapter: Adapter) -> dict[int, Score]:
        """Have the scored clients score an adapter; one that fails to is left out."""
        packed = pack_adapter(adapter)
        frame = replace(packed, manifest={**packed.manifest, "do": "evaluate"})
        numbers = {self.names[client]: client for client in self.scored_clients}
        scores = {}
        for name, found in self.exchange.ask(dict.fromkeys(numbers, frame), self._missing):
            self._note(name, found, "evaluate")
            try:
                if isinstance(found, str):
                    raise MessageError(found)
                facts, width = self.exchange.facts[name], self.counted_width
                most = facts.holdout_tokens if width is None else width * facts.holdout_blocks
                if score := unpack_score(found, most, private=self.exchange.private):
                    scores[numbers[name]] = score
            except MessageError as error:
                self.exchange.say("unscored", f"{name}: {error}")
        self.scores = dict(sorted(scores.items()))
        return self.scores

    def _questions(self, tasks: Mapping[str, ClientTask]) -> dict[str, Frame]:
        """Pack tasks, by their clients' names. Those that start from one adapter share its bytes."""
        starts = {id(task.adapter): task.adapter for task in tasks.values()}
        packed = {number: pack_adapter(adapter) for number, adapter in starts.items()}
        questions = {}
        for name, task in tasks.items():
            frame = pack_task(task, packed[id(task.adapter)])
            judge = task.client in self.scores
            questions[name] = replace(frame, manifest={**frame.manifest, "do": "train", "judge": judge})
        return questions

    def _read(self, task: ClientTask, found: Frame | str) -> ClientResult:
        try:
            if isinstance(found, str):
                raise MessageError(found)
            return unpack_update(found, task, private=self.exchange.private)
        except MessageError as error:
            where = {"round": task.round, "client": task.client, "stage": self.names[task.client]}
            return ClientFailure(task.client, TrainingError(str(error), **where))  # type: ignore[arg-type]

    def _note(self, name: str, found: Frame | str, do: str) -> None:
        if isinstance(found, str):
            self._missing.add(name)
            self.exchange.say("lost", f"{name}: {found}")
            return
        self._missing.discard(name)
        # What is wrong with an answer is said where it is used.
        with suppress(MessageError):
            for progress in unpack_progress(found, do, private=self.exchange.private):
                self.watch(progress)
