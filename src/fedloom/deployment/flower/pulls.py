"""Looks of a SuperNode for messages, on both sides: none gets lost with an answer, none is a burden. No torch here.

For Flower a message is delivered once it was given out, whether or not that answer arrives. Here a node numbers its
looks and tells which was the last whose answer came: what was given for a later one is given again. And a look for
which there is nothing waits at the server: asked anew twice a second, a SuperLink does little else from 75 nodes on.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import Any

PULL_PATH = "/v1/fleet/pull-messages"
LOOK_HEADER = "x-fedloom-look"
WAIT_HEADER, WAITED_HEADER = "x-fedloom-wait", "x-fedloom-waited"
"""Headers by which a node says that its look may wait, and a server how many seconds it did."""
WAIT_SECONDS = 10.0
"""Time for which a look waits for a message. A node gives up a request after 30 seconds, and must not be near that."""
SWEEP_SECONDS = 5.0
"""Time between two looks of a SuperLink for messages whose time is over."""
SLOWER_TIMES, MOST_REST_SECONDS = 4.0, 8.0
"""Rest after a look, in times that it took, and the longest such rest. A hundred nodes that ask a slow server anew as
soon as it has answered are all in its queue all the time, and what a round needs waits behind them."""


@dataclass(frozen=True)
class Look:
    """Look for messages, as its node tells of it."""

    session: str
    """Name of the node's process."""
    number: int
    answered: int
    """Number of the last look whose answer came, or 0."""

    def __str__(self) -> str:
        return f"{self.session} {self.number} {self.answered}"


def read_look(told: bytes) -> Look | None:
    """Read what a node tells of its look; None if that is nothing of the kind."""
    match told.decode("latin-1").split(" "):
        case [session, number, answered] if (number + answered).isascii() and number.isdigit() and answered.isdigit():
            if max(len(session), len(number), len(answered)) <= 20:
                return Look(session, int(number), int(answered))
    return None


LOOK: ContextVar[Look | None] = ContextVar("look", default=None)
"""Look that the request which is being answered tells of."""


class Looks:
    """Looks of this process's node."""

    def __init__(self, pull: Callable[..., Any]) -> None:
        self._pull = pull
        self._session, self._numbers, self._answered = secrets.token_hex(8), itertools.count(1), 0
        self._took = self._waited = 0.0

    def pull(self, client: Any, request: Any) -> Any:
        """Look for messages as Flower's client does, each time with a number of its own."""
        look = Look(self._session, next(self._numbers), self._answered)
        client._client.headers.update({LOOK_HEADER: str(look), WAIT_HEADER: "1"})
        client._client.event_hooks = {"response": [self._note]}
        began, self._waited = time.monotonic(), 0.0
        try:
            found = self._pull(client, request)
        finally:
            self._took = time.monotonic() - began - self._waited
        self._answered = look.number
        return found

    def _note(self, response: Any) -> None:
        """Note how long a look waited: that it took this long does not say that the server is slow."""
        with suppress(KeyError, ValueError):  # the answer to something else
            self._waited = float(response.headers[WAITED_HEADER])

    def rest_seconds(self, seconds: float) -> float:
        """Return how long to rest after the last look: so many seconds, or longer where it was slow."""
        return slower(seconds, self._took)


def slower(seconds: float, took: float) -> float:
    """Return how long to rest after a look that took some time, at least `seconds`."""
    return max(seconds, min(SLOWER_TIMES * took, MOST_REST_SECONDS))


class Given:
    """Messages that a SuperLink gave out for each node's last look."""

    def __init__(self, pull: Callable[..., Any]) -> None:
        self._pull = pull
        self._last: dict[int, tuple[Look, str]] = {}
        self._lock = Lock()

    def pull(self, request: Any, state: Any, store: Any) -> Any:
        """Give out a message as Flower does; first what a lost answer held, and nothing for a look that is over."""
        from flwr.proto.fleet_pb2 import PullMessagesResponse

        look, node = LOOK.get(), request.node.node_id
        if look is None:
            return self._pull(request=request, state=state, store=store)
        with self._lock:
            last, message = self._last.get(node, (None, ""))
            if last and last.session == look.session:
                # The node has asked again meanwhile: what this one were given would be lost.
                if look.number <= last.number:
                    return PullMessagesResponse()
                question = state.message_ins_store.get(message)
                if last.number > look.answered and question:
                    question.metadata.delivered_at = ""
            response = self._pull(request=request, state=state, store=store)
            given = response.messages_list[0].metadata.message_id if response.messages_list else ""
            self._last[node] = look, given
            return response


@dataclass
class Waiting:
    """Look that waits for a message, in the loop of the process that holds it."""

    loop: asyncio.AbstractEventLoop
    told: asyncio.Event
    is_over: bool = False
    """True where its node is no longer there, or has looked again: whatever it were given would be lost."""


