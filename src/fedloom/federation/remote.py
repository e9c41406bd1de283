"""A fleet of other machines: questions to clients by their names, and their answers, with a deadline on every wait.

It knows nothing of Flower: a `Link` tells who is there and carries frames. A client is its name, whatever node it is
now: one that comes back is asked again, and only the first answer counts.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from fedloom.adapters.weights import Adapter
from fedloom.deployment.wire import Frame
from fedloom.errors import DeploymentError, MessageError, TrainingError
from fedloom.evaluation import Score
from fedloom.federation.admission import Holding
from fedloom.federation.packing import (
    Facts,
    pack_adapter,
    pack_task,
    unpack_facts,
    unpack_progress,
    unpack_score,
    unpack_update,
)
from fedloom.progress import Watch, ignore
from fedloom.training.jobs import ClientFailure, ClientResult, ClientTask, OptimizerState
from fedloom.words import count, format_seconds
from fedloom.writing import writing

if TYPE_CHECKING:
    from fedloom.recipe import Recipe

POLL_SECONDS = 0.2
ATTEND_SECONDS = 1.0
"""Between two looks at who is there."""
TRIES = 3
"""Of a question that Flower could not deliver or whose process died."""
PHASES = {"train": "training", "evaluate": "scoring"}
"""What a client is doing, by what it was asked."""
DEADLINES = 10
"""That a round waits for its quorum, with `on_quorum_lost = "wait"`."""


class Node(NamedTuple):
    """One session of one of Flower's nodes."""

    id: str
    name: str
    """That its key was registered with; empty on a link without keys."""
    session: str


class Answer(NamedTuple):
    message: str
    frame: Frame | None
    error: str


class Link(Protocol):
    """Whoever carries frames to nodes. Every call raises OSError where the link is lost."""

    def nodes(self) -> Sequence[Node]: ...
    def send(self, node: Node, frame: Frame, seconds: float) -> str:
        """Send a question, of no use after so many seconds; its id."""
        ...

    def pull(self, messages: Collection[str]) -> Answer | None:
        """An answer to one of these questions, if there is one."""
        ...

    def reopen(self) -> None:
        """Make a lost link anew; what was under way is lost.

        Raises:
            DeploymentError: that can't be done.
        """
        ...


