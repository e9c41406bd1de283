"""Fleet of other machines on a scripted transport: who comes late, twice, under another node or with nonsense."""

import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest
import torch
from support.liars import facts_of
from support.marks import first
from support.tiny import make_adapted, make_recipe, make_update

from fedloom.adapters.adapter import Adapter
from fedloom.deployment.messages import (
    pack_adapter,
    pack_recipe,
    pack_refusal,
    pack_task,
    pack_update,
    unpack_adapter,
    unpack_recipe,
    unpack_task,
    unpack_update,
)
from fedloom.deployment.server import exchange, remote_fleet
from fedloom.deployment.server.exchange import Answer, Exchange, Node
from fedloom.deployment.server.remote_fleet import RemoteFleet
from fedloom.errors import DeploymentError, MessageError, RunError
from fedloom.federation.fleet import ClientPreview
from fedloom.host.frames import Frame
from fedloom.progress import Progress
from fedloom.recipe.recipe import Recipe
from fedloom.training.jobs import ClientFailure, ClientResult, ClientTask, ClientUpdate

pytestmark = pytest.mark.usefixtures("hurry")

Script = Callable[[Node, Frame], Frame | str | None]
"""Answer of a node: a frame, an error of Flower's, or nothing at all."""


class ScriptedTransport:
    """Nodes whose answers are there at the next look."""

    def __init__(self, nodes: Sequence[Node], script: Script) -> None:
        self.there, self._script = list(nodes), script
        self.asked: list[tuple[Node, str]] = []
        self._answers: dict[str, Frame | str] = {}
        self.lost_calls = 0

    def nodes(self) -> Sequence[Node]:
        if self.lost_calls:
            raise ConnectionError("the SuperLink is gone")
        return self.there

    def send(self, node: Node, frame: Frame, seconds: float) -> str:
        message = str(len(self.asked))
        self.asked.append((node, frame.manifest["do"]))
        answer = self._script(node, frame)
        if answer is not None:
            self._answers[message] = answer
        return message

    def pull(self, messages: Collection[str]) -> Answer | None:
        for message in messages:
            if message in self._answers:
                found = self._answers.pop(message)
                if isinstance(found, str):
                    return Answer(message, None, found, is_gone=found == "gone")
                return Answer(message, found, "")
        return None

    def reopen(self) -> None:
        self.lost_calls -= 1


def node(name: str, session: str = "1") -> Node:
    return Node(f"node of {name}", "", session)


def adapter() -> Adapter:
    return make_adapted().read()


def honest(asked: Node, frame: Frame) -> Frame | str | None:
    """Answer as a client that adds its number to every weight."""
    name = asked.id.removeprefix("node of ")
    if frame.manifest["do"] == "meet":
        return facts_of(name)
    start = adapter()
    if frame.manifest["do"] == "evaluate":
        return Frame({"score": [2.0, 1, 4]})
    trained = replace(start, weights_P=start.weights_P + int(name))
    return pack_update(make_update(trained, int(name), round=frame.manifest["round"]), None)


def open_fleet(script: Script, clients: int = 3, **federation: Any) -> tuple[RemoteFleet, ScriptedTransport, list[str]]:
    recipe = make_recipe(data={"clients": clients}, federation={"round_deadline": 20.0, **federation})
    transport, said = ScriptedTransport([node(str(n)) for n in range(clients)], script), list[str]()
    exchange = open_exchange(transport, recipe, said)
    names = exchange.assemble(clients, 5.0)
    return RemoteFleet(exchange, names, recipe.federation, range(clients), Path(gettempdir())), transport, said


def open_exchange(transport: ScriptedTransport, recipe: Recipe, said: list[str]) -> Exchange:
    return Exchange(
        transport,
        pack_recipe(recipe),
        recipe.federation.round_deadline,
        lambda what, detail: said.append(f"{what} {detail}"),
        lambda phases: None,
    )


def tasks(fleet: RemoteFleet, round: int = 1) -> list[ClientTask]:
    training, start = make_recipe().training, adapter()
    return [ClientTask(round, client, start, training, 3, 7) for client in fleet.clients]


def outcome(fleet: RemoteFleet, round: int = 1) -> list[str]:
    return [
        f"{result.client} {result.error}" if isinstance(result, ClientFailure) else f"{result.report.client} trained"
        for result in train(fleet, round)
    ]


