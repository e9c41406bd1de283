"""Tasks that a client's owner holds (`fedloom join --tasks`): counts of them travel, and nothing else."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.asked import write_tasks
from support.federation_here import split, tiny
from support.liars import LyingClient, LyingServer
from support.tiny import make_adapted, make_recipe
from support.workers_here import LinkHere, Owner, asked_to, serve_here, told_of

from fedloom.deployment.client.policy import Policy
from fedloom.deployment.client.reading import read_aloud
from fedloom.deployment.client.rehearsal import rehearse
from fedloom.deployment.client.task_file import read_task_file
from fedloom.deployment.own_messages import pack_answers, unpack_answers
from fedloom.errors import DataError, MessageError
from fedloom.evaluation.measures import wilson
from fedloom.evaluation.task_counts import OwnAnswers, TaskCount
from fedloom.experiment.trial import Trial
from fedloom.handover.evaluate import evaluate
from fedloom.host.frames import Frame
from fedloom.host.machine import Finding
from fedloom.recipe.privacy_section import Privacy
from fedloom.recipe.recipe import Recipe
from fedloom.records.check import check_run

pytestmark = pytest.mark.usefixtures("hurry")

SECRET = "the patient of ward nine"
ROWS = [{"q": f"Is {SECRET} number {n} well?", "c": ["yes", "no", "never"], "a": "yes"} for n in range(7)]
SAY = {
    "name": "say",
    "kind": "regex",
    "prompt": "{q}",
    "pattern": "(yes|no)",
    "answer": "{a}",
    "max_new_tokens": 4,
}


@pytest.fixture
def quiz(tmp_path: Path) -> str:
    return str(write_tasks(tmp_path / "quiz", ROWS, {"name": "ward"}, SAY))


def link_of(recipe: Recipe, folder: Path, **owner: Any) -> LinkHere:
    """Return a link to clients of which the first holds tasks."""
    data = split(recipe, folder / "split")
    owners = {f"client-{number}": Owner(path) for number, path in enumerate(data)}
    owners["client-0"] = replace(owners["client-0"], **owner)
    return LinkHere(owners, folder / "clients")


def recipe_of(*overrides: str) -> Recipe:
    return tiny("data.clients=2", "federation.rounds=3", *overrides)


def test_counts_reach_the_report_with_their_intervals_and_are_those_of_evaluate(quiz: str, tmp_path: Path) -> None:
    """The server's own `evaluate` of the same file comes to the same counts."""
    recipe = recipe_of("evaluation.tasks_every=2")
    link = link_of(recipe, tmp_path, tasks=quiz)
    served = serve_here(recipe, link, tmp_path / "served")
    told = {(one["task"], one.get("round")): one for one in served.own_evaluations}
    best = served.best_round
    assert set(told) == {(task, model) for task in ("ward", "say") for model in (None, 2, best)}
    assert {one["holder"] for one in served.own_evaluations} == {0}
    assert served.evaluations == []
    ours = evaluate(served.folder, [quiz], base=True)
    for one in ours:
        there = told[one["task"], one.get("round")]
        for name in ("accuracy", "unreadable"):
            assert there["measures"].get(name) == one["measures"].get(name)
        low, high = wilson(there["measures"]["accuracy"]["right"], 7)
        assert (there["measures"]["accuracy"]["low"], there["measures"]["accuracy"]["high"]) == (low, high)
    assert not [one for one in check_run(served.folder) if not one.well]
    page = (served.folder / "report.md").read_text()
    assert "Tasks that clients hold themselves" in page
    right = told["ward", None]["measures"]["accuracy"]
    figures = f"{100 * right['value']:.1f} % ({right['right']} of 7; {100 * right['low']:.1f} to"
    assert f"| client 0 | ward | accuracy | {figures}" in page