class Exchange:
    """Who is there, by name, and questions to them."""

    def __init__(
        self,
        link: Link,
        recipe: Recipe,
        say: Callable[[str, str], object],
        show_clients: Callable[[Mapping[str, str]], object] = dict,
    ) -> None:
        self._link, self.say, self._show_clients = link, say, show_clients
        # Where the server's own documents are and how they lie is not told: nothing of it would be used.
        servers = {"source", "revision", "subset", "split", "files", "partition", "clients", "central_holdout"}
        self._recipe = recipe.model_dump(
            mode="json", exclude_unset=True, exclude_none=True, exclude={"data": servers, "baselines": True}
        )
        self._seconds = recipe.federation.round_deadline
        self.facts: dict[str, Facts] = {}
        """Of every client that was met and not refused."""
        self.refused: dict[str, str] = {}
        self._phases: dict[str, str] = {}
        self._names: dict[Node, str] = {}
        self._meeting: dict[str, Node] = {}
        self._present: dict[str, Node] = {}
        self._looked = float("-inf")

    def assemble(self, clients: int, seconds: float) -> list[str]:
        """Wait until so many clients are there at once; their names, sorted.

        Raises:
            DeploymentError: they did not come in time.
        """
        until = time.monotonic() + seconds
        while len(there := sorted(self.facts.keys() & self._present.keys())) < clients:
            try:
                self._attend()
                self._look({})
            except OSError:
                self._reopen()
            if time.monotonic() > until:
                refused = "".join(f"; {name or 'a client'} refused: {why}" for name, why in self.refused.items())
                raise DeploymentError(
                    f"{len(there)} of {clients} clients came within {format_seconds(seconds)} "
                    f"({', '.join(there) or 'none'}){refused}",
                    where="data.clients",
                    mend="start the others with fedloom join, or give them longer: --wait SECONDS",
                )
            time.sleep(POLL_SECONDS)
        return there[:clients]

    def ask(self, questions: Mapping[str, Frame], missing: Collection[str] = ()) -> Iterator[tuple[str, Frame | str]]:
        """Each client's answer as it comes, or why there is none. Who is `missing` and not back is not waited for."""
        waiting = {name: replace(frame, manifest={**frame.manifest, "recipe": self._recipe})
                   for name, frame in questions.items()}  # fmt: skip
        asked: dict[str, str] = {}
        sent: dict[str, Node] = {}
        tries = dict.fromkeys(waiting, 0)
        until = time.monotonic() + self._seconds
        first_look = True
        while waiting:
            try:
                present = self._attend()
                if first_look:
                    for name in [name for name in waiting if name in missing and name not in present]:
                        del waiting[name]
                        yield name, "is still not connected"
                    first_look = False
                for name, frame in waiting.items():
                    node = present.get(name)
                    if node and sent.get(name) != node:
                        asked[self._link.send(node, frame, max(until - time.monotonic(), 1.0))] = name
                        sent[name] = node
                        self._show(name, PHASES[frame.manifest["do"]])
                answer = self._look(asked)
            except OSError:
                self._reopen()
                asked.clear()
                sent.clear()
                continue
            name = asked.pop(answer.message, "") if answer else ""
            if answer and name in waiting:
                tries[name] += 1
                if answer.frame is None and tries[name] < TRIES:
                    self.say("again", f"{name}: {answer.error}")
                    del sent[name]
                    continue
                del waiting[name]
                self._show(name, "answered" if answer.frame else "lost")
                yield name, answer.frame or answer.error
            elif time.monotonic() > until:
                for name in waiting:
                    self._show(name, "late" if name in self._present else "gone")
                    yield name, f"no answer within {format_seconds(self._seconds)}: what comes later is refused"
                return
            elif answer is None:
                time.sleep(POLL_SECONDS)

    def _attend(self) -> Mapping[str, Node]:
        """Who is there, by name; who is new is asked who it is."""
        if time.monotonic() - self._looked < ATTEND_SECONDS:
            return self._present
        self._looked = time.monotonic()
        # Flower lists a node that was killed for a minute more: of two with one name, the later is the client.
        nodes = sorted(self._link.nodes(), key=lambda node: node.session)
        for node in nodes:
            if node not in self._names and node not in self._meeting.values():
                question = Frame({"do": "meet", "recipe": self._recipe})
                self._meeting[self._link.send(node, question, self._seconds)] = node
                if node.name:
                    self._show(node.name, "loading")
        before = set(self._present)
        self._present = {name: node for node in nodes if (name := self._names.get(node, ""))}
        for name in before - set(self._present):
            self.say("gone", name)
            self._show(name, "gone")
        return self._present

    def _look(self, asked: Mapping[str, str]) -> Answer | None:
        """An answer to one of these questions; answers to who one is are taken in."""
        answer = self._link.pull([*asked, *self._meeting]) if asked or self._meeting else None
        if answer and answer.message in self._meeting:
            self._meet(self._meeting.pop(answer.message), answer)
            self._looked = float("-inf")
            return None
        return answer

    def _meet(self, node: Node, answer: Answer) -> None:
        if answer.frame is None:
            return  # it is asked again at the next look
        told = answer.frame.manifest
        name = node.name or str(told.get("name", ""))[:64]
        known = self.facts.get(name)
        try:
            if "error" in told:
                raise MessageError(str(told["error"])[:300])
            told = unpack_facts(told)
            if known and any(known[key] != told[key] for key in ("base", "documents")):
                raise MessageError("it came back with another base model or other documents")
        except MessageError as error:
            self._names[node] = ""
            self.refused[name] = str(error)
            self.say("refused", f"{name}: {error}")
            return
        self._names[node] = name
        self.facts[name] = told
        self._show(name, "connected")
        self.say("client", f"{name}: {count(told['train_documents'], 'document')}, {count(told['blocks'], 'block')}")

    def _show(self, name: str, phase: str) -> None:
        if self._phases.get(name) != phase:
            self._phases[name] = phase
            self._show_clients(dict(self._phases))

    def _reopen(self) -> None:
        self.say("link", "lost; it is made anew")
        self._meeting.clear()
        self._names.clear()
        self._present = {}
        self._looked = float("-inf")
        self._link.reopen()


