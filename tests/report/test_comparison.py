"""Runs side by side: what differs, what it took, and when a comparison is not fair."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.made_runs import make_run

from fedloom.errors import RunError
from fedloom.host.files import take_lock
from fedloom.records.run import Run
from fedloom.report.arms_section import group_runs
from fedloom.report.comparison import (
    build_comparison,
    conclude,
    recipe_differences,
    runs_in,
    summarize,
    write_comparison,
)
from fedloom.report.document import Table, to_markdown
from fedloom.report.fairness import OVER_SEEDS, mixes_seeds, unfairness, unfairness_in_tables

pytestmark = pytest.mark.draws


def test_only_what_differs_is_shown(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", [3.0, 2.5], name="one", training={"proximal_mu": 0.1})
    two = make_run(tmp_path / "two", [3.0, 2.4], name="two", training={"proximal_mu": 0.2})
    assert recipe_differences([one, two]) == {"training.proximal_mu": [0.1, 0.2]}
    assert unfairness([one, two], ["one", "two"]) == []
    text = to_markdown(build_comparison([one, two]))
    assert "| training.proximal_mu | 0.1 | 0.2 |" in text
    assert "| Loss, round 0 → 1 | 3.0000 → 2.5000 | 3.0000 → 2.4000 |" in text
    assert "| Δ loss (0 → 1) | -0.5000 | -0.6000 |" in text


def test_the_title_is_short_and_the_names_are_below(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "mine" / f"seed={seed}", [3.0, 2.5], name="tiny", seed=seed) for seed in (1, 2, 3, 4)]
    few, many = build_comparison(runs[:2]), build_comparison(runs)
    assert (few.title, few.subtitle) == ("Comparison: seed=1, seed=2", "2 runs")
    assert (many.title, many.subtitle) == ("Comparison: tiny, 4 runs", "4 runs: seed=1, seed=2, seed=3, seed=4")
    other = make_run(tmp_path / "other", [3.0, 2.5], name="other")
    assert build_comparison([*runs, other]).title == "Comparison: 5 runs"
    (tmp_path / "mine" / "sweep.json").write_text("{}")
    swept = build_comparison(runs[:2])
    assert (swept.title, swept.subtitle) == ("Comparison: mine", "2 runs: seed=1, seed=2")


def test_seconds_of_a_pass_say_whose_they_are(tmp_path: Path) -> None:
    together = {1: {"runs_together": 2}}
    one, two = (
        make_run(tmp_path / "a", [3.0, 2.5], name="a", more=together),
        make_run(tmp_path / "b", [3.0, 2.5], name="b"),
    )
    text = to_markdown(build_comparison([one, two]))
    assert "| Runtime | 100 s (1:40), shared with 1 other in one pass | 100 s (1:40) |" in text
    assert "| A round | 1.5 s, its part | 2.0 s |" in text


def test_the_change_is_over_the_rounds_they_share(tmp_path: Path) -> None:
    long = make_run(tmp_path / "long", [3.0, 2.5, 2.2, 2.0], name="long")
    short = make_run(tmp_path / "short", [3.0, 2.6], name="short")
    text = to_markdown(build_comparison([long, short]))
    assert "| Loss, round 0 → 1 | 3.0000 → 2.5000 | 3.0000 → 2.6000 |" in text
    assert "| Δ loss (0 → 1) | -0.5000 | -0.4000 |" in text
    assert "| Last loss | 2.0000 in round 3 | 2.6000 in round 1 |" in text


def test_convergence_is_what_it_took_to_reach_a_loss(tmp_path: Path) -> None:
    quick = make_run(tmp_path / "quick", [3.0, 2.2, 2.0], name="quick")
    slow = make_run(tmp_path / "slow", [3.0, 2.8, 2.2], name="slow")
    text = to_markdown(build_comparison([quick, slow]))
    assert "| Rounds to 2.2000 | 1 | 2 |" in text
    assert "| Tokens to 2.2000 | 300 | 600 |" in text
    assert "| Seconds to 2.2000 | 3.0 | 5.0 |" in text
    assert "| Bytes to 2.2000 | 6.0 kB | 12.0 kB |" in text


@pytest.mark.parametrize(
    ("plan", "sections", "warns"),
    [
        ({"model": "another"}, {}, "other base models"),
        ({"central_tokens": 7}, {}, "other central hold-outs"),
        ({}, {"data": {"max_length": 64}}, "other tokens in a block"),
        ({"data": "others"}, {}, "other data"),
        ({}, {"seed": 8, "training": {"proximal_mu": 0.3}}, "other central hold-outs"),
    ],
)
def test_what_is_not_fair_is_said(plan: dict, sections: dict, warns: str, tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", [3.0, 2.5], name="one")
    two = make_run(tmp_path / "two", [3.0, 2.4], name="two", plan=plan, **sections)
    assert any(warns in warning for warning in unfairness([one, two], ["one", "two"]))
    assert f"**Note:** two: {warns} than one" in to_markdown(build_comparison([one, two]))


def test_runs_that_are_compared_within_a_seed_are_no_alarm(tmp_path: Path) -> None:
    """Their tables are over other hold-outs, which is said once, and nothing is ahead of what it is not set against."""
    runs = [
        make_run(tmp_path / f"{mu}-{seed}", [3.0 + seed, 2.0 + seed + mu], seed=seed, training={"proximal_mu": mu})
        for mu in (0.1, 0.2)
        for seed in (1, 2)
    ]
    names = ["one", "two", "three", "four"]
    arms = group_runs(runs, ["training.proximal_mu"])
    for these, grouped in ((runs, None), (runs, arms), (runs[:2], None)):
        text = to_markdown(build_comparison(these, grouped))
        assert text.count(OVER_SEEDS) == summarize(these, grouped).count(OVER_SEEDS) == 1
        assert "can't be compared" not in text + " ".join(summarize(these, grouped))
        assert "ahead" not in text
    assert not mixes_seeds([runs[0], runs[3]])
    assert "other central hold-outs" in unfairness([runs[0], runs[3]], ["one", "four"])[0]
    for odd, plan, warns in (
        (3, {"model": "another"}, "four: other base models than one"),
        (2, {"central_tokens": 7}, "three: other central hold-outs than one"),
    ):
        changed = [replace(run, plan={**run.plan, **plan}) if number == odd else run for number, run in enumerate(runs)]
        assert unfairness_in_tables(changed, names) == [f"{warns}. Their losses can't be compared."]


def test_other_starting_losses_are_a_warning(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one", [3.0, 2.5], name="one"), make_run(tmp_path / "two", [3.2, 2.5], name="two")
    assert "begin with different losses" in unfairness([one, two], ["one", "two"])[0]


EVENLY = [[3.0, 2.5, 2.4], [3.0, 2.6, 2.5], [3.0, 2.7, 2.6]]
"""Losses of three clients' hold-outs, by round."""


