"""Guard of a SuperLink: who may speak to it, how much of it is read, and how much of that it keeps. No torch here.

Flower reads a request whole before it looks who sent it, and keeps every object that it is sent until somebody
confirms it. Here nothing of a stranger's is read, of what is read the sizes and the time are limited, and a node has no
more stored than a few answers. What is changed in Flower is held to the version installed by tests.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from base64 import b64decode
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from types import SimpleNamespace
from typing import Any

from fedloom.deployment.flower.pulls import (
    LOOK,
    LOOK_HEADER,
    PULL_PATH,
    WAIT_HEADER,
    WAITED_HEADER,
    Given,
    keep_by_node,
    questions_of,
    read_look,
)
from fedloom.deployment.processes import CONTROL_SECRET, KEYS_ARE_IN
from fedloom.deployment.status import KEYS_HEADER, MOST_BODY_BYTES, SIGNATURE_PATH, STAMP_HEADER, STATUS_PATH

FLEET = "/v1/fleet/"
"""Path of what nodes ask; a node proves itself by its key."""
SECRET_HEADER = "x-fedloom-secret"
MOST_WAITING_BYTES = 64 * 2**20
"""Limit of the bodies that are read at one time, together: one for the nodes', and one for this machine's."""
MOST_LOOK_BYTES = 2**16
"""Limit of the body of a look for messages, which is kept for as long as the look waits; it has some hundred bytes."""
BODY_SECONDS = 60.0
"""Time within which a body must be there. nginx passes them on whole."""
ANSWERS_KEPT = 3
"""Answers of a node that are kept until they are fetched: it is asked one thing at a time."""
MOST_OBJECTS = 8
"""Limit of the objects that Flower makes of an answer, beyond the chunks of its array: message, records and such."""

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class Guard:
    """ASGI middleware before Flower's app: nobody operates it without its secret, and no stranger's body is read."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._secret = os.environ[CONTROL_SECRET].encode()
        self._is_open = False
        self._waiting_bytes = {True: 0, False: 0}
        """Bytes of the bodies that are being read, of the nodes' (True) and of the others'."""

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            return await self._pass(scope, receive, send)
        except asyncio.CancelledError:
            # The server ends. Its own answer is 500, with which a SuperNode ends; after this one it asks again.
            return await _answer(send, 503)

    async def _pass(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it to Flower's app."""
        headers, path = dict(scope["headers"]), scope["path"]
        is_fleet = path.startswith(FLEET)
        if not is_fleet:
            if not secrets.compare_digest(headers.get(SECRET_HEADER.encode(), b""), self._secret):
                return await _answer(send, 403)
        elif status := self._look(scope, headers, path):
            return await _answer(send, status)
        length = headers.get(b"content-length", b"0")
        if b"transfer-encoding" in headers or not length.isdigit():
            return await _answer(send, 411)
        if int(length) > (MOST_LOOK_BYTES if path == PULL_PATH else MOST_BODY_BYTES):
            return await _answer(send, 413)
        if self._waiting_bytes[is_fleet] + int(length) > MOST_WAITING_BYTES:
            return await _answer(send, 503)
        self._waiting_bytes[is_fleet] += int(length)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _read(receive)
        except TimeoutError:
            return await _answer(send, 408)
        finally:
            self._waiting_bytes[is_fleet] -= int(length)
        if body is None:
            return None  # the sender went away
        if path == PULL_PATH:
            LOOK.set(look := read_look(headers.get(LOOK_HEADER.encode(), b"")))
            # After an answer that was lost there may be something to be given again.
            if look and look.answered == look.number - 1 and WAIT_HEADER.encode() in headers:
                node = _find_node(scope["app"], headers)
                # Flower looks later who asks, and one who only names the key would end the look of who has it.
                if node is not None and (
                    not scope["app"].state.enable_supernode_auth or is_signed(scope["app"], headers)
                ):
                    state = scope["app"].state.linkstate_factory.state()
                    waited = await questions_of(state).wait(state, node, receive)
                    if waited is None:
                        return await _answer(send, 200)
                    send = _telling(send, WAITED_HEADER, f"{waited:.3f}")
        first = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return first.pop() if first else await receive()

        return await self._app(scope, replay, send)

    def _look(self, scope: Any, headers: dict[bytes, bytes], path: str) -> int:
        """Return the status that ends a question of the fleet's; 0 where it goes on to Flower."""
        # Until then every key is unknown, and Flower would say that it is refused.
        self._is_open = self._is_open or os.path.exists(os.environ[KEYS_ARE_IN])
        if not self._is_open:
            return 503
        if path == STATUS_PATH:
            return 204
        if not scope["app"].state.enable_supernode_auth:
            return 0
        if path == SIGNATURE_PATH:
            return 204 if is_signed(scope["app"], headers) else 401
        return 0 if _find_node(scope["app"], headers) is not None else 401


def _find_node(app: Any, headers: dict[bytes, bytes]) -> int | None:
    """Find the node whose key a request names: anybody may name it, but few know it."""
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER

    try:
        key = b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER.encode()], validate=True)
    except (KeyError, ValueError):
        return None
    found: int | None = app.state.linkstate_factory.state().get_node_id_by_public_key(key)
    return found


