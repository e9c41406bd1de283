"""What a person sees: on a terminal, and in a pipe."""

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.made_runs import make_run
from support.tiny import make_recipe

from fedloom import run
from fedloom.experiment.run import plan
from fedloom.monitoring.board import Board
from fedloom.monitoring.display import Terminal, describe_clients, describe_plan, format_round, round_header
from fedloom.monitoring.observer import Observer
from fedloom.progress import Clock, Progress
from fedloom.records.plan import UNKNOWN, explain_cut
from fedloom.text import format_bytes, format_seconds


def show(tmp_path: Path, *, terminal: bool) -> str:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=100, highlight=False)
    run(make_recipe(), tmp_path / "run", Terminal(console))
    return screen.getvalue()


def test_plain_lines_hold_the_plan_and_a_row_a_round(tmp_path: Path) -> None:
    shown = show(tmp_path, terminal=False)
    assert "\x1b" not in shown
    for name in ("model", "trainable", "data", "clients", "central", "audit", "work", "bytes", "device"):
        assert any(line.startswith(name) for line in shown.splitlines()), name
    table = shown[shown.rindex("round   train") :].splitlines()
    assert table[0].split() == ["round", "train", "clients", "central", "proximal", "drift", "seconds", "bytes"]
    assert [row.split()[0] for row in table[1:4]] == ["0", "1", "2"]
    assert "central loss " in shown


@pytest.mark.parametrize("capped", [False, True])
def test_the_last_lines_have_the_loss_that_chose_the_best_adapter(capped: bool, tmp_path: Path) -> None:
    """Without a central hold-out, as in many a deployment, they had none."""
    judged = {round: {"judged_loss": loss} for round, loss in enumerate((3.0, 2.0, 2.5))} if capped else {}
    losses = [3.0, 2.25, 2.125]
    made = make_run(tmp_path / "run", [None] * 3, clients=[losses, losses], more=judged)
    screen = io.StringIO()
    Terminal(Console(file=screen, width=100, highlight=False)).show_end(made, made.folder / "report.html")
    told = "clients' middle hold-out loss 3.0000 → 2.5000" if capped else "clients' hold-out loss 3.0000 → 2.1250"
    best = "round 1: 2.0000" if capped else "round 2: 2.1250"
    assert f"{told} nats a token, best in {best}" in screen.getvalue()


def test_a_terminal_has_a_bar_with_speed_and_time_left(tmp_path: Path) -> None:
    shown = show(tmp_path, terminal=True)
    assert "steps" in shown
    assert "tokens/s" in shown
    assert "left" in shown


@pytest.mark.parametrize("baselines", [["round0", "pooled"], ["round0"]], ids=len)
def test_what_follows_the_rounds_has_a_name_and_counts_to_the_end(
    baselines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedloom.monitoring.display.PLAIN_SECONDS", -1.0)
    recipe = make_recipe(federation={"rounds": 1}, baselines=baselines, personalise={}, contributions=True)
    screen, board = io.StringIO(), Board("fedloom run")
    run(recipe, tmp_path / "run", Terminal(Console(file=screen, width=200)), observers=[board])
    told = [line.split(": ", 1) for line in screen.getvalue().splitlines() if re.match("      .* steps  ", line)]
    total = sum(stage.steps for stage in plan(recipe).stages)
    assert {said.split(" steps")[0].split("/")[1] for _, said in told} == {f"{total:,}"}
    doing = [what.strip() for what, _ in told]
    assert [*dict.fromkeys(doing)][:3] == ["round 0, evaluating", "round 1, client 0", "round 1, client 1"]
    assert ("baselines, round 1" in doing) == ("pooled" in baselines), "round 0 is there already"
    assert {"by itself, client 2", "by itself, evaluating", "contributions, round 1"} <= {*doing}
    assert told[-1][1].startswith(f"{total:,}/{total:,} steps")
    assert told[-1][1].endswith(" 0:00 left")
    assert (board.work.doing, board.work.seconds_left) == ("done", 0)
    assert (board.work.round, board.work.rounds) == (1, 1)


class StopsInRound(Observer):
    """Interrupts a run after the first step of a round, as `fedloom stop` does."""

    def __init__(self, round: int) -> None:
        self.round = round

    def watch(self, progress: Progress) -> None:
        if progress.phase == "train" and progress.round == self.round:
            raise KeyboardInterrupt


@pytest.mark.parametrize("sections", [{}, {"evaluation": {"every": 2}, "federation": {"rounds": 4}}])
def test_a_run_that_goes_on_counts_the_steps_and_tokens_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any]
) -> None:
    monkeypatch.setattr("fedloom.monitoring.display.PLAIN_SECONDS", -1.0)
    recipe, screen, board = make_recipe(**sections), io.StringIO(), Board("fedloom run")
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "run", Observer(), observers=[StopsInRound(2)])
    planned = plan(recipe)
    steps, total = planned.steps_per_round, planned.rounds * planned.steps_per_round
    display = Terminal(Console(file=screen, width=200))
    run(recipe, tmp_path / "run", display, resume=True, observers=[board])
    told = [line for line in screen.getvalue().splitlines() if " steps  " in line]
    assert f": {steps + 1}/{total} steps" in told[0], "the first step of round 2"
    assert f": {total}/{total} steps" in told[-1]
    assert told[-1].endswith(" 0:00 left")
    assert board.work.seconds_left == 0


