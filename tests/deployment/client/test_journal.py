"""Journal of a client: what it holds, counts and survives."""

import errno
import fcntl
import json
import os
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from support.full_disk import no_file_above

from fedloom.deployment.client.joining import Kit, Member, join
from fedloom.deployment.client.journal import Journal, hash_task, standing
from fedloom.deployment.client.policy import Policy
from fedloom.deployment.client.secret import read_secret
from fedloom.errors import DeploymentError, RecipeError
from fedloom.host.frames import Frame

UNKNOWN = '{"when": "2026-11-26T00:00:00+00:00", "task": "a", "kind": "another"}'
TOLD = {"recipe": "r", "round": 1}


def write(path: Path, *rounds: tuple[float, str]) -> Journal:
    """Write a journal of rounds that began so many hours ago."""
    now = datetime.now(UTC)
    lines = [json.dumps({"when": (now - timedelta(hours=hours)).isoformat(), "task": task}) for hours, task in rounds]
    path.write_text("".join(line + "\n" for line in lines))
    return Journal(path)


def tasks(journal: Journal) -> list[str]:
    return [json.loads(line)["task"] for line in journal.path.read_text().splitlines()]


def test_rounds_count_for_a_day(tmp_path: Path) -> None:
    journal = write(tmp_path / "a.jsonl", (24.1, "old"), (23.9, "a"), (1, "b"))
    journal.note("c", TOLD, at_most=3)
    with pytest.raises(RecipeError, match="allows 3 rounds a day"):
        journal.note("d", TOLD, at_most=3)
    assert tasks(journal) == ["old", "a", "b", "c"]
    journal.note("d", TOLD)
    assert tasks(journal)[-1] == "d"


def test_it_is_said_when_the_next_round_may_begin(tmp_path: Path) -> None:
    journal = write(tmp_path / "a.jsonl", (5, "a"), (3, "b"), (2, "c"))
    b = datetime.fromisoformat(json.loads(journal.path.read_text().splitlines()[1])["when"])
    free = b + timedelta(days=1)  # c alone then counts
    with pytest.raises(RecipeError, match=f"{free:%Y-%m-%d at %H:%M:%S} UTC"):
        journal.note("d", TOLD, at_most=2)


def test_the_same_task_is_one_round(tmp_path: Path) -> None:
    journal = write(tmp_path / "a.jsonl", (2, "a"), (1, "b"))
    for _ in range(3):
        journal.note("a", TOLD, at_most=2)
    with pytest.raises(RecipeError):
        journal.note("c", TOLD, at_most=2)
    assert tasks(journal) == ["a", "b", "a", "a", "a"]


def test_a_task_is_all_that_training_depends_on() -> None:
    asked = Frame({"round": 1, "recipe": {"a": 1}, "judge": False, "nonce": "x"}, b"1234")
    assert hash_task(asked) == hash_task(Frame({"judge": True, "recipe": {"a": 1}, "round": 1}, b"1234"))
    others = [Frame({**asked.manifest, "round": 2}, b"1234"), Frame(asked.manifest, b"1235")]
    assert len({hash_task(asked), *map(hash_task, others)}) == 3


def test_a_task_asked_again_does_not_move_when_the_next_may_begin(tmp_path: Path) -> None:
    journal = write(tmp_path / "a.jsonl", (5, "a"), (1, "a"))
    first = datetime.fromisoformat(json.loads(journal.path.read_text().splitlines()[0])["when"])
    with pytest.raises(RecipeError, match=f"{first + timedelta(days=1):%Y-%m-%d at %H:%M:%S} UTC"):
        journal.note("b", TOLD, at_most=1)


def test_a_task_asked_again_a_day_later_is_another_round(tmp_path: Path) -> None:
    journal = write(tmp_path / "a.jsonl", (30, "a"), (5, "a"))
    with pytest.raises(RecipeError, match="allows 1 rounds a day"):
        journal.note("b", TOLD, at_most=1)
    journal.note("a", TOLD, at_most=1)


