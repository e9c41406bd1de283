"""Answers to tasks in reports and comparisons: each figure with its interval, the models beside each other."""

import json
from pathlib import Path
from typing import Any

from support.made_runs import make_run

from fedloom.evaluation.measures import mean, share
from fedloom.records.check import check_run
from fedloom.records.evaluations import add_evaluations, find_evaluation, forget_evaluations
from fedloom.records.run import EVALUATIONS, Run, read_run
from fedloom.report.comparison import build_comparison
from fedloom.report.document import to_markdown
from fedloom.report.run_report import build_report
from fedloom.report.tasks_section import describe_evaluations, tell_tasks


def record(task: str, right: int, round: int | None = None, *, digest: str = "d", **more: Any) -> dict[str, Any]:
    """The record of a task of ten questions."""
    measures = {"accuracy": share([1.0] * right + [0.0] * (10 - right)).to_json()}
    model = {} if round is None else {"round": round, "adapter_sha256": f"of round {round}"}
    return {**model, "task": task, "kind": "choice", "digest": digest, "chance": 0.25, "measures": measures, **more}


def asked(folder: Path, *records: dict[str, Any], **more: Any) -> Run:
    return make_run(folder, [3.0, 2.5, 2.0], evaluations=records, **more)


def test_models_stand_beside_each_other_with_their_intervals(tmp_path: Path) -> None:
    rouge = {"rouge_l": mean([0.2, 0.4, 0.6]).to_json()}
    words = {**record("words", 0, 2), "kind": "rouge", "measures": rouge}
    run = asked(tmp_path / "run", record("quiz", 7, 2, skipped={"bad": 3}), record("quiz", 2), words)
    text = to_markdown(build_report(run))
    assert "| Task | Measure | base | round 2 |" in text
    assert "| quiz | accuracy | 20.0 % (2 of 10; 5.7 to 51.0) | 70.0 % (7 of 10; 39.7 to 89.2) |" in text
    low, high = (100 * rouge["rouge_l"][key] for key in ("low", "high"))
    assert f"| words | ROUGE-L |  | 40.0 % ({low:.1f} to {high:.1f}) |" in text
    assert "- quiz: chance is 25.0 %" in text
    assert "Round 2 is the best by its loss." in text
    lines = describe_evaluations(run.evaluations)
    assert lines[0].split() == ["Task", "Measure", "base", "round", "2"]
    assert "note      quiz: chance is 25.0 %; 3 rows skipped: 3 bad" in describe_evaluations(
        [record("quiz", 1, skipped={"bad": 3})]
    )
    assert "Tasks" not in to_markdown(build_report(make_run(tmp_path / "none", [3.0, 2.0])))


def test_other_questions_and_other_templates_are_told(tmp_path: Path) -> None:
    warning = "asked without a chat template, and the run was trained in one"
    run = asked(tmp_path / "run", record("quiz", 7, 2, warning=warning), record("quiz", 2, digest="other"))
    text = to_markdown(build_report(run))
    assert "not all models were asked the same questions" in text
    assert warning in to_markdown(build_report(asked(tmp_path / "b", record("quiz", 7, 2, warning=warning))))


def test_runs_are_compared_by_what_their_best_adapters_can_do(tmp_path: Path) -> None:
    one = asked(tmp_path / "one", record("quiz", 7, 2), record("quiz", 5, 1), record("quiz", 2), name="one")
    two = asked(tmp_path / "two", record("quiz", 4, 1), record("more", 1, 2), name="two")
    text = to_markdown(build_comparison([one, two]))
    best = "70.0 % (7 of 10; 39.7 to 89.2), round 2; base 20.0 %"
    assert f"| quiz | accuracy | {best} | 40.0 % (4 of 10; 16.8 to 68.7), round 1 |" in text
    assert "| more | accuracy |  | 10.0 % (1 of 10; 1.8 to 40.4), round 2 |" in text
    assert "can't be compared" not in text.partition("## 4")[2]
    other = asked(tmp_path / "three", record("quiz", 4, 1, digest="other"), name="three")
    assert "quiz: not all runs were asked the same questions" in to_markdown(build_comparison([one, other]))


def test_a_difference_is_told_only_where_the_intervals_lie_apart(tmp_path: Path) -> None:
    run = asked(
        tmp_path / "run",
        *(record("up", 0), record("up", 9, 2), record("down", 9), record("down", 0, 2)),
        *(record("same", 4), record("same", 6, 2), record("other", 0, digest="e"), record("other", 9, 2)),
    )
    assert tell_tasks(run) == (
        "On these tasks the adapter is better than the base model, beyond chance: up (0.0 to 90.0 %, accuracy)."
        " On these it is worse than the base model, beyond chance: down (90.0 to 0.0 %, accuracy)."
        " These can't tell the adapter from the base model: same (40.0 to 60.0 %, accuracy)."
    )
    assert tell_tasks(asked(tmp_path / "alone", record("up", 9, 2))) is None