def test_a_sweep_has_the_steps_and_the_time_left_of_all_its_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedloom.monitoring.display.PLAIN_SECONDS", -1.0)
    clock = iter(range(1000))
    monkeypatch.setattr("fedloom.monitoring.display.Clock", lambda stages=(): Clock(stages, lambda: float(next(clock))))
    screen = io.StringIO()
    display = Terminal(Console(file=screen, width=200))
    planned = plan(make_recipe(federation={"rounds": 1}))
    (rounds,) = planned.stages
    display.show_sweep([rounds] * 3)
    display.show_pass(["one"], [planned])
    display.show_stage("rounds")
    display.watch(Progress("evaluate", rounds.evaluate, 1, 0))
    display.watch(Progress("train", rounds.train, 1, 1, 0))
    last = screen.getvalue().splitlines()[-1]
    assert f": 1/{3 * rounds.steps} steps" in last
    assert last.endswith("0:04 left"), "two more of each, at a tick of the clock"


def test_the_time_left_is_without_the_questions_that_are_to_come() -> None:
    screen = io.StringIO()
    display = Terminal(Console(file=screen, width=200))
    planned = replace(plan(make_recipe(federation={"rounds": 1})), tasks=("gsm8k",))
    display.show_plan(planned)
    display.show_stage("rounds")
    (rounds,) = planned.stages
    display.watch(Progress("evaluate", rounds.evaluate, 1, 0))
    display.watch(Progress("train", rounds.train, 1, 1, 0))
    assert display._pace("train").endswith(" 0:00 left before tasks")
    display.watch(Progress("ask", 100))
    assert display._describe_work(Progress("ask", 100)) == "round 1, asking tasks"
    assert "left" not in display._pace("ask")


def test_text_of_others_has_no_meaning_as_markup() -> None:
    screen = io.StringIO()
    display = Terminal(Console(file=screen, width=200))
    display.show_step("documents", "[bold]/data/[/nonsense]")
    assert "[bold]/data/[/nonsense]" in screen.getvalue()


def test_the_plan_names_what_was_skipped(write_jsonl) -> None:
    path = write_jsonl([*(f"document {i} with words {i * i}" for i in range(60)), "", {"other": 1}])
    screen = io.StringIO()
    display = Terminal(Console(file=screen, width=200))
    display.show_plan(
        plan(make_recipe(data={"source": str(path), "documents_per_client": None, "max_bad_fraction": 0.1}))
    )
    assert "1 empty, 1 without text in column text" in screen.getvalue()


def test_the_plan_says_how_much_of_long_texts_is_left_out_and_what_follows_the_rounds(write_jsonl) -> None:
    path = write_jsonl([f"{number} " + "x" * (28 if number % 2 else 298) for number in range(60)])
    data = {"source": str(path), "max_length": 32, "documents_per_client": None}
    told = describe_plan(plan(make_recipe(data=data, baselines=["pooled"], contributions=True)))
    mend = 'data.window = "blocks" takes them'
    assert re.fullmatch(
        rf"30 documents at data.max_length, which leaves out some \d\d % of all tokens; {mend}", told["cut"]
    )
    assert 78 <= int(told["cut"].split("some ")[1][:2]) <= 86, "300 of 30 + 300 characters, of which 32 and 31 are kept"
    assert re.search(r"; then baselines, \d+ steps; then contributions, \d+ steps$", told["work"])
    whole = describe_plan(plan(make_recipe(data={**data, "window": "blocks"})))
    assert "cut" not in whole
    assert "then" not in whole["work"]


def test_the_plan_is_wrapped_on_a_terminal_and_cuts_no_word_in_a_pipe() -> None:
    planned = replace(plan(make_recipe()), data="x" * 300, tasks=("one", "two"))
    screens = {terminal: io.StringIO() for terminal in (True, False)}
    for terminal, screen in screens.items():
        Terminal(Console(file=screen, force_terminal=terminal, width=80)).show_plan(planned)
    assert max(len(line) for line in re.sub(r"\x1b.*?m", "", screens[True].getvalue()).splitlines()) <= 80
    lines = screens[False].getvalue().splitlines()
    assert lines == [line.rstrip() for line in lines]
    assert f"{'data':<10}{'x' * 300}" in "\n".join(lines)
    assert [line.split() for line in lines if line.endswith(("one", "two"))] == [["tasks", "one"], ["two"]]


