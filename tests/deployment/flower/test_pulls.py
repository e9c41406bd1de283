"""Looks for messages: what an answer that never came held is given again, and a slow server is asked less often."""

from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

import asyncio
import inspect
import threading
import time
from base64 import b64encode
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace

import httpx
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.supernode.fleet_http_client import FleetHttpClient

from fedloom.deployment.flower import pulls
from fedloom.deployment.flower.pulls import (
    LOOK_HEADER,
    MOST_REST_SECONDS,
    PULL_PATH,
    SLOWER_TIMES,
    WAIT_HEADER,
    Look,
    Looks,
    Questions,
    questions_of,
    read_look,
    slower,
)

from .test_guard import Asked, asked, here  # noqa: F401  (fixtures)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulls, "WAIT_SECONDS", 0.05)


class Node:
    """Node whose looks this SuperLink answers; some answers are lost on their way."""

    def __init__(self, there: Asked) -> None:
        self.loses = False
        self._asked = there
        self._looks = Looks(self._pull)

    def _pull(self, client: Any, request: Any) -> Any:
        found = FleetHttpClient.PullMessages(client, request)
        if self.loses:
            raise httpx.ReadTimeout("it came too late")
        return found

    def look(self) -> list[str]:
        found = self._looks.pull(self._asked.fleet, PullMessagesRequest(node=self._asked.node))
        return [message.metadata.message_id for message in found.messages_list]

    def look_in_vain(self) -> None:
        self.loses = True
        with pytest.raises(httpx.ReadTimeout):
            self.look()
        self.loses = False


def test_a_message_whose_answer_was_lost_is_given_again_and_once(asked: Asked) -> None:  # noqa: F811
    node, question = Node(asked), asked.ask(40_000).metadata.message_id
    node.look_in_vain()
    node.look_in_vain()
    assert node.look() == [question]
    assert node.look() == []


def test_two_messages_of_which_one_was_lost_both_come(asked: Asked) -> None:  # noqa: F811
    node, first = Node(asked), asked.ask(40_000).metadata.message_id
    node.look_in_vain()
    second = asked.ask(40_000).metadata.message_id
    assert sorted([*node.look(), *node.look()]) == sorted([first, second])
    assert node.look() == []


def test_a_look_that_its_node_has_given_up_gets_nothing(asked: Asked) -> None:  # noqa: F811
    """It was held up on its way: whatever it were given would be lost."""
    node = Node(asked)
    assert node.look() == []
    late = dict(asked.fleet._client.headers)
    assert node.look() == []
    question = asked.ask(40_000).metadata.message_id
    asked.fleet._client.headers[LOOK_HEADER] = late[LOOK_HEADER]
    assert not asked.fleet.PullMessages(PullMessagesRequest(node=asked.node)).messages_list
    assert node.look() == [question]


def test_what_another_process_of_a_client_was_given_is_not_given_to_the_next(asked: Asked) -> None:  # noqa: F811
    """The exchange asks it anew."""
    asked.ask(40_000)
    Node(asked).look_in_vain()
    assert Node(asked).look() == []


def test_a_node_that_numbers_nothing_is_answered_as_flower_does(asked: Asked) -> None:  # noqa: F811
    question = asked.ask(40_000).metadata.message_id
    request = PullMessagesRequest(node=asked.node)
    for expected in ([question], []):
        found = asked.fleet.PullMessages(request).messages_list
        assert [message.metadata.message_id for message in found] == expected


def test_what_a_node_tells_of_a_look_is_read_or_nothing() -> None:
    assert read_look(str(Look("1f", 3, 2)).encode()) == Look("1f", 3, 2)
    for told in (
        b"",
        b"1f 3",
        b"1f 3 -2",
        b"1f x 2",
        b"1f 3 2 1",
        b"1f " + b"9" * 5000 + b" 2",
        b"1f \xb2 2",
        b"\xff" * 9,
    ):
        assert read_look(told) is None


def test_a_slow_look_is_followed_by_a_long_rest() -> None:
    assert slower(0.5, 0.01) == 0.5
    assert slower(0.5, 1.0) == SLOWER_TIMES
    assert slower(0.5, 30.0) == MOST_REST_SECONDS


