"""Queue of a service, alone: its order, many who submit at once, kills at each write, and files that hold anything."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from fedloom.cli import app
from fedloom.deployment import queue as module
from fedloom.deployment.keys import in_use
from fedloom.deployment.queue import QUEUE, SUBMIT, Entry, Queue, list_runs, read_entry, write_lines
from fedloom.errors import DeploymentError, RunError
from fedloom.host import failpoints
from fedloom.host.files import replace_file
from fedloom.monitoring.status import status_file

RECIPE = {"name": "first", "model": {"source": "random:tiny"}}


@pytest.fixture
def server(tmp_path: Path) -> Path:
    (tmp_path / "server").mkdir()
    return tmp_path / "server"


def names(queue: Queue) -> list[tuple[str, str]]:
    return [(entry.name, entry.state) for entry in queue.read()[0]]


def test_runs_are_taken_in_the_order_in_which_they_came(server: Path) -> None:
    queue = Queue(server)
    for name in ("a", "b", "c"):
        queue.add(name, RECIPE)
    taken = []
    while entry := queue.take():
        assert not entry.resume
        assert entry.recipe == RECIPE
        taken.append(entry.name)
        queue.end(entry, "failed" if entry.name == "b" else "done", "why not" if entry.name == "b" else "")
    assert taken == ["a", "b", "c"]
    assert names(Queue(server)) == [("a", "done"), ("b", "failed"), ("c", "done")]
    assert Queue(server).read()[0][1].why == "why not"


def test_a_run_that_was_at_work_is_the_next_one_and_goes_on(server: Path) -> None:
    queue = Queue(server)
    for name in ("a", "b"):
        queue.add(name, RECIPE)
    first = queue.take()
    assert first is not None
    again = Queue(server).take()
    assert again is not None
    assert (again.name, again.resume, first.resume) == ("a", True, False)


def test_each_run_has_a_directory_of_its_own_beside_the_servers_folder(server: Path, tmp_path: Path) -> None:
    queue = Queue(server)
    made = {queue.add("tiny", RECIPE).out for _ in range(20)}
    assert len(made) == 20
    assert {Path(out).parent for out in made} == {tmp_path / "runs"}
    queue.add("mine", RECIPE, tmp_path / "x" / ".." / "mine")
    with pytest.raises(RunError, match=r"mine: run 21 of the queue has it \(waiting\); name another with --out"):
        queue.add("mine", RECIPE, tmp_path / "mine")
    found = queue.find(tmp_path / "mine")
    assert found
    assert queue.stop(found, at_once=False).state == "stopped"
    assert queue.add("mine", RECIPE, tmp_path / "mine", resume=True).number == 22


SUBMITS = (
    "import sys; from pathlib import Path; from fedloom.deployment.queue import Queue\n"
    "for number in range(int(sys.argv[3])): Queue(Path(sys.argv[1])).add(f'{sys.argv[2]}-{number}', {'name': 'x'})"
)


def test_of_many_who_submit_at_once_none_is_lost(server: Path) -> None:
    several = [subprocess.Popen([sys.executable, "-c", SUBMITS, str(server), who, "4"]) for who in "abc"]
    assert [process.wait(120) for process in several] == [0, 0, 0]
    entries, errors = Queue(server).read()
    assert not errors
    assert [entry.number for entry in entries] == [*range(1, 13)]
    assert {entry.name for entry in entries} == {f"{who}-{number}" for who in "abc" for number in range(4)}
    for who in "abc":  # each one's own are in its order
        mine = [entry.name for entry in entries if entry.name.startswith(who)]
        assert mine == [f"{who}-{number}" for number in range(4)]
    assert len({entry.out for entry in entries}) == 12


# Kills


def killed(work: Callable[[], object], failpoint: str) -> bool:
    """Do it in a process of its own that is killed at a place, and return whether it came by there."""
    if not (child := os.fork()):
        try:
            failpoints.arm(failpoint)
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def work_through(server: Path, ran: Path) -> None:
    """Carry out all runs, as a service does; what is begun stands in a file."""
    queue = Queue(server)
    while entry := queue.take():
        with ran.open("a") as file:
            file.write(f"{entry.name} {entry.resume}\n")
        queue.end(entry, "done")


@pytest.mark.parametrize("place", ["file.write", "file.written"])
@pytest.mark.parametrize("time", [1, 2, 3])
def test_a_kill_at_any_write_loses_nothing_and_runs_nothing_anew(
    place: str, time: int, server: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        Queue(server).add(name, RECIPE)
    # Writes: a running, a done, b running.
    assert killed(lambda: work_through(server, tmp_path / "ran"), f"{place}=kill@{time}")
    entries, errors = Queue(server).read()
    assert not errors
    assert [entry.name for entry in entries] == ["a", "b"]
    work_through(server, tmp_path / "ran")
    assert names(Queue(server)) == [("a", "done"), ("b", "done")]
    begun = (tmp_path / "ran").read_text().splitlines()
    assert [line for line in begun if line.endswith("False")] == ["a False", "b False"], "each is begun once"
    assert begun == ["a False", *(["a True"] if time == 2 else []), "b False"]


def test_whoever_is_killed_while_it_submits_or_stops_leaves_a_queue(server: Path) -> None:
    queue = Queue(server)
    for place, there in (("file.write", 0), ("file.written", 0)):
        assert killed(lambda: queue.add("a", RECIPE), f"{place}=kill")
        assert len(Queue(server).read()[0]) == there
    entry = queue.add("a", RECIPE)
    assert entry.number == 1
    for place in ("file.write", "file.written"):
        assert killed(lambda: queue.stop(entry, at_once=False), f"{place}=kill")
        assert names(queue) == [("a", "waiting")]


def test_written_in_place_a_kill_would_lose_a_run(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken twin: the test above finds what it is to find."""

    def in_place(path: Path, content: bytes, **told: object) -> None:
        path.write_bytes(b"")
        failpoints.failpoint("file.written")
        path.write_bytes(content)

    assert module.replace_file is replace_file
    monkeypatch.setattr(module, "replace_file", in_place)
    Queue(server).add("a", RECIPE)
    assert killed(lambda: work_through(server, server / "ran"), "file.written=kill@1")
    assert Queue(server).read()[1], "the run is lost"


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=pytest.mark.long if seed < 1 else pytest.mark.slow) for seed in range(8)]
)
def test_whatever_is_done_and_wherever_it_is_killed_each_run_ends_once(seed: int, tmp_path: Path) -> None:
    """A service, one who submits and one who stops, each killed at any write, in any order."""
    draw, server, ran = Random(seed), tmp_path / "server", tmp_path / "ran"
    server.mkdir()
    submitted = 0

    def submit() -> None:
        Queue(server).add(f"r{submitted}", RECIPE)

    def stop_one() -> None:
        entries = [entry for entry in Queue(server).read()[0] if entry.is_unfinished]
        if entries:
            Queue(server).stop(draw.choice(entries), at_once=False)

    for _ in range(60):
        kind, place = draw.choice(("submit", "stop", "work")), draw.choice(("file.write", "file.written"))
        failpoint = f"{place}=kill@{draw.randint(1, 4)}" if draw.random() < 0.7 else ""
        before = len(Queue(server).read()[0])
        done = {"submit": submit, "stop": stop_one, "work": lambda: work_through(server, ran)}
        killed(done[kind], failpoint)
        assert not Queue(server).read()[1]
        assert len(Queue(server).read()[0]) - before in ((0, 1) if kind == "submit" else (0,))
        submitted += 1
    work_through(server, ran)
    entries = Queue(server).read()[0]
    begun = [line.split()[0] for line in ran.read_text().splitlines() if line.endswith("False")]
    assert len(begun) == len(set(begun))
    assert {entry.state for entry in entries} <= {"done", "stopped"}
    assert {entry.name for entry in entries if entry.state == "done"} <= set(begun)
    order = {entry.name: entry.number for entry in entries}
    assert [order[name] for name in begun] == sorted(order[name] for name in begun)