def is_signed(app: Any, headers: dict[bytes, bytes]) -> bool:
    """Return whether Flower would take a request with these headers for one of a node that is registered."""
    from fastapi import HTTPException
    from flwr.superlink.routers.fleet.node_auth import authenticate_node
    from starlette.datastructures import Headers

    if (node := _find_node(app, headers)) is None:
        return False
    asked = SimpleNamespace(protobuf_request=SimpleNamespace(node_id=node))
    request: Any = SimpleNamespace(headers=Headers(raw=[*headers.items()]), app=app, state=asked)
    try:
        authenticate_node(request)
    except HTTPException:
        return False
    return True


async def _read(receive: Receive) -> bytes | None:
    """Read a body whole, no longer than its length, which the server holds it to; None if its sender went away."""
    parts = []
    while True:
        part = await receive()
        if part["type"] != "http.request":
            return None
        parts.append(part.get("body", b""))
        if not part.get("more_body"):
            return b"".join(parts)


def _telling(send: Send, header: str, value: str) -> Send:
    """Return what sends an answer with one more header."""

    async def send_more(told: Any) -> None:
        if told["type"] == "http.response.start":
            told = {**told, "headers": [*told.get("headers", ()), (header.encode(), value.encode())]}
        await send(told)

    return send_more


async def _answer(send: Send, status: int) -> None:
    """Answer without a body, and tell the time: a client whose clock is off would be refused without a word."""
    headers = [(STAMP_HEADER.encode(), f"{time.time():.3f}".encode())]
    with suppress(OSError):  # not yet
        age = time.time() - os.stat(os.environ[KEYS_ARE_IN]).st_mtime
        headers.append((KEYS_HEADER.encode(), f"{max(age, 0.0):.1f}".encode()))
    if status != 204:
        headers.append((b"content-length", b"0"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body"})


def most_objects(answer_bytes: int) -> int:
    """Return how many objects Flower makes of an answer of so many bytes, at most."""
    from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE

    return MOST_OBJECTS + answer_bytes // FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE


def bound_answers() -> None:
    """Have Flower keep what the questions of now need and no more: `Kept` says how much, and `Given` until when."""
    from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
    from flwr.superlink.servicer.fleet import fleet_handlers

    handlers: Any = fleet_handlers
    kept = Kept(handlers.push_messages, handlers.push_object)
    handlers.push_messages, handlers.push_object = kept.push_answer, kept.push_object
    handlers.pull_messages = Given(handlers.pull_messages).pull
    delete: Any = InMemoryLinkState.delete_messages

    def delete_with_objects(self: Any, message_ins_ids: set[str]) -> None:
        # Flower lets go of a question that was answered or has expired, but of its adapter only where the client
        # confirmed it: that of a client which died it would keep for ever. So it would an answer that nobody fetched.
        for question in message_ins_ids & self.message_ins_store.keys():
            self.object_store.delete(question)
            answer = self.message_res_store.get(self.message_ins_id_to_message_res_id.get(question))
            if answer and not answer.metadata.delivered_at:
                self.object_store.delete(answer.metadata.message_id)
        delete(self, message_ins_ids)

    InMemoryLinkState.delete_messages = delete_with_objects  # type: ignore[method-assign]
    keep_by_node(InMemoryLinkState)


@dataclass
class KeptAnswer:
    """Answer that a SuperLink keeps, and how many bytes its node may still send for it."""

    message: str
    left: int


class Kept:
    """Answers that a SuperLink keeps, by the nodes that sent them and the sessions in which their parts come."""

    def __init__(self, push_messages: Callable[..., Any], push_object: Callable[..., Any]) -> None:
        self._push_messages, self._push_object = push_messages, push_object
        self._answers: dict[int, dict[str, KeptAnswer]] = defaultdict(dict)
        self._lock = Lock()

    def push_answer(self, request: Any, state: Any) -> Any:
        """Take an answer as Flower does, if it may be one; a node's oldest is let go of where it has too many.

        Raises:
            HTTPException: it is not one answer of this node's, or has more parts than it may have.
        """
        from fastapi import HTTPException
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

        messages, trees, node = request.messages_list, request.message_object_trees, request.node.node_id
        if len(messages) != 1 or len(trees) != 1:
            raise HTTPException(400, "not one answer")
        answer, tree = messages[0].metadata, trees[0]
        if answer.src_node_id != node or tree.object_id != answer.message_id:
            raise HTTPException(400, "not an answer of this node")
        # Flower takes no answer to a question that it no longer has; it says so in its own way.
        most = 0
        if question := state.message_ins_store.get(answer.reply_to_message_id):
            most = read_limit(question.metadata.group_id)
            if sum(1 for _ in iterate_object_tree(tree)) > most_objects(most):
                raise HTTPException(413, "more parts than an answer has")
        response = self._push_messages(request=request, state=state)
        if not response.objects_to_push:
            # No part will come in this session, and Flower would remember it.
            state._cleanup_push_session(response.session_id, cleanup_messages=False)
            return response
        with self._lock:
            kept = self._answers[node]
            for session in [session for session, one in kept.items() if one.message == answer.message_id]:
                del kept[session]  # the same answer again: the parts that are there stay
            kept[response.session_id] = KeptAnswer(answer.message_id, most)
            oldest = [kept.pop(session) for session in [*kept][:-ANSWERS_KEPT]]
        for one in oldest:
            state.object_store.delete(one.message)
        return response

    def push_object(self, request: Any, state: Any) -> Any:
        """Take a part of an answer as Flower does, unless the answer grows larger than it may be: it is let go of."""
        from flwr.proto.message_pb2 import PushObjectResponse

        with self._lock:
            kept = self._answers[request.node.node_id]
            answer = kept.get(request.session_id)
            if answer:
                answer.left -= len(request.object_content)
                if answer.left < 0:
                    del kept[request.session_id]
        if answer and answer.left >= 0:
            return self._push_object(request=request, state=state)
        if answer:
            state.object_store.delete(answer.message)
        return PushObjectResponse(stored=False)


def write_limit(answer_bytes: int) -> str:
    """Write how large an answer may be, as the group of its question: Flower carries that and does nothing with it."""
    return str(answer_bytes)


def read_limit(group: str) -> int:
    """Read what `write_limit` wrote; Flower's own questions have none, and get no numbers for an answer."""
    return int(group) if group.isdigit() else 0
