"""Runs as arms: which are pairs, what is said of their differences, and what is not."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.made_runs import make_run

from fedloom.errors import RunError
from fedloom.records.run import Run
from fedloom.report import figures
from fedloom.report.arms_section import compare_arms, draw_arms, group_runs
from fedloom.report.comparison import build_comparison, summarize, write_comparison
from fedloom.report.document import to_markdown
from fedloom.report.fairness import unfairness

pytestmark = pytest.mark.draws

MU = "training.proximal_mu"
NOISE = {1: 0.00, 2: 0.05, 3: -0.04}
"""What a seed adds to every run's loss: pairs see nothing of it."""


@pytest.fixture
def arm(tmp_path: Path) -> Callable[..., list[Run]]:
    def make(mu: float, last: float, *, odd: float = 0.0, **more: object) -> list[Run]:
        training = {"proximal_mu": mu, **more.pop("training", {})}  # type: ignore[dict-item]
        return [
            make_run(
                tmp_path / f"mu={mu}_seed={seed}_{last}",
                [3.0 + noise, last + noise + odd * (seed - 2)],
                seed=seed,
                training=training,
                **more,  # type: ignore[arg-type]
            )
            for seed, noise in NOISE.items()
        ]

    return make


def test_a_difference_is_seen_in_pairs_that_spread_alone_would_hide(arm: Callable[..., list[Run]]) -> None:
    runs = [*arm(0.1, 2.48, odd=0.001), *arm(0.0, 2.5)]
    grouped = group_runs(runs, [MU])
    assert [one.name for one in grouped.arms] == ["proximal_mu=0.0", "proximal_mu=0.1"], "numbers by their size"
    said = compare_arms(grouped, unfairness)
    assert said[0].startswith("proximal_mu=0.1 against proximal_mu=0.0: lower, by -0.0200 nats a token (95 % interval")
    assert "-0.0225 to -0.0175, 3 pairs, p < 0.001 (paired t), 0.25 (sign flips)" in said[0]
    assert said[1].startswith("With 3 pairs the sign-flip test has no p below 0.25, whatever the difference")
    assert len(said) == 2


def test_no_difference_is_said_as_plainly_with_what_is_not_excluded(arm: Callable[..., list[Run]]) -> None:
    said = compare_arms(group_runs([*arm(0.0, 2.5), *arm(0.1, 2.5, odd=0.01), *arm(1.0, 2.5)], [MU]), unfairness)
    assert "proximal_mu=0.1 against proximal_mu=0.0: no difference seen: +0.0000 nats a token" in said[0]
    assert said[0].endswith("One of 0.0248 is not excluded.")
    assert said[1] == "proximal_mu=1.0 against proximal_mu=0.0: no difference, in none of 3 pairs."
    assert said[-1].startswith("Each of 2 comparisons stands by itself")


def test_runs_without_a_seed_in_common_and_those_of_other_data_are_not_compared(
    arm: Callable[..., list[Run]], tmp_path: Path
) -> None:
    runs = arm(0.0, 2.5)
    other = make_run(tmp_path / "other", [3.0, 2.0], seed=9, training={"proximal_mu": 1.0})
    [said] = compare_arms(group_runs([*runs, other], [MU]), unfairness)
    assert said == "proximal_mu=1.0: not compared with proximal_mu=0.0. They have no seed in common."
    strange = arm(0.5, 2.0, plan={"data": "others"})
    [said] = compare_arms(group_runs([*runs, *strange], [MU]), unfairness)
    assert said.startswith("proximal_mu=0.5: not compared with proximal_mu=0.0. Other data")
    [said] = compare_arms(group_runs([runs[0], *arm(2.0, 2.0)[:1]], [MU]), unfairness)
    assert said.endswith("in a single pair, which says nothing of chance.")


