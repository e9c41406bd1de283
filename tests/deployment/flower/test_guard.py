"""Guard of a SuperLink, before Flower's own app: who is heard, how much is read of it, and how much of that is kept."""

import asyncio
import hashlib
import inspect
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

import httpx
from flwr.app import Message, Metadata
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.superlink import main as superlink
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedloom.deployment.flower import apps, guard
from fedloom.deployment.flower.guard import (
    ANSWERS_KEPT,
    MOST_LOOK_BYTES,
    Guard,
    bound_answers,
    most_objects,
    write_limit,
)
from fedloom.deployment.processes import CONTROL_SECRET, KEYS_ARE_IN
from fedloom.deployment.status import KEYS_HEADER, MOST_BODY_BYTES, SIGNATURE_PATH, STAMP_HEADER, STATUS_PATH
from fedloom.host.frames import Frame

PULL, PUSH = "/v1/fleet/pull-messages", "/v1/fleet/push-object"


class InProcess(httpx.BaseTransport):
    """Way to an ASGI app of this process."""

    def __init__(self, app: Any) -> None:
        self._app = app

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        async def ask() -> httpx.Response:
            answer = await httpx.ASGITransport(self._app).handle_async_request(request)
            return httpx.Response(answer.status_code, headers=answer.headers, content=await answer.aread())

        return asyncio.run(ask())


class Party:
    """One who knocks at a SuperLink with a key of his own."""

    def __init__(self, app: Any) -> None:
        self.private, public = generate_key_pairs()
        self.public = public_key_to_bytes(public)
        self.fleet = FleetHttpClient("http://testserver", interceptors=[NodeAuthHttpInterceptor(self.private, public)])
        self.http = self.fleet._client = httpx.Client(transport=InProcess(app), base_url="http://testserver")
        self.node = Node()

    def headers(self) -> dict[str, str]:
        """Headers that prove who it is."""
        request = httpx.Request("POST", "http://testserver")
        context = SimpleNamespace(request=request, message=None, rpc_method="")
        NodeAuthHttpInterceptor(self.private, self.private.public_key()).intercept(
            context,  # type: ignore[arg-type]
            lambda context: httpx.Response(200),
        )
        return {name: value for name, value in request.headers.items() if name != "host"}


class Here:
    """Flower's app behind the guard, in this process, with one client that is registered and one stranger."""

    def __init__(self, keys_are_in: Path) -> None:
        self.keys_are_in = keys_are_in
        self.app = superlink.create_app()
        self.app.state.enable_supernode_auth = True
        self.app.add_middleware(Guard)
        self.state: Any = self.app.state.linkstate_factory.state()
        self.alice, self.stranger = Party(self.app), Party(self.app)
        self.alice.node = Node(node_id=self.state.create_node("", "", self.alice.public, 60, name="alice"))

    @property
    def stored_bytes(self) -> int:
        return sum(len(entry.content) for entry in self.state.object_store.store.values())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState

    monkeypatch.setenv(CONTROL_SECRET, "s3cret")
    monkeypatch.setenv(KEYS_ARE_IN, str(tmp_path / "keys-are-in"))
    # What `bound_answers` changes, for it to be as it was afterwards.
    monkeypatch.setattr(fleet_handlers, "push_messages", fleet_handlers.push_messages)
    monkeypatch.setattr(fleet_handlers, "push_object", fleet_handlers.push_object)
    monkeypatch.setattr(fleet_handlers, "pull_messages", fleet_handlers.pull_messages)
    for changed in ("delete_messages", "store_message_ins", "get_message_ins", "activate_node", "delete_node"):
        monkeypatch.setattr(InMemoryLinkState, changed, getattr(InMemoryLinkState, changed))
    bound_answers()
    made = Here(tmp_path / "keys-are-in")
    made.keys_are_in.touch()
    return made


def test_until_the_keys_are_in_all_are_told_alike_to_come_again(here: Here) -> None:
    here.keys_are_in.unlink()
    for party in (here.alice, here.stranger):
        for path in (STATUS_PATH, SIGNATURE_PATH, PULL):
            answer = party.http.post(path, headers=party.headers())
            assert answer.status_code == 503
            assert abs(float(answer.headers[STAMP_HEADER]) - time.time()) < 5
            assert KEYS_HEADER not in answer.headers
    here.keys_are_in.touch()
    answer = here.stranger.http.get(STATUS_PATH)
    assert (answer.status_code, answer.content) == (204, b"")
    assert 0 <= float(answer.headers[KEYS_HEADER]) < 5
    request = ActivateNodeRequest(public_key=here.alice.public, heartbeat_interval=60)
    assert here.alice.fleet.ActivateNode(request).node_id == here.alice.node.node_id