def test_without_a_central_hold_out_the_same_clients_must_be_scored(tmp_path: Path) -> None:
    def judge(name: str, **more: Any) -> Run:
        return make_run(tmp_path / name, [None] * 3, name=name, **{"clients": EVENLY, **more})

    all_of_them, one_of_them = judge("all"), judge("one", clients=EVENLY[:1])
    assert unfairness([all_of_them, judge("same")], ["all", "same"]) == []
    odd = {
        "one": one_of_them,
        "central": make_run(tmp_path / "central", [3.0, 2.5, 2.4], name="central"),
        "others": judge("others", plan={"clients": [{"train_documents": 10, "holdout_documents": 3}] * 3}),
        "divided": judge("divided", data={"partition": {"kind": "dirichlet", "by": "x", "alpha": 1.0}}),
    }
    for name, run in odd.items():
        assert unfairness([all_of_them, run], ["all", name]) == [
            f"{name}: other hold-outs than all. Their losses can't be compared."
        ]
        assert not any(word in " ".join(conclude([all_of_them, run], ["all", name])) for word in ("ahead", "fastest"))
    # Losses that differ by less than a thousandth are not of the same documents, though as many are held out.
    near = judge("near", clients=[[3.001, 2.0, 2.0], *EVENLY[1:]])
    assert "begin with different losses" in unfairness([all_of_them, near], ["all", "near"])[0]
    capped = judge("capped", federation={"max_share": 0.5})
    assert "capped: other measures of the loss" in unfairness([all_of_them, capped], ["all", "capped"])[0]
    central = [
        make_run(tmp_path / f"central-{share}", [3.0, 2.5], name="x", federation={"max_share": share})
        for share in (None, 0.5)
    ]
    assert unfairness(central, ["a", "b"]) == []