def train(fleet: RemoteFleet, round: int = 1) -> list[ClientResult]:
    """Return a round's results, each update of which was shown before."""
    found = [*fleet.train(tasks(fleet, round))]
    results = [result for result in found if not isinstance(result, ClientPreview)]
    shown = [result.client for result in found if isinstance(result, ClientPreview)]
    assert sorted(shown) == [result.client for result in results if isinstance(result, ClientUpdate)]
    assert found[len(shown) :] == results, "all are shown before the first counts"
    return results


def test_updates_come_by_client_and_hold_outs_are_scored() -> None:
    fleet, _, _ = open_fleet(honest)
    assert {client: score.loss for client, score in fleet.evaluate(adapter()).items()} == {0: 0.5, 1: 0.5, 2: 0.5}
    results = train(fleet)
    assert all(isinstance(result, ClientUpdate) for result in results)
    for client, result in enumerate(results):
        assert isinstance(result, ClientUpdate)
        assert torch.equal(result.adapter.weights_P, adapter().weights_P + client)


@pytest.mark.parametrize(("clients", "waits"), first([(2, False), (3, True)]))
def test_who_refused_a_run_is_named_with_the_mend_that_fits(clients: int, waits: bool) -> None:
    """Longer waiting was advised where everybody had come and refused."""
    recipe = make_recipe(data={"clients": clients}, federation={"round_deadline": 20.0})
    words = {"0": "policy", "1": "documents"}

    def refuses(asked: Node, frame: Frame) -> Frame:
        name = asked.id.removeprefix("node of ")
        return pack_refusal(name, words[name])

    transport = ScriptedTransport([node("0"), node("1")], refuses)
    exchange, phases = open_exchange(transport, recipe, []), dict[str, str]()
    exchange._show_clients = phases.update
    with pytest.raises(DeploymentError) as ended:
        exchange.assemble(clients, 0.5)
    assert phases == {"0": "refused", "1": "refused"}, "and so says fedloom status"
    said = str(ended.value)
    refused = "1 refused: its documents, or tasks of its own, can't be used"
    assert f"0 refused: its owner's policy does not allow it (policy); {refused}" in said
    assert "change the recipe, or have the owners of those mend it, whose own terminals say why, and join anew" in said
    assert ("--wait SECONDS" in said) == waits


def test_who_refused_and_came_again_is_not_called_refused() -> None:
    recipe, said = make_recipe(data={"clients": 2}, federation={"round_deadline": 20.0}), list[str]()
    transport = ScriptedTransport(
        [node("0")], lambda n, f: pack_refusal("0", "policy") if n.session == "1" else honest(n, f)
    )
    exchange = open_exchange(transport, recipe, said)
    with pytest.raises(DeploymentError, match="0 refused"):
        exchange.assemble(2, 0.3)
    transport.there = [node("0", "2")]
    with pytest.raises(DeploymentError, match=r"1 of 2 clients came within 0:00 \(0\); start the others"):
        exchange.assemble(2, 0.3)


