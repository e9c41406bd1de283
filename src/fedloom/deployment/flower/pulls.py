"""Looks of a SuperNode for messages, on both sides: none gets lost with an answer, none is a burden. No torch here.

For Flower a message is delivered once it was given out, whether or not that answer arrives. Here a node numbers its
looks and tells which was the last whose answer came: what was given for a later one is given again.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import Any

PULL_PATH = "/v1/fleet/pull-messages"
LOOK_HEADER = "x-fedloom-look"
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
        self._took = 0.0

    def pull(self, client: Any, request: Any) -> Any:
        """Look for messages as Flower's client does, each time with a number of its own."""
        look = Look(self._session, next(self._numbers), self._answered)
        client._client.headers[LOOK_HEADER] = str(look)
        began = time.monotonic()
        try:
            found = self._pull(client, request)
        finally:
            self._took = time.monotonic() - began
        self._answered = look.number
        return found

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