# Stopping


def test_a_run_that_waits_is_taken_out_and_one_that_is_at_work_is_told(server: Path) -> None:
    queue = Queue(server)
    first, second, third = (queue.add(name, RECIPE) for name in "abc")
    with in_use(server, server):
        assert queue.take()
        assert queue.stop(second, at_once=False).state == "stopped"
        assert queue.stop(first, at_once=False).state == "running"
        assert queue.asked_to_stop(first.number) == "round"
        queue.stop(first, at_once=True)
        assert queue.asked_to_stop(first.number) == "now"
    # The service was killed before it heard of it.
    taken = Queue(server).take()
    assert taken
    assert taken.number == third.number
    assert names(queue) == [("a", "stopped"), ("b", "stopped"), ("c", "running")]


def test_where_nobody_serves_a_run_that_was_at_work_is_stopped_at_once(server: Path) -> None:
    queue = Queue(server)
    entry = queue.add("a", RECIPE)
    queue.take()
    assert queue.stop(entry, at_once=False).state == "stopped"
    assert queue.stop(entry, at_once=False).state == "stopped"
    assert queue.take() is None


# What is no run


def good(**changed: Any) -> bytes:
    told = {"name": "a", "recipe": RECIPE, "out": "/runs/a", "submitted": "2026-11-27T00:00:00+00:00"}
    return json.dumps({**told, **changed}).encode()