def test_first_falls_are_over_the_same_rounds(tmp_path: Path) -> None:
    each = make_run(tmp_path / "each", [3.0, 2.8, 2.5, 2.4], name="each")
    every = make_run(tmp_path / "every", [3.0, None, 2.5, 2.4], name="every", evaluation={"every": 2})
    assert not [line for line in conclude([each, every], ["each", "every"]) if "fastest" in line]
    slow = make_run(tmp_path / "slow", [3.0, 2.7, 2.6, 2.4], name="slow")
    said = "every falls fastest at first: 0.5000 in its first 2 rounds, slow 0.4000."
    assert said in conclude([slow, every], ["slow", "every"])


def test_runs_of_several_seeds_are_one_with_a_spread(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"seed-{seed}", [3.0, last], name="same", seed=seed) for seed, last in ((1, 2.0), (2, 2.2))
    ]
    document = build_comparison(runs)
    assert "comparison-seeds" in [figure.name for figure in document.figures]
    tables = [block for section in document.sections for block in section.blocks if isinstance(block, Table)]
    seeds = next(table for table in tables if "Seeds" in table.header)
    assert list(seeds.rows) == [["seed-1 and 1 more", "1, 2", "2.1000 ± 0.1414", "2.1000"]]


def test_a_client_with_more_than_half_of_the_weight_is_named(tmp_path: Path) -> None:
    more = {1: {"shares": {"0": 0.9, "1": 0.1}}}
    one, two = (
        make_run(tmp_path / name, [3.0, 2.5], name=name, more=shares) for name, shares in (("a", more), ("b", {}))
    )
    weights = [sentence for sentence in conclude([one, two], ["a", "b"]) if "weight" in sentence]
    assert weights == ["a: Client 0 had up to 90 % of a round's weight, more than all others together."]


def test_it_writes_a_page(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, [3.0, 2.5], name=name).folder for name in ("one", "two")]
    page = write_comparison(folders, tmp_path / "both")
    assert page == tmp_path / "both" / "comparison.html"
    assert page.read_text().count("<svg") == 2
    assert (tmp_path / "both" / "comparison.md").is_file()
    assert (tmp_path / "both" / "plots" / "comparison-loss.svg").is_file()


