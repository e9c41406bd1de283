"""What a sweep will cost is told before it starts, and what is on record costs nothing more."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.made_runs import make_run
from support.tiny import make_recipe

from fedloom.experiment import step_memory
from fedloom.experiment.combinations import expand
from fedloom.experiment.costing import clients_at_once, count_cost, describe_cost
from fedloom.experiment.preparation import Prepared, gather, prepare
from fedloom.experiment.sweep import prepare_all, sweep
from fedloom.host import failpoints
from fedloom.monitoring.observer import Observer
from fedloom.progress import Stage, add_stages
from fedloom.recipe.loading import recipe_to_toml


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_to_toml(make_recipe()))
    return path


@pytest.fixture
def ready(recipe_file: Path) -> Callable[..., dict[str, Prepared]]:
    def prepare_axes(*axes: str) -> dict[str, Prepared]:
        errors: dict[str, str] = {}
        found = prepare_all(list(expand(recipe_file, axes)), Observer(), errors)
        assert not errors
        return found

    return prepare_axes


class Told(Observer):
    """What a sweep says before its first pass, and whether a run had begun by then."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.whole = Stage("rounds", 0, 0, 0)
        self.begun: list[Path] = []
        self.passes = 0

    def show_step(self, what: str, detail: str) -> None:
        if what == "cost":
            self.lines.append(detail)
            self.begun += self.folder.glob("*/resolved.json")

    def show_sweep(self, stages: Sequence[Stage]) -> None:
        self.whole = add_stages("rounds", stages)

    def show_pass(self, names: Any, plans: Any) -> None:
        self.passes += 1


@pytest.mark.long
def test_the_cost_is_told_first_and_is_what_the_runs_come_to(recipe_file: Path, tmp_path: Path) -> None:
    told = Told(tmp_path / "sweep")
    folder = sweep(recipe_file, ["training.proximal_mu=0,0.5", "adapter.rank=2,4"], tmp_path / "sweep", told)
    assert told.lines[0] == "4 runs in 2 passes, the base model loaded 2 times"
    assert told.passes == 2
    assert told.lines[2].endswith("time: not known before the first steps")
    assert "predicted at most" in told.lines[2]
    assert not told.begun
    records = [json.loads(line) for path in folder.glob("*/rounds.jsonl") for line in path.read_text().splitlines()]
    assert told.whole.train == sum(record["train_tokens"] for record in records)
    reports = [json.loads(line) for path in folder.glob("*/clients.jsonl") for line in path.read_text().splitlines()]
    assert told.lines[1].startswith(f"{sum(report['steps'] for report in reports)} steps, {told.whole.train:,} tokens")
    again = Told(folder)
    sweep(recipe_file, ["training.proximal_mu=0,0.5", "adapter.rank=2,4"], folder, again)
    assert (again.lines, again.passes) == ([], 0), "nothing is left"


@pytest.mark.long
def test_rounds_on_record_cost_nothing_more_and_give_a_rate(recipe_file: Path, tmp_path: Path) -> None:
    axes = ["seed=1,2"]
    first, again = Told(tmp_path / "sweep"), Told(tmp_path / "sweep")
    failpoints.arm("state.renamed=raise@3")
    try:
        with pytest.raises(RuntimeError, match="a failpoint"):
            sweep(recipe_file, axes, tmp_path / "sweep", first)
    finally:
        failpoints.arm("")
    sweep(recipe_file, axes, tmp_path / "sweep", again)
    assert 0 < again.whole.train < first.whole.train
    assert "at the rate of the rounds on record" in again.lines[2]


@pytest.mark.long
def test_the_time_is_that_of_the_tokens_at_the_rate_on_record(
    ready: Callable[..., dict[str, Prepared]], tmp_path: Path
) -> None:
    found = ready("seed=1,2")
    make_run(tmp_path / "done", [3.0, 2.5], seconds={"train": [0.0, 3.0], "evaluate": [1.0, 1.0]})
    cost = count_cost(tmp_path, [[list(found)]], found)
    whole = add_stages("rounds", cost.stages)
    assert cost.seconds == pytest.approx(whole.train * 3.0 / 300 + whole.evaluate * 2.0 / 1000)
    assert "time: about " in describe_cost(cost)[2]
    told = {"seconds": {"train": [0.0, 3.0], "evaluate": [1.0, 1.0]}, "more": {1: {"runs_together": 3}}}
    make_run(tmp_path / "pass" / "one", [3.0, 2.5], **told)
    cost = count_cost(tmp_path / "pass", [[list(found)]], found)
    # Each run has the pass's seconds on record, and its own tokens.
    assert cost.seconds == pytest.approx(whole.train * 1.0 / 300 + whole.evaluate * 2.0 / 1000)
    assert count_cost(tmp_path / "elsewhere", [[list(found)]], found).seconds is None


@pytest.mark.long
def test_the_memory_of_a_pass_is_that_of_all_clients_that_train_at_once(
    ready: Callable[..., dict[str, Prepared]], tmp_path: Path
) -> None:
    found = ready("seed=1,2,3")
    one = next(iter(found.values()))
    assert one.memory is not None
    at_once = min(clients_at_once(list(found.values())), 9)
    assert count_cost(tmp_path, [[list(found)]], found).peak_bytes == one.memory.peak_bytes(at_once)
    assert one.memory.peak_bytes(at_once) > (one.plan.peak_bytes or 0)


@pytest.mark.slow
def test_arms_whose_steps_are_alike_share_their_prediction_and_each_has_its_own(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = ["training.proximal_mu=0.0,0.5", "training.batch_size=2,4", "training.learning_rate=1e-3,1e-2", "seed=1,2"]
    right, traced = step_memory.predict_step, []

    def count(*words: Any, **named: Any) -> Any:
        traced.append(named)
        return right(*words, **named)

    monkeypatch.setattr(step_memory, "predict_step", count)
    combinations = list(expand(recipe_file, axes))
    found = prepare_all(combinations, Observer(), {})
    assert len(traced) == 4, "sixteen arms, with and without the proximal term, in two sizes of a batch"
    for combination in combinations[::5]:
        alone = prepare(combination.recipe, Observer(), gather(combination.recipe, Observer()))
        assert (alone.memory, alone.capacity) == (found[combination.name].memory, found[combination.name].capacity)