DAMAGED = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"x"',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"1" * 5000,
    good(state="finished"),
    good(out="runs/a"),
    good(out="/a\0b"),
    good(out="/" + "a" * 5000),
    good(out=["/a"]),
    good(name=5),
    good(name="x" * 2000),
    good(recipe=[]),
    good(recipe="x"),
    good(stop="never"),
    good(extra=1),
    good(resume="yes"),
    good(round="1"),
    good(recipe={"x": "y" * 2**21}),
]


def test_a_file_that_is_no_run_is_told_of_and_keeps_no_other_from_its_turn(server: Path) -> None:
    queue = Queue(server)
    queue.add("a", RECIPE)
    for number, content in enumerate(DAMAGED, 10):
        (queue.folder / f"{number:06d}.json").write_bytes(content)
    (queue.folder / "000099.json").mkdir()
    (queue.folder / "000100.json").symlink_to("/nowhere")
    for name in (
        "evil.json",
        "1.json",
        "-00001.json",
        "0000001.json",
        "0000500.json",
        "000001.json.bak",
        ".000001.json.tmp",
        "٠٠٠٠٠٧.json",
    ):
        (queue.folder / name).write_bytes(good())
    assert queue.add("b", RECIPE).number == 101, "no number is given twice"
    entries, errors = queue.read()
    assert [entry.name for entry in entries] == ["a", "b"]
    assert len(errors) == len(DAMAGED) + 2
    assert all("remove it, and submit the run again" in str(error) or "can't be read" in str(error) for error in errors)
    taken = [queue.take()]
    assert taken[0] is not None
    queue.end(taken[0], "done")
    second = queue.take()
    assert second is not None
    assert second.name == "b"
    lines = [*write_lines(list_runs(server))]
    assert sum(line.startswith("damaged: ") for line in lines) == len(DAMAGED) + 2
    assert not (queue.folder / "000010.json").read_bytes(), "nobody changes them"


def test_however_high_a_number_is_no_later_run_is_lost(server: Path) -> None:
    queue = Queue(server)
    queue.add("a", RECIPE)
    (queue.folder / f"{'9' * 12}.json").write_bytes(b"{")
    assert [queue.add(name, RECIPE).number for name in "bc"] == [10**12, 10**12 + 1]
    assert names(Queue(server)) == [("a", "waiting"), ("b", "waiting"), ("c", "waiting")]


def test_a_recipe_that_is_no_text_ends_that_run_alone(server: Path) -> None:
    """It could not be written again: the service ended, and again each time that it was started."""
    queue = Queue(server)
    for name in "ab":
        queue.add(name, RECIPE)
    (queue.folder / "000001.json").write_bytes(good(name="a", recipe={"x": "\ud800"}))
    for why in ("no recipe", "x" * 6000):
        entry = queue.take()
        assert entry
        queue.end(entry, "failed", why)
    assert queue.take() is None
    first, second = Queue(server).read()[0]
    assert (first.state, first.why, first.recipe) == ("failed", "no recipe", {"x": "\ud800"})
    assert (second.state, second.why) == ("failed", "x" * 5000)


def test_the_largest_recipe_has_room_for_how_its_run_ends(server: Path) -> None:
    queue, room = Queue(server), len(Queue(server).add("a", {"x": ""}).to_bytes())
    with pytest.raises(DeploymentError, match="more than 1,048,576 bytes"):
        queue.add("a", {"x": "y" * (2**20 - room + 1)})
    queue.add("b", {"x": "y" * (2**20 - room)})
    for _ in "ab":
        entry = queue.take()
        assert entry
        queue.end(entry, "failed", "é" * 5000)
    assert names(Queue(server)) == [("a", "failed"), ("b", "failed")]


