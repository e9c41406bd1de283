"""Client that sends anything at all, as Flower's objects: it is refused, and the others' round is complete.

The kinds are those of which FedAvg let nine into the model and five end the run, and what else can be put into Flower's
messages. What is scripted is Flower's network alone: answers are taken apart and put together by Flower's own code.
"""

import json
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.superlink.grid.http_grid import HttpGrid
from support.liars import honest_answer
from support.marks import first
from support.tiny import make_adapted, make_recipe, run_of

from fedloom.deployment.flower import apps
from fedloom.deployment.messages import pack_recipe
from fedloom.deployment.server import exchange
from fedloom.deployment.server.exchange import Answer, Exchange, Node
from fedloom.deployment.server.facts import check_facts
from fedloom.deployment.server.remote_fleet import RemoteFleet
from fedloom.deployment.server.serving import with_limits
from fedloom.deployment.server.superlink import read_answer
from fedloom.evaluation.held_out import Score
from fedloom.federation.aggregation import STRATEGIES
from fedloom.federation.lora_rules import LORA_RULES
from fedloom.federation.rounds import RoundResult, run_rounds
from fedloom.host.frames import MOST_MANIFEST_BYTES, Frame

pytestmark = pytest.mark.usefixtures("hurry")

HOSTILE = 2
"""Client that is hostile, of 0, 1 and 2."""
ROUNDS = 2

Content = list[RecordDict]
"""Answer of a client to a question: one record, if it is honest."""
Hostility = Callable[[Frame, int], Content]
"""Change that a hostile client makes to its own honest answer, in a round."""
Spoil = Callable[[dict[str, bytes]], dict[str, bytes]]
"""Change that it makes to the objects that Flower takes its answer apart into."""


class ScriptedSuperLink:
    """Holds what clients answered as Flower does, and gives it to the relay's inbox."""

    def __init__(self, hostility: Hostility, spoil: Spoil) -> None:
        self._hostility, self._spoil = hostility, spoil
        self._hostile: set[str] = set()
        self._asked = 0
        self._replies: dict[str, list[Message]] = {}
        self._objects: dict[str, bytes] = {}
        grid = HttpGrid(token="none")
        grid._run = SimpleNamespace(run_id=1)  # type: ignore[assignment]
        grid._client = SimpleNamespace(  # type: ignore[assignment]
            PullMessages=self._give, PullObject=self._give_object, ConfirmMessageReceived=lambda request: None
        )
        self._inbox = apps.Inbox(grid)

    def nodes(self) -> Sequence[Node]:
        return [Node(str(n), str(n), "1") for n in range(3)]

    def send(self, node: Node, frame: Frame, seconds: float) -> str:
        self._asked += 1
        question = str(self._asked)
        answer = honest_answer(node.name, frame)
        content = [apps.to_record(answer)]
        if frame.manifest["do"] == "train" and int(node.name) == HOSTILE:
            content = self._hostility(answer, frame.manifest["round"])
            self._hostile.add(question)
        self._replies[question] = [self._reply(question, record) for record in content]
        self._inbox.expect(question, len(frame.payload) + MOST_MANIFEST_BYTES, seconds)
        return question

    def pull(self, messages: Collection[str]) -> Answer | None:
        found = self._inbox.pull(messages)
        told = apps._answer(found) if found else Frame({"message": ""})
        assert len(json.dumps(told.manifest)) <= MOST_MANIFEST_BYTES, "it goes over a socket that takes no more"
        return read_answer(told)

    def reopen(self) -> None:
        raise AssertionError("the link was lost")

    def _reply(self, question: str, content: RecordDict) -> Message:
        metadata = Metadata(1, "", 2, 1, question, "", time.time(), 60.0, "train")
        reply = make_message(metadata=metadata, content=content)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        return reply

    def _give(self, request: Any) -> PullAppMessagesResponse:
        found = PullAppMessagesResponse()
        for question in request.message_ids:
            for reply in self._replies.pop(question, []):
                found.message_object_trees.append(get_object_tree(reply))
                content = {name: thing.deflate() for name, thing in get_all_nested_objects(reply).items()}
                self._objects.update(self._spoil(content) if question in self._hostile else content)
                found.messages_list.append(message_to_proto(remove_content_from_message(reply)))
        return found

    def _give_object(self, request: Any) -> PullObjectResponse:
        content = self._objects.get(request.object_id)
        return PullObjectResponse(
            object_found=True, object_available=content is not None, object_content=content or b""
        )