class Waiting:
    """Look that waits at the SuperLink, in a thread."""

    def __init__(self, asked: Asked, look: Callable[[], list[str]]) -> None:  # noqa: F811
        self.found: list[str] | None = None
        self._look, self._thread = look, threading.Thread(target=self._run)
        questions = questions_of(asked.here.state)
        before = questions._waiting.get(asked.node.node_id)
        self._thread.start()
        until = time.monotonic() + 20
        while questions._waiting.get(asked.node.node_id) in (before, None) and time.monotonic() < until:
            time.sleep(0.001)

    def _run(self) -> None:
        self.found = self._look()

    def end(self) -> list[str] | None:
        self._thread.join(20)
        return self.found


def client_of(asked: Asked) -> Asked:  # noqa: F811
    """A second connection of the same client: httpx's own has the headers of one look at a time."""
    fleet = FleetHttpClient("http://testserver", interceptors=asked.fleet._interceptors)
    fleet._client = httpx.Client(transport=asked.fleet._client._transport, base_url="http://testserver")
    return SimpleNamespace(fleet=fleet, node=asked.node)  # type: ignore[return-value]


def test_a_look_waits_until_there_is_a_message(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(pulls, "WAIT_SECONDS", 60.0)
    node = Node(asked)
    waiting = Waiting(asked, node.look)
    assert waiting.found is None
    question = asked.ask(40_000).metadata.message_id
    assert waiting.end() == [question]
    second = asked.ask(40_000).metadata.message_id
    assert node.look() == [second], "it was there before the look"


def test_a_look_for_which_nothing_comes_is_answered_and_leaves_nothing(asked: Asked) -> None:  # noqa: F811
    node = Node(asked)
    assert node.look() == []
    assert not questions_of(asked.here.state)._waiting
    # It is no sign of a slow server.
    assert node._looks._waited >= 0.04
    assert node._looks.rest_seconds(0.5) < 4


def test_after_a_lost_answer_a_look_does_not_wait(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    node, question = Node(asked), asked.ask(40_000).metadata.message_id
    node.look_in_vain()
    monkeypatch.setattr(pulls, "WAIT_SECONDS", 600.0)
    assert node.look() == [question]


def test_a_client_of_an_earlier_version_does_not_wait(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(pulls, "WAIT_SECONDS", 600.0)
    asked.fleet._client.headers[LOOK_HEADER] = "1f 1 0"
    assert not asked.fleet.PullMessages(PullMessagesRequest(node=asked.node)).messages_list


def test_what_a_process_that_ended_waits_for_goes_to_the_one_that_came_after(
    asked: Asked,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its connection may look open for long. Whatever it were given would be lost."""
    monkeypatch.setattr(pulls, "WAIT_SECONDS", 600.0)
    ended, state = Waiting(asked, Node(asked).look), asked.here.state
    state.deactivate_node(asked.node.node_id)
    new = client_of(asked)
    new.fleet.ActivateNode(ActivateNodeRequest(public_key=asked.here.alice.public, heartbeat_interval=60))
    question = asked.ask(40_000).metadata.message_id
    assert ended.end() == []
    assert Node(new).look() == [question]


def test_of_two_looks_of_a_node_the_later_waits(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(pulls, "WAIT_SECONDS", 600.0)
    first = Waiting(asked, Node(asked).look)
    second = Waiting(asked, Node(client_of(asked)).look)
    assert first.end() == []
    question = asked.ask(40_000).metadata.message_id
    assert second.end() == [question]


def test_who_only_knows_a_clients_key_ends_no_look_of_it_and_waits_for_nothing(
    asked: Asked,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It stands in the client's request and kit, and on the loopback no proxy asks for a signature first."""
    monkeypatch.setattr(pulls, "WAIT_SECONDS", 600.0)
    waiting, http = Waiting(asked, Node(asked).look), asked.here.stranger.http
    for headers in (asked.here.stranger.headers(), {}):
        named = {**headers, FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(asked.here.alice.public).decode()}
        body = PullMessagesRequest(node=asked.node).SerializeToString()
        told = {**named, LOOK_HEADER: "1f 1 0", WAIT_HEADER: "1", "content-type": "application/protobuf"}
        assert http.post(PULL_PATH, headers=told, content=body).status_code == 401
    assert waiting.found is None
    question = asked.ask(40_000).metadata.message_id
    assert waiting.end() == [question]


def test_a_node_that_hangs_up_while_it_waits_is_given_nothing(asked: Asked) -> None:  # noqa: F811
    questions = questions_of(asked.here.state)

    async def hang_up() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    assert asyncio.run(questions.wait(asked.here.state, asked.node.node_id, hang_up)) is None
    assert not questions._waiting
    question = asked.ask(40_000).metadata.message_id
    assert Node(asked).look() == [question]


def test_a_look_that_waits_when_the_server_ends_is_to_come_again(
    asked: Asked,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Told 500, as a server does that ends, every SuperNode that waited ended too, and was started again."""
    monkeypatch.setattr(pulls, "WAIT_SECONDS", 600.0)

    async def ask() -> int:
        headers = {**asked.here.alice.headers(), LOOK_HEADER: "1f 1 0", WAIT_HEADER: "1"}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(asked.here.app)) as client:
            looking = asyncio.create_task(client.post(f"http://testserver{PULL_PATH}", headers=headers))
            while not questions_of(asked.here.state)._waiting:
                await asyncio.sleep(0.001)
            looking.cancel("as uvicorn cancels what has not ended in time")
            return (await looking).status_code

    assert asyncio.run(asyncio.wait_for(ask(), 20)) == 503


def test_a_client_that_is_revoked_while_it_waits_is_told_at_once(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(pulls, "WAIT_SECONDS", 600.0)

    node = Node(asked)
    waiting = Waiting(asked, node.look)
    asked.here.state.delete_node("", asked.node.node_id)
    assert waiting.end() == []
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        node.look()


def test_a_look_sees_the_messages_of_its_node_alone(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Flower walks those of all: with n clients that look, n² a round."""
    looked_at, check = [], asked.here.state._check_stored_messages
    for _ in range(5):
        asked.ask(4)
    others = questions_of(asked.here.state)._of_node.pop(asked.node.node_id)
    questions_of(asked.here.state)._of_node[7] = others
    assert Node(asked).look() == []  # sweeps, as the first
    question = asked.ask(4).metadata.message_id
    monkeypatch.setattr(asked.here.state, "_check_stored_messages", lambda ids: (looked_at.extend(ids), check(ids)))
    assert Node(asked).look() == [question]
    assert looked_at == [question]


def test_messages_that_are_gone_are_forgotten(asked: Asked) -> None:  # noqa: F811
    question = asked.ask(40_000).metadata.message_id
    asked.here.state.delete_messages({question})
    assert not questions_of(asked.here.state)._of_node[asked.node.node_id]
    assert Node(asked).look() == []


def test_messages_may_be_noted_while_a_look_is_answered() -> None:
    """They come in threads of their own; the look failed with "dictionary changed size during iteration"."""

    class Store(dict[str, None]):
        def get(self, message: str, default: object = None) -> None:
            questions.add(7, f"{message}+")

    questions = Questions()
    questions.add(7, "first")
    assert questions._undelivered(SimpleNamespace(message_ins_store=Store()), 7) == []


def test_flower_is_what_was_changed() -> None:
    from flwr.superlink.routers.fleet import router
    from flwr.supernode import fleet_http_connection

    assert PULL_PATH in inspect.getsource(FleetHttpClient.PullMessages)
    assert "client.PullMessages, PullMessagesRequest(node=node)" in inspect.getsource(fleet_http_connection)
    called = "fleet_handlers.pull_messages(\n        request=request, state=state, store=state.object_store"
    assert called in inspect.getsource(router)
    # A look passes no run, and a SuperLink that is to end does not wait for looks that wait.
    from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
    from flwr.superlink.servicer.fleet import fleet_handlers

    assert "state.get_message_ins(node_id=node_id, limit=1)" in inspect.getsource(fleet_handlers)
    assert "self.message_ins_store[message_id] = message" in inspect.getsource(InMemoryLinkState.store_message_ins)
    program = import_module("flwr.superlink.cli.flower_superlink")
    assert "uvicorn.run(" in inspect.getsource(program)