def of_baseline(task: str, right: int, client: int | None = None, **more: Any) -> dict[str, Any]:
    model = {"baseline": "pooled"} if client is None else {"baseline": "local", "client": client}
    return {**record(task, right, **more), **model, "adapter_sha256": f"of {client}"}


def test_baselines_stand_beside_the_federation_and_each_client_has_a_row(tmp_path: Path) -> None:
    records = [record("quiz", 2), record("quiz", 7, 2), of_baseline("quiz", 8)]
    records += [of_baseline("quiz", right, client) for client, right in enumerate((3, 5, 4))]
    run = asked(tmp_path / "run", *records, name="one")
    text = to_markdown(build_report(run))
    assert "| Task | Measure | base | round 2 | all documents together | clients alone, on average |" in text
    assert "| 70.0 % (7 of 10; 39.7 to 89.2) | 80.0 % (8 of 10; 49.0 to 94.3) | 40.0 % (30.0 to 50.0) |" in text
    assert "| client 1 | 50.0 % (5 of 10; 23.7 to 76.3) |" in text
    assert any(line.startswith("client 2  40.0 % (4 of 10;") for line in describe_evaluations(records))
    other = asked(tmp_path / "other", record("quiz", 4, 1), name="other")
    beside = "base 20.0 %; all documents together 80.0 %; clients alone, on average 40.0 % (30.0 to 50.0)"
    assert f"round 2; {beside} |" in to_markdown(build_comparison([run, other]))
    assert next(one.found for one in check_run(run.folder) if one.what == "tasks") == "6 answers counted, none twice"


def of_harness(value: float, round: int | None = None, *, error: float | None = 0.01, lower: bool = False) -> Any:
    measure = {"value": value, "of": 10, "higher_is_better": not lower}
    measure |= {} if error is None else {"low": value - error, "high": value + error}
    return {**record("lm-eval/quiz", 0, round), "kind": "harness", "measures": {"perplexity": measure}}


def test_a_figure_of_the_harness_is_no_share_and_may_be_better_if_lower(tmp_path: Path) -> None:
    run = asked(tmp_path / "run", of_harness(31.5, lower=True), of_harness(20.25, 2, lower=True))
    text = to_markdown(build_report(run))
    assert "| lm-eval/quiz | perplexity | 31.5000 (31.4900 to 31.5100) | 20.2500 (20.2400 to 20.2600) |" in text
    assert "better than the base model, beyond chance: lm-eval/quiz (31.5000 to 20.2500, perplexity)." in str(
        tell_tasks(run)
    )
    higher = asked(tmp_path / "higher", of_harness(31.5), of_harness(20.25, 2))
    assert "worse than the base model" in str(tell_tasks(higher))
    unknown = asked(tmp_path / "unknown", of_harness(31.5, error=None), of_harness(20.25, 2, error=None))
    assert tell_tasks(unknown) is None
    assert "| lm-eval/quiz | perplexity | 31.5000 | 20.2500 |" in to_markdown(build_report(unknown))


def test_a_line_is_replaced_and_those_of_lost_rounds_are_forgotten(tmp_path: Path) -> None:
    run = asked(tmp_path / "run", record("quiz", 2), record("quiz", 5, 1), record("quiz", 7, 2))
    add_evaluations(run.folder, [record("quiz", 8, 2)])
    counts = [one["measures"]["accuracy"]["right"] for one in read_run(run.folder).evaluations]
    assert counts == [2, 5, 8]
    model = {"round": 2, "adapter_sha256": "of round 2"}
    assert find_evaluation(run.folder, "quiz", digest="d", model=model) is not None
    assert find_evaluation(run.folder, "quiz", digest="e", model=model) is None
    for key, value in (("round", 1), ("adapter_sha256", "another"), ("baseline", "pooled")):
        assert find_evaluation(run.folder, "quiz", digest="d", model={**model, key: value}) is None
    forget_evaluations(run.folder, after=1)
    assert [one.get("round") for one in read_run(run.folder).evaluations] == [None, 1]
    forget_evaluations(run.folder, after=None)
    assert read_run(run.folder).evaluations == []


def test_fsck_sees_what_is_there_twice_or_of_no_round(tmp_path: Path) -> None:
    def found(folder: Path) -> str:
        return next(finding.found for finding in check_run(folder) if finding.what == "tasks")

    run = asked(tmp_path / "run", record("quiz", 2), record("quiz", 5, 1))
    assert found(run.folder) == "2 answers counted, none twice"
    with (run.folder / EVALUATIONS).open("a") as file:
        file.write(json.dumps(record("quiz", 5, 1)) + "\n")
    assert "quiz is on record twice" in found(run.folder)
    other = asked(tmp_path / "other", record("quiz", 5, 9))
    assert "round 9 was asked and is not on record" in found(other.folder)