def test_one_run_is_no_comparison(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", [3.0, 2.5])
    with pytest.raises(RunError, match="two runs or more"):
        write_comparison([one.folder], tmp_path / "both")
    two = make_run(tmp_path / "two", [3.0])
    (two.folder / "rounds.jsonl").write_text("")
    with pytest.raises(RunError, match="no round of it has a loss on record; leave it out, or see what is: fedloom"):
        write_comparison([one.folder, two.folder], tmp_path / "both")
    with closing(take_lock(two.folder)), pytest.raises(RunError, match="on record; wait for the first evaluation"):
        write_comparison([one.folder, two.folder], tmp_path / "both")
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize("done", [0, 1])
def test_a_sweep_that_is_not_finished_says_how_many_of_its_runs_are(done: int, tmp_path: Path) -> None:
    """It asked for another run directory, where the sweep had three and none was done."""
    for number, name in enumerate("abc"):
        make_run(tmp_path / "sweep" / name, [3.0, 2.5], state="done" if number < done else "interrupted")
    (tmp_path / "sweep" / "sweep.json").write_text('{"a": {}, "b": {}, "c": {}}')
    with pytest.raises(RunError, match=f"/sweep: a comparison needs two runs or more, and {done} of 3 are fin") as told:
        write_comparison([tmp_path / "sweep"], tmp_path / "both")
    assert f"fedloom status {tmp_path / 'sweep'} says how" in told.value.mend


def test_its_words_follow_its_numbers(tmp_path: Path) -> None:
    half = {round: {"bytes_up": 1500, "bytes_down": 1500} for round in range(1, 5)}
    quick = make_run(tmp_path / "quick", [3.0, 2.2, 1.9, 2.0, 2.1], name="quick", more=half)
    slow = make_run(
        tmp_path / "slow", [3.0, 2.8, 2.5], name="slow", seconds={"train": [0, 3, 3], "evaluate": [1, 1, 1]}
    )
    assert conclude([quick, slow], ["quick", "slow"]) == [
        "After round 2, the last that all runs have, quick is ahead: 1.9000, 0.6000 nats a token below slow.",
        "quick falls fastest at first: 0.8000 in its first round, slow 0.2000.",
        "Divergence: quick from round 3.",
        "No run overfits in the rounds on record.",
        "slow sends 2.0 times the bytes of quick in an update.",
        "A round of slow takes 4.0 s, 2.0 times one of quick.",
    ]
    assert conclude([slow, slow], ["slow", "again"]) == ["No run overfits in the rounds on record."]
    rounded = make_run(tmp_path / "rounded", [3.0, 2.8, 2.50001], name="rounded")
    assert conclude([slow, rounded], ["slow", "rounded"])[0] == (
        "After round 2, the last that all have, none is ahead by 0.0001 nats a token."
    )


def test_overfitting_is_what_the_training_loss_makes_of_a_rise(tmp_path: Path) -> None:
    losses = [3.0, 2.2, 1.9, 2.0, 2.1]
    learns = make_run(tmp_path / "learns", losses, name="learns", train=[2.5, 2.0, 1.5, 1.0])
    breaks = make_run(tmp_path / "breaks", losses, name="breaks")
    said = conclude([learns, breaks], ["learns", "breaks"])
    assert said[:2] == ["Overfitting: learns from round 3.", "Divergence: breaks from round 3."]
    text = to_markdown(build_comparison([learns, breaks]))
    assert "| Loss rises | overfitting from round 3 | divergence from round 3 |" in text
    assert "| Held-out above training loss | +1.1000 in round 4 | +0.0000 in round 4 |" in text


def test_of_seeds_that_end_elsewhere_the_last_loss_is_called_shared(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"seed-{seed}", losses, name="same", seed=seed)
        for seed, losses in ((1, [3.0, 2.0]), (2, [3.0, 2.2, 1.0]))
    ]
    text = to_markdown(build_comparison(runs))
    assert "| Runs | Seeds | Last shared loss | Best mean until then |" in text
    assert "| 2.1000 ± 0.1414 | 2.1000 |" in text


def test_words_about_losses_are_only_for_losses_of_the_same_thing(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", [3.0, 2.5], name="one")
    two = make_run(tmp_path / "two", [3.0, 2.0], name="two", plan={"model": "another"})
    assert not any("ahead" in sentence or "fastest" in sentence for sentence in conclude([one, two], ["one", "two"]))
    rising = [make_run(tmp_path / f"r{n}", [3.0, 3.0 + n / 10], name=f"r{n}") for n in (1, 2)]
    assert not any("fastest" in sentence for sentence in conclude(rising, ["r1", "r2"]))


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / seed / "run", [3.0, 2.5], name="same") for seed in ("a", "b")]
    assert build_comparison(runs).title == "Comparison: run (1), run (2)"


def test_a_sweeps_folder_stands_for_its_finished_runs(tmp_path: Path) -> None:
    for name, state in (("b", "done"), ("a", "done"), ("c", "failed")):
        make_run(tmp_path / "sweep" / name, [3.0, 2.5], state=state)
    (tmp_path / "sweep" / "sweep.json").write_text('{"b": {}, "a": {}, "c": {}, "d": {}}')
    assert runs_in(tmp_path / "sweep") == [tmp_path / "sweep" / "b", tmp_path / "sweep" / "a"]
    assert write_comparison([tmp_path / "sweep"], tmp_path / "out").is_file()


def test_a_heading_may_break_within_the_name_of_a_run_and_is_escaped(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"rounds={rounds}_rate=<i>", [3.0, 2.0]) for rounds in (2, 4)]
    page = write_comparison([run.folder for run in runs], tmp_path).read_text()
    assert "<th>rounds=<wbr>2_<wbr>rate=<wbr>&lt;i&gt;</th>" in page
    assert "<wbr>" not in (tmp_path / "comparison.md").read_text()
