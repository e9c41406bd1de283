"""Several clients of one worker: one base model, one pass, and nothing of one in another's answers."""

import json
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest
from support.liars import LyingServer
from support.tiny import make_recipe

from fedloom.adapters.rounded_product import RoundedProduct
from fedloom.adapters.stacked_lora import Stack
from fedloom.deployment.client import shared_base, worker_process
from fedloom.deployment.client.journal import Journal
from fedloom.deployment.client.policy import Policy
from fedloom.deployment.client.shared_base import Bases, SharedBase
from fedloom.deployment.client.worker import UnderWay, Worker, finish
from fedloom.deployment.client.worker_process import Arrived, answer, read_members
from fedloom.deployment.messages import pack_adapter
from fedloom.deployment.processes import AND
from fedloom.federation.lora_rules import shared_part
from fedloom.host import failpoints
from fedloom.host.frames import Frame, receive_frame
from fedloom.progress import Progress
from fedloom.recipe.recipe import Recipe
from fedloom.training.jobs import ClientJob

NAMES = "alice", "bob", "carol"


def recipe_of(engine: str = "batched", **sections: Any) -> Recipe:
    data = {"documents_per_client": None, **sections.pop("data", {})}
    return make_recipe(training={"engine": engine}, data=data, **sections)


def write_documents(folder: Path, name: str) -> Path:
    """Write as many documents as the name has letters, three times, of lengths that differ by client."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    data = folder / name / "rows.jsonl"
    rows = range(3 * len(name))
    data.write_text(
        "".join(json.dumps({"text": f"{name} {row} " + "word " * (row + 2 * len(name))}) + "\n" for row in rows)
    )
    secret = folder / name / f"{name}.journal.secret"
    secret.write_bytes(name.encode().ljust(32, b"s"))
    secret.chmod(0o600)
    return data


def worker_of(folder: Path, name: str, bases: Bases | None = None, **owner: Any) -> Worker:
    given = {"data": write_documents(folder, name), "policy": Policy(), **owner}
    journal = Journal(folder / name / f"{name}.journal.jsonl")
    return Worker(name, journal=journal, bases=bases, **given)


def node_of(folder: Path, **owners: Mapping[str, Any]) -> list[Worker]:
    """Return the workers of one process, which have a base model in common; `owners` says what is one's own."""
    bases = Bases()
    return [worker_of(folder, name, bases, **owners.get(name, {})) for name in NAMES]


def asked_of(recipe: Recipe, do: str, client: int, **fields: Any) -> Frame:
    server = LyingServer(lambda frame: frame, recipe)
    question = server.question(
        do, **{**({"client": client, "round": 1, "judge": True} if do == "train" else {}), **fields}
    )
    if do != "train" or recipe.federation.lora_rule != "fedsa":
        return question
    shares_P = shared_part(server.adapter.layout, "fedsa")
    return replace(question, payload=pack_adapter(server.adapter, shares_P).payload)


def together(workers: Sequence[Worker], questions: Sequence[Frame]) -> list[Frame]:
    """Have workers answer a question each, as their process does."""
    begun = [UnderWay(*pair, time.monotonic()) for pair in zip(workers, questions, strict=True)]
    for _ in finish(begun):
        pass
    return [one.answer or pytest.fail("no answer") for one in begun]


def alone(folder: Path, recipe: Recipe, do: str = "train") -> list[Frame]:
    """Have clients of the same documents answer the same, each with a model of its own."""
    return [worker_of(folder, name).answer(asked_of(recipe, do, number)) for number, name in enumerate(NAMES)]


def timeless(answer: Frame) -> dict[str, Any]:
    told = dict(answer.manifest)
    report = {key: value for key, value in told.get("report", {}).items() if not key.endswith("seconds")}
    return {**told, "report": report}