def test_what_else_differs_is_said_and_pairs_are_alike_in_it(arm: Callable[..., list[Run]]) -> None:
    runs = [run for mu in (0.0, 0.1) for rate in (1e-3, 1e-2) for run in arm(mu, 2.5 - rate, training={})]
    for run, rate in zip(runs, [1e-3] * 3 + [1e-2] * 3 + [1e-3] * 3 + [1e-2] * 3, strict=True):
        run.recipe["training"]["learning_rate"] = rate
        run.recipe["training"]["epochs"] = 2 if run.recipe["training"]["proximal_mu"] else 1
    grouped = group_runs(runs, [MU])
    assert (list(grouped.beside), list(grouped.within)) == (["training.epochs"], ["training.learning_rate"])
    assert "6 pairs" in compare_arms(grouped, unfairness)[0]
    assert "Arms differ in this, too: training.epochs." in summarize(runs, grouped)
    text = to_markdown(build_comparison(runs, grouped))
    assert "Arms differ in this, too: training.epochs." in text
    assert "Within an arm these differ beside the seed: training.learning_rate." in text


def test_the_reference_is_chosen_by_name_or_value(arm: Callable[..., list[Run]]) -> None:
    runs = [*arm(0.0, 2.5), *arm(0.1, 2.4)]
    for against in ("0.1", "proximal_mu=0.1"):
        assert compare_arms(group_runs(runs, [MU], against), unfairness)[0].startswith(
            "proximal_mu=0.0 against proximal_mu=0.1: higher, by +0.1000"
        )
    both = group_runs(runs, [MU, "seed"], "0.1, 2")
    assert both.arms[both.reference].name == "proximal_mu=0.1, seed=2"


@pytest.mark.parametrize(
    ("by", "against", "says"),
    [
        (
            ["training.proximal_mue"],
            None,
            "no run has a key `training.proximal_mue`; did you mean `training.proximal_mu`",
        ),
        (["training.epochs"], None, "all runs have epochs=1"),
        ([MU], "7", 'no arm is "7"; choose one of: proximal_mu=0.0; proximal_mu=0.1'),
    ],
)
def test_arms_that_can_not_be_are_refused(
    by: list[str], against: str | None, says: str, arm: Callable[..., list[Run]]
) -> None:
    with pytest.raises(RunError, match=says):
        group_runs([*arm(0.0, 2.5), *arm(0.1, 2.4)], by, against)


def test_a_run_that_is_named_twice_is_refused(arm: Callable[..., list[Run]]) -> None:
    runs = arm(0.0, 2.5)
    with pytest.raises(RunError, match=r"two runs with proximal_mu=0\.0 are alike"):
        group_runs([*runs, runs[0], *arm(0.1, 2.4)], [MU])


def test_the_page_has_four_figures_and_the_terminal_a_short_table(
    arm: Callable[..., list[Run]], tmp_path: Path
) -> None:
    runs = [*arm(0.0, 2.5), *arm(0.1, 2.4, more={1: {"bytes_up": 270_000, "bytes_down": 270_000}})]
    lines: list[str] = []
    page = write_comparison([run.folder for run in runs], tmp_path / "out", by=[MU], say=lines.append)
    for name in ("arms-loss", "arms-last", "arms-drift", "arms-payload"):
        assert (tmp_path / "out" / "plots" / f"{name}.svg").read_text().startswith("<svg")
    assert ">proximal_mu=0.1<" in (tmp_path / "out" / "plots" / "arms-last.svg").read_text()
    assert page.read_text().count("<figcaption>") == 7
    assert lines[:3] == [
        "Arm              Runs        Last loss        Best loss            Drift  An update",
        "proximal_mu=0.0     3  2.5033 ± 0.0451  2.5033 ± 0.0451  0.5000 ± 0.0000     1.0 kB",
        "proximal_mu=0.1     3  2.4033 ± 0.0451  2.4033 ± 0.0451  0.5000 ± 0.0000    90.0 kB",
    ]
    assert any("lower, by -0.1000" in line for line in lines)
    same = build_comparison(runs[:3] + arm(0.2, 2.3), group_runs(runs[:3] + arm(0.3, 2.3), [MU]))
    assert "arms-payload" not in [figure.name for figure in same.figures]