def test_clients_that_are_there_enrol_without_a_rest_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rest after each answer was most of the time until round 0: ten seconds with thirty clients."""
    rests: list[float] = []
    monkeypatch.setattr(exchange.time, "sleep", rests.append)
    open_fleet(honest, 30)
    assert len(rests) <= 2


def test_where_padding_counts_a_score_is_over_more_than_the_real_tokens() -> None:
    def pads(asked: Node, frame: Frame) -> Frame | str | None:
        return Frame({"score": [30.0, 1, 60]}) if frame.manifest["do"] == "evaluate" else honest(asked, frame)

    fleet, _, said = open_fleet(pads)
    assert fleet.evaluate(adapter()) == {}
    assert said[-1].endswith("an impossible score: 60 tokens, 1 of them right")
    fleet.counted_width = 16  # of four blocks each
    assert [score.loss for score in fleet.evaluate(adapter()).values()] == [0.5] * 3
    fleet.counted_width = 14
    assert fleet.evaluate(adapter()) == {}


def test_who_is_late_is_lost_and_is_not_waited_for_while_it_is_gone() -> None:
    fleet, transport, _ = open_fleet(
        lambda n, f: None if n.id[-1] == "1" and f.manifest["do"] == "train" else honest(n, f), round_deadline=1.0
    )
    found = outcome(fleet)
    assert [line[:9] for line in found] == ["0 trained", "1 round 1", "2 trained"]
    assert "no answer within" in found[1]
    transport.there = [node("0"), node("2")]
    assert "is still not connected" in outcome(fleet, 2)[1]
    lost = [result for result in fleet.train(tasks(fleet, 3)) if isinstance(result, ClientFailure)]
    assert [(one.client, one.was_asked) for one in lost] == [(1, False)]


def test_a_client_under_another_node_is_asked_again_and_counted_once() -> None:
    fleet, transport, _ = open_fleet(honest)

    def dies_once(asked: Node, frame: Frame) -> Frame | str | None:
        if asked == node("1") and frame.manifest["do"] == "train":
            transport.there = [node("0"), node("2"), node("1", "2"), node("1")]
            return None
        return honest(asked, frame)

    waits: list[None] = []
    transport._script, fleet.exchange._show_wait = dies_once, lambda: waits.append(None)
    assert outcome(fleet) == ["0 trained", "1 trained", "2 trained"]
    assert len(waits) == 1, "what the first node was waited for was no work, though nobody saw it go"
    assert [n.session for n, do in transport.asked if do == "train" and n.id[-1] == "1"] == ["1", "2"]


def test_a_process_that_died_is_asked_again_but_not_for_ever() -> None:
    fleet, transport, _ = open_fleet(
        lambda n, f: "Flower's error 1" if f.manifest["do"] == "train" else honest(n, f), 1
    )
    assert "Flower's error 1" in outcome(fleet)[0]
    assert [do for _, do in transport.asked].count("train") == exchange.TRIES


def test_a_node_that_went_away_is_asked_again_when_it_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower may say again and again that it is away: that is no try."""
    monkeypatch.setattr(exchange, "GONE_SECONDS", 0.05)
    away = iter(["gone"] * (exchange.TRIES + 2))

    def goes_away(asked: Node, frame: Frame) -> Frame | str | None:
        train = frame.manifest["do"] == "train" and asked.id[-1] == "1"
        return next(away, honest(asked, frame)) if train else honest(asked, frame)

    fleet, transport, _ = open_fleet(goes_away)
    assert outcome(fleet) == ["0 trained", "1 trained", "2 trained"]
    assert [n.id[-1] for n, do in transport.asked if do == "train"].count("1") == exchange.TRIES + 3


def test_who_was_away_is_said_to_be_back_once_and_how_long_a_round_waited_is_known() -> None:
    """It was said that an owner went away, and never that it came back; the record had a long round and no reason."""
    fleet, transport, said = open_fleet(honest)
    waits = [0]

    def leaves(asked: Node, frame: Frame) -> Frame | str | None:
        if asked == node("1") and frame.manifest["do"] == "train":
            transport.there = [node("0"), node("2")]
            return None
        return honest(asked, frame)

    def returns() -> None:
        waits[0] += 1
        if waits[0] == 20:
            transport.there = [node("0"), node("1", "2"), node("2")]

    transport._script, fleet.exchange._show_wait = leaves, returns
    assert outcome(fleet) == ["0 trained", "1 trained", "2 trained"]
    assert fleet.away.keys() == {1}
    assert fleet.away[1] > 0
    assert [line for line in said if line.startswith(("gone", "back"))] == [
        "gone 1 is no longer connected",
        "back 1 is connected again, after 0:00",
    ]
    outcome(fleet, 2)
    assert fleet.away == {}
    assert sum(line.startswith("back") for line in said) == 1


def test_nobody_is_said_to_be_waited_for_while_another_works() -> None:
    fleet, transport, _ = open_fleet(honest, max_lost_clients=2, round_deadline=0.3)
    waits: list[None] = []

    def leaves(asked: Node, frame: Frame) -> Frame | str | None:
        transport.there = [node("0"), node("2")]
        return None if asked.id[-1] in "12" else honest(asked, frame)

    transport._script, fleet.exchange._show_wait = leaves, lambda: waits.append(None)
    outcome(fleet)
    assert not waits
    assert fleet.away[1] == pytest.approx(0.3, abs=0.2)


def test_a_lost_link_is_made_anew_and_the_questions_asked_again() -> None:
    fleet, transport, said = open_fleet(honest)
    transport.lost_calls = 1
    assert outcome(fleet) == ["0 trained", "1 trained", "2 trained"]
    assert "server lost the connection to Flower's SuperLink; connecting again" in said


