"""Did federation help: what a run is set against, with the same tokens, on the same hold-out."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.asked import write_tasks
from support.made_runs import make_run
from support.marks import first
from support.tiny import make_recipe

from fedloom import run
from fedloom.federation import rounds
from fedloom.handover.evaluate import evaluate
from fedloom.monitoring.observer import Observer
from fedloom.progress import Progress, StageName
from fedloom.records.check import check_run
from fedloom.report.baselines_section import did_it_help
from fedloom.report.run_report import write_report

ALL = ["round0", "local", "pooled"]


@pytest.mark.parametrize("engine", first(["batched", "reference"]))
def test_baselines_train_on_the_federations_tokens_and_meet_its_hold_out(engine: str, tmp_path: Path) -> None:
    recipe = make_recipe(baselines=ALL, training={"engine": engine, "epochs": 2})
    finished = run(recipe, tmp_path / "run", Observer())
    told = json.loads((tmp_path / "run" / "baselines.json").read_text())
    assert list(told) == ["round0", "pooled", "local"]
    start = finished.rounds[0]["central_loss"]
    assert told["round0"] == {"losses": [start], "tokens": 0}
    federated = sum(record["train_tokens"] for record in finished.rounds)
    assert told["pooled"]["tokens"] == sum(one["tokens"] for one in told["local"].values()) == federated
    for one in (told["pooled"], *told["local"].values()):
        assert len(one["losses"]) == len(finished.rounds)
        assert one["losses"][0] == pytest.approx(start, rel=1e-6)
        assert one["losses"][-1] < start
    text = (tmp_path / "run" / "report.md").read_text()
    assert ". Did federation help?" in text
    assert "| all documents together |" in text


class StopsInBaselines(Observer):
    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []
        self.stage = ""

    def show_step(self, what: str, detail: str) -> None:
        self.said.append((what, detail))

    def show_stage(self, name: StageName, share: float = 1.0) -> None:
        self.stage = name

    def watch(self, progress: Progress) -> None:
        if self.stage == "baselines":
            raise KeyboardInterrupt


def test_who_stops_a_run_in_its_baselines_is_told_that_they_begin_again(tmp_path: Path) -> None:
    display = StopsInBaselines()
    with pytest.raises(KeyboardInterrupt):
        run(make_recipe(baselines=["pooled"]), tmp_path / "it's", display)
    assert display.said[-2][0] == "baselines"
    assert display.said[-2][1].startswith("begin again when the run goes on")
    folder = shlex.quote(str(tmp_path / "it's"))
    assert display.said[-1][1].endswith(f"--resume {folder}")


@pytest.mark.parametrize(
    "file", first(["contributions.json", "baselines.json", "personalised.json", "evaluation.jsonl"])
)
def test_a_result_that_is_gone_is_no_whole_run_and_is_made_again(file: str, tmp_path: Path) -> None:
    rows = [{"q": f"word{number} is", "c": ["good", "evil"], "a": "good"} for number in range(4)]
    tasks = write_tasks(tmp_path / "tasks", rows, {"name": "quiz"})
    asked = {"evaluation": {"tasks": [str(tasks)]}} if file == "evaluation.jsonl" else {}
    recipe = make_recipe(baselines=["pooled"], personalise={}, contributions=True, federation={"rounds": 1}, **asked)
    folder = tmp_path / "run"
    run(recipe, folder, Observer())
    kept = (folder / file).read_text()
    (folder / file).unlink()
    (damaged,) = [finding for finding in check_run(folder) if finding.mend]
    assert (damaged.what, damaged.found) == ("results", f"missing: {file}")
    run(recipe, folder, Observer(), resume=True)
    assert not [finding for finding in check_run(folder) if finding.mend]
    if file != "evaluation.jsonl":  # which has the time of each answer
        assert json.loads((folder / file).read_text()) == json.loads(kept)


def test_a_client_alone_is_a_federation_of_one(tmp_path: Path) -> None:
    recipe = make_recipe(baselines=["local", "pooled"], data={"clients": 1}, training={"proximal_mu": 0.0})
    finished = run(recipe, tmp_path / "run", Observer())
    losses = [record["central_loss"] for record in finished.rounds]
    told = json.loads((tmp_path / "run" / "baselines.json").read_text())
    assert told["local"]["0"]["losses"] == pytest.approx(losses, rel=1e-9)
    assert told["pooled"]["losses"] == pytest.approx(losses, rel=1e-9)


def test_after_an_early_end_a_schedule_of_all_rounds_is_where_the_runs_is(tmp_path: Path) -> None:
    recipe = make_recipe(
        baselines=["pooled"], data={"clients": 1},
        training={"proximal_mu": 0.0, "schedule": "cosine", "schedule_scope": "run"},
        federation={"rounds": 6, "early_stop": {"patience": 2, "min_delta": 9.0}},
    )  # fmt: skip
    finished = run(recipe, tmp_path / "run", Observer())
    told = json.loads((tmp_path / "run" / "baselines.json").read_text())
    assert len(finished.rounds) == 1 + 2
    assert told["pooled"]["losses"] == pytest.approx([one["central_loss"] for one in finished.rounds], rel=1e-6)


@pytest.mark.long
def test_with_a_share_of_the_clients_a_round_the_budget_is_theirs(tmp_path: Path) -> None:
    recipe = make_recipe(
        baselines=["pooled"], data={"clients": 4}, federation={"fraction": 0.5, "rounds": 4}, model={"dtype": "float32"}
    )
    finished = run(recipe, tmp_path / "run", Observer())
    told = json.loads((tmp_path / "run" / "baselines.json").read_text())
    assert len(told["pooled"]["losses"]) == 1 + 2
    federated = sum(record["train_tokens"] for record in finished.rounds)
    assert told["pooled"]["tokens"] == pytest.approx(federated, rel=0.3)


def test_without_a_central_hold_out_they_are_judged_on_the_clients(tmp_path: Path) -> None:
    finished = run(make_recipe(baselines=["local"], data={"central_holdout": 0}), tmp_path / "run", Observer())
    told = json.loads((tmp_path / "run" / "baselines.json").read_text())
    assert told["local"]["1"]["losses"][0] == pytest.approx(finished.rounds[0]["client_loss"], rel=1e-9)


def test_where_shares_are_capped_the_middle_client_judges_them_as_it_judges_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "judge_losses", lambda losses, began, start: len(losses) + len(began) + start)
    capped = {"max_share": 0.4, "rounds": 2}
    recipe = make_recipe(baselines=["pooled", "local"], data={"central_holdout": 0}, federation=capped)
    finished = run(recipe, tmp_path / "run", Observer())
    told = json.loads((tmp_path / "run" / "baselines.json").read_text())
    start = finished.rounds[0]["client_loss"]
    for one in (told["pooled"], *told["local"].values()):
        assert one["losses"] == pytest.approx([start, start + 6, start + 6])
    page = write_report(finished.folder).with_suffix(".md").read_text()
    assert "are judged alike, by how the middle one of all clients' hold-outs moves." in page
    assert "The clients' middle hold-out loss rose by 6.0000 nats" in page


@pytest.mark.parametrize(("scored", "said"), [(2, "the hold-outs of 2 of 3 clients"), (3, "all clients' hold-outs")])
def test_whose_hold_outs_judge_is_said(scored: int, said: str, tmp_path: Path) -> None:
    lists = [[3.0, 2.5, 2.4]] * scored
    clients = [{"train_documents": 10, "holdout_documents": 11, "holdout_tokens": 9, "steps": 2}] * 3
    told = {"local": {"0": {"losses": [3.0, 2.6], "tokens": 5}}}
    made = make_run(tmp_path / "run", [None] * 3, clients=lists, plan={"clients": clients}, baselines=told)
    page = write_report(made.folder).with_suffix(".md").read_text()
    assert f"are judged alike, by {said} together. A baseline trains without the proximal term, for 1 round, as" in page
    assert f"Judged by {said} together ({11 * scored} documents), federation helped" in page


@pytest.mark.long
def test_tasks_are_asked_of_the_best_adapter_of_each(tmp_path: Path) -> None:
    """Of a single client whose federation is all that it is alone, to the bit."""
    rows = [{"q": f"word{number} is", "c": ["good", "evil", "neither"], "a": "good"} for number in range(12)]
    tasks = write_tasks(tmp_path / "tasks", rows, {"name": "quiz"})
    recipe = make_recipe(
        baselines=["local", "pooled"],
        data={"clients": 1},
        training={"proximal_mu": 0.0, "engine": "reference"},
        evaluation={"tasks": [str(tasks)]},
    )
    finished = run(recipe, tmp_path / "run", Observer())
    told = json.loads((tmp_path / "run" / "baselines.json").read_text())
    best = finished.rounds[finished.best_round or 0]["adapter_sha256"]
    assert told["pooled"]["adapter_sha256"] == told["local"]["0"]["adapter_sha256"] == best
    names = ("adapters/best", "baselines/pooled", "baselines/client-0")
    weights = [(finished.folder / name / "adapter_model.safetensors").read_bytes() for name in names]
    assert weights[0] == weights[1] == weights[2]
    asked = {(one.get("round"), one.get("baseline"), one.get("client")): one for one in finished.evaluations}
    assert asked.keys() == {
        (None, None, None), (finished.best_round, None, None), (None, "pooled", None), (None, "local", 0),
    }  # fmt: skip
    _, ours, pooled, alone = asked.values()
    assert ours["measures"] == pooled["measures"] == alone["measures"]
    assert ours["adapter_sha256"] == alone["adapter_sha256"] != asked[None, None, None].get("adapter_sha256")
    assert evaluate(finished.folder, [tasks], which=("local", "pooled")) == [alone, pooled]


@pytest.mark.long
def test_each_client_alone_is_asked_and_a_damaged_adapter_is_found(tmp_path: Path) -> None:
    rows = [{"q": f"word{number} is", "c": ["good", "evil"], "a": "good"} for number in range(4)]
    tasks = write_tasks(tmp_path / "tasks", rows, {"name": "quiz"})
    recipe = make_recipe(baselines=["round0", "local"], evaluation={"tasks": [str(tasks)]}, federation={"rounds": 1})
    finished = run(recipe, tmp_path / "run", Observer())
    assert [one["round"] for one in finished.evaluations if "round" in one] == [1, 0]
    assert [one["client"] for one in finished.evaluations if "client" in one] == [0, 1, 2]
    page = (finished.folder / "report.md").read_text()
    assert "| Task | Measure | base | round 0 | round 1 | clients alone, on average |" in page
    assert "| Alone | quiz, accuracy |" in page
    assert "| client 2 |" in page.partition("| Alone | quiz, accuracy |")[2]
    file = finished.folder / "baselines" / "client-1" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"\0\0\0\1")
    assert [one.what for one in check_run(finished.folder) if not one.well] == ["baselines/client-1"]
    run(recipe, finished.folder, Observer(), resume=True)
    assert file.read_bytes() == whole
    shutil.rmtree(file.parent)
    assert not [one for one in check_run(finished.folder) if not one.well]
    assert [one["client"] for one in evaluate(finished.folder, which=("local",))] == [0, 2]


def tell(losses: list[float], tokens: int = 10) -> dict[str, Any]:
    return {"losses": losses, "tokens": tokens}


@pytest.mark.parametrize(
    ("baselines", "said"),
    [
        ({}, None),
        ({"round0": tell([3.0])}, None),
        (
            {"local": {"0": tell([3.0, 2.5]), "1": tell([3.0, 2.4, 2.6])}},
            "helped: its best loss is 0.4000 nats a token",
        ),
        ({"local": {"0": tell([3.0, 1.9])}}, "did not help: client 0 alone is 0.1000 nats a token below"),
        (
            {"local": {"0": tell([3.0, 2.5])}, "pooled": tell([3.0, 1.8])},
            "on all documents together is 0.2000 below the federation's",
        ),
        (
            {"local": {"0": tell([3.0, 2.0001])}, "pooled": tell([3.0, 2.0])},
            "made no difference: the best loss of client 0 alone is as low as its own. The best loss of training on all"
            " documents together is as low as the federation's.",
        ),
        # By its best loss, as the federation is, wherever it ends.
        (
            {"local": {"0": tell([3.0, 2.5])}, "pooled": tell([3.0, 1.9, 2.3])},
            "The best loss of training on all documents together is 0.1000 below the federation's.",
        ),
        ({"local": {"0": {**tell([3.0]), "error": "x"}, "1": tell([3.0, 2.2])}}, "below that of client 1 alone"),
    ],
)
def test_what_is_said(baselines: dict[str, Any], said: str | None, tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", [3.0, 2.5, 2.0])
    if baselines:
        (made.folder / "baselines.json").write_text(json.dumps(baselines))
    from fedloom.records.run import read_run

    found = did_it_help(read_run(made.folder))
    assert found is None if said is None else said in str(found)
    page = write_report(made.folder)
    assert ("Did federation help?" in page.read_text()) == bool(baselines)


@pytest.mark.parametrize(
    ("documents", "said"), [(20, "federation helped"), (19, "nobody can tell if federation helped, which takes 20")]
)
def test_of_few_documents_there_is_no_verdict(documents: int, said: str, tmp_path: Path) -> None:
    told = {"local": {"2": {"losses": [3.0, 2.007], "tokens": 5}}}
    made = make_run(tmp_path / "run", [3.0, 2.0], plan={"central_documents": documents}, baselines=told)
    assert f"({documents} documents), {said}: its best loss is 0.0070 nats" in str(did_it_help(made))
