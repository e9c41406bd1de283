"""What `fedloom join` hears of its worker, which is a process of its own."""

import os
import sys

import pytest

from fedloom.deployment.client.display import say
from fedloom.deployment.client.hearing import HEARD, hearing
from fedloom.deployment.processes import Child

LINES = """\
from fedloom.deployment.client.display import say
say("by itself", "an adapter \\x1b[2J\\x1e of ε = 1")
print("a library's own line")
say("told", "the last")
"""
TOLD = [("by itself", r"an adapter \x1b[2J\x1e of ε = 1"), ("told", "the last")]


def run_child(output: int) -> None:
    child = Child([sys.executable, "-c", LINES], None, {**os.environ, **HEARD}, None, output)
    while not child.ended:
        pass
    child.end()


def test_each_line_that_a_process_says_is_heard_also_once_it_was_started_again(
    capfd: pytest.CaptureFixture[str],
) -> None:
    heard: list[tuple[str, str]] = []
    with hearing(lambda what, detail: heard.append((what, detail))) as output:
        run_child(output)
        run_child(output)
    assert heard == 2 * TOLD
    assert capfd.readouterr().out == 2 * "a library's own line\n"


def test_a_process_goes_on_where_nobody_can_read_what_it_says() -> None:
    def closed(what: str, detail: str) -> None:
        heard.append(what)
        raise BrokenPipeError

    heard: list[str] = []
    with hearing(closed) as output:
        run_child(output)
    assert heard == ["by itself", "told"]


def test_where_nobody_listens_a_line_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    say("told", "5 documents")
    assert capsys.readouterr().out == "told      5 documents\n"