def test_without_arms_the_terminal_has_a_row_for_each_run(tmp_path: Path) -> None:
    one, two = (make_run(tmp_path / name, [3.0, last], name=name) for name, last in (("one", 2.5), ("two", 2.4)))
    lines = summarize([one, two], None)
    assert lines[:3] == [
        "Run  Rounds    Best loss    Last loss  An update  All rounds",
        "one  1 of 2  2.5000 in 1  2.5000 in 1     1.0 kB       3.0 s",
        "two  1 of 2  2.4000 in 1  2.4000 in 1     1.0 kB       3.0 s",
    ]
    assert "After round 1, the last that all runs have, two is ahead: 2.4000, 0.1000 nats a token below one." in lines


@pytest.fixture
def unequal(tmp_path: Path) -> list[Run]:
    """Two arms of two seeds, alike in each round; a run of the second was stopped after round 1."""
    whole = [3.0, 2.5, 2.0, 1.5]
    cut = {(0.1, 2): 2}
    return [
        make_run(
            tmp_path / f"mu={mu}_seed={seed}", whole[: cut.get((mu, seed))], seed=seed, training={"proximal_mu": mu},
            federation={"rounds": 3},
        )
        for mu in (0.0, 0.1)
        for seed in (1, 2)
    ]  # fmt: skip


def test_runs_that_end_in_different_rounds_are_compared_after_the_last_that_all_have(unequal: list[Run]) -> None:
    grouped = group_runs(unequal, [MU])
    lines = summarize(unequal, grouped)
    assert lines[0].split("  ")[0] == "Arm"
    assert "Last shared loss  Best until then" in lines[0]
    assert all("2.5000 ± 0.0000  2.5000 ± 0.0000" in line for line in lines[1:3])
    assert "Runs end after round 1 to 3: they are compared after round 1, the last that all have." in lines
    assert "proximal_mu=0.1 against proximal_mu=0.0: no difference, in none of 2 pairs." in lines
    assert [line.y for line in draw_arms(grouped.arms)[1].plot.lines] == [[2.5], [2.5], [2.5] * 4]


def test_last_losses_of_different_rounds_would_be_caught(unequal: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: whatever round a run ended in, its last loss is taken."""
    monkeypatch.setattr("fedloom.report.arms_section.loss_after", lambda run, round: figures.judged_series(run)[2][-1])
    with pytest.raises(AssertionError):
        test_runs_that_end_in_different_rounds_are_compared_after_the_last_that_all_have(unequal)


def test_arms_by_their_number_of_rounds_are_compared_at_their_ends(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"{rounds}-{seed}", [3.0, 2.5, 2.0][: rounds + 1], seed=seed, federation={"rounds": rounds})
        for rounds in (1, 2)
        for seed in (1, 2)
    ]
    lines = summarize(runs, group_runs(runs, ["federation.rounds"]))
    assert "The last losses are of different rounds: 1 to 2." in lines
    assert any(line.startswith("rounds=2 against rounds=1: lower, by -0.5000 nats a token") for line in lines)


def test_runs_without_a_round_in_common_are_refused(tmp_path: Path) -> None:
    early, late = (make_run(tmp_path / name, losses) for name, losses in (("a", [3.0, None]), ("b", [None, 2.5])))
    with pytest.raises(RunError, match="no round was evaluated in all of the runs"):
        write_comparison([early.folder, late.folder], tmp_path / "out")


def test_rounds_that_are_not_one_after_another_are_refused(tmp_path: Path) -> None:
    one, two = (make_run(tmp_path / name, [3.0, 2.5, 2.4]).folder for name in ("one", "two"))
    first, _, last = (two / "rounds.jsonl").read_text().splitlines()
    (two / "rounds.jsonl").write_text(f"{first}\n{last}\n")
    with pytest.raises(RunError, match=r"two/rounds\.jsonl: its rounds are not one after another"):
        write_comparison([one, two], tmp_path / "out")


def test_a_method_that_begins_elsewhere_is_still_fair(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", [3.0, 2.5])
    two = make_run(tmp_path / "two", [3.4, 2.5], adapter={"method": "prompt_tuning", "rank": None, "alpha": None})
    assert unfairness([one, two], ["one", "two"]) == []
