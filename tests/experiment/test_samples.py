"""Answers at the end of a run, to questions that no client has."""

import json
from pathlib import Path

from support.tiny import make_recipe

from fedloom.experiment.run import run
from fedloom.monitoring.observer import Observer
from fedloom.progress import Progress, StageName
from fedloom.report.run_report import write_report


class Stages(Observer):
    def __init__(self) -> None:
        self.names: list[str] = []
        self.asked = 0

    def show_stage(self, name: StageName, share: float = 1.0) -> None:
        self.names.append(name)

    def watch(self, progress: Progress) -> None:
        self.asked += progress.samples if progress.phase == "ask" else 0


def test_a_run_ends_with_answers_to_central_questions_and_a_plain_one_does_not(tmp_path: Path) -> None:
    rows = [{"q": f"question {number}", "a": f"{number} is the answer"} for number in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": str(path), "clients": 2, "documents_per_client": 10, "central_holdout": 5}
    asked = make_recipe(data={**data, "prompt": "Q: {q}>", "completion": "{a}", "max_length": 64})
    stages = Stages()
    run(asked, tmp_path / "asked", stages)
    assert stages.names == ["rounds", "answers"]
    assert stages.asked == 3
    samples = json.loads((tmp_path / "asked" / "samples.json").read_text())["samples"]
    assert len(samples) == 3
    assert all(sample["prompt"].startswith("Q: question ") for sample in samples)
    assert "is the answer" not in " ".join(sample["prompt"] for sample in samples)
    assert any(sample["base"] != sample["tuned"] for sample in samples), "the adapter is in use"
    for sample in samples:
        number = sample["prompt"].removeprefix("Q: question ").removesuffix(">").strip()
        assert sample["answer"].lstrip() == f"{number} is the answer", "the right one, to its own question"
    report = (tmp_path / "asked" / "report.md").read_text()
    assert samples[0]["prompt"] in report
    assert f"--- right answer, as held out ---\n{samples[0]['answer']}\n\n--- base model ---\n" in report
    earlier = [{key: text for key, text in sample.items() if key != "answer"} for sample in samples]
    (tmp_path / "asked" / "samples.json").write_text(json.dumps({"samples": earlier}))
    report = write_report(tmp_path / "asked").with_suffix(".md").read_text()
    assert samples[0]["prompt"] in report
    assert "as held out" not in report
    plain = Stages()
    run(make_recipe(data={**data, "text": "a"}), tmp_path / "plain", plain)
    assert plain.names == ["rounds"]
    assert not (tmp_path / "plain" / "samples.json").exists()