class Passes:
    """Passes that were made, by their clients' numbers, and models that were loaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[list[int]] = []
        self.loaded = 0
        train, load = SharedBase.train, shared_base.load_base

        def watched(base: SharedBase, jobs: Sequence[ClientJob], count: Callable[[Progress], object]) -> Any:
            self.made.append([job.client for job in jobs])
            return train(base, jobs, count)

        def loading(*asked: Any, **named: Any) -> Any:
            self.loaded += 1
            return load(*asked, **named)

        monkeypatch.setattr(SharedBase, "train", watched)
        monkeypatch.setattr(shared_base, "load_base", loading)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    return Passes(monkeypatch)


@pytest.mark.parametrize("engine", ["batched", "reference"])
def test_a_client_scores_by_the_products_that_it_trains_by(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stack, "rounds_to", staticmethod(lambda adapted, _: adapted.base.dtype))
    made, apply = [], RoundedProduct.apply
    monkeypatch.setattr(RoundedProduct, "apply", lambda *given: made.append(given) or apply(*given))
    answer = worker_of(tmp_path, "alice").answer(asked_of(recipe_of(engine), "evaluate", 0))
    assert answer.manifest["score"]
    assert bool(made) is (engine == "batched")


# --- Each answers what it answers alone.


@pytest.mark.parametrize(
    "do", [pytest.param("meet", marks=pytest.mark.long), pytest.param("evaluate", marks=pytest.mark.long), "train"]
)
def test_with_reference_each_answer_has_the_bits_that_it_has_alone(do: str, tmp_path: Path) -> None:
    recipe = recipe_of("reference")
    expected = alone(tmp_path / "alone", recipe, do)
    found = together(node_of(tmp_path), [asked_of(recipe, do, number) for number in range(3)])
    assert [timeless(one) for one in found] == [timeless(one) for one in expected]
    assert [one.payload for one in found] == [one.payload for one in expected]


def test_in_one_pass_each_answer_is_what_it_is_alone_up_to_rounding(tmp_path: Path, passes: Passes) -> None:
    recipe = recipe_of()
    expected = alone(tmp_path / "alone", recipe)
    passes.made, passes.loaded = [], 0
    # Whoever comes first, a pass is in the order of their numbers.
    workers, questions = node_of(tmp_path), [asked_of(recipe, "train", number) for number in range(3)]
    found = together(workers[::-1], questions[::-1])[::-1]
    assert (passes.made, passes.loaded) == ([[0, 1, 2]], 1)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.frombuffer(one.payload, "<f4"), np.frombuffer(other.payload, "<f4"), atol=1e-5)
        assert one.manifest["progress"] == other.manifest["progress"], "its own steps, and nobody else's"
        for key in ("examples", "tokens", "steps", "client"):
            assert one.manifest["report"][key] == other.manifest["report"][key]
        assert one.manifest["report"]["loss_last"] == pytest.approx(other.manifest["report"]["loss_last"], abs=1e-5)
    assert len({one.payload for one in found}) == 3


def test_a_client_that_comes_later_begins_where_all_begin(tmp_path: Path, passes: Passes) -> None:
    """What one has trained before stays nowhere in the model: with `fedsa`, each goes on with a part of its own."""
    recipe = recipe_of("reference", federation={"lora_rule": "fedsa"}, data={"central_holdout": 0})
    expected = worker_of(tmp_path / "alone", "bob").answer(asked_of(recipe, "train", 1))
    alice, bob, _ = node_of(tmp_path)
    assert "report" in alice.answer(asked_of(recipe, "train", 0)).manifest
    found = bob.answer(asked_of(recipe, "train", 1))
    assert timeless(found) == timeless(expected)
    assert found.payload == expected.payload
    assert passes.loaded == 2, "one of the client alone, one of the node"


@pytest.mark.long
def test_clients_that_a_server_gives_one_number_get_each_its_own_answer(
    tmp_path: Path, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results are told apart by the numbers that a server gave."""
    recipe = recipe_of()
    lied = [asked_of(recipe, "train", 1)] * 3
    expected = [worker_of(tmp_path / "alone", name).answer(lied[0]) for name in NAMES]
    passes.made = []
    found = together(node_of(tmp_path), lied)
    assert passes.made == [[1], [1], [1]]
    assert [one.payload for one in found] == [one.payload for one in expected]
    monkeypatch.setattr(shared_base, "_fit", lambda one, other: True)  # the twin: one pass, whatever the numbers
    mixed = UnderWay(worker_of(tmp_path, "alice"), lied[0], time.monotonic())
    other = UnderWay(worker_of(tmp_path, "bob"), lied[0], time.monotonic())
    with pytest.raises((KeyError, AssertionError)):
        assert [one.answer for one in finish([mixed, other])] == found[:2]


# --- What one does costs the others nothing.


