"""Questions to clients on other machines, by their names, and their answers, with a deadline on every wait.

It knows nothing of Flower: a `Transport` tells who is there and carries frames. A client is its name, whatever node it
is now: one that comes back is asked again, and only the first answer counts.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Protocol

from fedloom.deployment.message_fields import CLIENT
from fedloom.deployment.messages import ClientFacts, ask_within, unpack_facts
from fedloom.errors import DeploymentError, MessageError
from fedloom.host.frames import Frame
from fedloom.text import count, format_seconds

POLL_SECONDS = 0.2
ATTEND_SECONDS = 1.0
"""Time between two looks at who is there."""
TRIES = 3
"""Tries of a question that Flower could not deliver or whose process died."""
NOT_CONNECTED = "is still not connected"
"""Words on a client that was lost before, and is asked nothing while it is away."""
GONE_SECONDS = 3.0
"""Time before a node that went away is asked again, if it is listed all the same."""
ClientPhase = Literal["loading", "connected", "refused", "training", "scoring", "answered", "lost", "late", "gone"]
PHASES: dict[str, ClientPhase] = {
    "train": "training", "keep": "training", "evaluate": "scoring", "tasks": "scoring"
}  # fmt: skip
"""Phase of a client while it works, by what it was asked."""


class Node(NamedTuple):
    """Session of one of Flower's nodes: a node that is started again is another session."""

    id: str
    name: str
    """Name its key was registered under; empty without authentication."""
    session: str


class Answer(NamedTuple):
    """Client's answer to a question, or the reason why there is none."""

    message: str
    frame: Frame | None
    error: str
    is_gone: bool = False
    """True where the error is that the node went away."""


class Transport(Protocol):
    """Carrier of frames to nodes. Every call raises OSError where the connection is lost."""

    def nodes(self) -> Sequence[Node]:
        """List the nodes that are connected now."""
        ...

    def send(self, node: Node, frame: Frame, seconds: float) -> str:
        """Send a question that is of no use after so many seconds, and return its id."""
        ...

    def pull(self, messages: Collection[str]) -> Answer | None:
        """Return an answer to one of these questions, if there is one."""
        ...

    def reopen(self) -> None:
        """Connect again; whatever was under way is lost.

        Raises:
            DeploymentError: that can't be done.
        """
        ...


