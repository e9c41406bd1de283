"""The report of real runs, recomputed from their records; and of runs that are not done."""

import html
import json
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from support.made_runs import make_run
from support.marks import first
from support.tiny import make_recipe

from fedloom import run
from fedloom.errors import RunError
from fedloom.monitoring.observer import Observer
from fedloom.recipe.sections import Federation
from fedloom.records.privacy import explain_noise
from fedloom.records.run import Run, overfitting_onset, read_run
from fedloom.report import figures
from fedloom.report.document import to_markdown
from fedloom.report.figures import client_work, reach, roughness
from fedloom.report.plots import Line, Plot, draw
from fedloom.report.run_report import build_report, load_reference, write_report
from fedloom.report.setup_section import LORA_RULES

pytestmark = pytest.mark.draws

SECTIONS = [
    "Setup",
    "Loss trajectories",
    "Runtime and throughput",
    "Federation",
    "Communication",
    "Privacy",
    "Observations",
    "How to repeat it",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(make_recipe(), tmp_path_factory.mktemp("runs") / "run", Observer())


def tables(markdown: str) -> dict[str, list[list[str]]]:
    """Every table of a report, by its first heading cell and its section."""
    found: dict[str, list[list[str]]] = {}
    for section in markdown.split("\n## ")[1:]:
        title = re.sub(r"^\d+\. ", "", section.splitlines()[0])
        for block in re.findall(r"(?:^\|.*\n)+", section + "\n", flags=re.M):
            rows = [[cell.strip() for cell in line.strip("|\n ").split(" | ")] for line in block.strip().split("\n")]
            found[f"{title}/{rows[0][0]}"] = [rows[0], *rows[2:]]
    return found


def test_a_run_ends_with_its_report(finished: Run) -> None:
    found = {str(path.relative_to(finished.folder)) for path in finished.folder.rglob("*")}
    assert {"report.md", "report.html", "plots/loss.svg", "plots/clients.svg", "plots/time.svg"} <= found
    assert not [name for name in found if name.endswith(".tmp")]
    text = (finished.folder / "report.md").read_text()
    assert re.findall(r"^## \d+\. (.*)$", text, flags=re.M) == SECTIONS


def test_every_number_of_the_tables_is_in_the_records(finished: Run) -> None:
    found = tables((finished.folder / "report.md").read_text())
    rounds = [json.loads(line) for line in (finished.folder / "rounds.jsonl").read_text().splitlines()]
    clients = [json.loads(line) for line in (finished.folder / "clients.jsonl").read_text().splitlines()]

    def text(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form).replace("%", " %")

    assert found["Loss trajectories/Round"][1:] == [
        [
            str(record["round"]),
            text(record.get("train_loss"), ".4f"),
            text(record["client_loss"], ".4f"),
            text(record["central_loss"], ".4f"),
            text(record["central_perplexity"], ".3f"),
            text(record["central_accuracy"], ".2%"),
        ]
        for record in rounds
    ]
    assert found["Federation/Round"][1:] == [
        [
            str(record["round"]),
            text(record["proximal_loss"], ".3e"),
            text(record["proximal_ratio"], ".2%"),
            text(record["drift"], ".4f"),
            text(record["lora_error"], ".2%"),
            "all 3",
            "none",
            f"{100 * max(record['shares'].values()):.1f} % (client {max(record['shares'], key=record['shares'].get)})",
        ]
        for record in rounds[1:]
    ]
    phases = {row[0]: row[1:] for row in found["Runtime and throughput/Phase"][1:]}
    rates: dict[str, list[float]] = {"samples": [], "steps": [], "tokens": []}
    for record in rounds[1:]:
        mine = [client for client in clients if client["round"] == record["round"]]
        for rate, key in zip(rates.values(), ("examples", "steps", "tokens"), strict=True):
            rate.append(sum(client[key] for client in mine) / record["train_seconds"])
    seconds = [record["train_seconds"] for record in rounds[1:]]
    total = sum(r["train_seconds"] + r["aggregate_seconds"] + r["evaluate_seconds"] for r in rounds)
    assert phases["Training"] == [
        f"{statistics.fmean(seconds):.2f} ± {statistics.stdev(seconds):.2f}",
        *(f"{statistics.fmean(rate):,.2f} ± {statistics.stdev(rate):,.2f}" for rate in rates.values()),
        f"{100 * sum(seconds) / total:.1f} %",
    ]
    scored = [record["evaluate_samples"] / record["evaluate_seconds"] for record in rounds]
    assert phases["Evaluation"][1] == f"{statistics.fmean(scored):,.2f} ± {statistics.stdev(scored):,.2f}"
    payload = finished.plan["payload_bytes"] / 1000
    assert found["Communication/Round"][1][1:4] == [
        f"{3 * payload:.1f} kB",
        f"{3 * payload:.1f} kB",
        f"{payload:.1f} kB",
    ]


@pytest.mark.parametrize(
    ("kind", "says"), first([("fedavg", "by examples"), ("fedmedian", "every client with the same weight")])
)
def test_the_strategys_weights_are_said_as_they_were(kind: str, says: str, tmp_path: Path) -> None:
    finished = run(make_recipe(federation={"rounds": 1, "strategy": {"kind": kind}}), tmp_path / "run", Observer())
    (row,) = (
        line for line in (finished.folder / "report.md").read_text().splitlines() if line.startswith("| Strategy")
    )
    assert f"{kind}, " in row
    assert says in row


def test_evaluation_counts_what_it_scored(finished: Run) -> None:
    plan = finished.plan
    holdout = sum(client["holdout_tokens"] for client in plan["clients"])
    assert finished.rounds[0]["evaluate_tokens"] == plan["central_tokens"] + holdout
    assert finished.rounds[1]["evaluate_tokens"] == plan["central_tokens"] + 2 * holdout


def test_a_run_has_its_part_of_the_time_of_a_pass(finished: Run) -> None:
    """Ten runs' training is in the seconds of each: beside it, a run's own evaluation would look like nothing."""
    rounds = [{**r, "train_seconds": 10.0, "aggregate_seconds": 0.0, "evaluate_seconds": 1.0} for r in finished.rounds]
    alone = replace(finished, rounds=rounds)
    shared = replace(finished, rounds=[{**record, "runs_together": 10} for record in rounds])
    assert figures.phase_shares(alone)["evaluation"] == pytest.approx(1 / 11)
    assert figures.phase_shares(shared)["evaluation"] == pytest.approx(1 / 2)
    assert figures.total_seconds(shared) == pytest.approx(2 * len(rounds))
    rates = [figures.throughput(run, "training")["tokens/s"].mean for run in (alone, shared)]
    assert rates[1] == pytest.approx(10 * rates[0])
    assert figures.SHARED_PASS in to_markdown(build_report(shared))
    assert figures.SHARED_PASS not in to_markdown(build_report(alone))
    assert to_markdown(build_report(shared)).count("shared with 9 others in one pass") == 2, "beside both runtimes"
    assert "in one pass" not in to_markdown(build_report(alone))


def test_the_parts_of_a_run_are_told_from_what_is_on_record(tmp_path: Path) -> None:
    """It starts at 10:00:00 and ends at 10:01:40; the rounds take 1, 2.01 and 2.01 s."""
    ends = {round: {"finished": f"2026-11-22T10:00:{second}+00:00"} for round, second in enumerate((11, 20, 31))}
    made = make_run(tmp_path / "run", [3.0, 2.5, 2.2], more=ends)
    assert figures.run_parts(made) == pytest.approx(
        {"before the rounds": 10.0, "rounds": 5.02, "between rounds": 15.98, "after the rounds": 69.0}
    )
    found = tables(to_markdown(build_report(made)))["Runtime and throughput/Part of the run"]
    assert found[1:] == [
        ["Before the rounds", "10.0", "10 %"],
        ["Rounds", "5.0", "5 %"],
        ["Between rounds", "16.0", "16 %"],
        ["After the rounds", "69.0", "69 %"],
    ]
    went_on = replace(made, status={**made.status, "resumed": 1, "paused": 50.0})
    assert figures.run_parts(went_on) == pytest.approx({"rounds": 5.02, "all else": 44.98})
    for odd in ("soon", "2026-11-22T10:00:31"):
        cut = replace(made, rounds=[*made.rounds[:-1], {**made.rounds[-1], "finished": odd}])
        assert list(figures.run_parts(cut)) == ["rounds", "all else"]
    one_pass = replace(made, rounds=[{**record, "runs_together": 2} for record in made.rounds])
    assert figures.run_parts(one_pass) == figures.run_parts(replace(made, status={})) == {}


def test_memory_is_on_record_by_phase(finished: Run) -> None:
    assert set(finished.rounds[0]["ram_peak_bytes"]) == {"loading", "aggregation", "evaluation"}
    assert set(finished.rounds[1]["ram_peak_bytes"]) == {"training", "aggregation", "evaluation"}
    assert all(2**27 < size < 2**34 for record in finished.rounds for size in record["ram_peak_bytes"].values())


def test_the_page_needs_nothing_from_anywhere(finished: Run) -> None:
    page = (finished.folder / "report.html").read_text()
    links = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')\s>]+)', page)
    assert links
    assert all(link.startswith("#") for link in links)
    assert "<script" not in page
    assert page.count("<svg") == len(list((finished.folder / "plots").iterdir())) == 4


