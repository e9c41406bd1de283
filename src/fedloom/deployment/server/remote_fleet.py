"""Fleet of other machines: tasks and adapters go to them as questions, updates and scores come back as answers.

A round's answers lie on the disk until all are there, so memory does not grow with the number of clients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fedloom.adapters.adapter import Adapter
from fedloom.deployment.messages import pack_adapter, pack_task, unpack_progress, unpack_score, unpack_update
from fedloom.deployment.own_messages import KeptAdapter, ask_tasks, unpack_answers, unpack_kept
from fedloom.deployment.server.exchange import NOT_CONNECTED, Exchange
from fedloom.errors import MessageError, TrainingError
from fedloom.evaluation.held_out import Score
from fedloom.evaluation.task_counts import OwnAnswers
from fedloom.federation.admission import ClientSize
from fedloom.federation.fleet import ClientPreview
from fedloom.federation.lora_rules import shared_part
from fedloom.host.frames import Frame
from fedloom.host.spool import Spool
from fedloom.progress import Watch, ignore
from fedloom.recipe.sections import Federation
from fedloom.training.jobs import ClientFailure, ClientResult, ClientTask, OptimizerState

DEADLINES = 10
"""Deadlines that a round waits for its quorum, with `on_quorum_lost = "wait"`."""
Found = TypeVar("Found")


@dataclass
class RemoteFleet:
    """Fleet whose clients are other machines. They keep their data; the server keeps their scores."""

    exchange: Exchange
    names: Sequence[str]
    """Names of the clients, in the order of their numbers."""
    federation: Federation
    scored_clients: Collection[int]
    """Clients on whose hold-outs adapters are scored."""
    folder: Path
    """Folder in which answers lie until their turn comes."""
    watch: Watch = ignore
    counted_width: int | None = None
    """Positions of each block that count, where padding does; None where real tokens alone count."""
    first_client: int = 0
    """Number of the first client; the others' follow."""

    def __post_init__(self) -> None:
        facts = self.exchange.facts
        self.named = dict(enumerate(self.names, self.first_client))
        """Names of the clients by their numbers."""
        self.clients: Sequence[int] = [client for client, name in self.named.items() if facts[name].blocks]
        self.optimizer_states: dict[int, OptimizerState] = {}
        """States of optimizers between rounds: always empty, for clients keep their own."""
        self.own_parts: dict[int, Tensor] = {}
        """Keyed hashes of the parts of adapters that clients keep, as bytes: the parts themselves are not here."""
        self.scores: dict[int, Score] = {}
        self._missing: set[str] = set()

    @property
    def sizes(self) -> dict[int, ClientSize]:
        """Amount of data that each client said it has, when it enrolled."""
        facts = {client: self.exchange.facts[self.named[client]] for client in self.clients}
        return {client: ClientSize(told.blocks, told.tokens) for client, told in facts.items()}

    def foresee(self, tasks: Sequence[ClientTask]) -> Mapping[int, ClientSize]:
        """Return nothing: each client shows what it did before the first counts."""
        return {}

    @property
    def away(self) -> dict[int, float]:
        """Seconds for which clients were waited for that were away, by number, since training last began."""
        return {client: self.exchange.away[name] for client, name in self.named.items() if name in self.exchange.away}

    def restore(
        self, optimizer_states: dict[int, OptimizerState], scores: dict[int, Score], own_parts: dict[int, Tensor]
    ) -> None:
        self.scores, self.own_parts = scores, dict(own_parts)

    def forget_scores(self) -> None:
        """Forget the scores: clients are not asked to judge a round whose beginning nobody did."""
        self.scores = {}

    def train(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult | ClientPreview]:
        """Have the clients train: yield a preview of each update as it comes, and all in the order of the tasks.

        The clients train while this waits for previews. All that comes after them is read from the disk.
        """
        self.exchange.away.clear()
        waiting = {self.named[task.client]: task for task in tasks}
        lost: dict[str, ClientFailure] = {}
        with Spool[str](self.folder) as spool:
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
                        # Its progress was counted.
                        told = {key: value for key, value in found.manifest.items() if key != "progress"}
                        spool.put(name, replace(found, manifest=told))
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
                name = self.named[task.client]
                if name in lost:
                    yield lost[name]
                    continue
                found = spool.take(name)
                # As in one process: it keeps what it trained, whether that counts in the round or not.
                if task.shares_P is not None:
                    stamp = bytes.fromhex(found.manifest["own"])
                    self.own_parts[task.client] = torch.frombuffer(bytearray(stamp), dtype=torch.uint8)
                yield self._read(task, found)

    def evaluate(self, adapter: Adapter) -> dict[int, Score]:
        """Have the scored clients score an adapter; one that fails to is left out."""
        packed = self._pack(adapter)
        frame = replace(packed, manifest={**packed.manifest, "do": "evaluate"})

        def read(name: str, answer: Frame) -> Score | None:
            facts, width = self.exchange.facts[name], self.counted_width
            most = facts.holdout_tokens if width is None else width * facts.holdout_blocks
            return unpack_score(answer, most, private=self.exchange.private)

        found = self._ask_each(dict.fromkeys(self.scored_clients, frame), read)
        for client, why in found.items():
            if isinstance(why, MessageError):
                self.exchange.say("unscored", f"{self.named[client]}: {why}")
        self.scores = {client: score for client, score in found.items() if isinstance(score, Score)}
        return self.scores

    @property
    def examined(self) -> Sequence[int]:
        """Ids of the clients whose owners hold tasks of their own."""
        return [client for client, name in self.named.items() if self.exchange.facts[name].tasks]

    def ask_tasks(self, adapter: Adapter, *, base: bool) -> dict[int, OwnAnswers]:
        """Have those clients ask an adapter their own tasks; who does not tell, or fails to, is said and left out."""
        frame = ask_tasks(self._pack(adapter), base=base)

        def read(name: str, answer: Frame) -> OwnAnswers | None:
            return unpack_answers(answer, self.exchange.facts[name].tasks, base=base)

        found = self._ask_each(dict.fromkeys(self.examined, frame), read)
        for client, answers in found.items():
            if not isinstance(answers, OwnAnswers):
                self.exchange.say("unasked", f"{self.named[client]}: {answers or 'its owner keeps the counts'}")
        return {client: answers for client, answers in found.items() if isinstance(answers, OwnAnswers)}

    def keep(self, adapter: Adapter, round: int) -> dict[int, KeptAdapter | MessageError]:
        """Have every client keep an adapter of its own, made from this one; return what it tells, or why there is none.

        `round` is that of the training which it goes on with, one more than the run had.
        """
        packed = self._pack(adapter)
        told = {**packed.manifest, "do": "keep", "round": round}
        questions = {client: replace(packed, manifest={**told, "client": client}) for client in self.clients}
        found = self._ask_each(questions, lambda _, answer: unpack_kept(answer, private=self.exchange.private))
        return {client: kept for client, kept in found.items() if kept is not None}

    def _pack(self, adapter: Adapter) -> Frame:
        """Pack an adapter: what clients share of it."""
        return pack_adapter(adapter, shared_part(adapter.layout, self.federation.lora_rule))

    def _with_own(self, client: int, frame: Frame) -> Frame:
        """Return a question that says which part of the adapter the client goes on with, where it has one of its own.

        Before its first round it has what everybody has.
        """
        if (stamp := self.own_parts.get(client)) is None:
            return frame
        return replace(frame, manifest={**frame.manifest, "own": bytes(stamp.tolist()).hex()})

    def _ask_each(
        self, questions: Mapping[int, Frame], read: Callable[[str, Frame], Found]
    ) -> dict[int, Found | MessageError]:
        """Ask clients, by their numbers, and return what is read of each answer, or why there is none."""
        numbers = {self.named[client]: client for client in questions}
        asked = {self.named[client]: self._with_own(client, frame) for client, frame in questions.items()}
        found: dict[int, Found | MessageError] = {}
        for name, answer in self.exchange.ask(asked, self._missing):
            self._note(name, answer, asked[name].manifest["do"])
            try:
                if isinstance(answer, str):
                    raise MessageError(answer)
                found[numbers[name]] = read(name, answer)
            except MessageError as error:
                found[numbers[name]] = error
        return dict(sorted(found.items()))

    def _questions(self, tasks: Mapping[str, ClientTask]) -> dict[str, Frame]:
        """Pack tasks, by their clients' names. Those that start from one adapter share its bytes."""
        starts = {id(task.adapter): task.adapter for task in tasks.values()}
        packed = {number: self._pack(adapter) for number, adapter in starts.items()}
        questions = {}
        for name, task in tasks.items():
            frame = self._with_own(task.client, pack_task(task, packed[id(task.adapter)]))
            judge = task.client in self.scores
            questions[name] = replace(frame, manifest={**frame.manifest, "do": "train", "judge": judge})
        return questions

    def _read(self, task: ClientTask, found: Frame | str) -> ClientResult:
        try:
            if isinstance(found, str):
                raise MessageError(found)
            return unpack_update(found, task, private=self.exchange.private)
        except MessageError as error:
            where = {"round": task.round, "client": task.client, "stage": self.named[task.client]}
            lost = TrainingError(str(error), **where)  # type: ignore[arg-type]
            return ClientFailure(task.client, lost, was_asked=found != NOT_CONNECTED)

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