def test_documents_that_are_gone_and_a_policy_that_refuses_cost_nobody_else_anything(
    tmp_path: Path, passes: Passes, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of("reference")
    expected = alone(tmp_path / "alone", recipe)[2]
    workers = node_of(tmp_path, alice={"data": tmp_path / "gone.jsonl"}, bob={"policy": Policy(models=("another",))})
    found = together(workers, [asked_of(recipe, "train", number) for number in range(3)])
    assert [one.manifest.get("refused") for one in found] == ["documents", "model", None]
    assert found[2].payload == expected.payload
    said = capsys.readouterr().out
    assert "refused   alice: --data " in said
    assert "refused   bob: " in said


def test_a_client_that_is_late_is_given_up_alone(
    tmp_path: Path, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers, recipe = node_of(tmp_path), recipe_of()
    together(workers, [asked_of(recipe, "meet", number) for number in range(3)])
    passes.made = []
    now = time.monotonic()
    begun = [
        UnderWay(worker, asked_of(recipe, "train", number, seconds=5.0 if number == 1 else 600.0), now)
        for number, worker in enumerate(workers)
    ]
    monkeypatch.setattr(shared_base.time, "monotonic", lambda: now + 60.0)
    found = [one.answer for one in finish(begun) if one.answer]
    assert passes.made == [[0, 1, 2]], "nobody begins anew"
    assert sorted(one.manifest.get("refused", "") for one in found) == ["", "", "late"]
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "bob" / "bob.journal.jsonl").read_text().splitlines()]
    assert kinds[-1] == "give_up", "it does not count"


def test_a_pass_ends_when_all_of_it_are_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workers, recipe, now = node_of(tmp_path), recipe_of(), time.monotonic()
    begun = [
        UnderWay(worker, asked_of(recipe, "train", number, seconds=50.0), now) for number, worker in enumerate(workers)
    ]
    steps: list[Progress] = []
    count = shared_base._Counter.__call__
    monkeypatch.setattr(shared_base._Counter, "__call__", lambda self, one: (steps.append(one), count(self, one)))
    monkeypatch.setattr(shared_base.time, "monotonic", lambda: now + 60.0)
    assert [one.answer.manifest["refused"] for one in finish(begun) if one.answer] == ["late"] * 3
    assert len(steps) == 1


def test_a_failure_that_nobody_foresaw_is_told_to_each_of_its_pass_and_all_go_on(tmp_path: Path) -> None:
    workers, recipe = node_of(tmp_path), recipe_of()
    questions = [asked_of(recipe, "train", number) for number in range(3)]
    failpoints.arm("training.stepped=raise")
    try:
        found = together(workers, questions)
    finally:
        failpoints.arm("")
    assert [one.manifest["refused"] for one in found] == ["internal"] * 3
    assert ["report" in one.manifest for one in together(workers, questions)] == [True] * 3


# --- What they have in common.


def test_in_a_private_run_nothing_of_anothers_documents_is_in_an_answer(tmp_path: Path, passes: Passes) -> None:
    """Not in its rounding either: each has a pass of its own, and its own noise."""
    bound = {"delta": 1e-3, "noise_multiplier": 1.0}
    recipe = recipe_of(data={"client_holdout": 0.0}, privacy=bound)
    expected = alone(tmp_path / "alone", recipe)
    passes.made = []
    workers = node_of(tmp_path)
    found = together(workers, [asked_of(recipe, "train", number) for number in range(3)])
    assert passes.made == [[0], [1], [2]]
    assert [(one.manifest, one.payload) for one in found] == [(one.manifest, one.payload) for one in expected]


def test_the_same_documents_have_each_clients_own_noise_and_hash(tmp_path: Path) -> None:
    bound = {"delta": 1e-3, "noise_multiplier": 1.0}
    recipe = recipe_of(data={"client_holdout": 0.0}, privacy=bound)
    data = write_documents(tmp_path, "alice")
    write_documents(tmp_path, "bob")
    bases = Bases()
    workers = [worker_of(tmp_path, name, bases, data=data) for name in ("alice", "bob")]
    met = together(workers, [asked_of(recipe, "meet", 0)] * 2)
    assert met[0].manifest["documents"] != met[1].manifest["documents"]
    one, other = (found.payload for found in together(workers, [asked_of(recipe, "train", 0)] * 2))
    assert one != other