@pytest.mark.long
def test_a_round_waits_for_its_quorum_if_the_recipe_says_so() -> None:
    tried = iter([None, None])
    fleet, _, said = open_fleet(
        lambda n, f: next(tried, honest(n, f)) if n.id[-1] == "1" and f.manifest["do"] == "train" else honest(n, f),
        on_quorum_lost="wait",
        round_deadline=1.0,
    )
    assert outcome(fleet) == ["0 trained", "1 trained", "2 trained"]
    assert sum(line.startswith("waiting") for line in said) == 2


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (pack_refusal("1", "policy"), r"its owner's policy does not allow it \(policy\)"),
        (facts_of("1", blocks="many"), "blocks: not a whole number"),
        (facts_of("1", tokens=-1), "tokens: not a whole number"),
        (facts_of("1", tokens=10**400), "tokens: not a whole number"),
    ],
)
def test_who_is_refused_or_refuses_is_named_with_the_reason(answer: Frame, why: str) -> None:
    recipe = make_recipe(data={"clients": 2})
    transport = ScriptedTransport([node("0"), node("1")], lambda n, f: answer if n.id[-1] == "1" else honest(n, f))
    with pytest.raises(DeploymentError, match=f"1 of 2 clients came .*1 refused: {why}"):
        open_exchange(transport, recipe, []).assemble(2, 0.2)


def test_who_came_and_left_before_the_run_began_is_none_of_its_clients() -> None:
    """Revoked, say: it would be waited for in every round."""
    transport = ScriptedTransport([node("0")], honest)
    exchange = open_exchange(transport, make_recipe(data={"clients": 2}), [])
    for present in ("0", "1"):
        transport.there = [node(present)]
        with pytest.raises(DeploymentError, match=rf"1 of 2 clients came within .* \({present}\)"):
            exchange.assemble(2, 0.3)
    transport.there = [node("1"), node("2")]
    assert exchange.assemble(2, 5.0) == ["1", "2"]


def test_a_client_with_other_documents_is_not_the_client_that_left() -> None:
    fleet, transport, said = open_fleet(honest, 2, round_deadline=1.0)
    transport.there = [node("0"), node("1", "2")]
    transport._script = lambda n, f: facts_of("1", documents="0" * 64) if n == node("1", "2") else honest(n, f)
    assert "no answer within" in outcome(fleet)[1]
    assert any("other documents" in line for line in said)


def test_the_servers_documents_are_not_told() -> None:
    told: list[Frame] = []
    open_fleet(lambda n, f: told.append(f) or honest(n, f), 1)  # type: ignore[func-returns-value]
    assert "source" not in told[0].manifest["recipe"]["data"]


@pytest.mark.parametrize(
    "progress",
    first(
        [
            [["train", float("inf"), 1, 1, 1]],
            [["train", 1, 1, "[/red]", 1]],
            [["train", 1, 1, 1, "\x1b[2J"]],
            [["train", 10**400, 1, 1, 1]],
            [["train", -1, 1, 1, 1]],
            [["sleep", 1, 1, 1, 1]],
            [["train", 1]],
            5,
        ],
        keep=3,
    ),
)
def test_progress_that_can_not_be_is_not_shown_and_costs_the_update(progress: Any) -> None:
    def boasts(asked: Node, frame: Frame) -> Frame | str | None:
        answer = honest(asked, frame)
        if frame.manifest["do"] == "train" and isinstance(answer, Frame):
            return replace(answer, manifest={**answer.manifest, "progress": progress})
        return answer

    fleet, _, _ = open_fleet(boasts)
    seen: list[Progress] = []
    fleet.watch = seen.append
    assert all("progress" in line for line in outcome(fleet))
    assert not seen


@pytest.mark.parametrize(
    "federation",
    [{"min_clients": 5}, {"fraction": 0.5, "min_clients": 4}, {"lora_rule": "svd", "client_ranks": [1, 1, 2, 2, 2]}],
)
def test_a_recipe_for_more_clients_than_the_default_can_be_read_by_each_of_them(federation: dict[str, Any]) -> None:
    recipe = make_recipe(data={"clients": 5}, federation=federation)
    unpacked = unpack_recipe(pack_recipe(recipe))
    assert (unpacked.federation.client_ranks, unpacked.data.clients) == (recipe.federation.client_ranks, 5)
    assert unpacked.data.source == "the client's own"