class Exchange:
    """Conversation with clients, by their names."""

    def __init__(
        self,
        transport: Transport,
        recipe: Mapping[str, Any],
        deadline_seconds: float,
        say: Callable[[str, str], object],
        show_clients: Callable[[Mapping[str, str]], object],
        check_facts: Callable[[ClientFacts], object] = bool,
        show_wait: Callable[[], object] = bool,
    ) -> None:
        """Open an exchange in which every question carries the recipe, as `pack_recipe` made it.

        `check_facts` raises MessageError for a client that may not take part with what it says it has. `show_wait` is
        called at each look at which everybody who is waited for is away.
        """
        self._transport, self.say, self._show_clients = transport, say, show_clients
        self.recipe, self._check_facts, self._show_wait = recipe, check_facts, show_wait
        self.seconds = deadline_seconds
        """Seconds that clients have to answer what they are asked from now on."""
        self.private = "privacy" in recipe
        """True where clients tell nothing of their documents but noised weights."""
        self.facts: dict[str, ClientFacts] = {}
        """Facts of every client that enrolled and was not refused."""
        self.refused: dict[str, str] = {}
        """Reasons by the names of the clients that were refused, or that refused."""
        self.away: Counter[str] = Counter()
        """Seconds for which each client was waited for after it was said to be gone, since this was last cleared."""
        self._gone: dict[str, float] = {}
        """Times, on the monotonic clock, since which clients are gone that were not back since."""
        self._phases: dict[str, ClientPhase] = {}
        self._names: dict[Node, str] = {}
        """Names by node; empty for a node that was refused."""
        self._meeting: dict[str, Node] = {}
        self._present: dict[str, Node] = {}
        self._places: frozenset[str] | None = None
        """Names of the clients that the run has; None while any may come."""
        self._late: set[str] = set()
        self._looked = float("-inf")

    def assemble(self, clients: int, seconds: float, known: Collection[str] = ()) -> list[str]:
        """Wait until so many clients are connected at once, and return their names, sorted.

        A run that goes on has its clients: with `known`, others are not asked who they are.

        Raises:
            DeploymentError: they did not come in time.
        """
        until = time.monotonic() + seconds
        self._places = frozenset(known) if known else None
        while len(there := sorted(self._places_of(self.facts.keys() & self._present.keys()))) < clients:
            self.attend()
            if time.monotonic() > until:
                refused = "".join(f"; {name or 'a client'} refused: {why}" for name, why in self.refused.items())
                raise DeploymentError(
                    f"{len(there)} of {clients} clients came within {format_seconds(seconds)} "
                    f"({', '.join(there) or 'none'}){refused}",
                    where="data.clients",
                    mend=_mend_missing(clients - len(there) - len(self.refused), bool(self.refused)),
                )
            time.sleep(POLL_SECONDS)
        self._places = frozenset(there[:clients])
        return there[:clients]

    def attend(self) -> None:
        """Look who is there and who they are, while nothing is asked."""
        try:
            self._attend()
            self._look({})
        except OSError:
            self._reopen()

    def _places_of(self, names: Collection[str]) -> Collection[str]:
        return names if self._places is None else [name for name in names if name in self._places]

    def ask(self, questions: Mapping[str, Frame], missing: Collection[str] = ()) -> Iterator[tuple[str, Frame | str]]:
        """Yield each client's answer as it comes, or the reason why there is none.

        Clients that are `missing` and not back are not waited for.
        """
        waiting = {
            name: replace(
                frame,
                manifest={**frame.manifest, "recipe": self.recipe, "documents": self.facts[name].documents},
            )
            for name, frame in questions.items()
        }
        asked: dict[str, str] = {}
        sent: dict[str, Node] = {}
        rested: dict[str, float] = {}
        tries = dict.fromkeys(waiting, 0)
        looked = time.monotonic()
        until = looked + self.seconds
        first_look = True
        while waiting:
            try:
                present = self._attend()
                # Lost before and still away: waiting for it would cost every later round its whole deadline.
                if first_look:
                    for name in [name for name in waiting if name in missing and name not in present]:
                        del waiting[name]
                        yield name, NOT_CONNECTED
                    first_look = False
                else:
                    # Before those who are back are asked: until now they did nothing, also where nobody saw them go.
                    working = [name for name in waiting if name in sent and sent[name] == present.get(name)]
                    looked = self._count_away(waiting, working, looked)
                for name, frame in waiting.items():
                    node = present.get(name)
                    # A client under another node has lost its question with the node it was before.
                    if node and sent.get(name) != node and time.monotonic() >= rested.get(name, 0.0):
                        left = max(until - time.monotonic(), 1.0)
                        asked[self._transport.send(node, ask_within(frame, left), left)] = name
                        sent[name] = node
                        self._show(name, PHASES[frame.manifest["do"]])
                answer = self._look(asked)
            except OSError:
                # Another SuperLink knows nothing of what was sent through this one: all is asked again.
                self._reopen()
                asked.clear()
                sent.clear()
                continue
            # A client that was asked twice may answer twice: after the first it is no longer waiting.
            name = asked.pop(answer.message, "") if answer else ""
            # Flower's error, at once, for a node without a heartbeat. It says nothing of the client: no try is counted.
            if answer and name in waiting and answer.is_gone:
                rested[name] = time.monotonic() + GONE_SECONDS
                sent.pop(name, None)
            elif answer and name in waiting:
                tries[name] += 1
                if answer.frame is None and tries[name] < TRIES:
                    self.say("retry", f"{name}: {answer.error}")
                    del sent[name]
                    continue
                del waiting[name]
                self._show(name, "answered" if answer.frame else "lost")
                yield name, answer.frame or answer.error
            elif time.monotonic() > until:
                for name in waiting:
                    self._show(name, "late" if name in self._present else "gone")
                    yield name, f"no answer within {format_seconds(self.seconds)}: what comes later is refused"
                return
            elif answer is None:
                time.sleep(POLL_SECONDS)

    def _attend(self) -> Mapping[str, Node]:
        """Look who is connected, by name, and ask new nodes who they are."""
        if time.monotonic() - self._looked < ATTEND_SECONDS:
            return self._present
        self._looked = time.monotonic()
        # Flower lists a node that was killed for a minute more: of two with one name, the later is the client.
        nodes = sorted(self._transport.nodes(), key=lambda node: node.session)
        for node in nodes:
            # Its documents would be read, and count as asked for, for nothing.
            if node.name and not self._places_of([node.name]):
                if node.name not in self._late:
                    self._late.add(node.name)
                    self.say("later", f"{node.name} has no place in this run, whose clients are there: in the next one")
                continue
            if node not in self._names and node not in self._meeting.values():
                question = ask_within(Frame({"do": "meet", "recipe": self.recipe}), self.seconds)
                self._meeting[self._transport.send(node, question, self.seconds)] = node
                if node.name:
                    self._show(node.name, "loading")
        before = set(self._present)
        self._present = {name: node for node in nodes if (name := self._names.get(node, ""))}
        for name in before - set(self._present):
            self._gone[name] = time.monotonic()
            self.say("gone", f"{name} is no longer connected")
            self._show(name, "gone")
        for name in self._gone.keys() & self._present.keys():
            away = format_seconds(time.monotonic() - self._gone.pop(name))
            self.say("back", f"{name} is connected again, after {away}")
        return self._present

    def _count_away(self, waiting: Collection[str], working: Collection[str], since: float) -> float:
        """Count the time since a look for those who are waited for and gone, and return that of this look."""
        now = time.monotonic()
        self.away.update({name: now - since for name in waiting if name in self._gone})
        if waiting and not working:
            self._show_wait()
        return now

    def _look(self, asked: Mapping[str, str]) -> Answer | None:
        """Return an answer to one of these questions, if there is one; enrol clients that have said who they are."""
        # All of them: a rest after each would be most of what a hundred clients take to come.
        while asked or self._meeting:
            answer = self._transport.pull([*asked, *self._meeting])
            if answer is None or answer.message not in self._meeting:
                return answer
            self._meet(self._meeting.pop(answer.message), answer)
            self._looked = float("-inf")
        return None

    def _meet(self, node: Node, answer: Answer) -> None:
        if answer.frame is None:
            return  # the node is no longer known to be asked: it is asked again at the next look
        name = node.name or _called(answer.frame)
        known = self.facts.get(name)
        try:
            facts = unpack_facts(answer.frame, private=self.private)
            self._check_facts(facts)
            # Its numbers too: limits were reckoned from them. Its own tasks its owner may change meanwhile.
            if known and replace(known, name=facts.name, version=facts.version, tasks=facts.tasks) != facts:
                raise MessageError("it came back with another base model or other documents")
        except MessageError as error:
            self._names[node] = ""
            self.refused[name] = str(error)
            if name:
                self._show(name, "refused")
            self.say("refused", f"{name}: {error}")
            return
        self._names[node] = name
        self.refused.pop(name, None)  # its owner has mended it
        # The name of its key, if it has one, whatever it calls itself.
        self.facts[name] = replace(facts, name=name)
        self._show(name, "connected")
        own = f", {count(facts.tasks, 'task')} of its own" if facts.tasks else ""
        held = f"{count(facts.train_documents, 'document')}, {count(facts.blocks, 'block')}"
        if facts.noise_multiplier is not None:  # a document each, or all of one value of a column
            held = f"{count(facts.blocks, 'unit')}, a noise multiplier of {facts.noise_multiplier:.3g}"
        below = ", which clients of its own hold" if facts.weighs else ""
        self.say("client", f"{name}: {held}{own}{below}")

    def _show(self, name: str, phase: ClientPhase) -> None:
        if self._phases.get(name) != phase:
            self._phases[name] = phase
            self._show_clients(dict(self._phases))

    def _reopen(self) -> None:
        self.say("server", "lost the connection to Flower's SuperLink; connecting again")
        self._meeting.clear()
        self._names.clear()
        self._present = {}
        self._looked = float("-inf")
        self._transport.reopen()


def _mend_missing(silent: int, some_refused: bool) -> str:
    """Return what to do where some clients refused or were refused, and so many others were not heard of."""
    refusals = "change the recipe, or have the owners of those mend it, whose own terminals say why, and join anew"
    others = "start the others with fedloom join, or give them longer: --wait SECONDS"
    return "; ".join([refusals] * some_refused + [others] * (silent > 0))


def _called(answer: Frame) -> str:
    """Return the name that a client calls itself, or nothing where that is no name."""
    try:
        return str(CLIENT.read(answer.manifest.get("name"), "name"))
    except MessageError:
        return ""
