"""Tasks of lm-evaluation-harness by `fedloom evaluate`: on record and in reports beside the run's own tasks."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.asked import write_tasks
from support.marks import first
from support.tiny import make_recipe
from typer.testing import CliRunner

from fedloom import run
from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.cli import app
from fedloom.errors import DataError, ModelError, RunError
from fedloom.evaluation import harness
from fedloom.evaluation.harness import HarnessAnswers, HarnessScore
from fedloom.experiment import harness_tasks
from fedloom.handover.evaluate import evaluate
from fedloom.monitoring.observer import Observer
from fedloom.records.check import check_run
from fedloom.records.run import Run, read_run
from fedloom.report.comparison import write_comparison

pytestmark = [pytest.mark.xdist_group("harness"), pytest.mark.filterwarnings("ignore")]
QUIZ = [{"q": f"is word{number} good", "c": [" yes", " no"], "a": number % 2} for number in range(10)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    recipe = make_recipe(baselines=["local", "pooled"], federation={"rounds": 1})
    return run(recipe, tmp_path_factory.mktemp("trained") / "run", Observer())


class Harness:
    """Stands for the harness: it scores a model by a sum over its weights, and keeps how it was asked."""

    def __init__(self, *scores: HarnessScore) -> None:
        self.scores, self.asked = scores, list[dict[str, Any]]()

    def open_manager(self, names: Any) -> str:
        return f"of {', '.join(names)}"

    def run(self, adapted: AdaptedModel, tokenizer: Any, names: Any, **how: Any) -> HarnessAnswers:
        self.asked.append({"names": names, "is_base": adapted.is_base, **how})
        return HarnessAnswers([*self.scores], ["some words of a question", "and of another"])


ACC = HarnessScore("quiz", "acc", "none", 0.25, 0.1, 40, "1.0", higher_is_better=True, digest="d")
WORDS = HarnessScore("quiz", "perplexity", "strict", 31.5, None, 40, "1.0", higher_is_better=False, digest="d")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Harness:
    stand_in = Harness(ACC, WORDS, HarnessScore("quiz", "odd", "none", math.inf, 0.1, 40, "1.0"))
    monkeypatch.setattr(harness_tasks, "open_manager", stand_in.open_manager)
    monkeypatch.setattr(harness_tasks, "run_harness", stand_in.run)
    monkeypatch.setattr(harness_tasks, "name_harness", lambda: "lm-evaluation-harness 0")
    return stand_in


def test_its_figures_stand_beside_each_other_with_the_harness_own_errors(trained: Run, stand_in: Harness) -> None:
    records = evaluate(trained.folder, harness=["quiz"], base=True, which=("0", "best"), limit=40, examples=2)
    assert [record.get("round") for record in records] == [None, 0, trained.best_round]
    assert {record["task"] for record in records} == {"lm-eval/quiz"}
    assert [how["is_base"] for how in stand_in.asked] == [True, False, False]
    for how in stand_in.asked:
        told = {key: how[key] for key in ("names", "manager", "limit", "examples", "as_chat", "system")}
        assert told == {
            "names": ("quiz",), "manager": "of quiz", "limit": 40, "examples": 2, "as_chat": False, "system": None,
        }  # fmt: skip
    reach = 1.959963984540054 * 0.1
    interval = "value ± 1.96 of the harness's standard errors, 95 %"
    assert records[0]["measures"] == {
        "acc": {
            "value": 0.25, "of": 40, "low": 0.25 - reach, "high": 0.25 + reach, "interval": interval,
            "higher_is_better": True,
        },
        "perplexity (strict)": {"value": 31.5, "of": 40, "higher_is_better": False},
    }  # fmt: skip
    page = (trained.folder / "report.md").read_text(encoding="utf-8")
    assert "| lm-eval/quiz | acc | 0.2500 (0.0540 to 0.4460) | 0.2500 (0.0540 to 0.4460) |" in page
    assert "| lm-eval/quiz | perplexity (strict) | 31.5000 | 31.5000 |" in page
    assert "Figures of lm-evaluation-harness stand as it gives them" in page
    assert not [finding for finding in check_run(trained.folder) if not finding.well]


def test_it_asks_baselines_and_own_tasks_at_once_and_comparisons_show_them(
    trained: Run, stand_in: Harness, tmp_path: Path
) -> None:
    rows = [{"q": f"is word{number}", "c": ["good", "evil"], "a": "good"} for number in range(4)]
    tasks = write_tasks(tmp_path, rows, {"name": "own"})
    which = ("best", "pooled", "local")
    records = evaluate(trained.folder, [tasks], harness=["quiz"], which=which)
    assert [record["task"] for record in records] == ["own", "lm-eval/quiz"] * 5
    assert [record.get("client") for record in records[::2]] == [None, None, 0, 1, 2]
    assert len(read_run(trained.folder).evaluations) == len({json.dumps(one) for one in records} | {"base", "round 0"})
    page = write_comparison([trained.folder, trained.folder], tmp_path / "compared").with_suffix(".md").read_text()
    beside = "all documents together 0.2500; clients alone, on average 0.2500 (0.2500 to 0.2500)"
    assert f"0.2500 (0.0540 to 0.4460), round {trained.best_round}" in page
    assert beside in page


@pytest.mark.parametrize("in_chat", first([True, False]))
def test_it_is_asked_as_the_run_was_trained_or_a_warning_says_that_it_is_not(
    in_chat: bool, stand_in: Harness, tmp_path: Path
) -> None:
    rows = [{"q": f"say word{number}", "a": f"word{number} and no more"} for number in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    template = "{% for m in messages %}{{ m.role[0] + ':' + m.content }}\n{% endfor %}a:"
    chat = {"chat_template": template, "system": "be brief"} if in_chat else {}
    data = {"source": str(tmp_path / "rows.jsonl"), "prompt": "{q}", "completion": " {a}", **chat}
    finished = run(make_recipe(data=data, federation={"rounds": 1}), tmp_path / "run", Observer())
    (record,) = evaluate(finished.folder, harness=["quiz"])
    (how,) = stand_in.asked
    told = (template, True, "be brief") if in_chat else (None, False, None)
    assert (how["chat_template"], how["as_chat"], how["system"]) == told
    assert record["chat"] is in_chat
    assert record.get("warning") == (None if in_chat else harness_tasks.OTHER_PROMPTS)


def test_an_adapter_that_is_not_applied_ends_the_command(
    trained: Run, stand_in: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_run(trained.folder).evaluations
    monkeypatch.setattr(AdaptedModel, "load", lambda *_: None)
    with pytest.raises(ModelError, match="not applied"):
        evaluate(trained.folder, harness=["quiz"])
    assert read_run(trained.folder).evaluations == before


def test_what_can_not_be_asked_is_told_before_a_model_is_loaded(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "PACKAGE", "no_such_package_is_installed")
    monkeypatch.setattr("fedloom.handover.evaluate.load_adapted_model", None)
    with pytest.raises(DataError, match="lm-evaluation-harness is not installed"):
        evaluate(trained.folder, harness=["mmlu"])
    with pytest.raises(RunError, match="--limit, --examples: they are of the harness's tasks alone"):
        evaluate(trained.folder, ["first-steps"], limit=3)
    alone = run(make_recipe(federation={"rounds": 1}), tmp_path / "run", Observer())
    with pytest.raises(
        RunError, match=r'no adapter "pooled"; a run whose recipe has baselines = \["pooled"\] keeps it'
    ):
        evaluate(alone.folder, harness=["mmlu"], which=("pooled",))


def test_by_the_command_with_the_harness_itself(trained: Run, tmp_path: Path) -> None:
    """From a file of its own form, whose numbers `tests/evaluation/test_harness.py` holds to the harness's own."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    rows = tmp_path / "quiz.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in QUIZ), encoding="utf-8")
    told = {
        "task": "made_up", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test", "doc_to_text": "{{q}}", "doc_to_choice": "{{c}}", "doc_to_target": "{{a}}",
        "output_type": "multiple_choice", "metadata": {"version": 3.0},
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    file = tmp_path / "quiz.yaml"
    file.write_text(json.dumps(told))
    asked = ["evaluate", str(trained.folder), "--harness", str(file), "--base", "--limit", "8", "--which", "local"]
    found = CliRunner().invoke(app, asked)
    assert found.exit_code == 0, found.output
    assert "lm-eval/made_up  acc" in found.stdout
    records = [one for one in read_run(trained.folder).evaluations if one["task"] == "lm-eval/made_up"]
    assert [record.get("client") for record in records] == [None, 0, 1, 2]
    assert len({record["digest"] for record in records}) == 1
    for record in records:
        acc = record["measures"]["acc"]
        assert (record["questions"], record["revision"], acc["of"]) == (8, "3.0", 8)
        # Of a mean of zeros and ones the harness has the standard error by its formula.
        error = math.sqrt(acc["value"] * (1 - acc["value"]) / 7)
        assert acc["high"] - acc["value"] == pytest.approx(1.959963984540054 * error)
