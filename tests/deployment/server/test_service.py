"""A server that stays, on a link to workers of this process: one run after another, and none in another's way."""

import json
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest
from typer.testing import CliRunner

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from support.tiny import make_recipe
from support.workers_here import LinkHere, Owner, asked_to, link_of, serve_here

from fedloom.cli import app
from fedloom.deployment.keys import in_use
from fedloom.deployment.queue import Entry, Queue
from fedloom.deployment.server import service
from fedloom.deployment.server.exchange import Node
from fedloom.deployment.server.service import Service, submit
from fedloom.deployment.server.superlink import SuperLink
from fedloom.errors import DeploymentError, RecipeError
from fedloom.host.signals import Interruption, Terminated
from fedloom.monitoring.board import Board
from fedloom.monitoring.observer import Observer, Observers
from fedloom.recipe.recipe import Recipe
from fedloom.records.run import RoundRecord, Run, read_run


@pytest.fixture(autouse=True)
def _hurry(hurry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "LOOK_SECONDS", 0.0)


def recipe(name: str, **sections: Any) -> Recipe:
    plain = {"data": {"clients": 2, "documents_per_client": 10}, "federation": {"rounds": 2}}
    return make_recipe(**{"name": name, "training": {"engine": "reference"}, **plain, **sections})


class Heard(Observer):
    """Writes down what it hears of runs, and does something at a round."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.at_next: Callable[[Path | None], object] = lambda folder: None
        self.at_round: Callable[[RoundRecord], object] = lambda record: None
        self.at_clients: Callable[[], object] = lambda: None
        self.queue: Sequence[Mapping[str, Any]] = ()

    def show_next(self, folder: Path | None) -> None:
        self.told.append(f"next {folder.name}" if folder else "idle")
        self.at_next(folder)

    def show_queue(self, runs: Sequence[Mapping[str, Any]]) -> None:
        self.queue = runs

    def show_clients(self, phases: Mapping[str, str]) -> None:
        self.at_clients()

    def show_round(self, record: RoundRecord) -> None:
        self.told.append(f"round {record['round']}")
        self.at_round(record)

    def show_end(self, run: Run, report: Path) -> None:
        self.told.append(f"done {run.folder.name}")

    def show_failure(self, state: str, why: str) -> None:
        self.told.append(f"{state} {why}")

    def close(self) -> None:
        self.told.append("closed")


class There:
    """A server's folder, clients that are there, and who watches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "server").mkdir()
        self.queue = Queue(folder / "server")
        self.link = link_of(recipe("any"), folder)
        self.heard, self.board, self.said = Heard(), Board("fedloom serve", folder / "server"), list[str]()

    def submit(self, name: str, **sections: Any) -> Entry:
        asked = recipe(name, **sections)
        return submit(asked, self.queue.server, self.folder / name, say=lambda what, detail: None)

    def work(self) -> None:
        """Serve until there is no run any more."""

        def check() -> None:
            if not any(entry.is_unfinished for entry in self.queue.read()[0]):
                raise KeyboardInterrupt

        def say(what: str, detail: str) -> None:
            self.said.append(f"{what} {detail}")

        observers = Observers(self.board, self.heard)
        made = Service(self.queue, cast(SuperLink, self.link), 60.0, observers, say, check, Observer)
        self.heard.at_next = lambda folder: setattr(made, "_wait_seconds", 1.0 if "crowded" in str(folder) else 60.0)
        with in_use(self.queue.server, self.queue.server), suppress(KeyboardInterrupt):
            made.work()

    @property
    def ended(self) -> dict[str, str]:
        return {entry.name: f"{entry.state} {entry.why}".strip() for entry in self.queue.read()[0]}

    def adapters(self, name: str) -> list[str]:
        return [record["adapter_sha256"] for record in read_run(self.folder / name).rounds]