@pytest.mark.parametrize("rule", ["factors", "rolora", "fedex"])
def test_a_task_and_its_update_are_the_same_after_they_travelled(rule: str) -> None:
    from fedloom.federation.lora_rules import trained_part

    recipe, start = make_recipe(federation={"lora_rule": rule}), adapter()
    task = ClientTask(1, 0, start, recipe.training, 3, 7, trained_part(start.layout, rule, 1))
    unpacked = unpack_task(pack_task(task, pack_adapter(start)), start.layout, recipe.federation)
    assert unpacked.adapter.sha256() == start.sha256()
    assert (unpacked.training, unpacked.rounds, unpacked.seed) == (task.training, 3, 7)
    assert (unpacked.trains_P is None) == (task.trains_P is None)
    moved = start.weights_P + (1 if task.trains_P is None else task.trains_P.float())
    packed = pack_update(make_update(replace(start, weights_P=moved), 0), task.trains_P)
    assert len(packed.payload) == task.num_bytes
    assert torch.equal(unpack_update(packed, task).adapter.weights_P, moved)


def test_a_residual_travels_with_its_adapter() -> None:
    from fedloom.adapters.lora import Residual, lora_pairs

    start = adapter()
    shapes = dict(zip(start.layout.names, start.layout.shapes, strict=True))
    made = {layer: (torch.randn(shapes[b][0], 3), torch.randn(3, shapes[a][1]))
            for layer, (a, b) in lora_pairs(start.layout.names).items()}  # fmt: skip
    whole = replace(start, residual=Residual(made))
    assert unpack_adapter(pack_adapter(whole), start.layout, "fedex").sha256() == whole.sha256()
    with pytest.raises(MessageError, match="the residual is for another model"):
        unpack_adapter(pack_adapter(whole), start.layout, "factors")
    fewer = replace(start, residual=Residual(dict([*made.items()][1:])))
    with pytest.raises(MessageError, match="the residual is for another model"):
        unpack_adapter(pack_adapter(fewer), start.layout, "fedex")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda frame: replace(frame, payload=frame.payload[:-4]),
        lambda frame: replace(frame, payload=frame.payload + b"\0\0\0\0"),
        lambda frame: replace(frame, manifest={**frame.manifest, "layout": "another"}),
        lambda frame: replace(frame, manifest={**frame.manifest, "report": {}}),
        lambda frame: replace(frame, manifest={"layout": frame.manifest["layout"]}),
        lambda frame: replace(frame, manifest={**frame.manifest, "report": {**frame.manifest["report"], "round": 2}}),
        lambda frame: replace(
            frame, manifest={**frame.manifest, "report": {**frame.manifest["report"], "examples": -3}}
        ),
    ],
)
def test_an_update_that_can_not_be_one_is_refused(spoil: Callable[[Frame], Frame]) -> None:
    start = adapter()
    task = ClientTask(1, 0, start, make_recipe().training, 3, 7)
    with pytest.raises(MessageError):
        unpack_update(spoil(pack_update(make_update(start, 0), None)), task)


def test_answers_wait_on_the_disk_for_their_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that come first but are summed last are held by nobody: neither in memory nor in a file that stays."""
    fleet, _, _ = open_fleet(honest)
    fleet.folder = tmp_path
    alive: weakref.WeakSet[Adapter] = weakref.WeakSet()

    def watched(frame: Frame, task: ClientTask, **more: Any) -> ClientUpdate:
        update = unpack_update(frame, task, **more)
        alive.add(update.adapter)
        return update

    monkeypatch.setattr(remote_fleet, "unpack_update", watched)
    most = 0
    for result in fleet.train(tasks(fleet)):
        assert isinstance(result, ClientUpdate | ClientPreview)
        most = max(most, len(alive))
        assert not [*tmp_path.iterdir()]
        del result
    assert most <= 2


def test_a_disk_without_room_for_answers_is_said(tmp_path: Path) -> None:
    fleet, _, _ = open_fleet(honest)
    fleet.folder = tmp_path / "not there"
    with pytest.raises(RunError, match="can't be written"):
        list(fleet.train(tasks(fleet)))