def test_another_recipe_takes_the_place_of_the_model_and_each_client_opens_its_own_again(
    tmp_path: Path, passes: Passes
) -> None:
    workers, first, then = node_of(tmp_path), recipe_of("reference"), recipe_of("reference", adapter={"rank": 3})
    together(workers, [asked_of(first, "meet", number) for number in range(3)])
    assert passes.loaded == 1
    alice, bob, _ = workers
    assert "report" in alice.answer(asked_of(then, "train", 0)).manifest
    assert passes.loaded == 2
    assert not bob.may_train, "it holds nothing of the former model"
    assert "report" in bob.answer(asked_of(first, "train", 1)).manifest
    assert passes.loaded == 3


# --- How their process gathers them.


def test_options_of_several_clients_are_told_apart() -> None:
    members = read_members(["--name=alice", "--data=a b", AND, "--name=bob", "--data=--and"])
    assert [(one.name, one.data, one.policy) for one in members] == [("alice", "a b", ""), ("bob", "--and", "")]


class Process:
    """Process of workers, but for its sockets: questions are put before it by hand."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers, self.waiting = workers, Queue[Arrived]()
        self._askers: list[socket.socket] = []

    def ask(self, client: int, question: Frame) -> Callable[[], Frame]:
        """Ask, and return what waits for the answer."""
        asker, connection = socket.socketpair()
        self._askers.append(asker)
        self.waiting.put(Arrived(connection, question, time.monotonic(), client))
        return lambda: receive_frame(asker)

    def answer(self) -> Arrived | None:
        return answer(self.waiting.get(), self.waiting, self.workers)

    def close(self) -> None:
        for asker in self._askers:
            asker.close()


def test_clients_that_are_asked_within_the_window_train_in_one_pass_and_a_lone_one_waits_no_longer(
    tmp_path: Path, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, workers = recipe_of(), node_of(tmp_path)
    with closing(Process(workers)) as process:
        meets = [process.ask(number, asked_of(recipe, "meet", number)) for number in range(3)]
        assert [process.answer() for _ in meets] == [None] * 3
        assert all("blocks" in met().manifest for met in meets)
        # All are there: nobody waits.
        monkeypatch.setattr(worker_process, "GATHER_SECONDS", 60.0)
        asked = [process.ask(number, asked_of(recipe, "train", number)) for number in range(2)]
        threading.Timer(0.3, lambda: asked.append(process.ask(2, asked_of(recipe, "train", 2)))).start()
        assert process.answer() is None
        assert ["report" in found().manifest for found in asked] == [True] * 3
        assert passes.made == [[0, 1, 2]]
        # One is asked alone, as where a round takes some of the clients.
        monkeypatch.setattr(worker_process, "GATHER_SECONDS", 0.3)
        began = time.monotonic()
        alone = process.ask(0, asked_of(recipe, "train", 0, round=2))
        assert process.answer() is None
        assert "report" in alone().manifest
        assert 0.3 <= time.monotonic() - began < 30
        assert passes.made[1:] == [[0]]


@pytest.mark.parametrize(
    "recipe",
    [
        recipe_of("reference"),
        recipe_of(data={"client_holdout": 0.0}, privacy={"delta": 1e-3, "noise_multiplier": 1.0}),
    ],
    ids=["reference", "private"],
)
def test_who_trains_alone_in_any_case_waits_for_nobody(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "GATHER_SECONDS", 1000.0)
    workers = node_of(tmp_path)
    with closing(Process(workers)) as process:
        for number in range(3):
            process.ask(number, asked_of(recipe, "meet", number))
            process.answer()
        one = process.ask(1, asked_of(recipe, "train", 1))
        assert process.answer() is None
        assert "report" in one().manifest


def test_a_second_question_to_a_client_waits_until_the_first_is_answered(tmp_path: Path) -> None:
    recipe, workers = recipe_of(), node_of(tmp_path)
    with closing(Process(workers)) as process:
        for number in range(3):
            process.ask(number, asked_of(recipe, "meet", number))
            process.answer()
        question = asked_of(recipe, "train", 0)
        first, again = process.ask(0, question), process.ask(0, question)
        behind = process.answer()
        assert behind, "the second is left for the next turn"
        assert answer(behind, process.waiting, workers) is None
        assert first() == again(), "it is not worked out again"


def test_what_a_pass_holds_is_free_once_nobody_uses_it(tmp_path: Path) -> None:
    bases = Bases()
    worker = worker_of(tmp_path, "alice", bases)
    assert "report" in worker.answer(asked_of(recipe_of(), "train", 0)).manifest
    held = bases._held
    assert held
    assert held() is not None
    bases.let_go()
    assert held() is None