class Shelf:
    """Answers of a round, on the disk until their turn comes: in a file without a name, which ends with the process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with writing(folder):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed by `__exit__`)
        self._kept: dict[str, tuple[Mapping[str, Any], int, int]] = {}

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, *ended: object) -> None:
        self._file.close()

    def put(self, name: str, frame: Frame) -> None:
        """Keep an answer.

        Raises:
            RunError: it can't be written.
        """
        with writing(self._folder):
            self._kept[name] = frame.manifest, self._file.tell(), len(frame.payload)
            self._file.write(frame.payload)
            self._file.flush()

    def take(self, name: str) -> Frame:
        """An answer that was kept."""
        manifest, start, length = self._kept[name]
        return Frame(manifest, os.pread(self._file.fileno(), length, start))


@dataclass
class RemoteFleet:
    """The fleet whose clients are other machines. They keep their data; the server keeps their scores."""

    exchange: Exchange
    names: Sequence[str]
    """Client numbers are places in it."""
    recipe: Recipe
    judges: Collection[int]
    folder: Path
    """Where answers lie until their turn comes."""
    watch: Watch = ignore

    def __post_init__(self) -> None:
        facts = self.exchange.facts
        self.clients: Sequence[int] = [client for client, name in enumerate(self.names) if facts[name]["blocks"]]
        self.optimizer_states: dict[int, OptimizerState] = {}
        """Always empty: what clients keep is theirs."""
        self.scores: dict[int, Score] = {}
        self._missing: set[str] = set()

    @property
    def holdings(self) -> dict[int, Holding]:
        """What each client said that it has, when it enrolled."""
        facts = {client: self.exchange.facts[self.names[client]] for client in self.clients}
        return {client: Holding(fact["blocks"], fact["tokens"]) for client, fact in facts.items()}

    def restore(self, optimizer_states: dict[int, OptimizerState], scores: dict[int, Score]) -> None:
        self.scores = scores

    def train(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        """The updates of a round by client, whatever order they come in: sums then have one order."""
        section = self.recipe.federation
        waiting = {self.names[task.client]: task for task in tasks}
        lost: dict[str, ClientFailure] = {}
        with Shelf(self.folder) as shelf:
            for _ in range(DEADLINES):
                for name, found in self.exchange.ask(self._questions(waiting), self._missing):
                    self._note(name, found)
                    result = self._read(waiting[name], found)
                    if isinstance(result, ClientFailure):
                        lost[name] = result
                    else:
                        lost.pop(name, None)
                        shelf.put(name, found)  # type: ignore[arg-type]
                if section.on_quorum_lost != "wait" or len(lost) <= section.max_lost_clients:
                    break
                self.exchange.say("waiting", f"for {', '.join(sorted(lost))}: the round has too few updates without")
                self._missing.clear()
                waiting = {name: waiting[name] for name in lost}
            for task in tasks:
                name = self.names[task.client]
                yield lost[name] if name in lost else self._read(task, shelf.take(name))

    def evaluate(self, adapter: Adapter) -> dict[int, Score]:
        packed = pack_adapter(adapter)
        frame = replace(packed, manifest={**packed.manifest, "do": "evaluate"})
        numbers = {self.names[client]: client for client in self.judges}
        scores = {}
        for name, found in self.exchange.ask(dict.fromkeys(numbers, frame), self._missing):
            self._note(name, found)
            try:
                if isinstance(found, str):
                    raise MessageError(found)
                tokens = self.exchange.facts[name]["holdout_tokens"]
                if score := unpack_score(found.manifest.get("score"), tokens):
                    scores[numbers[name]] = score
            except MessageError as error:
                self.exchange.say("unscored", f"{name}: {error}")
        self.scores = dict(sorted(scores.items()))
        return self.scores

    def _questions(self, tasks: Mapping[str, ClientTask]) -> dict[str, Frame]:
        """Clients that start from one adapter share its bytes."""
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
            if "error" in found.manifest:
                raise MessageError(str(found.manifest["error"])[:300])
            return unpack_update(found, task)
        except MessageError as error:
            where = {"round": task.round, "client": task.client, "stage": self.names[task.client]}
            return ClientFailure(task.client, TrainingError(str(error), **where))  # type: ignore[arg-type]

    def _note(self, name: str, found: Frame | str) -> None:
        if isinstance(found, str):
            self._missing.add(name)
            self.exchange.say("lost", f"{name}: {found}")
            return
        self._missing.discard(name)
        try:
            for progress in unpack_progress(found.manifest.get("progress", ())):
                self.watch(progress)
        except MessageError as error:
            self.exchange.say("odd", f"{name}: {error}")
