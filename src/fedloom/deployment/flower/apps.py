"""Apps for Flower, one for the server and one for a client, that only pass frames on. No torch here.

Flower starts a process for every message to a client, in which loading a model would be paid each time. So what it
carries is unpacked elsewhere: the server app talks to `fedloom serve`, the client app to the worker of `fedloom join`,
each over a Unix socket of its own machine.
"""

from __future__ import annotations

import copy
import json
import os
import select
import socket
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as CHUNK_BYTES
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid.http_grid import HttpGrid

from fedloom.deployment.flower.guard import most_objects, write_limit
from fedloom.deployment.processes import SERVE_SOCKET, SOCKETS, WORKER_SOCKET
from fedloom.errors import MessageError
from fedloom.host.frames import MOST_MANIFEST_BYTES, Frame, ask, receive_frame, send_frame

WORKER_PATIENCE_SECONDS = 120.0
"""Time for which a client waits for its worker: one that died is being started again."""
SERVER_PATIENCE_SECONDS = 60.0
"""Time within which `fedloom serve` must take the app's connection."""
ARRIVAL_SECONDS = 0.05
"""Time for which a look for an answer waits for one that is on its way from the SuperLink."""
ARRIVING_AT_ONCE = 8
"""Answers put together at once, so that memory does not grow with the clients; others wait at the SuperLink."""
STALLED_SECONDS = 60.0
"""Time without a new part of an answer, after which it is given up: others wait for its place."""

server_app = ServerApp()
client_app = ClientApp()


@client_app.train()
def work(message: Message, context: Context) -> Message:
    """Hand a question to this client's worker, and its answer back."""
    frame = to_frame(message.content)
    left = message.metadata.created_at + message.metadata.ttl - time.time()
    answer = ask(
        worker_socket(context),
        frame,
        patience_seconds=min(WORKER_PATIENCE_SECONDS, max(left, 1.0)),
        answer_seconds=max(left, 1.0),
    )
    return Message(to_record(answer), reply_to=message)


@server_app.main()
def relay(grid: Grid, context: Context) -> None:
    """Do what `fedloom serve` asks: tell who is there, send a question, look for answers."""
    inbox = Inbox(grid)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(SERVER_PATIENCE_SECONDS)
        connection.connect(os.environ[SERVE_SOCKET])
        connection.settimeout(None)  # as long as `fedloom serve` lives: its end closes the connection
        # The loop below may hang in a call of Flower's for hours when `fedloom serve` is gone.
        threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
        while True:
            asked = receive_frame(connection)
            match asked.manifest["do"]:
                case "nodes":
                    # With node keys the name is the one that the key was registered with: nobody else can bear it.
                    there = [[str(node.node_id), node.name, node.last_activated_at] for node in grid.get_nodes()]
                    send_frame(connection, Frame({"nodes": there}))
                case "send":
                    told = asked.manifest
                    record = to_record(Frame(told["manifest"], asked.payload))
                    # An answer holds no more numbers than its question.
                    most_bytes = len(asked.payload) + MOST_MANIFEST_BYTES
                    addressed = {"dst_node_id": int(told["node"]), "ttl": told["ttl"]}
                    message = Message(record, message_type="train", group_id=write_limit(most_bytes), **addressed)
                    question = str(next(iter(grid.push_messages([message]))))
                    inbox.expect(question, most_bytes, told["ttl"])
                    send_frame(connection, Frame({"message": question}))
                case "pull":
                    answer = inbox.pull(asked.manifest["messages"])
                    send_frame(connection, _answer(answer) if answer else Frame({"message": ""}))


def worker_socket(context: Context) -> str:
    """Find this node's worker. Flower's simulation has many nodes in a process, and tells them their numbers."""
    number = context.node_config.get("partition-id")
    return f"{os.environ[SOCKETS]}/{WORKER_SOCKET if number is None else f'worker-{number}.sock'}"


class Expected(NamedTuple):
    """Limits of an answer, in size and in time."""

    most_bytes: int
    until: float


class Inbox:
    """Answers as they come in, each by itself and no larger than it may be.

    Flower's own `pull_messages` waits for the rest of one answer, hours if its sender died, before it looks at the
    next, and takes whatever comes.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._expected: dict[str, Expected] = {}
        self._arrived: SimpleQueue[Message | Unusable] = SimpleQueue()
        self._places = threading.Semaphore(ARRIVING_AT_ONCE)

    def expect(self, question: str, most_bytes: int, seconds: float) -> None:
        """Expect an answer that is no larger than this, and comes in time."""
        self._expected[question] = Expected(most_bytes, time.monotonic() + seconds)

    def pull(self, questions: Collection[str]) -> Message | Unusable | None:
        """Return an answer to one of these questions that has arrived whole, if there is one."""
        # An answer that is on its way here is no longer expected. Flower, asked for it again, would not know it.
        if self._arrived.empty() and (asked := [question for question in questions if question in self._expected]):
            self._look(asked)
        with suppress(Empty):
            answer = self._arrived.get(timeout=ARRIVAL_SECONDS)
            self._places.release()
            return answer
        return None

    def _look(self, asked: Collection[str]) -> None:
        # In Flower's simulation answers are objects of this process: nothing has to be put together.
        if not isinstance(self._grid, HttpGrid):
            for message in self._grid.pull_messages(asked):
                del self._expected[message.metadata.reply_to_message_id]
                self._arrived.put(message)
            return
        # Below `pull_messages` Flower first lists answers and then fetches their parts: here one thread fetches each.
        found = self._grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=asked))
        for message, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            question = message.metadata.reply_to_message_id
            one = PullAppMessagesResponse(messages_list=[message], message_object_trees=[tree])
            if expected := self._expected.pop(question, None):
                threading.Thread(target=self._take, args=(question, one, expected), daemon=True).start()

    def _take(self, question: str, found: PullAppMessagesResponse, expected: Expected) -> None:
        """Have Flower put one answer together."""
        self._places.acquire()  # `pull` frees the place
        try:
            # Flower's own code puts the answer together, over a client that knows of this one answer alone.
            grid = copy.copy(self._grid)
            grid._client = _limit(grid._runtime_client, found, expected)  # type: ignore[attr-defined]
            (message,) = grid.pull_messages([question])
            if message.has_error():
                self._let_go(found)
            self._arrived.put(message)
        except MessageError as error:
            self._let_go(found)
            self._arrived.put(Unusable(question, str(error)))
        except Exception as error:  # of any kind, from bytes that may be anything
            self._let_go(found)
            self._arrived.put(Unusable(question, f"not a fedloom answer ({type(error).__name__})"))

    def _let_go(self, found: PullAppMessagesResponse) -> None:
        """Tell the SuperLink to keep an answer no longer: until then it would, whatever became of it."""
        told = found.messages_list[0].metadata
        asked = ConfirmMessageReceivedRequest(run_id=told.run_id, message_object_id=told.message_id)
        with suppress(Exception):  # it may have ended, and all answers with it
            self._grid._runtime_client.ConfirmMessageReceived(asked)  # type: ignore[attr-defined]


class Unusable(NamedTuple):
    """Reason why an answer can't be used."""

    question: str
    why: str


