"""Parts of one's own: a strategy, an observer, and a strategy that another package offers."""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny import make_recipe

from fedloom import run
from fedloom.adapters.adapter import Adapter
from fedloom.errors import RecipeError, RunError, TrainingError
from fedloom.federation.aggregation import once_all_are_there
from fedloom.monitoring.observer import Observer
from fedloom.records.run import RoundRecord
from fedloom.training.jobs import ClientUpdate


def median(adapter: Adapter, updates: Sequence[ClientUpdate]) -> Adapter:
    weights_KP = torch.stack([update.adapter.weights_P.double() for update in updates])
    return replace(adapter, weights_P=weights_KP.quantile(0.5, dim=0).float())


class StopsAt(Observer):
    """Ends a run once its loss is low enough, and keeps what it was asked about."""

    def __init__(self, loss: float) -> None:
        self.loss = loss
        self.rounds: list[int] = []

    def stop_after(self, record: RoundRecord) -> str | None:
        self.rounds.append(record["round"])
        return "the loss is low enough" if record["central_loss"] < self.loss else None


def test_a_strategy_of_ones_own_takes_the_place_of_the_recipes(tmp_path: Path) -> None:
    mine = run(make_recipe(), tmp_path / "mine", Observer(), aggregate=once_all_are_there(median))
    theirs = run(make_recipe(federation={"strategy": {"kind": "fedmedian"}}), tmp_path / "theirs", Observer())
    plain = run(make_recipe(), tmp_path / "plain", Observer())
    assert mine.rounds[-1]["adapter_sha256"] == theirs.rounds[-1]["adapter_sha256"]
    assert mine.rounds[-1]["adapter_sha256"] != plain.rounds[-1]["adapter_sha256"]


@pytest.mark.long
def test_an_observer_of_ones_own_is_told_of_every_round_and_can_end_the_run(tmp_path: Path) -> None:
    recipe = make_recipe(federation={"rounds": 4})
    whole = run(recipe, tmp_path / "whole", Observer())
    stops = StopsAt(whole.rounds[1]["central_loss"])
    finished = run(recipe, tmp_path / "stopped", Observer(), observers=[stops])
    assert stops.rounds == [record["round"] for record in finished.rounds] == [0, 1, 2]
    assert finished.status["state"] == "done"
    assert finished.status["stopped_early"] == "4 scheduled, 2 completed: the loss is low enough"
    assert finished.rounds[-1]["adapter_sha256"] == whole.rounds[2]["adapter_sha256"]


class Breaks(Observer):
    """Interrupts a run after its first round, as Ctrl-C does."""

    def show_round(self, record: RoundRecord) -> None:
        if record["round"] == 1:
            raise KeyboardInterrupt


@pytest.mark.long
def test_a_run_that_goes_on_asks_about_the_rounds_that_it_has(tmp_path: Path) -> None:
    recipe = make_recipe(federation={"rounds": 4})
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "run", Observer(), observers=[Breaks()])
    first = run(recipe, tmp_path / "whole", Observer()).rounds[0]["central_loss"]
    stops = StopsAt(first)
    finished = run(recipe, tmp_path / "run", Observer(), resume=True, observers=[stops])
    assert stops.rounds == [0, 1]
    assert finished.status["stopped_early"] == "4 scheduled, 1 completed: the loss is low enough"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package as pip installs it, with a strategy that halves what the median changes."""
    site = tmp_path / "site"
    (site / "calm-1.0.dist-info").mkdir(parents=True)
    (site / "calm-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: calm\nVersion: 1.0\n")
    (site / "calm-1.0.dist-info" / "entry_points.txt").write_text("[fedloom.strategies]\nhalf = calm:half\n")
    (site / "calm.py").write_text(
        "from dataclasses import replace\n"
        "from fedloom.federation.aggregation import once_all_are_there, weighted_mean\n"
        "def half(strategy):\n"
        "    share = strategy.options.get('share', 0.5)\n"
        "    def combine(adapter, updates):\n"
        "        mean = weighted_mean(adapter, updates, lambda report: report.examples)\n"
        "        change = mean.weights_P - adapter.weights_P\n"
        "        return replace(adapter, weights_P=adapter.weights_P + share * change)\n"
        "    return once_all_are_there(combine)\n"
    )
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "calm", raising=False)


@pytest.mark.long
@pytest.mark.usefixtures("package")
def test_a_strategy_of_an_installed_package_is_named_in_the_recipe(tmp_path: Path) -> None:
    def final(name: str, **strategy: object) -> str:
        recipe = make_recipe(federation={"rounds": 1, "strategy": strategy})
        return str(run(recipe, tmp_path / name, Observer()).rounds[-1]["adapter_sha256"])

    plain, half = final("plain", kind="fedavg"), final("half", kind="calm:half")
    none = final("none", kind="calm:half", options={"share": 0.0})
    assert len({plain, half, none}) == 3
    assert (
        none == run(make_recipe(federation={"rounds": 1}), tmp_path / "start", Observer()).rounds[0]["adapter_sha256"]
    )


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("kind", "says"),
    [("calm:third", "it offers: calm:half"), ("nobody:half", "install nobody")],
)
def test_one_that_is_not_there_says_what_is(kind: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=says):
        run(make_recipe(federation={"strategy": {"kind": kind}}), tmp_path / "run", Observer())
    assert not (tmp_path / "run").exists()


def test_options_are_for_strategies_of_packages_alone() -> None:
    with pytest.raises(ValueError, match="does not use options"):
        make_recipe(federation={"strategy": {"kind": "fedavg", "options": {"share": 1}}})


@pytest.mark.long
def test_a_run_with_a_strategy_of_ones_own_says_so_and_goes_on_with_it_alone(tmp_path: Path) -> None:
    recipe, own = make_recipe(federation={"rounds": 3}), once_all_are_there(median)
    whole = run(recipe, tmp_path / "whole", Observer(), aggregate=own)
    assert "Strategy" in (text := (tmp_path / "whole" / "report.md").read_text())
    assert "median, the caller's own" in text
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "run", Observer(), observers=[Breaks()], aggregate=own)
    with pytest.raises(RunError, match=r"began with aggregate= \(median\)"):
        run(recipe, tmp_path / "run", Observer(), resume=True)
    finished = run(recipe, tmp_path / "run", Observer(), resume=True, aggregate=own)
    assert finished.rounds[-1]["adapter_sha256"] == whole.rounds[-1]["adapter_sha256"]
    with pytest.raises(RunError, match=r"began with aggregate= \(median\)"):  # done, but not that other run
        run(recipe, tmp_path / "run", Observer(), resume=True)


def test_a_strategy_whose_adapter_is_not_finite_is_named_and_not_the_clients(tmp_path: Path) -> None:
    def broken(start: Adapter, updates: Sequence[ClientUpdate]) -> Adapter:
        return replace(start, weights_P=start.weights_P * math.nan)

    with pytest.raises(TrainingError, match="round 1, aggregation: the strategy's adapter has weights that are not"):
        run(make_recipe(), tmp_path / "run", Observer(), aggregate=once_all_are_there(broken))


def test_a_strategy_of_ones_own_leaves_no_rule_of_the_recipe_out(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match='takes the place of lora_rule = "fedex" too'):
        run(
            make_recipe(federation={"lora_rule": "fedex"}),
            tmp_path / "run",
            Observer(),
            aggregate=once_all_are_there(median),
        )
    assert not (tmp_path / "run").exists()
