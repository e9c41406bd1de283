"""What is kept of a run for whoever asks while it works."""

import json
from pathlib import Path

import pytest
from support.boards import HOSTILE, make_board, make_record
from support.tiny import make_recipe

from fedloom import run
from fedloom.monitoring.board import MOST_POINTS, MOST_ROWS, MOST_TROUBLES, Board
from fedloom.monitoring.display import COLUMNS
from fedloom.monitoring.observer import Observer


def test_it_says_of_a_run_what_the_records_say(tmp_path: Path) -> None:
    board = Board("fedloom run", None)
    done = run(make_recipe(), tmp_path / "run", Observer(), observers=[board])
    shown = board.document()
    assert shown["state"] == "done"
    assert (shown["round"], shown["rounds"]) == (2, 2)
    assert shown["losses"]["central"] == [(record["round"], record["central_loss"]) for record in done.rounds]
    assert shown["losses"]["clients"] == [(record["round"], record["client_loss"]) for record in done.rounds]
    assert shown["columns"] == [name for name, _ in COLUMNS]
    assert [row[0] for row in shown["rows"]] == ["0", "1", "2"]
    assert shown["spent"] is None
    assert shown["plan"]["model"].startswith("random:")
    json.dumps(shown, allow_nan=False)


def test_rounds_of_before_are_known_to_a_run_that_goes_on(tmp_path: Path) -> None:
    board = Board("fedloom run", None)
    for round in range(2):
        board.stop_after(make_record(round))
    board.show_round(make_record(2))
    assert [row[0] for row in board.document()["rows"]] == ["0", "1", "2"]


def test_a_run_that_waits_says_so_until_it_goes_on() -> None:
    board = Board("fedloom serve")
    assert board.state == "starting"
    board.show_step("waiting", "for 2 clients")
    board.show_step("client", "alice: 5 documents")
    assert board.state == "waiting"
    board.show_round(make_record(0))
    assert board.state == "working"


def test_each_refusal_has_its_reason() -> None:
    board = make_board(1)
    board.show_clients({"alice": "late", "bob": "answered"})
    because = {"0": "round 1, client 0, alice: no answer within 0:20", "1": "round 1, client 1: not finite"}
    board.show_round(make_record(1, lost=[0, 1], lost_because=because, refused=["round 1: one nobody asked"]))
    assert board.refusals == {"turned away": 1, "late": 1, "not admitted": 2}
    # She is away still, which nobody tells again.
    board.show_round(make_record(2, lost=[0], lost_because={"0": "round 2, client 0, alice: is still not connected"}))
    assert board.refusals["late"] == 2
    told = [(trouble["what"], trouble["why"]) for trouble in board.document()["troubles"]]
    assert told[0] == ("lost", "round 2, client 0, alice: is still not connected")
    assert {why for _, why in told} > {*because.values(), "round 1: one nobody asked"}


@pytest.mark.long
def test_privacy_spent_is_that_of_the_last_round() -> None:
    board = make_board(0)
    board.show_round(make_record(1, epsilon=1.5))
    board.show_round(make_record(2, epsilon=2.5))
    assert board.document()["spent"] == 2.5


def test_what_is_shown_is_bounded_and_has_no_control_characters() -> None:
    names = tuple(f"{HOSTILE}{number}" for number in range(300))
    board = make_board(3 * MOST_POINTS + 1, names=names)
    for _ in range(2 * MOST_TROUBLES):
        board.show_step("refused", HOSTILE * 100)
    shown = board.document()
    points = shown["losses"]["central"]
    assert len(points) <= MOST_POINTS
    assert points[-1][0] == 3 * MOST_POINTS, "the last is never left out"
    assert len(shown["rows"]) == MOST_ROWS
    assert len(shown["troubles"]) == MOST_TROUBLES
    assert len(shown["clients"]) + shown["clients_not_shown"] == 300
    text = json.dumps(shown)
    assert len(text) < 300_000
    assert "\\u001b" not in text
    assert "\\u202e" not in text.replace("\\\\u202e", "")


@pytest.mark.long
def test_the_next_run_of_a_service_begins_with_nothing_of_the_one_before() -> None:
    board = make_board(3)
    board.show_clients({"alice": "late"})
    board.show_failure("failed", "no quorum")
    refused = board.refusals["turned away"]
    board.show_next(Path("runs/second"))
    shown = board.document()
    assert (shown["state"], shown["round"], shown["rounds"], shown["seconds_left"]) == ("starting", None, None, None)
    assert (shown["rows"], shown["clients"], shown["troubles"], shown["plan"]) == ([], [], [], {})
    assert (board.folder, board.error) == (Path("runs/second"), "")
    assert board.refusals["turned away"] == refused == 1, "of the process"
    board.show_next(None)
    assert (board.state, board.folder, board.work.doing) == ("idle", Path("runs/first"), "waiting for a run")


def test_a_queue_is_bounded_and_its_words_are_text() -> None:
    board = Board("fedloom serve")
    assert board.document()["queue"] == []
    told = {"state": "waiting", "round": None, "rounds": None, "run": "/runs/x", "why": HOSTILE * 99}
    board.show_queue([{"number": number, "name": HOSTILE, **told} for number in range(200)])
    queue = board.document()["queue"]
    assert [run["number"] for run in queue] == [*range(199, 149, -1)], "the last first"
    assert "\x1b" not in json.dumps(queue, ensure_ascii=False)
    assert len(queue[0]["why"]) < 2500