@pytest.mark.parametrize("out", ["/" + "a/" * 3000, os.fsdecode(b"/tmp/\xff")])
def test_a_run_directory_that_no_file_can_name_is_refused_in_a_sentence(out: str, server: Path) -> None:
    with pytest.raises(RunError, match="name another with --out"):
        Queue(server).add("a", RECIPE, Path(out))
    assert not Queue(server).read()[0]


def test_a_queue_is_read_anew_where_it_was_changed_alone(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service looks at it each second: of a thousand runs that wait, it did little else."""
    queue, read = Queue(server), []
    monkeypatch.setattr(module, "read_entry", lambda path: read.append(path.name) or read_entry(path))
    for name in "abc":
        queue.add(name, RECIPE)
    long_ago = time.time() - 10
    for path in queue.paths().values():
        os.utime(path, (long_ago, long_ago))
    queue.read()
    read.clear()
    assert names(queue) == [("a", "waiting"), ("b", "waiting"), ("c", "waiting")]
    assert not read
    other = Queue(server)
    other.stop(other.read()[0][1], at_once=False)
    read.clear()
    assert names(queue) == [("a", "waiting"), ("b", "stopped"), ("c", "waiting")]
    names(queue)
    assert read == ["000002.json"] * 2, "what was just written may be written again within the clock's tick"


def test_a_whole_file_is_a_run(server: Path) -> None:
    (server / "000007.json").write_bytes(good())
    assert read_entry(server / "000007.json").number == 7


def test_text_of_others_is_shown_as_text(server: Path) -> None:
    queue = Queue(server)
    queue.add("\x1b[2Jname", RECIPE)
    done = CliRunner().invoke(app, ["runs", "--server", str(server)])
    assert done.exit_code == 0
    assert "\\x1b[2Jname" in done.output
    assert "\x1b" not in done.output


def test_a_recipe_that_is_too_large_is_refused(server: Path) -> None:
    with pytest.raises(DeploymentError, match="the recipe has more than 1,048,576 bytes"):
        Queue(server).add("a", {"x": "y" * 2**20})
    assert not Queue(server).read()[0]


def test_a_folder_that_is_not_there_or_another_users_is_refused(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DeploymentError, match=r"nothing: no server is set up in it; make one: fedloom provision init"):
        Queue(tmp_path / "nothing").add("a", RECIPE)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(
        DeploymentError, match=r"can't be written \(it is another user's\); be the user that the server"
    ):
        Queue(server).add("a", RECIPE)
    assert not (server / QUEUE).exists()


AS_NOBODY = """\
import os, sys
from pathlib import Path
from fedloom.deployment.queue import list_runs
from fedloom.errors import DeploymentError
os.setuid(65534)
try:
    print(list_runs(Path(sys.argv[1])))
except DeploymentError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="another user is to be had by root alone")
@pytest.mark.parametrize("rights", [0o700, 0o711])
def test_another_user_is_not_told_that_there_are_no_runs(rights: int, server: Path, tmp_path: Path) -> None:
    for folder in (tmp_path.parent.parent, tmp_path.parent, tmp_path):
        folder.chmod(0o711)
    Queue(server).add("a", RECIPE)
    server.chmod(rights)
    done = subprocess.run([sys.executable, "-c", AS_NOBODY, str(server)], capture_output=True, text=True, timeout=120)
    assert done.stdout == (
        f"{server / QUEUE}: can't be read (Permission denied); be the user that the server runs as, as with: runuser -u"
        " fedloom -- fedloom ...\n"
    ), done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_the_queue_is_whose_its_own_folder_is(server: Path) -> None:
    """In a container the server's folder is memory of root's, and the queue a folder of the server's."""
    queue = Queue(server)
    queue.add("first", RECIPE)
    os.chown(server, 4711, -1)
    assert queue.add("second", RECIPE).number == 2
    os.chown(server, 0, -1)
    os.chown(server / QUEUE, 4711, -1)
    with pytest.raises(DeploymentError, match="it is another user's"):
        queue.add("third", RECIPE)


def test_who_does_not_let_go_of_the_queue_is_named(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.1)
    queue = Queue(server)
    with queue._alone(), pytest.raises(DeploymentError, match="another process writes it and does not end"):
        Queue(server).add("a", RECIPE)


