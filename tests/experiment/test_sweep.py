"""Sweeps: every combination, in as few passes as can be, each equal to its own run."""

import json
import os
import platform
import shutil
import signal
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.asked import write_tasks
from support.bars import Bar
from support.full_disk import no_file_above
from support.made_runs import make_run
from support.marks import first
from support.quick_runs import Said
from support.tiny import make_recipe

from fedloom import run
from fedloom.errors import RecipeError, RunError
from fedloom.experiment.combinations import expand, open_sweep
from fedloom.experiment.costing import count_left
from fedloom.experiment.session import Session
from fedloom.experiment.sweep import group_by, same_model, same_pass, sweep
from fedloom.host import failpoints
from fedloom.host.files import take_lock
from fedloom.host.signals import Terminated
from fedloom.monitoring.observer import Observer
from fedloom.monitoring.status import describe, is_well
from fedloom.progress import Stage
from fedloom.recipe.axes import read_axis
from fedloom.recipe.loading import load_recipe, recipe_to_toml
from fedloom.records.check import check_run
from fedloom.records.run import read_run
from fedloom.records.sweep_folder import list_runs, write_asked
from fedloom.report import figures
from fedloom.report.comparison import runs_in
from fedloom.service_commands import _go_on


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_to_toml(make_recipe(model={"dtype": "float64"}, adapter={"dropout": 0.2})))
    return path


class Passes(Observer):
    """Which runs trained together."""

    def __init__(self) -> None:
        self.passes: list[list[str]] = []
        self.ranked: list[Any] = []
        self.stages: list[Stage] = []

    def show_pass(self, names: Any, plans: Any) -> None:
        self.passes.append(list(names))

    def show_sweep(self, stages: Any) -> None:
        self.stages = list(stages)

    def show_sweep_end(self, ranked: Any, folder: Path) -> None:
        self.ranked = ranked


def numbers(folder: Path) -> list[dict[str, Any]]:
    """What a run's rounds came to, without times, and without hashes: what trains beside moves results by rounding."""
    kept = ("round", "central_loss", "train_loss", "client_loss", "proximal_loss", "drift", "proximal_mu", "bytes_up")
    return [{key: record[key] for key in kept if key in record} for record in read_run(folder).rounds]


AXES = ["seed=1,2", "training.proximal_mu=0.0,0.5", "training.learning_rate=1e-3,1e-2", 'baselines=["pooled"]']


@pytest.mark.long
def test_each_arm_of_one_pass_is_its_own_run(recipe_file: Path, tmp_path: Path) -> None:
    display = Passes()
    folder = sweep(recipe_file, AXES, tmp_path / "sweep", display)
    assert [len(names) for names in display.passes] == [8], "one model, one pass"
    trials = list(expand(recipe_file, AXES))
    for trial in trials[::3]:
        run(trial.recipe, tmp_path / trial.name, Observer())
        for ours, alone in zip(numbers(folder / trial.name), numbers(tmp_path / trial.name), strict=True):
            assert ours == {key: pytest.approx(value, rel=1e-9) for key, value in alone.items()}
        ours, alone = (json.loads((where / trial.name / "baselines.json").read_text()) for where in (folder, tmp_path))
        assert ours["pooled"]["tokens"] == alone["pooled"]["tokens"]
        assert ours["pooled"]["losses"] == pytest.approx(alone["pooled"]["losses"], rel=1e-9)
    assert len({read_run(folder / trial.name).rounds[-1]["adapter_sha256"] for trial in trials}) == 8
    assert [row[1] for row in display.ranked] == sorted(row[1] for row in display.ranked)
    assert {record["runs_together"] for record in read_run(folder / trials[0].name).rounds} == {8}
    page = (folder / "comparison.html").read_text()
    assert figures.SHARED_PASS in page
    assert "mean and standard deviation over seeds" in page


@pytest.mark.parametrize(
    ("axes", "models", "passes"),
    [
        (["seed=1,2,3"], 1, 1),
        (["training.optimizer=adamw,sgd"], 1, 2),
        (["adapter.rank=2,4"], 2, 2),
        (["federation.lora_rule=factors,svd,rolora"], 1, 1),
        (["federation.lora_rule=ffa,factors", "seed=1,2"], 3, 3),
        (["federation.lora_rule=fedex", "seed=1,2"], 1, 2),
        (["training.engine=reference", "seed=1,2"], 2, 2),
        (["data.max_length=16,32", "training.epochs=1,2"], 1, 1),
        (["data.pad_in_loss=false,true", "training.epochs=1,2"], 2, 2),
    ],
)
def test_what_is_shared(axes: list[str], models: int, passes: int, recipe_file: Path) -> None:
    groups = group_by(list(expand(recipe_file, axes)), same_model)
    assert len(groups) == models
    assert sum(len(group_by(group, same_pass)) for group in groups) == passes


