"""Looks for messages: what an answer that never came held is given again, and a slow server is asked less often."""

from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

import inspect

import httpx
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.supernode.fleet_http_client import FleetHttpClient

from fedloom.deployment.flower.pulls import (
    LOOK_HEADER,
    MOST_REST_SECONDS,
    PULL_PATH,
    SLOWER_TIMES,
    Look,
    Looks,
    read_look,
    slower,
)

from .test_guard import Asked, asked, here  # noqa: F401  (fixtures)


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


def test_flower_is_what_was_changed() -> None:
    from flwr.superlink.routers.fleet import router
    from flwr.supernode import fleet_http_connection

    assert PULL_PATH in inspect.getsource(FleetHttpClient.PullMessages)
    assert "client.PullMessages, PullMessagesRequest(node=node)" in inspect.getsource(fleet_http_connection)
    called = "fleet_handlers.pull_messages(\n        request=request, state=state, store=state.object_store"
    assert called in inspect.getsource(router)