@pytest.fixture
def there(tmp_path: Path) -> There:
    return There(tmp_path)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Adapters of a run by itself, as `fedloom serve RECIPE` makes them."""

    def serve(**sections: Any) -> list[str]:
        folder = tmp_path_factory.mktemp("alone")
        done = serve_here(recipe("alone", **sections), link_of(recipe("any"), folder), folder / "alone")
        return [record["adapter_sha256"] for record in done.rounds]

    return serve


def test_runs_are_carried_out_one_after_another_and_each_is_as_it_is_alone(
    there: There, alone: Callable[..., list[str]]
) -> None:
    there.submit("first")
    there.submit("crowded", data={"clients": 3, "documents_per_client": 10})
    there.submit("third", seed=8)
    there.work()
    assert re.match(r"failed data.clients: [0-2] of 3 clients came within 0:01 .*; start", there.ended["crowded"])
    assert {name: state for name, state in there.ended.items() if name != "crowded"} == {
        "first": "done",
        "third": "done",
    }
    assert there.adapters("first") == alone()
    assert there.adapters("third") == alone(seed=8)
    heard = [told.partition(" data")[0].partition(": ")[0] for told in there.heard.told]
    rounds = ["round 0", "round 1", "round 2"]
    assert heard[:6] == ["next first", *rounds, "done first", "next crowded"]
    assert heard[6:] == ["failed", "next third", *rounds, "done third"], "nobody was closed between runs"
    assert [(run["name"], run["state"], run["round"]) for run in there.heard.queue][:2] == [
        ("first", "done", 2),
        ("crowded", "failed", None),
    ]
    assert not [words for words in there.said if words.startswith("damaged")]


@pytest.mark.long
def test_a_page_shows_the_run_that_is_at_work_and_the_queue(there: There) -> None:
    there.submit("first")
    there.submit("second")
    shown: list[dict[str, Any]] = []
    there.heard.at_round = lambda record: shown.append(there.board.document())
    there.work()
    assert [one["name"] for one in shown] == ["first"] * 3 + ["second"] * 3
    assert [len(one["rows"]) for one in shown] == [1, 2, 3] * 2, "rounds of the run before are forgotten"
    assert [(run["name"], run["state"]) for run in shown[-1]["queue"]] == [("second", "running"), ("first", "done")]
    json.dumps(shown, allow_nan=False)


def interrupt(record: RoundRecord) -> None:
    if record["round"] == 1:
        raise KeyboardInterrupt


@pytest.mark.long
def test_a_service_that_ends_in_a_run_leaves_it_to_the_next_one(there: There, alone: Callable[..., list[str]]) -> None:
    there.submit("first")
    there.submit("second")
    there.heard.at_round = interrupt
    there.work()
    assert there.ended == {"first": "running", "second": "waiting"}
    there.heard.at_round = lambda record: None
    # Who comes first is not in the run that goes on.
    there.link.owners = {"aaa": there.link.owners["client-0"], **there.link.owners}
    there.link.workers = {"aaa": Owner(there.link.owners["aaa"].data).start("aaa", there.folder), **there.link.workers}
    there.work()
    assert there.ended == {"first": "done", "second": "done"}
    assert there.adapters("first") == alone()
    assert read_run(there.folder / "first").plan["elsewhere"] == ["client-0", "client-1"]
    assert read_run(there.folder / "second").plan["elsewhere"] == ["aaa", "client-0"]


@pytest.mark.long
def test_a_run_that_was_done_when_its_service_was_killed_is_not_run_again(there: There) -> None:
    entry = there.submit("first")
    there.queue.take()
    serve_here(recipe("first"), there.link, Path(entry.out))
    asked = len(there.link.asked)
    there.work()
    assert there.ended == {"first": "done"}
    assert len(there.link.asked) == asked
    assert there.heard.told == ["next first", "done first"], "it is told, for nobody was"


@pytest.mark.long
def test_a_run_ends_after_its_round_and_goes_on_when_it_is_submitted_again(
    there: There, alone: Callable[..., list[str]]
) -> None:
    first = there.submit("first")
    waits = there.submit("waits")
    there.submit("last")

    def stop(record: RoundRecord) -> None:
        if there.heard.told.count("round 1") == 1 and record["round"] == 1:
            there.queue.stop(first, at_once=False)
            there.queue.stop(waits, at_once=False)

    there.heard.at_round = stop
    there.work()
    assert there.ended == {"first": "stopped fedloom stop", "waits": "stopped fedloom stop", "last": "done"}
    assert not (there.folder / "waits").exists()
    assert read_run(there.folder / "first").status["state"] == "interrupted"
    assert len(there.adapters("first")) == 2, "the round that was under way is complete"
    assert there.heard.told[3] == "interrupted fedloom stop"
    submit(recipe("first"), there.queue.server, there.folder / "first", resume=True, say=lambda what, detail: None)
    there.work()
    assert there.adapters("first") == alone()


@pytest.mark.long
def test_a_run_that_waits_for_clients_is_stopped_at_once(there: There) -> None:
    entry = there.submit("many", data={"clients": 5})
    there.submit("next")
    there.heard.at_clients = lambda: there.queue.stop(entry, at_once=False)
    there.work()
    assert there.ended == {"many": "stopped fedloom stop", "next": "done"}
    assert not (there.folder / "many").exists()


@pytest.mark.long
def test_who_comes_when_a_run_has_its_clients_is_not_asked_before_the_next_one(there: There) -> None:
    """Its documents would be read, and told of, for a run in which it has no place."""
    there.submit("first")
    there.submit("second", data={"clients": 3, "documents_per_client": 10})
    came = Owner(there.link.owners["client-0"].data)

    def come(record: RoundRecord) -> None:
        if "later" not in there.link.workers:
            there.link.workers["later"] = came.start("later", there.folder / "clients")

    there.heard.at_round = come
    there.work()
    assert there.ended == {"first": "done", "second": "done"}
    met = [frame.manifest["recipe"]["name"] for name, frame in asked_to(there.link, "meet") if name == "later"]
    assert met == ["second"]
    assert read_run(there.folder / "second").plan["elsewhere"] == ["client-0", "client-1", "later"]


@pytest.mark.long
def test_what_is_wrong_with_a_run_ends_that_run_alone(there: There, capsys: pytest.CaptureFixture[str]) -> None:
    there.queue.add("strange", {"name": "strange", "training": {"epochs": "many"}})
    there.submit("taken")
    (there.folder / "taken").mkdir()
    there.submit("buggy")
    there.submit("last")

    def fail(record: RoundRecord) -> None:
        if there.board.folder == there.folder / "buggy":
            raise ValueError("private text")

    there.heard.at_round = fail
    (there.queue.folder / "000099.json").write_text("{")
    there.work()
    assert there.ended["strange"].startswith("failed run 1 of the queue: not a recipe of this version of fedloom: ")
    assert there.ended["taken"].startswith(f"failed {there.folder / 'taken'}: the run directory exists")
    assert there.ended["buggy"] == "failed bug: ValueError"
    assert there.ended["last"] == "done"
    assert "in fail" in capsys.readouterr().err, "a bug shows its traceback"
    assert len([words for words in there.said if words.startswith("damaged ")]) == 1


class LostLink(LinkHere):
    """Is lost once, for good, when a run begins."""

    def nodes(self) -> Sequence[Node]:
        raise ConnectionResetError

    def reopen(self) -> None:
        raise DeploymentError("the SuperLink ended 5 times in a row")


@pytest.mark.long
def test_a_link_that_is_lost_for_good_is_not_a_runs_fault(there: There) -> None:
    there.submit("first")
    whole, there.link = there.link, LostLink(there.link.owners, there.folder / "clients")
    with pytest.raises(DeploymentError, match="ended 5 times in a row"):
        there.work()
    assert there.ended == {"first": "running"}
    there.link = whole
    there.work()
    assert there.ended == {"first": "done"}


# Submitting


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fedloom-server").mkdir()
    return tmp_path / "fedloom-server"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["tiny", "training.epoch=2"], "unknown key `training.epoch`"),
        (["tiny", "training.optimizer_state=keep"], "clients on other machines keep no optimizer state"),
        (["tiny", "model.source=random:huge"], 'no shape "huge"'),
        (["tiny", 'adapter.targets=["wv"]'], 'no layer "wv"'),
        (["tiny", "data.source=./nothing.jsonl"], "nothing.jsonl"),
        (["no-such-recipe"], "no shipped recipe is named"),
        (["tiny", "--out", "fedloom-server"], "the run directory exists"),
        (["tiny", "--server", "elsewhere"], "elsewhere: no server is set up in it"),
    ],
)
def test_what_serve_refuses_is_refused_when_it_is_submitted(words: list[str], why: str, server: Path) -> None:
    done = CliRunner().invoke(app, ["submit", *words])
    assert why in str(done.exception)
    assert not Queue(server).read()[0]


def test_what_is_submitted_beside_a_server_of_one_run_is_said_to_be_taken_by_nobody(server: Path) -> None:
    """It was queued, and that was all that was said."""
    alone = Path("runs/alone").absolute()
    with in_use(server, alone):
        done = CliRunner().invoke(app, ["submit", "tiny"], catch_exceptions=False)
    assert done.output.splitlines()[-1] == (
        f"note      nobody takes it now: the server at work with fedloom-server carries out {alone} alone;"
        " it begins once that has ended and fedloom serve is started without a recipe"
    )
    with in_use(server, server):
        done = CliRunner().invoke(app, ["submit", "tiny"], catch_exceptions=False)
    assert done.output.splitlines()[-1].startswith("queued    run 2: ")


def test_what_is_submitted_stays_as_it_was(server: Path, tmp_path: Path) -> None:
    (tmp_path / "documents.jsonl").write_text("\n".join(json.dumps({"text": f"word {n} " * 20}) for n in range(30)))
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\nmodel.source = "random:tiny-llama"\ndata.source = "documents.jsonl"\ndata.clients = 2\n'
        "data.central_holdout = 4\ndata.max_length = 32\n"
    )
    done = CliRunner().invoke(app, ["submit", "mine.toml", "training.epochs=3"], catch_exceptions=False)
    assert done.exit_code == 0
    (tmp_path / "mine.toml").unlink()
    (entry,) = Queue(server).read()[0]
    lines = done.output.splitlines()
    assert f"queued    run 1: {entry.out}" in lines
    assert lines[-1] == "note      nobody works with fedloom-server now: it begins once fedloom serve is started"
    kept = service.read_recipe(entry)
    assert kept.training.epochs == 3
    assert kept.data.source == str(tmp_path / "documents.jsonl")
    assert entry.folder.parent == tmp_path / "runs"


def test_a_recipe_of_another_version_is_named(server: Path) -> None:
    entry = Queue(server).add("a", {"name": "a", "modell": {}})
    with pytest.raises(RecipeError, match=r"run 1 of the queue: not a recipe of this version of fedloom: .*submit it"):
        service.read_recipe(entry)


def test_stop_takes_a_run_out_by_its_run_directory(server: Path, tmp_path: Path) -> None:
    Queue(server).add("a", {"name": "a"}, tmp_path / "a")
    done = CliRunner().invoke(app, ["stop", "a"], catch_exceptions=False)
    assert done.exit_code == 0
    assert done.output == "stopped; nothing was begun: submit it again\n"
    assert Queue(server).take() is None


def test_serve_without_a_recipe_has_no_run_directory(server: Path) -> None:
    for words in (["--out", "runs/first"], ["--resume"]):
        done = CliRunner().invoke(app, ["serve", "--insecure", *words])
        assert done.exit_code == 2
        assert "RECIPE is missing" in done.output


def test_two_services_in_one_folder_are_refused(server: Path) -> None:
    with in_use(server, server):
        done = CliRunner().invoke(app, ["serve", "--insecure"])
        assert "another server works with it (process" in str(done.exception)
        assert str(done.exception).endswith(f"end that one: fedloom stop {server}")


def test_a_signal_that_comes_as_a_run_ends_is_heard_by_the_service() -> None:
    """A run checks no more then, and the service would have stayed."""
    with Interruption(lambda words: None) as of_service:
        with Interruption(lambda words: None):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Terminated):
            of_service.check()
    with Interruption(lambda words: None) as of_service:
        with suppress(KeyboardInterrupt), Interruption(lambda words: None) as of_run:
            signal.raise_signal(signal.SIGINT)
            of_run.check()
            pytest.fail("it was not heard")
        of_service.check()