# What is shown


def test_the_list_says_where_each_run_is_and_how_it_ended(server: Path, tmp_path: Path) -> None:
    queue = Queue(server)
    assert [*write_lines(list_runs(server))] == ["no runs yet: fedloom submit RECIPE"]
    for name in ("first", "second", "third"):
        queue.add(name, RECIPE, tmp_path / name)

    def at(name: str, **status: Any) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "status.json").write_text(json.dumps(status))

    taken = queue.take()
    assert taken
    at("first", state="failed", round=3, rounds=5)
    queue.end(taken, "failed", "round 4: no quorum")
    queue.take()
    at("second", state="running", round=1, rounds=4)
    told = list_runs(server)
    assert [(run["state"], run["round"], run["rounds"]) for run in told["runs"]] == [
        ("failed", 3, 5),
        ("running", 1, 4),
        ("waiting", None, None),
    ]
    lines = [*write_lines(told)]
    assert lines[0].split() == ["number", "state", "round", "name", "submitted", "(UTC)", "run", "directory"]
    assert lines[2].split()[:6] == ["2", "running", "1", "of", "4", "second"]
    assert lines[2].endswith(str(tmp_path / "second"))
    assert lines[4:] == ["1: round 4: no quorum", f"nobody works with {server}: start it with fedloom serve"]
    with in_use(server, server):
        assert [*write_lines(list_runs(server))] == lines[:5]
    with in_use(server, tmp_path / "alone"):
        assert [*write_lines(list_runs(server))] == [
            *lines[:5],
            f"the server there carries out {tmp_path / 'alone'} alone, and none of these",
        ]
    done = CliRunner().invoke(app, ["runs", "--server", str(server), "--json"])
    assert [run["name"] for run in json.loads(done.output)["runs"]] == ["first", "second", "third"]


@pytest.mark.parametrize("status", ["", "[]", '{"round": "many"}', '{"round": true, "rounds": {}}', "\x00"])
def test_a_run_directory_that_holds_anything_is_no_harm(status: str, server: Path, tmp_path: Path) -> None:
    queue = Queue(server)
    queue.add("a", RECIPE, tmp_path / "a")
    entry = queue.take()
    assert entry
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "status.json").write_text(status)
    assert list_runs(server)["runs"][0]["state"] == "running"
    queue.end(entry, "done")
    assert names(queue) == [("a", "done")]


def test_what_is_said_of_a_run_is_what_its_file_has(server: Path) -> None:
    entry = Queue(server).add("a", RECIPE)
    assert read_entry(server / QUEUE / "000001.json") == entry
    assert isinstance(entry, Entry)
    assert (server / QUEUE / "000001.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("words", "wish", "when"), [([], "round", " after the round that is under way"), (["--now"], "now", "")]
)
def test_the_command_waits_until_the_service_has_ended_the_run(
    words: list[str], wish: str, when: str, server: Path, tmp_path: Path
) -> None:
    queue = Queue(server)
    entry = queue.add("a", RECIPE, tmp_path / "a")
    (tmp_path / "a").mkdir()
    heard: list[str] = []

    def serve() -> None:
        with in_use(server, server):
            queue.take()
            started.set()
            while not (asked := queue.asked_to_stop(entry.number)):
                time.sleep(0.01)
            heard.append(asked)
            queue.end(entry, "stopped", "fedloom stop")

    started = threading.Event()
    service = threading.Thread(target=serve, daemon=True)
    service.start()
    assert started.wait(60)
    done = CliRunner().invoke(app, ["stop", str(tmp_path / "a"), "--server", str(server), *words])
    service.join(60)
    assert (done.exit_code, heard) == (0, [wish])
    assert done.output.splitlines() == [
        f"stopping  run 1 ends{when}",
        f"stopped; go on with: fedloom submit --resume {tmp_path / 'a'}",
    ]


def test_a_service_is_not_ended_for_one_of_its_runs(server: Path, tmp_path: Path) -> None:
    """Its process would be signalled, where the queue that the run is in is not named."""
    with status_file(tmp_path / "a", SUBMIT):
        done = CliRunner().invoke(app, ["stop", str(tmp_path / "a"), "--server", str(server)])
    assert str(done.exception) == (
        f"{tmp_path / 'a'}: it is the run of a server that stays; name that server's folder: --server FOLDER"
    )
