"""Metrics by the rules of Prometheus' text format, with the run's own numbers, and without names."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import typer
from support.boards import asked, make_board, make_record
from support.tiny import make_recipe

from fedloom import run
from fedloom.monitoring.board import Board
from fedloom.monitoring.metrics import Metric, Metrics, measure, to_text
from fedloom.monitoring.observer import Observer
from fedloom.run_options import Asked, observed

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
SAMPLE = re.compile(rf"({NAME})(?:\{{({LABEL}(?:,{LABEL})*)\}})? (-?(?:\d[\d.e+-]*|Inf)|NaN)")


def read(text: str) -> dict[str, float]:
    """Read the exposition format by its rules; return each sample by its name and labels as they are written.

    One HELP and one TYPE for each name, before its samples, which stand together; no two samples alike; counters end
    in _total, and nothing else does; the last line ends.
    """
    assert text.endswith("\n")
    found: dict[str, float] = {}
    told: Counter[str] = Counter()
    kinds: dict[str, str] = {}
    for line in text[:-1].split("\n"):
        if comment := re.fullmatch(rf"# HELP ({NAME}) ((?:[^\\]|\\[\\n])+)", line):
            told[comment[1]] += 1
            current = comment[1]
        elif kind := re.fullmatch(rf"# TYPE ({NAME}) (counter|gauge)", line):
            assert kind[1] == current
            assert kind[1] not in kinds
            kinds[kind[1]] = kind[2]
            assert (kind[2] == "counter") == kind[1].endswith("_total")
        else:
            sample = SAMPLE.fullmatch(line)
            assert sample, line
            assert sample[1] == current
            assert sample[1] in kinds
            key = line.rpartition(" ")[0]
            assert key not in found
            found[key] = float(sample[3])
            assert kinds[current] == "gauge" or found[key] >= 0
    assert set(told.values()) == {1}
    return found


@pytest.mark.parametrize(
    "wrong",
    [
        "fedloom_loss 1\n",
        "# HELP a b\n# TYPE a counter\na 1.0\n",
        "# HELP a b\n# TYPE a gauge\na 1.0\na 2.0\n",
        '# HELP a b\n# TYPE a gauge\na{b="c"d"} 1.0\n',
        "# HELP a b\n# TYPE a gauge\na 1.0",
    ],
)
def test_what_breaks_the_format_is_found(wrong: str) -> None:
    with pytest.raises((AssertionError, UnboundLocalError)):
        read(wrong)


def test_they_are_the_numbers_of_the_records(tmp_path: Path) -> None:
    board = Board("fedloom run")
    done = run(make_recipe(), tmp_path / "run", Observer(), observers=[board])
    found = read(to_text(measure(board)))
    assert found["fedloom_rounds_total"] == 2
    assert found["fedloom_rounds_planned"] == 2
    assert found['fedloom_loss{of="central"}'] == done.rounds[-1]["central_loss"]
    assert found['fedloom_state{state="done"}'] == 1
    assert sum(value for key, value in found.items() if key.startswith("fedloom_state")) == 1
    for way in ("up", "down"):
        assert found[f'fedloom_bytes_total{{way="{way}"}}'] == sum(record[f"bytes_{way}"] for record in done.rounds)
    for phase in ("train", "aggregate", "evaluate"):
        of_records = sum(record[f"{phase}_seconds"] for record in done.rounds)
        assert found[f'fedloom_phase_seconds_total{{phase="{phase}"}}'] == pytest.approx(of_records)


def test_no_client_is_named_unless_that_is_asked_for() -> None:
    board = make_board(1, names=("alice", 'b"o\\b\n'))
    board.show_clients({"alice": "late", 'b"o\\b\n': "training"})
    board.show_round(make_record(1, lost=[0], lost_because={"0": "round 1, client 0, alice: no answer"}, epsilon=1.5))
    text = to_text(measure(board))
    found = read(text)
    assert "alice" not in text
    assert "mallory" not in text
    assert found['fedloom_clients{phase="late"}'] == 1
    assert found['fedloom_refusals_total{reason="late"}'] == 1
    assert found['fedloom_refusals_total{reason="turned away"}'] == 1
    assert found["fedloom_epsilon"] == 1.5
    named = read(to_text(measure(board, names=True)))
    assert named['fedloom_client_phase{client="alice",phase="late"}'] == 1
    assert named['fedloom_client_phase{client="b\\"o\\\\b\\n",phase="training"}'] == 1


def test_a_metric_without_a_value_is_left_out() -> None:
    assert to_text([Metric("fedloom_loss", "Loss.", [])]) == ""
    assert "fedloom_loss" not in to_text(measure(Board("fedloom run")))


def test_they_are_answered_at_an_address_and_health_beside_them() -> None:
    metrics = Metrics(make_board(), ("127.0.0.1", 0), lambda *told: None)
    try:
        assert metrics.port is not None
        with asked(metrics.port, "GET", "/metrics") as answer:
            assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
            assert read(answer.read().decode())["fedloom_rounds_total"] == 2
        with asked(metrics.port, "GET", "/health") as answer:
            assert (answer.status, json.loads(answer.read())) == (200, {"state": "working"})
        for path in ("/", "/run.json"):
            with asked(metrics.port, "GET", path) as answer:
                assert answer.status == 404
    finally:
        metrics.close()


def test_a_name_that_leads_to_this_machine_is_no_name_of_it() -> None:
    metrics = Metrics(make_board(), ("127.0.0.1", 0), lambda *told: None)
    named = (
        "localhost",
        "LOCALHOST:9",
        "127.0.0.1:9108",
        "[::1]:9108",
        "",
        "evil.example",
        "127.0.0.1.evil.example:80",
    )
    try:
        assert metrics.port is not None
        answers = []
        for host in named:
            for path in ("/metrics", "/health"):
                with asked(metrics.port, "GET", path, {"Host": host}) as answer:
                    answers.append(answer.status)
                    assert answer.status == 200 or b"loss" not in answer.read()
        assert answers == [200] * 10 + [421] * 4
    finally:
        metrics.close()


def test_names_without_metrics_are_refused() -> None:
    with (
        pytest.raises(typer.BadParameter, match="which is missing"),
        observed("fedloom run", None, lambda *told: None, Asked(metrics_names=True)),
    ):
        pass


def test_the_runs_of_a_queue_are_counted_by_state() -> None:
    board = Board("fedloom serve")
    assert "fedloom_queue" not in to_text(measure(board))
    board.show_queue([{"state": state} for state in ("done", "done", "failed", "running", "waiting")])
    board.show_next(None)
    found = read(to_text(measure(board)))
    counts = {"done": 2, "failed": 1, "running": 1, "waiting": 1}
    assert {state: found[f'fedloom_queue{{state="{state}"}}'] for state in counts} == counts
    assert found['fedloom_state{state="idle"}'] == 1
