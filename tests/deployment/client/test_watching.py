"""What is told of a server that goes away and comes back, by the log of a client's SuperNode."""

import inspect
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from flwr.supercore.retry import http_retry

from fedloom.deployment.client import watching
from fedloom.deployment.client.joining import Kit, start_node
from fedloom.deployment.client.watching import AWAY_SECONDS, NO_ANSWER, Presence
from fedloom.deployment.processes import free_port, private_folder

FAILED = "WARNING :   Connection attempt failed, retrying in 1.50 seconds\n"
ANSWERED = "INFO :      Connection successful after 12.20 seconds and 7 tries.\n"


class Told:
    """Log of a SuperNode that a test writes, a clock that it turns, and what was said."""

    def __init__(self, folder: Path) -> None:
        self.log, self.seconds = folder / "supernode.log", 0.0
        self.log.touch()
        self.said: list[str] = []
        self.presence = Presence("above:8514", self.log, self.say, lambda: self.seconds)

    def say(self, what: str, detail: str) -> None:
        self.said.append(f"{what}: {detail}")

    def look(self, more: str = "", later: float = 0.0) -> list[str]:
        self.seconds += later
        with self.log.open("a") as log:
            log.write(more)
        self.presence.look()
        return self.said


AWAY, BACK = "away: above:8514 does not answer: tried until it does", "back: above:8514 answers again"


def test_a_server_that_goes_and_comes_back_is_told_of_once_each(tmp_path: Path) -> None:
    """At rest, nothing was said of either."""
    told = Told(tmp_path)
    assert told.look("INFO :      SuperNode ID: 7\n", 100) == []
    assert told.look(FAILED) == []
    assert told.look(FAILED, AWAY_SECONDS / 2) == []
    assert told.look(FAILED, AWAY_SECONDS / 2) == [AWAY]
    for _ in range(3):
        assert told.look(FAILED, AWAY_SECONDS) == [AWAY]
    assert told.look(ANSWERED[:20]) == [AWAY], "half a line says nothing"
    assert told.look(ANSWERED[20:]) == [AWAY, BACK]
    assert told.look("", 100) == [AWAY, BACK]
    told.look(FAILED)
    assert told.look("", AWAY_SECONDS) == [AWAY, BACK, AWAY], "the SuperNode may wait for long before it tries again"
    assert told.look("INFO :      SuperNode ID: 8\n") == [AWAY, BACK, AWAY, BACK], "one that was started anew"


def test_a_server_that_is_busy_for_a_moment_is_not_away(tmp_path: Path) -> None:
    told = Told(tmp_path)
    for _ in range(5):
        told.look(FAILED, 1)
        told.look(ANSWERED, 1)
    assert told.look("", 100) == []


def test_the_words_are_flowers_own() -> None:
    source = inspect.getsource(http_retry)
    assert all(words.decode() in source for words in (NO_ANSWER, watching.ANSWERED[0]))


@pytest.mark.long
def test_a_supernode_whose_server_is_not_there_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "AWAY_SECONDS", 0.0)
    said: list[str] = []
    with private_folder() as home:
        node = start_node(Kit("north", f"127.0.0.1:{free_port()}"), home)
        try:
            assert node.log
            presence, until = (
                Presence("above", node.log, lambda what, detail: said.append(what)),
                time.monotonic() + 120,
            )
            while not said and time.monotonic() < until:
                presence.look()
                time.sleep(0.2)
        finally:
            node.end()
    assert said == ["away"]
