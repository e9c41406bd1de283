"""Tasks of a run, from the command and from a recipe: on record, in the report, beside the base model."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.asked import write_tasks
from support.confined import need_confinement
from support.quick_runs import Said
from support.tiny import make_recipe
from typer.testing import CliRunner

from fedloom import run
from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.cli import app
from fedloom.errors import ModelError, RecipeError, RunError
from fedloom.handover.evaluate import evaluate
from fedloom.handover.export import export
from fedloom.host.files import take_lock
from fedloom.monitoring.observer import Observer
from fedloom.records.check import check_run
from fedloom.records.run import Run, read_run
from fedloom.report.run_report import write_report

pytestmark = pytest.mark.xdist_group("evaluate")  # a run that all of them share
WORDS = ("apple", "storm", "bread", "plague", "honey", "poison", "garden", "wreck", "music", "famine")
QUIZ = [
    {"q": f"is {word}", "c": ["good", "evil"], "a": ("good", "evil")[number % 2]} for number, word in enumerate(WORDS)
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that learnt the answers of the quiz by heart."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUIZ * 4), encoding="utf-8")
    recipe = make_recipe(
        # The base is random: without words of its own it learns nothing by heart.
        adapter={
            "rank": 8,
            "alpha": 16,
            "targets": "all-linear",
            "options": {"modules_to_save": ["lm_head", "embed_tokens"]},
        },
        data={
            "source": str(folder / "rows.jsonl"),
            "prompt": "{q}",
            "completion": " {a}",
            "max_length": 32,
            "clients": 2,
            "documents_per_client": 18,
            "client_holdout": 0.1,
            "central_holdout": 2,
            "duplicates": "report",
        },
        training={"learning_rate": 3e-3, "batch_size": 4, "epochs": 8, "proximal_mu": 0.0},
        federation={"rounds": 4, "keep_every": 3},
    )
    return run(recipe, folder / "run", Observer())


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(
        tmp_path_factory.mktemp("tasks"),
        QUIZ,
        {"name": "quiz"},
        {"name": "words", "kind": "regex", "pattern": r"\S+", "prompt": "{q}", "answer": "{a}", "max_new_tokens": 8},
        average="both",
    )


def figures(records: list[dict[str, Any]], task: str, measure: str = "accuracy") -> dict[Any, float]:
    return {one.get("round"): one["measures"][measure]["value"] for one in records if one["task"] == task}


def test_an_adapter_trained_on_the_test_file_is_near_one(trained: Run, tasks: Path) -> None:
    records = evaluate(trained.folder, [tasks], base=True, which=("0", "best"))
    best = trained.best_round
    quiz, words = figures(records, "quiz"), figures(records, "words")
    assert quiz[best] >= 0.9
    assert words[best] >= 0.9
    assert quiz[None] == quiz[0]
    assert quiz[None] <= 0.7
    assert words[None] == 0
    assert figures(records, "both") == {model: pytest.approx((quiz[model] + words[model]) / 2) for model in quiz}
    assert all("warning" not in record for record in records)
    assert read_run(trained.folder).evaluations == records
    assert [finding for finding in check_run(trained.folder) if not finding.well] == []


def test_questions_that_were_trained_on_are_counted(trained: Run, tasks: Path, tmp_path: Path) -> None:
    records = evaluate(trained.folder, [tasks])
    assert [record.get("in_training") for record in records] == [9, 9, None]
    others = [{**row, "q": f"{row['q']} now"} for row in QUIZ[:6]]
    framed = {"name": "framed", "prompt": "Question: {q}\nAnswer:"}
    some = write_tasks(tmp_path, [*QUIZ[:4], *others], {"name": "some"}, framed)
    said = Said()
    records = evaluate(trained.folder, [some], say=said.show_step)
    assert [record["in_training"] for record in records] == [4, 4]
    line = "some, choice: 10 questions, 4 of them among the documents trained on"
    assert f"task: {line}" in said.steps
    page = (trained.folder / "report.md").read_text(encoding="utf-8")
    assert "some: chance is 50.0 %; 10 questions, 4 of them among the documents trained on" in page


def test_where_the_documents_are_no_longer_there_nothing_is_said_of_them(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"a text of {word} and more"}) + "\n" for word in WORDS * 4))
    recipe = make_recipe(data={"source": str(rows), "duplicates": "report"}, federation={"rounds": 1})
    finished = run(recipe, tmp_path / "run", Observer())
    asked = [{"q": f"a text of {word}", "c": ["and more", "or less"], "a": "and more"} for word in WORDS]
    tasks = write_tasks(tmp_path / "tasks", asked, {"name": "quiz"})
    assert evaluate(finished.folder, [tasks])[0]["in_training"] > 0
    again = write_tasks(tmp_path / "tasks", asked, {"name": "again"}, file="again.toml")
    plan = json.loads((finished.folder / "plan.json").read_text())
    # As a run's with clients on other machines, between which nobody could look.
    elsewhere = {**plan, "audit": {**plan["audit"], "overlaps": []}}
    (finished.folder / "plan.json").write_text(json.dumps(elsewhere))
    assert "in_training" not in evaluate(finished.folder, [again])[0]
    (finished.folder / "plan.json").write_text(json.dumps(plan))
    rows.write_text(rows.read_text() + json.dumps({"text": "one more"}) + "\n")
    assert "in_training" not in evaluate(finished.folder, [tasks], which=("0",))[0]
    rows.unlink()
    assert "in_training" not in evaluate(finished.folder, [tasks], which=("last", "0"))[1]


def test_the_same_models_are_not_asked_twice_and_nothing_is_doubled(trained: Run, tasks: Path, tmp_path: Path) -> None:
    records = evaluate(trained.folder, [tasks], base=True)
    said = Said()
    assert evaluate(trained.folder, [tasks], base=True, say=said.show_step) == records
    assert not any("questions: " in line for line in said.steps)
    more = write_tasks(tmp_path, QUIZ, {"name": "more"})
    both = evaluate(trained.folder, [tasks, more], say=said.show_step)
    assert [record for record in both if record["task"] != "more"] == records[3:]
    asked = [line for line in said.steps if "questions: " in line]
    assert asked == [f"task: more, 10 questions: round {trained.best_round}"]
    lines = [(one["task"], one.get("round")) for one in read_run(trained.folder).evaluations]
    assert len(lines) == len(set(lines))


def test_the_report_shows_figures_with_their_intervals_and_the_command_prints_them(trained: Run, tasks: Path) -> None:
    told = CliRunner().invoke(app, ["evaluate", str(trained.folder), "--tasks", str(tasks), "--base"])
    assert told.exit_code == 0, told.output
    record = next(one for one in read_run(trained.folder).evaluations if one["task"] == "quiz" and "round" in one)
    right = record["measures"]["accuracy"]["right"]
    assert f"({right} of 10; " in told.output
    assert "chance is 50.0 %" in told.output
    page = (trained.folder / "report.md").read_text(encoding="utf-8")
    assert "Tasks" in page
    assert f"({right} of 10; " in page
    write_report(trained.folder)
    assert (trained.folder / "report.md").read_text(encoding="utf-8") == page


def test_an_adapters_card_says_what_it_could_do_and_is_no_damage(trained: Run, tasks: Path, tmp_path: Path) -> None:
    records = evaluate(trained.folder, [tasks], base=True, which=("best", "3"))
    assert [finding for finding in check_run(trained.folder) if not finding.well] == []
    for name, round in (("best", trained.best_round), ("round-3", 3)):
        right = next(one for one in records if one["task"] == "quiz" and one.get("round") == round)
        card = (trained.folder / "adapters" / name / "README.md").read_text(encoding="utf-8")
        assert f"| Task | Measure | base | round {round} |" in card
        assert f"({right['measures']['accuracy']['right']} of 10; " in card
        assert "- quiz: chance is 50.0 %; 10 questions, 9 of them among the documents trained on" in card
        assert str(tmp_path.parent) not in card
    card = trained.folder / "adapters" / "best" / "README.md"
    whole = card.read_text(encoding="utf-8")
    card.write_text(whole.replace("## Privacy", "## Secrecy"), encoding="utf-8")
    assert [finding.what for finding in check_run(trained.folder) if not finding.well] == ["adapters/best"]
    card.write_text(whole, encoding="utf-8")
    export(trained.folder, tmp_path / "adapter")
    assert "## Tasks" in (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")


def test_any_adapter_that_was_kept_can_be_asked(trained: Run, tasks: Path) -> None:
    records = evaluate(trained.folder, [tasks], which=("3", "last"))
    assert {record["round"] for record in records} == {3, 4}
    with pytest.raises(RunError, match='no adapter "9"'):
        evaluate(trained.folder, [tasks], which=("9",))
    said = Said()
    with pytest.raises(RunError, match=r"round 1 was not kept; set federation\.keep_every"):
        evaluate(trained.folder, [tasks], base=True, which=("1",), say=said.show_step)
    assert said.steps == []


def test_rows_that_are_skipped_are_told_with_the_reason(trained: Run, tmp_path: Path) -> None:
    rows = [*QUIZ, {"q": "is it", "c": ["good"], "a": "good"}, {"q": "x" * 5000, "c": ["good", "evil"], "a": "good"}]
    told = CliRunner().invoke(
        app, ["evaluate", str(trained.folder), "--tasks", str(write_tasks(tmp_path, rows, {"name": "skips"}))]
    )
    assert told.exit_code == 0, told.output
    assert "1 row skipped: 1 without two choices or more in column c" in told.output
    reasons = "2 rows skipped: 1 longer than the model takes, 1 without two choices or more in column c"
    assert "skips: chance is 50.0 %; " in told.output
    assert reasons in told.output
    assert reasons in (trained.folder / "report.md").read_text(encoding="utf-8")


def test_what_can_not_be_asked_is_told(trained: Run, tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no tasks of its own; name a file, or one of: first-steps"):
        evaluate(trained.folder)
    with pytest.raises(RecipeError, match="no shipped file of tasks"):
        evaluate(trained.folder, ["nothing"])
    lock = take_lock(trained.folder)
    try:
        with pytest.raises(RunError, match="another run is at work in it"):
            evaluate(trained.folder, [tasks])
    finally:
        lock.close()
    with pytest.raises(RunError, match="not a run directory"):
        evaluate(tmp_path, [tasks])


def test_an_adapter_of_which_clients_have_a_part_says_so(trained: Run, tasks: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(trained.folder, tmp_path / "run")
    plan = json.loads((copied / "plan.json").read_text())
    (copied / "plan.json").write_text(json.dumps({**plan, "shared_alone": True}))
    for which in ("best", "last", "0"):
        with pytest.raises(RunError, match="its adapters have A alone: each client has a B of its own"):
            evaluate(copied, [tasks], which=[which])


def test_an_adapter_that_is_not_applied_ends_the_command(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = write_tasks(tmp_path, QUIZ[:4], {"name": "unapplied"})
    monkeypatch.setattr(AdaptedModel, "load", lambda *_: None)
    with pytest.raises(ModelError, match="not applied"):
        evaluate(trained.folder, [tasks])
    assert all(record["task"] != "unapplied" for record in read_run(trained.folder).evaluations)


def test_a_run_asks_its_own_tasks_and_trains_the_same(tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks", QUIZ[:4], {"name": "quiz"})
    rule = {"lora_rule": "ffa", "rounds": 2}
    with_tasks = make_recipe(evaluation={"tasks": [str(tasks)], "tasks_every": 1}, federation=rule)
    asked = run(with_tasks, tmp_path / "asked", Observer())
    plain = run(make_recipe(federation=rule), tmp_path / "plain", Observer())
    for one, other in zip(asked.rounds, plain.rounds, strict=True):
        for key in ("adapter_sha256", "central_loss", "evaluate_tokens"):
            assert one[key] == other[key]
    assert {record.get("round") for record in asked.evaluations} == {None, 1, 2}
    assert "quiz, choice: 4 questions, none among the documents trained on" in asked.plan["tasks"]
    assert evaluate(asked.folder) == [record for record in asked.evaluations if record.get("round") == asked.best_round]


@pytest.mark.long
def test_a_run_that_goes_on_was_asked_the_same(tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks", QUIZ[:4], {"name": "quiz"})
    recipe = make_recipe(evaluation={"tasks": [str(tasks)]}, federation={"rounds": 1})
    finished = run(recipe, tmp_path / "run", Observer())
    (finished.folder / "status.json").write_text('{"state": "interrupted"}')
    write_tasks(tmp_path / "tasks", QUIZ[:3], {"name": "quiz"})
    with pytest.raises(RunError, match="the tasks are not those that the run began with"):
        run(recipe, finished.folder, Observer(), resume=True)


def test_on_a_full_disk_it_says_how_to_ask_again(
    trained: Run, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = shutil.copytree(trained.folder, tmp_path / "run")
    (copied / "evaluation.jsonl").unlink(missing_ok=True)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("fedloom.host.files.replace_file", full)
        with pytest.raises(RunError, match=r"No space left on device\); make room for it, and ask again: ") as found:
            evaluate(copied, [tasks])
    assert "--resume" not in str(found.value)
    assert evaluate(copied, [tasks])


def test_programs_run_only_where_it_was_asked_for(trained: Run, tmp_path: Path) -> None:
    program = 'x = r"""{completion}"""\n{t}'
    told = {"name": "code", "kind": "code", "prompt": "{q}", "program": program, "max_new_tokens": 3}
    rows = [{"q": word, "t": f"assert {number} < 5"} for number, word in enumerate(WORDS)]
    file = write_tasks(tmp_path, rows, told)
    with pytest.raises(RecipeError, match=r"task code: it runs programs that the model writes.*--run-code"):
        evaluate(trained.folder, [file])
    recipe = make_recipe(evaluation={"tasks": [str(file)]})
    with pytest.raises(RecipeError, match="--run-code"):
        run(recipe, tmp_path / "run", Observer())
    assert not (tmp_path / "run").exists()
    need_confinement()
    found = CliRunner().invoke(app, ["evaluate", str(trained.folder), "--tasks", str(file), "--run-code"])
    assert found.exit_code == 0, found.output
    assert "pass@1" in found.stdout
    (record,) = [one for one in read_run(trained.folder).evaluations if one["task"] == "code"]
    assert (record["measures"]["pass@1"]["right"], record["measures"]["pass@1"]["of"]) == (5, 10)