def weights(change: Callable[[np.ndarray], np.ndarray]) -> Hostility:
    """Other numbers, of any kind."""

    def spoil(answer: Frame, round: int) -> Content:
        numbers = change(np.frombuffer(answer.payload, dtype="<f4").copy())
        told = ConfigRecord({"manifest": json.dumps(dict(answer.manifest))})
        return [RecordDict({"numbers": ArrayRecord({"all": Array(numbers)}), "told": told})]

    return spoil


def one_weight(value: float) -> Hostility:
    def change(numbers: np.ndarray) -> np.ndarray:
        numbers[3] = value
        return numbers

    return weights(change)


def report(**changed: Any) -> Hostility:
    """Other words about the same work."""
    return lambda answer, round: [
        apps.to_record(
            replace(answer, manifest={**answer.manifest, "report": {**answer.manifest["report"], **changed}})
        )
    ]


def text(change: Callable[[str], str]) -> Hostility:
    """Another manifest, which may be none."""

    def spoil(answer: Frame, round: int) -> Content:
        record = apps.to_record(answer)
        record["told"] = ConfigRecord({"manifest": change(json.dumps(dict(answer.manifest)))})
        return [record]

    return spoil


def records(record: RecordDict) -> Hostility:
    return lambda answer, round: [record]