def test_the_age_of_its_keys_is_told(here: Here) -> None:
    os.utime(here.keys_are_in, (time.time() - 100, time.time() - 100))
    assert 100 <= float(here.stranger.http.get(STATUS_PATH).headers[KEYS_HEADER]) < 110


def test_a_stranger_is_refused_before_his_body_is_read(here: Here) -> None:
    read = []

    async def knock(headers: dict[str, str]) -> int:
        async def receive() -> dict[str, Any]:
            read.append(1)
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(told: dict[str, Any]) -> None:
            statuses.append(told.get("status"))

        statuses: list[Any] = []
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "path": PULL, "method": "POST", "headers": raw, "app": here.app}

        async def flower(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await send({"type": "http.response.start", "status": 200})

        await Guard(flower)(scope, receive, send)
        return int(statuses[0])

    assert asyncio.run(knock({})) == 401
    assert asyncio.run(knock(here.stranger.headers())) == 401
    assert asyncio.run(knock({**here.alice.headers(), "content-length": str(MOST_LOOK_BYTES + 1)})) == 413
    assert asyncio.run(knock({**here.alice.headers(), "transfer-encoding": "chunked"})) == 411
    assert read == []
    assert asyncio.run(knock({**here.alice.headers(), "content-length": "0"})) == 200
    assert read == [1]


def test_nginx_is_told_whether_flower_would_take_a_signature(here: Here) -> None:
    def ask(headers: dict[str, str]) -> int:
        return int(here.stranger.http.get(SIGNATURE_PATH, headers=headers).status_code)

    right, wrong = here.alice.headers(), here.stranger.headers()
    assert ask(right) == 204
    assert ask(wrong) == ask({}) == 401
    assert {ask({**right, name: wrong[name]}) for name in right if right[name] != wrong.get(name)} == {401}
    assert here.alice.fleet.PullMessages(PullMessagesRequest(node=here.alice.node)).messages_list == []


def test_bodies_that_are_read_have_a_limit_together_and_a_time(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.5)
    statuses: list[int] = []
    guarded = Guard(lambda *asked: asyncio.sleep(0))

    async def half_send(length: int) -> None:
        async def receive() -> dict[str, Any]:
            await asyncio.sleep(60)
            raise AssertionError("nobody waits that long")

        async def send(told: dict[str, Any]) -> None:
            if "status" in told:
                statuses.append(told["status"])

        headers = {**here.alice.headers(), "content-length": str(length)}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "path": PUSH, "method": "POST", "headers": raw, "app": here.app}
        await guarded(scope, receive, send)

    async def many() -> None:
        await asyncio.gather(*(half_send(MOST_BODY_BYTES) for _ in range(20)))

    asyncio.run(half_send(MOST_BODY_BYTES + 1))
    assert statuses.pop() == 413
    asyncio.run(many())
    fit = guard.MOST_WAITING_BYTES // MOST_BODY_BYTES
    assert sorted(statuses) == [408] * fit + [503] * (20 - fit)
    statuses.clear()
    asyncio.run(many())
    assert 408 in statuses, "what was given up is no longer counted"


def test_who_has_no_secret_operates_nothing(here: Here) -> None:
    asked = {"content-type": "application/protobuf"}
    assert here.stranger.http.post("/v1/control/list-runs", headers=asked).status_code == 403
    told = here.stranger.http.post("/v1/control/list-runs", headers={**asked, "x-fedloom-secret": "s3cret"})
    assert told.status_code == 200


@pytest.fixture
def asked(here: Here, monkeypatch: pytest.MonkeyPatch) -> "Asked":
    monkeypatch.setattr(fleet_handlers, "check_abort", lambda *of_a_run: None)
    here.alice.fleet.ActivateNode(ActivateNodeRequest(public_key=here.alice.public, heartbeat_interval=60))
    return Asked(here)