def _limit(client: RuntimeHttpClient, found: PullAppMessagesResponse, expected: Expected) -> SimpleNamespace:
    """Make a client of Flower's API that knows of one answer, and gives it up where it is too large or too late."""
    left, came = expected.most_bytes, time.monotonic()
    num_objects = sum(1 for _ in iterate_object_tree(found.message_object_trees[0]))
    if num_objects > most_objects(left):
        raise MessageError(f"the answer has {num_objects} objects, which is too many")

    def pull_object(request: PullObjectRequest) -> PullObjectResponse:
        nonlocal left, came
        if time.monotonic() > min(expected.until, came + STALLED_SECONDS):
            raise MessageError("the answer never came whole")
        response = client.PullObject(request)
        if response.object_content:
            came = time.monotonic()
        left -= len(response.object_content) + _repeated_bytes(response.object_content)
        if left < 0:
            raise MessageError(f"the answer has more than {expected.most_bytes:,} bytes")
        return response

    return SimpleNamespace(
        PullMessages=lambda request: found,
        PullObject=pull_object,
        ConfirmMessageReceived=client.ConfirmMessageReceived,
    )


def _repeated_bytes(content: bytes) -> int:
    """Return how many bytes an array has beyond those sent: it may name one chunk again and again."""
    if not content.startswith(b"Array "):
        return 0
    chunks = json.loads(content[content.index(b"\0") + 1 :])["arraychunk_ids"]
    return CHUNK_BYTES * (len(chunks) - len(set(chunks)))


def _end_with(connection: socket.socket) -> None:
    """End this process when the other side does, even where it hangs in a call of Flower's."""
    hung_up = select.poll()
    hung_up.register(connection, getattr(select, "POLLRDHUP", select.POLLHUP))
    hung_up.poll()
    os._exit(1)


def _answer(message: Message | Unusable) -> Frame:
    """Pack an answer for `fedloom serve`. Its manifest goes on as it came: it is checked there."""
    if isinstance(message, Unusable):
        return Frame({"message": message.question, "error": message.why})
    told = {"message": message.metadata.reply_to_message_id}
    if message.has_error():
        is_gone = message.error.code == ErrorCode.NODE_UNAVAILABLE
        return Frame({**told, "error": f"Flower's error {message.error.code}", "is_gone": is_gone})
    try:
        manifest = _manifest(message.content)
        if len(json.dumps(manifest)) > MOST_MANIFEST_BYTES - 1024:  # as a text in a text it may be six times as long
            raise ValueError("more words than an answer has")
        return Frame({**told, "manifest": manifest}, _numbers(message.content))
    except Exception:  # of any kind, from bytes that may be anything
        return Frame({**told, "error": "not a fedloom answer"})


def to_record(frame: Frame) -> RecordDict:
    """Write a frame as Flower sends it: one text, and one array if there is one.

    Each object in it is a request to the SuperLink, which costs that more than the bytes do: an array is three with its
    record, where bytes that are one part anyway are one. They have a record of their own, which all questions share.
    """
    record = RecordDict({"told": ConfigRecord({"manifest": json.dumps(dict(frame.manifest))})})
    if len(frame.payload) > CHUNK_BYTES:
        record["numbers"] = ArrayRecord({"all": Array(np.frombuffer(frame.payload, dtype="<f4"))})
    elif frame.payload:
        record["numbers"] = ConfigRecord({"all": frame.payload})
    return record


def to_frame(record: RecordDict) -> Frame:
    """Read what `to_record` wrote."""
    return Frame(json.loads(_manifest(record)), _numbers(record))


def _manifest(record: RecordDict) -> str:
    return str(record.config_records["told"]["manifest"])


def _numbers(record: RecordDict) -> bytes:
    if "numbers" not in record:
        return b""
    if "numbers" in record.config_records:
        told = record.config_records["numbers"]["all"]
        if not isinstance(told, bytes):
            raise ValueError(f"numbers that are {type(told).__name__}")
        return told
    numbers = record.array_records["numbers"]["all"].numpy()
    if numbers.dtype != np.dtype("<f4") or numbers.ndim != 1:
        raise ValueError(f"numbers of {numbers.dtype}, {numbers.shape}")
    return numbers.tobytes()