@pytest.mark.parametrize("rule", first(["fedex", "svd", "rolora", "ffa"], keep=0, every=2))
def test_rules_that_share_a_model_keep_their_own(rule: str, recipe_file: Path, tmp_path: Path) -> None:
    axes = [f"federation.lora_rule=factors,{rule}"]
    folder = sweep(recipe_file, axes, tmp_path / "sweep", Observer())
    for trial in expand(recipe_file, axes):
        run(trial.recipe, tmp_path / trial.name, Observer())
        for ours, alone in zip(numbers(folder / trial.name), numbers(tmp_path / trial.name), strict=True):
            assert ours == {key: pytest.approx(value, rel=1e-9) for key, value in alone.items()}


@pytest.mark.long
def test_a_run_that_fails_does_not_stop_the_rest_and_is_tried_again(recipe_file: Path, tmp_path: Path) -> None:
    recipe_file.write_text(recipe_file.read_text().replace("float64", "float32"))
    axes = ["training.learning_rate=1e30,1e-3", "seed=1,2"]
    said = Said()
    with pytest.raises(RunError, match=r"2 of 4 runs failed, learning_rate=1e30_seed=1 for one: .*is (nan|inf)"):
        sweep(recipe_file, axes, tmp_path / "sweep", said)
    assert [step.split(": ")[1] for step in said.steps if step.startswith("failed")] == [
        f"learning_rate=1e30_seed={seed}" for seed in (1, 2)
    ], "each as it does"
    states = {path.parent.name: json.loads(path.read_text())["state"] for path in tmp_path.glob("sweep/*/status.json")}
    assert sorted(states.values()) == ["done", "done", "failed", "failed"]
    assert (tmp_path / "sweep" / "comparison.html").is_file()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("sweep/*=1e-3*/rounds.jsonl")}
    display = Passes()
    with pytest.raises(RunError, match="2 of 4 runs failed"):
        sweep(recipe_file, axes, tmp_path / "sweep", display)
    assert [len(names) for names in display.passes] == [2], "what is done stays"
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.long
def test_an_interrupted_sweep_goes_on_after_its_last_rounds(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = ["training.optimizer=adamw,sgd", "seed=1,2", "training.optimizer_state=keep"]
    whole = sweep(recipe_file, axes, tmp_path / "whole", Observer())
    right, calls = Session.train_clients, []

    def interrupted(self: Session, jobs: Any) -> Any:
        calls.append(len(jobs))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return right(self, jobs)

    monkeypatch.setattr(Session, "train_clients", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(recipe_file, axes, tmp_path / "sweep", Observer())
    states = sorted(json.loads(p.read_text())["state"] for p in tmp_path.glob("sweep/*/status.json"))
    assert states == ["done", "done", "interrupted", "interrupted"]
    display = Passes()
    sweep(recipe_file, axes, tmp_path / "sweep", display)
    second = [
        client["steps"] for path in whole.glob("*sgd*/") for client in read_run(path).clients if client["round"] == 2
    ]
    assert [(one.name, one.steps) for one in display.stages] == [("rounds", sum(second))]
    assert [[name[:13] for name in names] for names in display.passes] == [["optimizer=sgd"] * 2]
    assert calls == [6, 6, 6, 6, 6], "the second round of the second pass, and nothing twice"
    for path in whole.glob("*/rounds.jsonl"):
        assert numbers(tmp_path / "sweep" / path.parent.name) == numbers(path.parent), "to the bit"
        assert not [finding for finding in check_run(tmp_path / "sweep" / path.parent.name) if not finding.well]


def test_a_sweep_is_watched_and_stopped_from_another_terminal(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr("fedloom.monitoring.status.TELL_SECONDS", -1.0)
    folder, said = tmp_path / "sweep", []

    class Elsewhere(Observer):
        def show_trial(self, name: str, record: Any) -> None:
            if record["round"] == 1 and not said:
                said.extend(describe(folder))
                os.kill(os.getpid(), signal.SIGTERM)

        def show_step(self, what: str, detail: str) -> None:
            if what in ("stopping", "stopped"):
                said.append(f"{what} {detail}")

    with pytest.raises(Terminated):
        sweep(recipe_file, ["seed=1,2"], folder, Elsewhere())
    assert f"fedloom sweep, process {os.getpid()}" in said[0]
    assert said[1] == "doing     evaluating"
    assert said[2].startswith("left      0:0")
    assert said.pop(3) == "sweep     0 of 2 runs done"
    assert said[3] == "stopping ends after this step; once more, and it ends at once"
    command = f"fedloom sweep {recipe_file} seed=1,2 --out {folder}"
    assert said[4] == f"stopped go on with: {command}"
    assert _go_on("fedloom sweep", folder) == f"go on with: {command}"
    assert {json.loads(path.read_text())["state"] for path in folder.glob("*/status.json")} == {"interrupted"}
    go_on = f"go on     {command}"
    assert [*describe(folder)] == [
        "sweep     0 of 2 runs done",
        "run       seed=1: interrupted after round 1 of 2",
        "run       seed=2: interrupted after round 0 of 2",
        go_on,
    ]
    assert [line for line in describe(folder / "seed=1") if line.startswith("go on")] == [go_on]
    with pytest.raises(RunError, match=r"a sweep, and not one of its runs; name one in it: seed=1, seed=2"):
        read_run(folder)


@pytest.mark.long
@pytest.mark.parametrize("place", first(["state.renamed=raise@3", "record.round=raise@4"], rest=pytest.mark.slow))
def test_arms_that_were_cut_off_at_different_rounds_go_on_each_from_its_own(
    place: str, recipe_file: Path, tmp_path: Path
) -> None:
    """Round 1 is committed for the first arm alone, or written down but not committed for the second."""
    axes = ["seed=1,2", 'baselines=["round0"]']
    whole = sweep(recipe_file, axes, tmp_path / "whole", Observer())
    failpoints.arm(place)
    try:
        with pytest.raises(RuntimeError, match="a failpoint"):
            sweep(recipe_file, axes, tmp_path / "sweep", Observer())
    finally:
        failpoints.arm("")
    sweep(recipe_file, axes, tmp_path / "sweep", Observer())
    for path in whole.glob("*/rounds.jsonl"):
        for ours, others in zip(numbers(tmp_path / "sweep" / path.parent.name), numbers(path.parent), strict=True):
            assert ours == pytest.approx(others, rel=1e-9)


def test_what_is_said_of_a_run_has_its_name_and_what_is_alike_is_said_once(recipe_file: Path, tmp_path: Path) -> None:
    said: list[tuple[str, str]] = []

    class Heard(Observer):
        def show_step(self, what: str, detail: str) -> None:
            said.append((what, detail))

    failpoints.arm("state.renamed=raise@3")
    try:
        with pytest.raises(RuntimeError, match="a failpoint"):
            sweep(recipe_file, ["seed=1,2"], tmp_path / "sweep", Heard())
    finally:
        failpoints.arm("")
    assert [what for what, _ in said if what in ("model", "documents", "splits")] == ["documents", "splits", "model"]
    said.clear()
    sweep(recipe_file, ["seed=1,2"], tmp_path / "sweep", Heard())
    assert [detail for what, detail in said if what == "resumed"] == ["seed=1: after round 1", "seed=2: after round 0"]


class Heard(Observer):
    """Everything that is said, as lines."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def show_step(self, what: str, detail: str) -> None:
        self.said.append(f"{what}: {detail}")


def stop_in_round_1(recipe_file: Path, folder: Path) -> None:
    failpoints.arm("state.renamed=raise@4")
    try:
        with pytest.raises(RuntimeError, match="a failpoint"):
            sweep(recipe_file, ["seed=1,2"], folder, Observer())
    finally:
        failpoints.arm("")


def test_a_run_that_was_moved_by_itself_is_taken_back_on_record(recipe_file: Path, tmp_path: Path) -> None:
    folder, heard = tmp_path / "sweep", Heard()
    stop_in_round_1(recipe_file, folder)
    moved = load_recipe(folder / "seed=1" / "recipe.toml", ["training.clients_at_once=1"])
    failpoints.arm("training.stepped=raise@1")
    try:
        with pytest.raises(RuntimeError, match="a failpoint"):
            run(moved, folder / "seed=1", Observer(), resume=True)
    finally:
        failpoints.arm("")
    sweep(recipe_file, ["seed=1,2"], folder, heard)
    line = "moved: seed=1: no training.clients_at_once from here on, which moves results by rounding"
    assert [one for one in heard.said if one.startswith("moved")] == [line]
    assert [read_run(folder / name).status.get("moved") for name in ("seed=1", "seed=2")] == [
        ["after round 1 with training.clients_at_once = 1", "after round 1 with no training.clients_at_once"],
        None,
    ]


def test_a_run_that_another_process_is_at_work_in_is_left_to_it(recipe_file: Path, tmp_path: Path) -> None:
    folder, display = tmp_path / "sweep", Passes()
    stop_in_round_1(recipe_file, folder)
    with closing(take_lock(folder / "seed=1")):
        assert "run       seed=1: at work by itself after round 1 of 2" in [*describe(folder)]
        with pytest.raises(RunError) as refused:
            sweep(recipe_file, ["seed=1,2"], folder, display)
    who = f"process {os.getpid()} on {platform.node()}"
    go_on = f"fedloom sweep {recipe_file} seed=1,2 --out {folder}"
    assert str(refused.value) == (
        f"{folder}: another process is at work in 1 of 2 runs, seed=1 for one ({who}); the others are done; wait for"
        f" its end, or end it: fedloom stop {folder}/seed=1; then go on with: {go_on}"
    )
    assert display.passes == [["seed=2"]]
    sweep(recipe_file, ["seed=1,2"], folder, display)
    assert display.passes[1:] == [["seed=1"]]


def test_a_done_run_that_lost_rounds_is_not_compared_as_if_it_were_whole(recipe_file: Path, tmp_path: Path) -> None:
    folder = sweep(recipe_file, ["seed=1,2"], tmp_path / "sweep", Observer())
    rounds = folder / "seed=2" / "rounds.jsonl"
    kept, display = rounds.read_bytes(), Passes()
    rounds.write_bytes(kept.splitlines(keepends=True)[0])
    assert "run       seed=2: done, but rounds.jsonl lacks round 1 of 2" in [*describe(folder)]
    assert not is_well(folder)
    assert not is_well(folder / "seed=2")
    assert runs_in(folder) == [folder / "seed=1"]
    says = "1 of 2 runs failed, seed=2 for one: .*rounds.jsonl is not what it was at the end of round 2; restore"
    with pytest.raises(RunError, match=says):
        sweep(recipe_file, ["seed=1,2"], folder, display)
    assert [name for name, *_ in display.ranked] == ["seed=1"]
    rounds.write_bytes(kept)
    shutil.rmtree(folder / "seed=2" / "adapters")
    assert next(iter(describe(folder / "seed=2"))).startswith("ended     done, but adapters/initial is missing, ")
    sweep(recipe_file, ["seed=1,2"], folder, display)
    assert [len(display.ranked), is_well(folder)] == [2, True]
    assert rounds.read_bytes() == kept
    assert all(finding.well for finding in check_run(folder / "seed=2"))


def test_a_run_of_a_sweep_that_lost_its_recipe_is_made_anew_once_it_is_away(recipe_file: Path, tmp_path: Path) -> None:
    folder = sweep(recipe_file, ["seed=1,2"], tmp_path / "sweep", Observer())
    lost, before = folder / "seed=2", numbers(folder / "seed=2")
    (lost / "resolved.json").unlink()
    what = f"{lost}: not a run directory: it has no resolved.json; restore it, or move the folder away, and its sweep"
    assert f"run       seed=2: {what} makes the run anew" in [*describe(folder)]
    with pytest.raises(RunError, match=f"1 of 2 runs failed, seed=2 for one: {what}"):
        sweep(recipe_file, ["seed=1,2"], folder, Observer())
    lost.rename(tmp_path / "away")
    assert runs_in(sweep(recipe_file, ["seed=1,2"], folder, Observer())) == [folder / "seed=1", lost]
    for ours, others in zip(numbers(lost), before, strict=True):
        assert ours == pytest.approx(others, rel=1e-9)


def test_a_report_that_found_no_room_is_written_when_the_sweep_goes_on(recipe_file: Path, tmp_path: Path) -> None:
    axes = ["seed=1,2", "federation.rounds=1"]
    with no_file_above(8_000), pytest.raises(RunError, match=r"2 of 2 runs failed, .* can't be written"):
        sweep(recipe_file, axes, tmp_path / "sweep", Observer())
    reports = [tmp_path / "sweep" / f"seed={seed}" / "report.html" for seed in (1, 2)]
    assert not any(report.exists() for report in reports)
    sweep(recipe_file, axes, tmp_path / "sweep", Observer())
    assert all(report.exists() for report in reports)


def test_a_comparison_that_is_not_written_hides_no_run_that_failed(recipe_file: Path, tmp_path: Path) -> None:
    axes, heard = ["seed=1,2,3", "federation.rounds=1"], Heard()
    folder = sweep(recipe_file, axes, tmp_path / "sweep", Observer())
    rounds = folder / "seed=3" / "rounds.jsonl"
    (folder / "plots").rename(folder / "elsewhere")
    (folder / "plots").touch()
    with pytest.raises(RunError, match="plots: can't be written"):
        sweep(recipe_file, axes, folder, Observer())
    rounds.write_text(rounds.read_text().replace("central_loss", "no_loss").replace("client_loss", "no_loss"))
    assert "run       seed=3: done, but rounds.jsonl has no loss of a hold-out" in [*describe(folder)]
    with pytest.raises(RunError, match=r"1 of 3 runs failed, seed=3 for one: .*rounds.jsonl is not what"):
        sweep(recipe_file, axes, folder, heard)
    assert [line for line in heard.said if line.startswith("comparison: there is none: ")]


def test_a_done_run_whose_rounds_are_gone_is_named_and_the_rest_are_compared(recipe_file: Path, tmp_path: Path) -> None:
    axes = ["seed=1,2,3", "federation.rounds=1"]
    folder = sweep(recipe_file, axes, tmp_path / "sweep", Observer())
    (lost,) = folder.glob("seed=1*/rounds.jsonl")
    kept = lost.read_bytes()
    lost.unlink()
    (folder / "comparison.html").unlink()
    assert f"run       {lost.parent.name}: done, but rounds.jsonl is missing" in [*describe(folder)]
    says = "rounds.jsonl is missing; restore rounds.jsonl, or remove the run directory and begin again; the others"
    with pytest.raises(RunError, match=f"1 of 3 runs failed, {lost.parent.name} for one: {lost.parent}: {says}"):
        sweep(recipe_file, axes, folder, Observer())
    assert (folder / "comparison.html").is_file()
    lost.write_bytes(kept)
    sweep(recipe_file, axes, folder, Observer())


def test_a_list_of_runs_that_is_cut_short_says_what_is_still_whole(recipe_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    stop_in_round_1(recipe_file, folder)
    os.truncate(folder / "sweep.json", 300)
    says = f"sweep.json: .* damaged; restore it, or begin .* fedloom run --resume {folder}/RUN goes on with one"
    for ask in (lambda: sweep(recipe_file, ["seed=1,2"], folder, Observer()), lambda: [*describe(folder)]):
        with pytest.raises(RunError, match=says):
            ask()
    with pytest.raises(RunError, match=says):
        read_run(folder)


def test_an_arm_whose_documents_are_others_now_is_named_and_the_rest_go_on(tmp_path: Path, write_jsonl: Any) -> None:
    documents = write_jsonl([f"document {number} has some words in it" for number in range(40)])
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_to_toml(make_recipe(data={"source": str(documents)})))
    axes = ["seed=1,2"]
    failpoints.arm("state.renamed=raise@3")
    try:
        with pytest.raises(RuntimeError, match="a failpoint"):
            sweep(path, axes, tmp_path / "sweep", Observer())
    finally:
        failpoints.arm("")
    write_jsonl([f"another text {number} with words" for number in range(40)])
    with pytest.raises(RunError, match=r"2 of 2 runs failed, seed=1 for one: .*documents are not those"):
        sweep(path, axes, tmp_path / "sweep", Observer())


@pytest.mark.long
def test_an_arm_that_stops_early_ends_with_its_baselines(recipe_file: Path, tmp_path: Path) -> None:
    stop = "federation.early_stop={patience=1,min_delta=9},{patience=5}"
    axes = [stop, "federation.rounds=4", 'baselines=["pooled"]']
    assert [trial.overrides[0] for trial in expand(recipe_file, axes)] == [
        "federation.early_stop={patience=1,min_delta=9}",
        "federation.early_stop={patience=5}",
    ]
    said = Said()
    folder = sweep(recipe_file, axes, tmp_path / "sweep", said)
    (told,) = (step for step in said.steps if step.startswith("early end"))
    assert "4 scheduled, 1 completed" in told
    found = {
        len(read_run(path.parent).rounds): len(json.loads(path.read_text())["pooled"]["losses"])
        for path in folder.glob("*/baselines.json")
    }
    assert found == {2: 2, 5: 5}


@pytest.mark.parametrize("first_to_end", [True, False])
def test_a_round_that_others_trained_already_is_not_left(first_to_end: bool, recipe_file: Path, tmp_path: Path) -> None:
    """Of a pass, each run's round is on record after all of them have trained it."""
    stops = ["{patience=1,min_delta=9}", "{patience=9}"]
    stop = f"federation.early_stop={','.join(stops if first_to_end else stops[::-1])}"
    bar = Bar()
    sweep(recipe_file, [stop, "federation.rounds=3"], tmp_path / "sweep", bar)
    assert bar.clock.total_steps == bar.steps
    assert bar.clock.seconds_left() == 0


def test_an_early_end_counts_anew_what_is_left_of_its_own_pass_alone(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a thousand runs that all end early, each would else read what all that follow it have on record."""
    read: list[list[str]] = []

    def note_count(folder: Path, together: Sequence[str], *rest: Any) -> tuple[Stage, ...]:
        read.append([*together])
        return count_left(folder, together, *rest)

    monkeypatch.setattr("fedloom.experiment.sweep.count_left", note_count)
    axes = ["federation.early_stop={patience=1,min_delta=9}", "federation.rounds=3", "training.learning_rate=1e-3,2e-3"]
    bar = Bar()
    sweep(recipe_file, [*axes, "training.gradient_checkpointing=false,true"], tmp_path / "sweep", bar)
    assert sorted(map(len, read)) == [2, 2, 2, 2], "each pass of two runs once for each"
    assert bar.clock.total_steps == bar.steps


@pytest.mark.long
def test_runs_that_fail_or_end_early_take_their_work_out_of_the_bar(recipe_file: Path, tmp_path: Path) -> None:
    recipe_file.write_text(recipe_file.read_text().replace("float64", "float32"))
    stop = "federation.early_stop={patience=1,min_delta=9},{patience=9}"
    rates = "training.learning_rate=1e30,1e-3"
    two_passes = "training.gradient_checkpointing=false,true"
    axes = [stop, rates, two_passes, "federation.rounds=3", 'baselines=["pooled"]', "contributions=true"]
    bar = Bar()
    with pytest.raises(RunError, match="4 of 8 runs failed"):
        sweep(recipe_file, axes, tmp_path / "sweep", bar)
    assert bar.totals["baselines"] == bar.totals["contributions"] == bar.steps, "of the last pass: all others are done"
    assert bar.clock.seconds_left() == 0


def test_a_draw_is_some_of_the_combinations_and_the_same_ones_again(recipe_file: Path) -> None:
    axes = ["seed=1,2,3,4", "training.proximal_mu=0,0.1,0.2"]
    drawn = [trial.name for trial in expand(recipe_file, axes, 5)]
    assert len(set(drawn)) == 5
    assert drawn == [trial.name for trial in expand(recipe_file, axes, 5)]
    assert len(list(expand(recipe_file, axes, 50))) == 12


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        ("a.b=1,2", ["1", "2"]),
        ("a.b= x , y ", ["x", "y"]),
        ('a=["q","v"],["k"]', ['["q","v"]', '["k"]']),
        ('a="x,y",z', ['"x,y"', "z"]),
        ("a={b=1,c=2},{b=3}", ["{b=1,c=2}", "{b=3}"]),
    ],
)
def test_values_are_told_apart(axis: str, values: list[str]) -> None:
    assert list(read_axis(axis).choices) == values


@pytest.mark.parametrize(
    ("axes", "error"),
    [
        ([], "nothing to sweep over"),
        (["training.proximal_mu"], "is nothing to sweep over"),
        (["training.proximal_mu=1,1"], "a value twice"),
        (["training.proximal_mue=1,2"], "unknown key `training.proximal_mue`"),
        (["training.proximal_mu=1,many"], "training.proximal_mu"),
        (["federation.lora_rule=svd", "training.optimizer_state=keep,reset"], "training.optimizer_state"),
    ],
)
def test_bad_axes_are_refused_before_anything_runs(
    axes: list[str], error: str, recipe_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=error):
        sweep(recipe_file, axes, tmp_path / "sweep", Observer())
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("axes", "says"),
    [
        (["seed=1,2", "seed=3"], "seed is named twice"),
        (["training.learning_rate=0.01,0.010"], "has a value twice"),
        (['adapter.targets=["q_proj"],[ "q_proj" ]'], "has a value twice"),
    ],
)
def test_what_would_be_one_run_under_two_names_is_refused(axes: list[str], says: str, recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match=says):
        list(expand(recipe_file, axes))


def test_a_name_has_what_varies_and_nothing_else(recipe_file: Path) -> None:
    axes = ["baselines=[]", "contributions=false", "federation.rounds=12", "training.proximal_mu=0,0.1", "seed=1,2"]
    names = [trial.name for trial in expand(recipe_file, axes)]
    assert names == [f"proximal_mu={mu}_seed={seed}" for mu in ("0", "0.1") for seed in (1, 2)]
    assert [trial.name for trial in expand(recipe_file, ["seed=1", "training.epochs=2"])] == ["seed=1_epochs=2"]


def test_a_sweep_that_has_the_names_of_an_early_version_goes_on_with_them(recipe_file: Path, tmp_path: Path) -> None:
    found = list(expand(recipe_file, ["training.epochs=2", "seed=1,2"]))
    early = [replace(trial, name=f"epochs=2_{trial.name}") for trial in found]
    assert open_sweep(tmp_path / "sweep", early) == early
    assert open_sweep(tmp_path / "sweep", found) == early


@pytest.mark.parametrize(
    ("axes", "says"),
    [
        (["seed=1,3"], "seed: 1, 2 there, and 1, 3 asked; name another with --out"),
        (["seed=1,2", "training.epochs=3"], "training.epochs: 1 there, and 3 asked"),
        (["seed=2"], "seed: 1, 2 there, and 2 asked"),
        (["seed=1,2", "evaluation.tasks=[]", 'baselines=["pooled"]'], r'baselines: \[\] there, and \["pooled"\] asked'),
        (["seed=3,9,8,7,6,5,4"], "3, 9, 8, 7, 6 and 2 more asked"),
    ],
)
def test_what_differs_from_the_sweep_that_is_there_is_named(
    axes: list[str], says: str, recipe_file: Path, tmp_path: Path
) -> None:
    open_sweep(tmp_path / "sweep", list(expand(recipe_file, ["seed=1,2"])))
    with pytest.raises(RunError, match=f"this is a sweep over something else: .*{says}"):
        open_sweep(tmp_path / "sweep", list(expand(recipe_file, axes)))


def test_a_sweep_whose_runs_are_done_takes_further_values_and_keeps_what_it_has(
    recipe_file: Path, tmp_path: Path
) -> None:
    folder = sweep(recipe_file, ["seed=1", "federation.rounds=1"], tmp_path / "sweep", Observer())
    before = {path: path.read_bytes() for path in folder.glob("seed=1_*/**/*") if path.is_file()}
    display = Passes()
    sweep(recipe_file, ["seed=1,2", "federation.rounds=1"], folder, display)
    assert display.passes == [["seed=2"]]
    assert before == {path: path.read_bytes() for path in before}, "not even a clock is another"
    alone = sweep(recipe_file, ["seed=2", "federation.rounds=1"], tmp_path / "alone", Observer())
    assert numbers(folder / "seed=2") == numbers(alone / "seed=2_rounds=1"), "to the bit"
    assert len(display.ranked) == 2
    assert (folder / "comparison.html").is_file()
    with pytest.raises(RunError, match="over something else: seed: 1, 2 there, and 1 asked"):
        sweep(recipe_file, ["seed=1", "federation.rounds=1"], folder, Observer())


def test_a_sweep_with_runs_that_are_not_done_takes_no_others(recipe_file: Path, tmp_path: Path) -> None:
    """They would train beside one another, which moves by rounding what has begun."""
    folder = tmp_path / "sweep"
    open_sweep(folder, list(expand(recipe_file, ["seed=1,2"])))
    write_asked(folder, recipe_file, ["seed=1,2"], None)
    says = "2 of its 2 runs must be done before others join them: seed: 1, 2 there, and 1, 2, 3 asked; first go on with"
    with pytest.raises(RunError, match=f"{says}: fedloom sweep {recipe_file} seed=1,2 --out {folder}"):
        open_sweep(folder, list(expand(recipe_file, ["seed=1,2,3"])))
    assert list_runs(folder) == ["seed=1", "seed=2"]


def test_a_further_run_whose_name_another_has_gets_one_of_its_own(recipe_file: Path, tmp_path: Path) -> None:
    one, two, three = expand(recipe_file, ["seed=1,2,3"])
    folder = tmp_path / "sweep"
    open_sweep(folder, [replace(one, name="seed=2"), replace(two, name="seed=1")])
    for name in ("seed=1", "seed=2"):
        make_run(folder / name, [3.0, 2.0])
    found = open_sweep(folder, [one, two, replace(three, name="seed=1")])
    assert [trial.name for trial in found] == ["seed=2", "seed=1", "seed=1-2"] == list_runs(folder)


def test_a_draw_that_is_not_the_one_that_is_there_is_named(recipe_file: Path, tmp_path: Path) -> None:
    found = list(expand(recipe_file, ["seed=1,2", "training.epochs=1,2"]))
    open_sweep(tmp_path / "sweep", found)
    with pytest.raises(RunError, match="else: 4 combinations there, and 2 asked, of the same values; name another"):
        open_sweep(tmp_path / "sweep", [found[0], found[3]])


def test_values_that_look_alike_as_names_or_are_long_have_folders_of_their_own(recipe_file: Path) -> None:
    long = "x" * 250
    found = list(expand(recipe_file, [f'description="a/b","a:b","a-b","{long}y","{long}z"']))
    assert [trial.recipe.description for trial in found] == ["a/b", "a:b", "a-b", f"{long}y", f"{long}z"]
    assert len({trial.name for trial in found}) == 5
    assert all(len(trial.name.encode()) < 255 for trial in found)
    assert found[0].name == "description=-a-b"


def test_more_combinations_than_anybody_waits_for_are_refused_unless_some_are_drawn(recipe_file: Path) -> None:
    many = ",".join(str(number) for number in range(1, 1001))
    axes = [f"seed={many}", f"federation.rounds={many}", f"training.epochs={many}", f"training.batch_size={many}"]
    with pytest.raises(RecipeError, match="1,000,000,000,000 combinations are more than 10,000"):
        list(expand(recipe_file, axes))
    assert len({trial.name for trial in expand(recipe_file, axes, 3)}) == 3


def test_a_file_in_the_folders_place_is_refused(recipe_file: Path) -> None:
    with pytest.raises(RunError, match="it exists and is no sweep"):
        sweep(recipe_file, ["seed=1,2"], recipe_file, Observer())


@pytest.mark.long
def test_a_folder_of_something_else_is_refused(recipe_file: Path, tmp_path: Path) -> None:
    sweep(recipe_file, ["seed=1,2"], tmp_path / "sweep", Observer())
    with pytest.raises(RunError, match="a sweep over something else"):
        sweep(recipe_file, ["seed=1,3"], tmp_path / "sweep", Observer())
    held = take_lock(tmp_path / "sweep")
    with pytest.raises(RunError, match=f"another run is at work in it .process {os.getpid()} on"):
        sweep(recipe_file, ["seed=1,2"], tmp_path / "sweep", Observer())
    held.close()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(RunError, match="is no sweep"):
        sweep(recipe_file, ["seed=1,2"], tmp_path / "other", Observer())


def test_drawing_another_seeds_adapter_changes_nothing(recipe_file: Path) -> None:
    from support.tiny import make_adapted

    adapted = make_adapted()
    before = adapted.read()
    drawn = adapted.draw(11)
    assert drawn.sha256() == make_adapted(seed=11).read().sha256()
    assert adapted.read().sha256() == before.sha256()
    assert adapted.draw(7).sha256() == before.sha256()
    assert [name for name, value in adapted.model.named_parameters() if value.requires_grad]
    load_recipe(recipe_file)


@pytest.mark.long
def test_every_arm_is_asked_its_tasks_and_trains_the_same(recipe_file: Path, tmp_path: Path) -> None:
    questions = [{"q": f"is {number} even", "c": ["yes", "no"], "a": "yes"} for number in range(4)]
    tasks = write_tasks(tmp_path / "tasks", questions, {"name": "even"})
    rates = "training.learning_rate=1e-3,1e-2"
    plain = sweep(recipe_file, [rates], tmp_path / "plain", Observer())
    asked = sweep(
        recipe_file,
        [rates, f'evaluation.tasks=["{tasks}"]', "evaluation.tasks_every=1"],
        tmp_path / "asked",
        Observer(),
    )
    for ours, other in zip(sorted(asked.glob("*/plan.json")), sorted(plain.glob("*/plan.json")), strict=True):
        one, alone = read_run(ours.parent), read_run(other.parent)
        assert {record.get("round") for record in one.evaluations} == {None, 1, 2}
        assert [record["adapter_sha256"] for record in one.rounds] == [r["adapter_sha256"] for r in alone.rounds]
    assert "| even | accuracy |" in (asked / "comparison.md").read_text()


def test_a_recipes_own_axes_are_swept_and_its_choices_bring_their_keys(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    axes = "[sweep]\nseed = [1, 2]\n[sweep.adapter.method]\nlora = {}\nia3 = {training.learning_rate = 0.02}\n"
    path.write_text(recipe_to_toml(make_recipe()) + axes)
    said: list[str] = []
    found = {trial.name: trial.recipe for trial in expand(path, [], say=lambda what, detail: said.append(detail))}
    assert list(found) == ["seed=1_method=lora", "seed=1_method=ia3", "seed=2_method=lora", "seed=2_method=ia3"]
    assert found["seed=1_method=ia3"].training.learning_rate == 0.02
    assert found["seed=1_method=lora"].training.learning_rate != 0.02
    assert [line for line in said if "left out" in line] == [
        '2 of 4 runs: adapter.method = "ia3" has no use for adapter.rank = 2, adapter.alpha = 4.0: left out'
    ]
    assert not any("learning_rate" in line for line in said)


@pytest.mark.long
def test_a_sweep_over_seeds_ends_with_its_arms(recipe_file: Path, tmp_path: Path) -> None:
    said: list[str] = []

    class Heard(Observer):
        def show_step(self, what: str, detail: str) -> None:
            said.extend([detail] if what == "arms" else [])

    axes = ["seed=1,2", "training.proximal_mu=0.0,9.0", "federation.rounds=1"]
    folder = sweep(recipe_file, axes, tmp_path / "sweep", Heard())
    assert [line.split()[0] for line in said[:3]] == ["Arm", "proximal_mu=0.0", "proximal_mu=9.0"]
    assert any(line.startswith("proximal_mu=9.0 against proximal_mu=0.0: ") for line in said)
    assert "## 1. Arms" in (folder / "comparison.md").read_text()
    said.clear()
    alone = sweep(recipe_file, ["training.proximal_mu=0.0,9.0", "federation.rounds=1"], tmp_path / "alone", Heard())
    assert not said
    assert "Arms" not in (alone / "comparison.md").read_text()