def test_the_same_records_give_the_same_files(finished: Run) -> None:
    before = {path: path.read_bytes() for path in finished.folder.rglob("*.*g") if path.suffix in (".svg",)}
    before |= {path: path.read_bytes() for path in (finished.folder / "report.md", finished.folder / "report.html")}
    write_report(finished.folder)
    assert {path: path.read_bytes() for path in before} == before


def test_no_torch_is_needed(finished: Run) -> None:
    code = (
        "import sys; from fedloom.report.run_report import write_report; from fedloom.report.comparison import"
        f" write_comparison; f = {str(finished.folder)!r}; write_report(f); write_comparison([f, f], f + '/both');"
        " assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("state", ["running", "failed", "interrupted"])
def test_a_run_that_is_not_done_says_so(state: str, tmp_path: Path) -> None:
    error = "round 2, client 1, step 3: the loss is nan" if state == "failed" else ""
    made = make_run(tmp_path / "run", [3.0, 2.5], state=state, error=error, federation={"rounds": 4})
    page = write_report(made.folder).read_text()
    said = {"running": "still running", "failed": "failed", "interrupted": "interrupted"}[state]
    assert f"This run is {said}" in page
    assert f"{said}, 1 of 4 rounds" in page
    assert error in page


def test_a_run_without_a_round_has_a_report(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", [3.0], state="running")
    (made.folder / "rounds.jsonl").write_text("")
    text = write_report(made.folder).with_suffix(".md").read_text()
    assert text.count("No round is complete yet.") == 2


def test_a_recipe_that_is_no_text_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [3.0, 2.0]).folder
    (run / "recipe.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(RunError, match=r"recipe.toml: not UTF-8: it is damaged; restore it, or move it away"):
        write_report(run)
    (run / "recipe.toml").unlink()
    assert "learning_rate" in write_report(run).with_suffix(".md").read_text()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run directory"):
        write_report(tmp_path)


@pytest.mark.parametrize("rule", ["factors", "fedsa"])
def test_clients_with_parts_of_their_own_are_said_to_be_scored_with_them(rule: str, tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", [3.0, 2.0], clients=[[3.0, 2.0]] * 3, federation={"lora_rule": rule, "rounds": 1})
    text = write_report(made.folder).with_suffix(".md").read_text()
    own = " (each with its own part)" if rule == "fedsa" else ""
    assert f"Each client's hold-out loss under the global adapter{own}." in text
    assert f"adapter from the global one at the end of the round{own}, mean over clients." in text


@pytest.mark.parametrize("rule", get_args(Federation.model_fields["lora_rule"].annotation))
def test_the_setup_says_in_words_what_becomes_of_loras_factors(rule: str, tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", [3.0], federation={"lora_rule": rule})
    text = write_report(made.folder).with_suffix(".md").read_text()
    assert f"; {LORA_RULES[rule]} ({rule}) |" in text


def test_the_setup_says_nothing_of_factors_where_there_are_none(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", [3.0], adapter={"method": "full", "rank": None, "alpha": None})
    assert "LoRA's" not in write_report(made.folder).with_suffix(".md").read_text()


def test_the_published_trajectory_is_laid_over(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", [3.0, 2.5])
    write_report(made.folder, reference="experiment")
    text = (made.folder / "report.md").read_text()
    page = html.unescape((made.folder / "report.html").read_text())
    for caveat in load_reference("experiment")["caveats"]:
        assert caveat in page
        assert caveat in text
    assert "The proximal term was never applied" in text
    assert "the last (2.1748) is one client's alone" in text
    assert "The full-model runs sent their weights in half precision" in text
    assert "while AdamW's moments were kept" in text
    assert "I. Kosiakov" in text
    svg = (made.folder / "plots" / "loss.svg").read_text()
    assert "published: LoRA, 2,000 files a client" in svg
    trajectories = load_reference("experiment")["trajectories"]
    assert [len(trajectory["central_loss"]) for trajectory in trajectories] == [21, 11, 11]
    assert trajectories[0]["central_loss"][10] == 2.2944
    with pytest.raises(RunError, match='no reference "nonsense"'):
        write_report(made.folder, reference="nonsense")


def test_the_best_round_and_the_onset_are_marked(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", [3.0, 2.0, 1.9, 2.1, 2.3], train=[2.5, 2.0, 1.5, 1.0])
    loss = next(figure for figure in build_report(made).figures if figure.name == "loss").plot
    assert [mark.name for mark in loss.marks] == ["best", "overfitting"]
    assert "overfitting" in draw(loss)
    falling = make_run(tmp_path / "falling", [3.0, 2.0, 1.9])
    assert "overfitting" not in draw(
        next(figure for figure in build_report(falling).figures if figure.name == "loss").plot
    )


def test_marks_of_many_rounds_do_not_hide_the_dashes_that_tell_lines_apart() -> None:
    def draw_rounds(number: int, *, joined: bool = True) -> int:
        lines = [Line(name, range(number), range(number), joined=joined) for name in ("one", "two")]
        return draw(Plot(lines, x_label="round", y_label="loss")).count("<use")

    assert draw_rounds(40) > 2 * 40
    assert draw_rounds(41) < 41, "ticks alone"
    assert draw_rounds(41, joined=False) > 2 * 41, "points without a line are all there is"


@pytest.mark.parametrize(
    ("examples", "epochs", "steps", "samples"),
    [(14, 2, 2, 14), (16, 2, 2, 16), (18, 2, 2, 18), (14, 2, 3, 26), (14, 2, 4, 28), (24, 1, 2, 24), (30, 3, 1, 12)],
)
def test_samples_are_those_of_short_last_batches(
    examples: int, epochs: int, steps: int, samples: int, tmp_path: Path
) -> None:
    made = make_run(tmp_path / "run", [3.0, 2.5], training={"batch_size": 12, "epochs": epochs, "max_steps": steps})
    reports = [{**report, "examples": examples, "steps": steps} for report in made.clients]
    assert client_work(replace(made, clients=reports), 1)[0] == 3 * samples


def test_samples_of_a_branch_are_all_its_clients_though_its_steps_are_those_of_one(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", [3.0, 2.5], training={"batch_size": 2, "epochs": 2})
    reports = [{**report, "examples": 30, "steps": 10} for report in made.clients]
    assert client_work(replace(made, clients=reports), 1)[0] == 3 * 60


def test_baselines_are_drawn_over_the_rounds_of_the_federation(tmp_path: Path) -> None:
    ends = {"pooled": {"losses": [3.0, 2.6, 2.4], "tokens": 9}}
    losses = [3.0, None, 2.5, None, 2.2]
    made = make_run(tmp_path / "run", losses, baselines=ends, evaluation={"every": 2})
    figure = next(figure for figure in build_report(made).figures if figure.name == "baselines")
    assert [list(line.x) for line in figure.plot.lines] == [[0, 2, 4], [0.0, 2.0, 4.0]]
    assert "Those of a baseline, 2, are spread over the federation's 4." in figure.caption
    alike = make_run(tmp_path / "alike", [3.0, 2.5, 2.2], baselines=ends)
    figure = next(figure for figure in build_report(alike).figures if figure.name == "baselines")
    assert "spread" not in figure.caption


@pytest.mark.parametrize(
    ("federation", "is_averaged"),
    [
        ({}, True),
        ({"lora_rule": "rolora"}, True),
        ({"lora_rule": "svd"}, False),
        ({"lora_rule": "fedex"}, False),
        ({"strategy": {"kind": "krum", "malicious": 0}}, False),
    ],
    ids=str,
)
def test_the_error_of_averaging_is_that_of_rules_that_average(
    federation: dict[str, Any], is_averaged: bool, tmp_path: Path
) -> None:
    made = make_run(tmp_path / "run", [3.0, 2.5], more={1: {"lora_error": 0.3}}, federation=federation)
    text = to_markdown(build_report(made))
    assert ("| LoRA averaging error |" in text) == is_averaged
    assert ("| Error, had factors been averaged |" in text) != is_averaged


@pytest.mark.parametrize(
    ("losses", "onset"),
    [
        ([], None),
        ([3.0], None),
        ([3, 2, 1], None),
        ([3, 2, 2.1], None),
        ([3, 2, 2.1, 2.2], 2),
        ([3, 2, 2.1, 2.05], None),
        ([3, 2, 2.1, 2.05, 2.2, 2.3], 4),
    ],
)
def test_overfitting_needs_two_rises(losses: list[float], onset: int | None) -> None:
    assert overfitting_onset(range(len(losses)), losses) == onset


def test_what_it_took_to_reach_a_loss(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", [3.0, 2.5, 2.0])
    assert reach(made, 2.5) == {"rounds": 1, "tokens": 300, "seconds": pytest.approx(3.01), "bytes": 6000}
    assert reach(made, 1.0) is None
    assert roughness([3, 2, 1]) == 0
    assert roughness([1, 2, 1]) == 0.5


def test_text_of_recipes_can_not_break_the_page(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script> | ** " + "x" * 400
    made = make_run(tmp_path / "run", [3.0, 2.5], plan={"data": hostile}, description=hostile)
    page = write_report(made.folder).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_a_report_says_where_the_clients_were(tmp_path: Path) -> None:
    """`fedloom run` of a served recipe would train on what the central hold-out is taken from."""
    terms = {"units": 9, "rate": 0.5, "noise_multiplier": 1.0, "steps": 2, "epsilon": 2.0, "recognised": 0.1}
    privacy = {
        "unit": "document", "delta": 1e-3, "max_norm": 1.0, "noise": "secret", "noise_over_signal": 0.1,
        "clients": {"0": terms, "1": terms},
    }  # fmt: skip
    here, there = (
        html.unescape(
            write_report(make_run(tmp_path / name, [3.0, 2.5], plan={"privacy": privacy, **more}).folder).read_text()
        )
        for name, more in (("here", {}), ("there", {"elsewhere": ["alice", "bob"], "data_revision": "unknown"}))
    )
    assert "All clients were on this machine" in here
    assert "All clients were on this machine" not in there
    assert "fedloom run " in here
    assert "fedloom run " not in there
    assert "fedloom serve " in there
    assert "1 (bob)" in there
    assert "(bob)" not in here
    assert "0 is alice, 1 is bob" in there
    assert "The recipe as it was given:" in here
    assert "The recipe as it was given, and the limits to what a client counts that a served run fills in" in there
    assert "3 in a round; split iid" in here
    assert "3 in a round; each with its owner's own documents" in there
    assert "split iid" not in there, "nothing was split"
    assert "at once" in here
    assert "at once" not in there, "each node decides"
    assert "some documents (a digest)" in here
    assert "(unknown)" not in there


def test_what_a_step_does_is_said_of_one_client_where_they_differ() -> None:
    """A probability, a noise and steps were told as all clients' that one of them has."""
    terms = {"units": 9, "rate": 0.5, "noise_multiplier": 1.0, "steps": 2, "epsilon": 2.0, "recognised": 0.1}
    told = {"unit": "document", "delta": 1e-3, "max_norm": 1.0, "noise": "secret", "noise_over_signal": 0.1}
    larger = {**terms, "units": 18, "rate": 0.25, "steps": 4, "epsilon": 1.9}
    alike, differ = ({**told, "clients": {"0": other, "1": terms}} for other in (terms, larger))
    assert explain_noise(alike).startswith("each step draws a document with probability 0.5, ")
    assert explain_noise(differ).startswith("at client 1, whose ε is the largest, each step draws a document with")


def test_a_report_while_it_runs(tmp_path: Path) -> None:
    seen = []

    class Watching(Observer):
        def show_round(self, record: dict) -> None:
            page = tmp_path / "run" / "report.html"
            seen.append(page.is_file() and "still running" in page.read_text())

    run(make_recipe(), tmp_path / "run", Watching(), watch=True)
    assert seen == [False, True, True]
    assert "done, 2 of 2 rounds" in (tmp_path / "run" / "report.html").read_text()
    assert read_run(tmp_path / "run").status["state"] == "done"


def test_rounds_that_take_much_longer_are_named(tmp_path: Path) -> None:
    spike = {"train": [0, 1, 1, 1, 1, 1], "evaluate": [2.0, 2.0, 2.1, 2.0, 2.05, 9.0]}
    calm = {"train": [0, 1, 1, 1, 1, 1], "evaluate": [2.0, 2.0, 2.1, 2.0, 2.05, 2.1]}
    for name, seconds, named in (("spike", spike, True), ("calm", calm, False)):
        made = make_run(tmp_path / name, [3.0, 2, 2, 2, 2, 2], seconds=seconds)
        text = write_report(made.folder).with_suffix(".md").read_text()
        assert ("Unusually long: round 5, evaluation: 9.0 s against a median of 2.0 s." in text) == named


def test_of_many_long_rounds_the_three_longest_are_named_and_a_blink_is_none(tmp_path: Path) -> None:
    train = [0.0, *[1.0] * 9, 4.0, 1.9, 3.0, 6.0, 5.0]
    made = make_run(tmp_path / "run", [3.0] * 15, seconds={"train": train, "evaluate": [0.1] * 14 + [0.4]})
    text = write_report(made.folder).with_suffix(".md").read_text()
    assert (
        "Unusually long: round 13, training: 6.0 s against a median of 1.0 s; round 14, training: 5.0 s against a"
        " median of 1.0 s; round 10, training: 4.0 s against a median of 1.0 s; and 1 more." in text
    )


@pytest.mark.parametrize("error", first([KeyboardInterrupt, RuntimeError]))
def test_a_run_that_ends_badly_has_a_report_that_says_so(error: type[BaseException], tmp_path: Path) -> None:
    class Failing(Observer):
        def show_round(self, record: dict) -> None:
            if record["round"] == 1:
                raise error

    with pytest.raises(error):
        run(make_recipe(), tmp_path / "run", Failing(), watch=True)
    said = "interrupted" if error is KeyboardInterrupt else "failed"
    assert f"{said}, 1 of 2 rounds" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.long
def test_a_plot_is_drawn_again_where_its_numbers_or_its_file_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, drawn = make_run(tmp_path / "run", [3.0, 2.0, 1.9]), []

    def drawing(plot: Plot) -> str:
        drawn.append(plot.y_label)
        return draw(plot)

    monkeypatch.setattr("fedloom.report.run_report.draw", drawing)
    first = write_report(made.folder).read_text()
    assert len(drawn) == 3
    assert write_report(made.folder).read_text() == first
    assert len(drawn) == 3, "nothing changed"
    loss = made.folder / "plots" / "loss.svg"
    loss.write_text(loss.read_text().replace("round", "rnd"))
    (made.folder / "plots" / "time.svg").unlink()
    assert write_report(made.folder).read_text() == first
    assert len(drawn) == 5, "an edited and a lost file"
    records = made.folder / "rounds.jsonl"
    records.write_text(records.read_text().replace('"central_loss": 1.9', '"central_loss": 1.8'))
    assert write_report(made.folder).read_text() != first
    assert len(drawn) == 6, "the loss alone"


@pytest.mark.parametrize("value", [0, 1e18])
def test_what_clients_tell_at_its_bounds_is_shown_and_breaks_no_page(
    value: float, finished: Run, tmp_path: Path
) -> None:
    """Whatever is only shown may be a lie: a page is made of it, and its numbers are those that were told."""
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    told = ("loss_first", "loss_last", "loss_mean", "proximal_loss", "proximal_ratio", "drift", "seconds")
    for name, keys in (("clients.jsonl", told), ("rounds.jsonl", ("train_loss", "drift", "proximal_ratio"))):
        lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for line in lines:
            line |= {key: value for key in keys if key in line}
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report(folder)
    text = (folder / "report.md").read_text()
    assert re.findall(r"^## \d+\. (.*)$", text, flags=re.M) == SECTIONS
    assert text != (finished.folder / "report.md").read_text()
    assert not re.search(r"\b(nan|inf)\b", text)