def test_the_plan_leaves_what_is_decided_elsewhere_to_the_clients_there() -> None:
    plain = {"peak_bytes": None, "clients_that_fit": None, "ample_memory": False, "clients_at_once": 1}
    here = replace(plan(make_recipe()), **plain)
    there = replace(
        here, elsewhere=("alice", "bob", "carol"), data="alice, bob, carol: each its own", data_revision=UNKNOWN
    )
    assert describe_plan(here)["memory"] == "not predicted; 1 client at once"
    assert describe_plan(there)["memory"] == "not predicted"
    assert describe_plan(there)["data"] == "alice, bob, carol: each its own"


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 B"), (999, "999 B"), (6_291_456, "6.3 MB"), (1.32e9, "1.3 GB"), (5e12, "5.0 TB")]
)
def test_bytes(count: float, said: str) -> None:
    assert format_bytes(count) == said


@pytest.mark.parametrize(("seconds", "said"), [(7.4, "0:07"), (83, "1:23"), (27_424, "7:37:04")])
def test_seconds(seconds: float, said: str) -> None:
    assert format_seconds(seconds) == said


def test_what_clients_do_stands_beneath_the_bar_and_many_are_counted() -> None:
    screen = io.StringIO()
    display = Terminal(Console(file=screen, force_terminal=True, width=80))
    display._start_bar()
    display.show_clients({"alice": "training", "bob": "answered"})
    display._bar.refresh()
    display.close()
    assert "alice training, bob answered" in screen.getvalue()
    many = {f"client-{number}": "training" for number in range(40)} | {"bob": "gone"}
    assert describe_clients(many) == "40 training, 1 gone"


def test_while_clients_train_the_bar_has_their_round() -> None:
    display = Terminal(Console(file=io.StringIO(), width=80))
    display.show_plan(plan(make_recipe()))
    display.show_stage("rounds")
    display.watch(Progress("evaluate", 10, 1))
    assert display._describe_work(Progress("evaluate", 10, 1)) == "round 0, evaluating"
    record = {"round": 0, "train_seconds": 0.0, "aggregate_seconds": 0.0, "evaluate_seconds": 0.0, "bytes_up": 0,
              "bytes_down": 0}  # fmt: skip
    display.show_round(record)  # type: ignore[arg-type]
    display.show_clients({"alice": "training"})
    assert display._bar.tasks[0].description == "round 1"
    assert display._describe_work(Progress("evaluate", 10, 1)) == "round 1", "it came with an answer"


def test_rounds_of_a_sweep_stand_beneath_the_name_of_their_loss() -> None:
    planned = plan(make_recipe())
    record = {"round": 11, "central_loss": 5.0059}
    for plans, loss in (
        ([planned], "central"),
        ([replace(planned, central_documents=0)], "clients"),
        ([planned, replace(planned, central_documents=0)], "   loss"),
    ):
        screen = io.StringIO()
        display = Terminal(Console(file=screen, width=80))
        display.show_pass(["seed=1"] * len(plans), plans)
        display.show_step("resumed", "seed=1: after round 10")
        display.show_trial("seed=1", record)  # type: ignore[arg-type]
        display.show_trial("seed=1", record)  # type: ignore[arg-type]
        row = "   11    5.0059  seed=1"
        assert screen.getvalue().splitlines()[-3:] == [f"round   {loss}  run", row, row]


def test_a_private_run_shows_what_was_spent_where_others_show_their_clients_losses() -> None:
    record = {"round": 3, "train_seconds": 1.0, "aggregate_seconds": 0.0, "evaluate_seconds": 0.0, "bytes_up": 0,
              "bytes_down": 0}  # fmt: skip
    for private, told, seen in ((True, {"epsilon": 4.567}, "4.57"), (False, {"train_loss": 4.567}, "4.5670")):
        header, row = round_header(private=private), format_round({**record, **told})
        assert header.split()[1] == ("ε" if private else "train")
        assert row.split()[1] == seen
        assert header.index(header.split()[1]) + len(header.split()[1]) == row.index(seen) + len(seen)
    assert "train" not in round_header(private=True)


def test_what_is_cut_is_never_said_to_be_all() -> None:
    told = explain_cut(
        {"cut": 3, "cut_tokens": 99_580, "clients": [{"tokens": 400, "holdout_tokens": 20}], "central_tokens": 0}
    )
    assert "leaves out some 99 % of all tokens" in told