KINDS: dict[str, Hostility] = {
    "a weight that is no number": one_weight(float("nan")),
    "an infinite weight": one_weight(float("inf")),
    "1e30 times the change": weights(lambda numbers: numbers * np.float32(1e30)),
    "one number for all": weights(lambda numbers: numbers[:1]),
    "integers": weights(lambda numbers: numbers.astype("<i8")),
    "half precision": weights(lambda numbers: numbers.astype("<f2")),
    "another shape": weights(lambda numbers: numbers.reshape(2, -1)),
    "a weight too many": weights(lambda numbers: np.append(numbers, np.float32(0))),
    "half of it": weights(lambda numbers: numbers[: len(numbers) // 2]),
    "more than an answer can be": weights(lambda numbers: np.random.default_rng(0).random(2**23, dtype="f4")),
    "more than an answer can be, packed small": weights(lambda numbers: np.zeros(2**23, dtype="<f4")),
    "negative examples": report(examples=-15),
    "no examples": report(examples=0),
    "examples that are no number": report(examples=float("nan")),
    "1e18 examples": report(examples=10**18),
    "another round": report(round=7),
    "another client": report(client=0),
    "another model": text(lambda told: told.replace('"layout": "', '"layout": "0')),
    "words that are none": text(lambda told: told[:-9]),
    "a list": text(lambda told: f"[{told}]"),
    "a thousand lists": text(lambda told: '{"layout": ' + "[" * 990 + "]" * 990 + "}"),
    "a number with ten thousand digits": text(lambda told: f'{{"report": {"9" * 10_000}}}'),
    "words that are longer as a text": text(lambda told: told[:-1] + ', "x": "' + "\\u0001" * 2_450_000 + '"}'),
    "numbers that are words": lambda answer, round: [
        RecordDict({"told": apps.to_record(answer)["told"], "numbers": ConfigRecord({"all": "1.0"})})
    ],
    "numbers that are cut off": lambda answer, round: [
        RecordDict({"told": apps.to_record(answer)["told"], "numbers": ConfigRecord({"all": answer.payload[:-2]})})
    ],
    "no numbers": lambda answer, round: [RecordDict({"told": apps.to_record(answer)["told"]})],
    "no records": records(RecordDict()),
    "many arrays": records(
        RecordDict({"numbers": ArrayRecord({str(n): Array(np.zeros(1, dtype="<f4")) for n in range(50)})})
    ),
}


def honestly(answer: Frame, round: int) -> Content:
    return [apps.to_record(answer)]


def run_with(
    hostility: Hostility = honestly,
    spoil: Spoil = lambda objects: objects,
    deadline: float = 20.0,
    *,
    clients: int = 3,
    central: bool = True,
    **section: Any,
) -> tuple[list[RoundResult], list[str]]:
    """Run two rounds with a deployment's limits, and return their results and what was said."""
    section = {"rounds": ROUNDS, "max_lost_clients": 1, "round_deadline": deadline, **section}
    recipe = with_limits(make_recipe(federation=section, data={"clients": clients}, training={"proximal_mu": 0.0}))
    said: list[str] = []
    exchange = Exchange(
        ScriptedSuperLink(hostility, spoil),
        pack_recipe(recipe),
        deadline,
        lambda what, detail: said.append(f"{what} {detail}"),
        lambda phases: None,
        partial(check_facts, recipe),
    )
    names = exchange.assemble(clients, 5.0)
    fleet = RemoteFleet(exchange, names, recipe.federation, range(clients), Path(gettempdir()))
    aggregate = LORA_RULES["factors"](recipe.federation)
    score = Score(1.0, 0, 1) if central else None
    run = run_of(recipe, fleet, aggregate, lambda adapter: score, make_adapted().read(), sizes=fleet.sizes)
    return [*run_rounds(run, fleet)], said


def final(results: list[RoundResult]) -> str:
    return results[-1].adapter.sha256()


@pytest.fixture(scope="module")
def without_it() -> str:
    """Make the adapter of the other two."""
    said = Frame({"error": "not today"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "POLL_SECONDS", 0.01)
        return final(run_with(lambda answer, round: [apps.to_record(said)])[0])


@pytest.fixture(scope="module")
def with_it() -> str:
    """Make the adapter of all three."""
    return final(run_with()[0])


@pytest.mark.parametrize("kind", first(KINDS, keep=2))
def test_what_a_client_sends_is_refused_and_the_others_make_the_model(kind: str, without_it: str) -> None:
    results, said = run_with(KINDS[kind])
    assert len(results) == ROUNDS + 1
    assert [list(result.lost) for result in results] == [[], [HOSTILE], [HOSTILE]], said
    assert final(results) == without_it


def test_the_others_alone_make_another_model_than_all_three(without_it: str, with_it: str) -> None:
    """Show that the test above would see an update that came through."""
    assert without_it != with_it


def test_an_answer_that_comes_twice_counts_once(with_it: str) -> None:
    results, _ = run_with(lambda answer, round: [apps.to_record(answer)] * 2)
    assert final(results) == with_it


def test_a_former_rounds_answer_is_refused() -> None:
    kept: list[RecordDict] = []

    def replay(answer: Frame, round: int) -> Content:
        kept.append(apps.to_record(answer))
        return kept[:1]

    results, _ = run_with(replay)
    assert [list(result.lost) for result in results] == [[], [], [HOSTILE]]
    assert "another round" in str(results[-1].lost[HOSTILE])


def without_the_largest(objects: dict[str, bytes]) -> dict[str, bytes]:
    largest = max(objects, key=lambda name: len(objects[name]))
    return {name: content for name, content in objects.items() if name != largest}


@pytest.mark.long
def test_an_answer_that_never_comes_whole_costs_no_other(without_it: str) -> None:
    """Flower alone waits for the rest of it, hours, before it looks at the next."""
    results, said = run_with(spoil=without_the_largest, deadline=3.0)
    assert [list(result.lost) for result in results] == [[], [HOSTILE], [HOSTILE]], said
    assert "no answer within" in str(results[1].lost[HOSTILE])
    assert final(results) == without_it


def test_objects_of_other_bytes_are_refused(without_it: str) -> None:
    results, said = run_with(spoil=lambda objects: dict.fromkeys(objects, b"noise"))
    assert [list(result.lost) for result in results] == [[], [HOSTILE], [HOSTILE]], said
    assert final(results) == without_it


@pytest.mark.parametrize(
    "score", first([[float("nan"), 1, 4], [-1.0, 1, 4], [1.0, 9, 4], [1.0, 1, 10**18], [1.0, 1, 0], "x"], keep=2)
)
def test_a_score_that_can_not_be_is_not_counted(score: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = honest_answer

    def lie(name: str, asked: Frame) -> Frame:
        if asked.manifest["do"] == "evaluate" and name == str(HOSTILE):
            return Frame({"score": score})
        return honest(name, asked)

    monkeypatch.setitem(globals(), "honest_answer", lie)
    results, said = run_with()
    assert all(set(result.clients) == {0, 1} for result in results)
    assert any(line.startswith("unscored 2") for line in said)


def lie(monkeypatch: pytest.MonkeyPatch, do: str, **told: Any) -> None:
    """Let the hostile client say something else about itself, whatever its answer would be."""
    honest = honest_answer

    def answer(name: str, asked: Frame) -> Frame:
        found = honest(name, asked)
        hostile = asked.manifest["do"] == do and name == str(HOSTILE)
        return replace(found, manifest={**found.manifest, **told}) if hostile else found

    monkeypatch.setitem(globals(), "honest_answer", answer)


def test_a_deployment_never_lacks_limits_and_keeps_those_of_its_recipe() -> None:
    few, many = (with_limits(make_recipe(data={"clients": clients})).federation for clients in (2, 100))
    assert (few.max_share, few.max_change, few.max_client_blocks) == (0.5, 10.0, 10**6)
    assert many.max_share == 0.04, "half of the weight for one of a hundred would be no limit"
    own = {"max_share": 1.0, "max_change": 99.0, "max_client_blocks": 5}
    assert with_limits(make_recipe(federation=own)).federation == make_recipe(federation=own).federation


@pytest.mark.parametrize(
    ("told", "why"),
    first(
        [
            ({"blocks": 10**7, "tokens": 10**8}, "10,000,000 blocks"),
            ({"holdout_blocks": 10**7, "holdout_tokens": 10**8}, "10,000,000 blocks"),
            ({"tokens": 10**9}, "1,000,000,000 tokens in 4 blocks of 32"),
            ({"holdout_tokens": 10**9}, "1,000,000,000 tokens in 4 blocks of 32"),
        ]
    ),
)
def test_a_client_that_says_it_has_more_than_may_be_does_not_enrol(
    told: dict[str, int], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lie(monkeypatch, "meet", **told)
    results, said = run_with(clients=2)
    assert all(not result.lost for result in results)
    assert [line for line in said if line.startswith("refused")] == [next(line for line in said if why in line)]


@pytest.mark.parametrize("strategy", first([*STRATEGIES]))
def test_a_client_that_lies_about_its_size_neither_replaces_the_adapter_nor_judges_it(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many blocks as may be, a thousand times the change, and a loss of 0 over all tokens that they can hold."""
    most = 10**6
    settings = {"trimmed_mean": {"trim": 0.34}}.get(strategy, {})
    kind = {"strategy": {"kind": strategy, **settings}}
    start = make_adapted().read().weights_P

    def far(results: list[RoundResult]) -> float:
        return float((results[-1].adapter.weights_P - start).norm())

    honest = far(run_with(**kind)[0])
    lie(monkeypatch, "meet", blocks=most, tokens=32 * most, holdout_blocks=most, holdout_tokens=32 * most)
    lie(monkeypatch, "evaluate", score=[0.0, 1, 32 * most])

    def push(answer: Frame, round: int) -> Content:
        numbers = np.frombuffer(answer.payload, dtype="<f4")
        told = {**answer.manifest["report"], "examples": most, "tokens": most, "steps": most}
        pushed = (numbers * np.float32(1000)).astype("<f4").tobytes()
        return [apps.to_record(Frame({**answer.manifest, "report": told}, pushed))]

    results, said = run_with(push, central=False, **kind)
    assert far(results) <= 12 * honest, said
    assert all(set(result.scaled) | set(result.lost) == {HOSTILE} for result in results[1:])
    assert all(max(result.shares.values(), default=0.0) <= 0.5 + 1e-9 for result in results)
    assert [result.judged_loss for result in results] == [results[0].judged_loss] * 3, "what the others say: no change"
    assert results[1].client_loss == pytest.approx(0.25), "half of it is theirs, who say 0.5"