def test_rounds_recipes_and_scores_are_counted_apart(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.jsonl")
    for kind, what in (("train", "rounds"), ("meet", "recipes"), ("score", "scores")):
        journal.note(kind, TOLD, kind=kind, at_most=1)
        journal.note(kind, TOLD, kind=kind, at_most=1)
        with pytest.raises(RecipeError, match=f"allows 1 {what} a day"):
            journal.note("b", TOLD, kind=kind, at_most=1)
    assert [entry.kind for entry in journal.read()] == ["train"] * 2 + ["meet"] * 2 + ["score"] * 2


def test_rounds_of_a_recipe_are_counted_for_ever_and_by_what_was_trained(tmp_path: Path) -> None:
    """Fail where the round's number, which a server tells, is believed."""
    journal = write(tmp_path / "a.jsonl", (100, "of another"))
    for event in ("a", "b", "b"):
        journal.note(event, {"run": "r", "round": 1}, of_run=2)
    with pytest.raises(RecipeError, match=r"policy.max_rounds: its policy allows 2 rounds of a recipe"):
        journal.note("c", {"run": "r", "round": 1}, of_run=2)
    journal.note("a", {"run": "r", "round": 1}, of_run=2)
    journal.note("c", {"run": "another", "round": 1}, of_run=2)


def test_a_round_that_was_given_up_does_not_count(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.jsonl")
    for event in ("a", "b"):
        journal.note(event, {"run": "r"}, at_most=2, of_run=2)
    journal.give_up("b")
    journal.give_up("never begun")
    journal.note("c", {"run": "r"}, at_most=2, of_run=2)
    with pytest.raises(RecipeError):
        journal.note("b", {"run": "r"}, at_most=2)
    # Its last beginning alone: the one before may have been answered.
    journal.note("c", {"run": "r"}, at_most=2, of_run=2)
    journal.give_up("c")
    with pytest.raises(RecipeError):
        journal.note("b", {"run": "r"}, of_run=2)
    assert [entry.event for entry in standing(journal.read())] == ["a", "c"]


def test_an_old_journals_lines_are_rounds(tmp_path: Path) -> None:
    journal = write(tmp_path / "a.jsonl", (2, "a"))
    assert [(entry.kind, entry.event) for entry in journal.read()] == [("train", "a")]


def test_one_that_counts_waits_for_another_that_counts(tmp_path: Path) -> None:
    """Two that look at once would both get the last round."""
    journal = write(tmp_path / "a.jsonl", (1, "a"))
    with journal.path.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting = threading.Thread(target=journal.note, args=("b", TOLD))
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        assert tasks(journal) == ["a"]
    waiting.join(60)
    assert tasks(journal) == ["a", "b"]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_that_was_cut_off_is_no_round(cut: int, tmp_path: Path) -> None:
    journal = write(tmp_path / "a.jsonl", (2, "a"), (1, "b"))
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole[:-cut])
    journal.check()
    journal.note("c", TOLD, at_most=2)
    assert tasks(journal) == ["a", "c"]


@pytest.mark.parametrize(
    "line", [UNKNOWN, "noise", "{}", "[]", '{"when": 1, "task": "a"}', '{"when": "then", "task": "a"}', ""]
)
def test_a_damaged_journal_is_refused_by_its_line(line: str, tmp_path: Path) -> None:
    journal = write(tmp_path / "a.jsonl", (2, "a"))
    journal.path.write_text(journal.path.read_text() + line + "\n" + journal.path.read_text())
    for use in (journal.check, lambda: journal.note("c", TOLD)):
        with pytest.raises(DeploymentError, match="line 2 is not an entry"):
            use()


def test_a_journal_that_can_not_be_kept_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match=r"a.jsonl: the journal can't be written .*--journal FILE"):
        join([Member(Kit("a", "127.0.0.1:1"), tmp_path, Policy(), tmp_path / "not there" / "a.jsonl")], print)


def test_it_is_its_owners_alone(tmp_path: Path) -> None:
    Journal(tmp_path / "a.jsonl").check()
    assert (tmp_path / "a.jsonl").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("room", [0, 1, 40])
def test_a_line_for_which_the_disk_has_no_room_is_not_there_and_does_not_count(room: int, tmp_path: Path) -> None:
    journal = write(tmp_path / "a.jsonl", (1, "a"))
    before = journal.path.read_bytes()
    with no_file_above(len(before) + room), pytest.raises(DeploymentError, match="can't be written"):
        journal.note("b", TOLD)
    assert journal.path.read_bytes() == before
    journal.note("b", TOLD, at_most=2)
    assert tasks(journal) == ["a", "b"]


def test_a_line_that_does_not_reach_the_disk_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems find room only when they have to: then all is written, and `fsync` fails."""
    journal = write(tmp_path / "a.jsonl", (1, "a"))
    before = journal.path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(DeploymentError, match="No space left on device"):
            journal.note("b", TOLD)
    assert journal.path.read_bytes() == before


def test_half_a_secret_is_left_by_no_full_disk(tmp_path: Path) -> None:
    """It would be refused at the next start, and its owner told to lose who they are to the server."""
    for room in (0, 20):
        with no_file_above(room), pytest.raises(DeploymentError, match="the secret can't be kept"):
            read_secret(tmp_path / "a.secret")
        assert not (tmp_path / "a.secret").exists()
    assert read_secret(tmp_path / "a.secret") == read_secret(tmp_path / "a.secret")