def test_nothing_of_a_question_leaves_but_its_count(
    quiz: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of()
    link = link_of(recipe, tmp_path, tasks=quiz)
    served = serve_here(recipe, link, tmp_path / "served")
    assert [name for name, _ in asked_to(link, "tasks")] == ["client-0"], "who has none is not asked"
    ((_, answer),) = told_of(link, "tasks")
    assert answer.payload == b""
    assert set(answer.manifest) == {"tasks", "base"}, "nor how many tokens it took"
    for rows in answer.manifest.values():
        assert [row[:2] for row in rows] == [["ward", 7], ["say", 7]]
        assert all(type(number) is int or number is None for row in rows for number in row[1:])
    written = b"".join(file.read_bytes() for file in served.folder.rglob("*") if file.is_file())
    sent = json.dumps([dict(frame.manifest) for _, frame in link.answered])
    journal = (tmp_path / "clients" / "client-0" / "client-0.journal.jsonl").read_text()
    for words in (SECRET, "quiz", "never"):
        assert words.encode() not in written
        assert words not in sent
        assert words not in journal
    assert "questions" not in sent
    assert [json.loads(line)["kind"] for line in journal.splitlines()].count("tasks") == 1
    aloud = "\n".join(read_aloud(tmp_path / "clients" / "client-0" / "client-0.journal.jsonl", Policy()))
    assert "tasks' counts told" in aloud
    assert "1 of 50 answers to tasks in the past 24 hours" in aloud
    screen = capsys.readouterr().out
    assert "task      ward: 7 questions" in screen
    assert "told      the counts of its own tasks" in screen
    assert SECRET not in screen


@pytest.mark.long
def test_they_are_asked_after_the_rounds_that_the_recipe_says_and_the_base_once(quiz: str, tmp_path: Path) -> None:
    recipe = recipe_of("evaluation.tasks_every=1")
    link = link_of(recipe, tmp_path, tasks=quiz)
    served = serve_here(recipe, link, tmp_path / "served")
    assert [frame.manifest["base"] for _, frame in asked_to(link, "tasks")] == [False, False, False, True]
    assert not any("evaluation.tasks_every" in line for line in served.plan.get("unused", ()))
    best = served.best_round
    assert {one.get("round") for one in served.own_evaluations} == {None, 1, 2, 3} | {best}


@pytest.mark.parametrize("policy", [Policy(tell_tasks=False)])
def test_an_owners_policy_keeps_them(
    policy: Policy, quiz: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of()
    link = link_of(recipe, tmp_path, tasks=quiz, policy=policy)
    served = serve_here(recipe, link, tmp_path / "served")
    assert served.own_evaluations == []
    assert asked_to(link, "tasks") == []
    assert "Tasks that clients hold" not in (served.folder / "report.md").read_text()
    # A server that asks all the same is told nothing.
    server = LyingServer(link.workers["client-0"].answer, recipe)
    assert server.ask(server.question("tasks")).manifest == {"tasks": None, "base": None}
    assert "kept      the counts of its own tasks" in capsys.readouterr().out


def test_a_server_can_not_ask_for_as_many_counts_as_it_likes(quiz: str, tmp_path: Path) -> None:
    """With adapters that it makes up, each count tells it something of the questions."""
    recipe = make_recipe()
    link = link_of(recipe, tmp_path, tasks=quiz, policy=Policy(max_answers_a_day=2))
    server = LyingServer(link.workers["client-0"].answer, recipe)
    start = server.adapter
    told = []
    for number in (0, 1, 2, 0):
        server._adapter = replace(start, weights_P=start.weights_P + number)
        told.append(server.ask(server.question("tasks", base=False)).manifest["tasks"] is not None)
    assert told == [True, True, False, True]
    journal = (tmp_path / "clients" / "client-0" / "client-0.journal.jsonl").read_text()
    assert [json.loads(line)["kind"] for line in journal.splitlines()].count("tasks") == 3


def test_a_private_run_hears_of_no_tasks(
    quiz: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No promise covers what is counted on an owner's own questions: the client says it has none, and tells of none."""
    from fedloom.deployment.client import worker

    recipe = make_recipe()
    private = Privacy(epsilon=8.0, delta=1e-5)
    unpack = worker.unpack_recipe
    monkeypatch.setattr(worker, "unpack_recipe", lambda told: unpack(told).model_copy(update={"privacy": private}))
    link = link_of(recipe, tmp_path, tasks=quiz)
    server = LyingServer(link.workers["client-0"].answer, recipe)
    assert server.meet()["tasks"] == 0
    assert server.ask(server.question("tasks")).manifest == {"tasks": None, "base": None}
    assert "kept      the counts of its own tasks" in capsys.readouterr().out


def test_a_server_asks_nobody_for_tasks_in_a_private_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its clients say that they hold."""
    fleet, _ = LyingClient(lambda do, asked, answer: answer).fleet()
    assert fleet.examined == [0, 1]
    private = make_recipe().model_copy(update={"privacy": Privacy(epsilon=8.0, delta=1e-5)})
    monkeypatch.setattr(fleet, "ask_tasks", lambda *_, **__: pytest.fail("it asked"))
    nothing: Any = None
    Trial(private, nothing, nothing, fleet, nothing, None)._ask_clients(make_adapted().read(), 1)


RIGHT = TaskCount("quiz", 8, 2), TaskCount("say", 5, 1, 3)


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"tasks": [["quiz", 8, 9, None]]}, "impossible count"),
        ({"tasks": [["quiz", 8, 1, 9]]}, "impossible count"),
        ({"tasks": [["quiz", 0, 0, None]]}, "tasks"),
        ({"tasks": [["quiz", 8, 1, None], ["quiz", 8, 1, None]]}, "told of twice"),
        ({"tasks": [[f"t{n}", 1, 0, None] for n in range(5)], "base": [[f"t{n}", 1, 0, None] for n in range(5)]},
         "other models or tasks"),
        ({"tasks": [["a text that\nsomebody wrote", 8, 1, None]]}, "tasks"),
        ({"tasks": [["quiz", 8, 1.5, None]]}, "tasks"),
        ({"tasks": [["quiz", 8, True, None]]}, "tasks"),
        ({"tasks": [["quiz", 8, 1]]}, "tasks"),
        ({"tasks": [["quiz", 8, 1, None, "Is it well?"]]}, "tasks"),
        ({"base": None}, "other models or tasks"),
        ({"tasks": None}, "other questions"),
        ({"base": [["quiz", 7, 1, None], ["say", 5, 1, 3]]}, "other questions"),
        ({"answers": ["yes"]}, "unknown"),
        ({"progress": []}, "unknown"),
    ],
)  # fmt: skip
def test_counts_that_can_not_be_are_refused_and_the_others_stand(told: dict[str, Any], why: str) -> None:
    fleet, said = LyingClient(
        lambda do, asked, answer: Frame({**answer.manifest, **told}) if do == "tasks" else answer
    ).fleet()
    found = fleet.ask_tasks(make_adapted().read(), base=True)
    assert list(found) == [0]
    assert found[0] == OwnAnswers(RIGHT, RIGHT)
    (line,) = (line for line in said if line.startswith("unasked 1"))
    assert why in line
    assert "somebody wrote" not in line


def test_numbers_beside_counts_are_refused() -> None:
    with pytest.raises(MessageError, match="numbers came"):
        unpack_answers(Frame(pack_answers(OwnAnswers(RIGHT)).manifest, b"1234"), 2, base=False)


def test_what_is_packed_is_unpacked() -> None:
    for found in (None, OwnAnswers(RIGHT), OwnAnswers(RIGHT, RIGHT), OwnAnswers(())):
        base = found is not None and found.base is not None
        assert unpack_answers(pack_answers(found), 2, base=base) == found


@pytest.mark.parametrize(
    ("task", "why"),
    [
        ({"kind": "code", "prompt": "{q}", "program": "{completion}"}, "runs no program that a model wrote"),
        ({"kind": "f1", "prompt": "{q}", "answer": "{a}"}, 'kind "f1" is a mean'),
        ({"kind": "rouge", "prompt": "{q}", "answer": "{a}"}, 'kind "rouge" is a mean'),
        ({"name": "x" * 101}, "up to 100 letters"),
        ({"name": "two words"}, "name"),
        ({"kinds": "choice"}, "kind"),
    ],
)
def test_a_file_that_can_not_be_told_of_is_refused_before_anything_is_joined(
    task: dict[str, Any], why: str, tmp_path: Path
) -> None:
    file = write_tasks(tmp_path / "bad", ROWS, task)
    with pytest.raises(DataError, match=why) as refused:
        read_task_file(str(file))
    assert refused.value.where.startswith("--tasks ")
    assert SECRET not in str(refused.value)


def test_more_tasks_than_can_be_told_of_are_refused(tmp_path: Path) -> None:
    file = write_tasks(tmp_path / "many", ROWS, *({"name": f"t{number}"} for number in range(101)))
    with pytest.raises(DataError, match="it has 101 tasks, and 100"):
        read_task_file(str(file))


def test_what_ships_is_taken_by_its_name_where_it_can_be_counted() -> None:
    assert [task.name for task in read_task_file("first-steps")] == ["pick", "letter", "say"]
    with pytest.raises(DataError, match="no program"):
        read_task_file("humaneval")


def test_a_preflight_says_what_would_be_told(quiz: str, tmp_path: Path) -> None:
    def found(tasks: str) -> Finding:
        looked = rehearse(tmp_path / "a.kit", None, None, {}, None, None, tasks)
        return next(finding for finding in looked if finding.what == "tasks")

    assert found(quiz).well
    assert found(quiz).found == "ward, say: how many answers are right goes to the server, and nothing else of them"
    assert "no program" in found("humaneval").found
    assert not found("humaneval").well


def test_rows_that_are_gone_are_told_here_alone(quiz: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "quiz" / "questions.jsonl").unlink()
    recipe = make_recipe()
    server = LyingServer(link_of(recipe, tmp_path, tasks=quiz).workers["client-0"].answer, recipe)
    assert server.meet() == {"name": "client-0", "refused": "documents"}
    assert "task ward" in capsys.readouterr().out


@pytest.mark.long
def test_an_owner_may_change_them_in_a_run(quiz: str, tmp_path: Path) -> None:
    """Who comes back with others is the same client; with other documents it is not."""
    recipe = recipe_of("evaluation.tasks_every=1")
    link = link_of(recipe, tmp_path, tasks=quiz)
    more = write_tasks(tmp_path / "more", ROWS, {"name": "other"})
    seen: list[str] = []

    def change(name: str, frame: Frame) -> None:
        if frame.manifest["do"] == "train" and frame.manifest["round"] == 2 and name == "client-0" and not seen:
            seen.append(name)
            link.owners[name] = replace(link.owners[name], tasks=str(more))
            link.restart(name)

    link.on_question = change
    served = serve_here(recipe, link, tmp_path / "served")
    asked = {(one["task"], one.get("round")) for one in served.own_evaluations}
    assert {("ward", 1), ("other", 2), ("other", 3)} <= asked
    assert [record["lost"] for record in served.rounds] == [[], [], [], []]