class Questions:
    """Messages in a SuperLink for its nodes, by node, and the looks that wait for one.

    Flower walks all messages for each look. Here a look sees those of its node.
    """

    def __init__(self) -> None:
        self._of_node: dict[int, dict[str, None]] = defaultdict(dict)
        self._waiting: dict[int, Waiting] = {}
        self._swept = float("-inf")

    def add(self, node: int, message: str) -> None:
        """Note a message, and wake the look that waits for it."""
        self._of_node[node][message] = None
        self._wake(node)

    def forget(self, node: int, message: str) -> None:
        """Forget a message that is no longer there."""
        self._of_node[node].pop(message, None)

    def find(self, state: Any, node: int, limit: int | None) -> list[Any]:
        """Return the messages that wait for a node, and take them for delivered, as Flower does."""
        from flwr.supercore.date import now

        with state.lock:
            # Flower does this for all of them at each look; messages of nodes that never come back have to go too.
            if time.monotonic() - self._swept > SWEEP_SECONDS:
                self._swept = time.monotonic()
                state._check_stored_messages({*state.message_ins_store})
            state._check_stored_messages({*self._of_node[node]})
            found = self._undelivered(state, node)[:limit]
            for message in found:
                message.metadata.delivered_at = now().isoformat()
            return found

    async def wait(self, state: Any, node: int, receive: Callable[[], Awaitable[Any]]) -> float | None:
        """Wait until there is a message for a node, and return the seconds; None where it is to be given nothing.

        That is so where it hung up, looked again, is another process by now, or is revoked.
        """
        self.end(node)
        began, mine = time.monotonic(), Waiting(asyncio.get_running_loop(), asyncio.Event())
        self._waiting[node] = mine
        told, hung_up = asyncio.ensure_future(mine.told.wait()), asyncio.ensure_future(receive())
        try:
            # Looked at when it can be woken: none comes between.
            with state.lock:
                is_there = bool(self._undelivered(state, node))
            if not is_there:
                await asyncio.wait({told, hung_up}, timeout=WAIT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            return None if hung_up.done() or mine.is_over else time.monotonic() - began
        finally:
            told.cancel()
            hung_up.cancel()
            if self._waiting.get(node) is mine:
                del self._waiting[node]

    def end(self, node: int) -> None:
        """Give nothing to the look of a node that waits now."""
        if waiting := self._waiting.get(node):
            waiting.is_over = True
            self._wake(node)

    def _wake(self, node: int) -> None:
        if waiting := self._waiting.get(node):
            with suppress(RuntimeError):  # the server is ending
                waiting.loop.call_soon_threadsafe(waiting.told.set)

    def _undelivered(self, state: Any, node: int) -> list[Any]:
        # A copy, made in one step: others note messages meanwhile.
        there = [state.message_ins_store.get(message) for message in [*self._of_node[node]]]
        return [message for message in there if message and message.metadata.delivered_at == ""]


def questions_of(state: Any) -> Questions:
    """Return the questions in a SuperLink's state."""
    found: Questions = vars(state).setdefault("fedloom_questions", Questions())
    return found


def keep_by_node(kind: Any) -> None:
    """Have Flower's state of this type keep its messages by node, and end a waiting look whose node is another now."""
    store, find, delete = kind.store_message_ins, kind.get_message_ins, kind.delete_messages
    activate, let_go = kind.activate_node, kind.delete_node

    def store_message_ins(self: Any, message: Any) -> str | None:
        if stored := store(self, message):
            questions_of(self).add(message.metadata.dst_node_id, stored)
        return stored  # type: ignore[no-any-return]

    def get_message_ins(self: Any, node_id: int, limit: int | None, **told: Any) -> Any:
        return find(self, node_id, limit, **told) if told else questions_of(self).find(self, node_id, limit)

    def delete_messages(self: Any, message_ins_ids: set[str]) -> None:
        with self.lock:
            for message in message_ins_ids & self.message_ins_store.keys():
                questions_of(self).forget(self.message_ins_store[message].metadata.dst_node_id, message)
            delete(self, message_ins_ids)

    def activate_node(self: Any, node_id: int, heartbeat_interval: float) -> Any:
        # A look of the process before would take what this one is asked.
        questions_of(self).end(node_id)
        return activate(self, node_id, heartbeat_interval)

    def delete_node(self: Any, owner_aid: str, node_id: int) -> None:
        let_go(self, owner_aid, node_id)
        questions_of(self).end(node_id)

    for change in (store_message_ins, get_message_ins, delete_messages, activate_node, delete_node):
        setattr(kind, change.__name__, change)