class Asked:
    """Questions of a server to alice, and answers as her SuperNode would send them, or as she herself does."""

    def __init__(self, here: Here) -> None:
        from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType

        self.here, self.fleet, self.node = here, here.alice.fleet, here.alice.node
        self.run: int = here.state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, "", TaskType.SERVER_APP)

    def ask(self, payload_bytes: int, ttl: float = 60.0) -> Message:
        """Put a question, with an adapter of so many bytes, into the SuperLink as the server app does."""
        record = apps.to_record(Frame({"do": "train"}, os.urandom(payload_bytes)))
        group = write_limit(payload_bytes + 4096)
        told = Metadata(self.run, "", SUPERLINK_NODE_ID, self.node.node_id, "", group, time.time(), ttl, "train")
        question = make_message(metadata=told, content=record)
        question.metadata.__dict__["_message_id"] = question.object_id
        state, session = self.here.state, self.here.state.start_session(self.run)
        objects = get_all_nested_objects(question)
        _, missing = state.store_message_and_object_tree(
            remove_content_from_message(question), get_object_tree(question), session
        )
        for name in missing:
            assert state.store_object(self.run, session, name, objects[name].deflate())
        return question

    def answer(self, question: Message, payload_bytes: int) -> Message:
        answer = Message(apps.to_record(Frame({"w": 1}, os.urandom(payload_bytes))), reply_to=question)
        answer.metadata.__dict__["_message_id"] = answer.object_id
        return answer

    def push(self, answer: Message, tree: ObjectTree | None = None) -> Any:
        return self.fleet.PushMessages(
            PushMessagesRequest(
                node=self.node,
                messages_list=[message_to_proto(remove_content_from_message(answer))],
                message_object_trees=[tree or get_object_tree(answer)],
            )
        )

    def push_all(self, answer: Message) -> list[bool]:
        """Push an answer whole, and tell which of its parts were taken."""
        pushed, objects = self.push(answer), get_all_nested_objects(answer)
        return [
            self.fleet.PushObject(
                PushObjectRequest(
                    node=self.node,
                    run_id=self.run,
                    session_id=pushed.session_id,
                    object_id=name,
                    object_content=objects[name].deflate(),
                )
            ).stored
            for name in pushed.objects_to_push
        ]


def test_an_honest_answer_is_taken_whole(asked: Asked) -> None:
    question = asked.ask(40_000)
    assert set(asked.push_all(asked.answer(question, 40_000))) == {True}
    (found,) = asked.here.state.get_message_res({question.metadata.message_id}, asked.run)
    assert asked.here.state.get_object(asked.run, found.metadata.message_id)


def test_an_answer_that_is_larger_than_its_question_is_let_go_of(asked: Asked) -> None:
    before = asked.here.stored_bytes
    question = asked.ask(40_000)
    stored = asked.push_all(asked.answer(question, 4_000_000))
    assert False in stored
    asked.here.state.delete_messages({question.metadata.message_id})
    assert asked.here.stored_bytes == before


def test_an_answer_of_too_many_parts_and_one_of_another_node_are_refused(asked: Asked) -> None:
    question = asked.ask(40_000)
    answer = asked.answer(question, 40_000)
    names = [hashlib.sha256(bytes([n])).hexdigest() for n in range(most_objects(44_096) + 1)]
    tree = ObjectTree(object_id=answer.object_id, children=[ObjectTree(object_id=name) for name in names])
    num_objects = len(asked.here.state.object_store)
    with pytest.raises(httpx.HTTPStatusError, match="413"):
        asked.push(answer, tree)
    with pytest.raises(httpx.HTTPStatusError, match="400"):
        asked.push(answer, ObjectTree(object_id=names[0]))
    answer.metadata.__dict__["_src_node_id"] = 7
    with pytest.raises(httpx.HTTPStatusError, match="400"):
        asked.push(answer)
    assert len(asked.here.state.object_store) == num_objects


def test_a_node_that_is_never_fetched_from_has_a_few_answers_there_and_no_more(asked: Asked) -> None:
    before, sessions = asked.here.stored_bytes, len(asked.here.state._object_push_sessions)
    questions = [asked.ask(40_000) for _ in range(3 * ANSWERS_KEPT)]
    asked_bytes = asked.here.stored_bytes - before
    for question in questions:
        asked.push_all(asked.answer(question, 40_000))
    assert 0 < asked.here.stored_bytes - before - asked_bytes < (ANSWERS_KEPT + 1) * 41_000
    for question in questions:
        asked.push(asked.answer(question, 40_000))  # a second one, which Flower does not take
    assert len(asked.here.state._object_push_sessions) == sessions


@pytest.mark.long
def test_what_was_answered_or_has_expired_is_let_go_of_whoever_died(asked: Asked) -> None:
    """The client confirmed neither question, and nobody fetched the answer to the second."""
    before = asked.here.stored_bytes
    answered, expired = asked.ask(40_000), asked.ask(40_000, ttl=2.0)
    asked.push_all(asked.answer(expired, 40_000))
    asked.here.state.delete_messages({answered.metadata.message_id})
    time.sleep(2.5)
    asked.fleet.PullMessages(PullMessagesRequest(node=asked.node))
    assert asked.here.stored_bytes == before


def test_flower_is_what_was_changed() -> None:
    from flwr.superlink.routers.fleet import router
    from flwr.superlink.servicer.runtime import runtime_handlers

    assert "fleet_handlers.push_messages(request=request, state=state)" in inspect.getsource(router)
    assert "fleet_handlers.push_object(request=request, state=state)" in inspect.getsource(router)
    pulled = inspect.getsource(runtime_handlers.pull_messages)
    assert pulled.index("get_message_res") < pulled.index("state.delete_messages"), "marked as delivered before"
