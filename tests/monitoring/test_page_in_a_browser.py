"""The live page in a real browser, headless: what it shows, that nothing complains, and that nothing sticks out."""

import re
import subprocess
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest
from support.boards import HOSTILE, make_board, make_record
from support.browsers import BROWSER, QUIET

from fedloom.monitoring.page import Page

NAMES = ("alice", HOSTILE, "b" * 120)
WIDE = re.compile(r'data-wide="(\d+) (\d+)"')
"""Widths of the page and of the window, which a probe at the end of the frame's script writes down."""
PROBE = (
    "setTimeout(() => { document.body.dataset.wide ="
    " `${document.documentElement.scrollWidth} ${document.documentElement.clientWidth}`; }, 1500);\n</script>"
)

pytestmark = [pytest.mark.long, pytest.mark.skipif(BROWSER is None, reason="needs Chromium")]


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    board = make_board(12, names=NAMES)
    board.show_clients({"alice": "answered", HOSTILE: "training", "b" * 120: "late"})
    board.show_round(make_record(12, epsilon=1.25, lost=[2], lost_because={"2": f"round 12, client 2: {HOSTILE}"}))
    told = {"number": 7, "state": "failed", "round": 2, "rounds": 9, "run": "/runs/" + "c" * 150, "why": HOSTILE}
    board.show_queue([{"name": HOSTILE, **told}])
    page = Page(board, ("127.0.0.1", 0), lambda *told: None)
    respond = page._web._server.respond  # type: ignore[union-attr]

    def probed(path: str, headers: object) -> object:
        answer = respond(path, headers)  # type: ignore[arg-type]
        return answer._replace(body=answer.body.replace("</script>", PROBE)) if answer and path == "/" else answer

    monkeypatch.setattr(page._web._server, "respond", probed)
    yield page
    page.close()


def look(page: Page, tmp_path: Path, size: str, fragment: str) -> tuple[str, list[str]]:
    """What stands on the page after some seconds, and what the browser complained of."""
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    address = f"http://127.0.0.1:{page.port}/{fragment}"
    options = (profile, f"--window-size={size}", "--virtual-time-budget=5000", "--dump-dom")
    shown = subprocess.run(
        [str(BROWSER), *QUIET, *options, address], check=True, capture_output=True, text=True, timeout=120
    )
    return shown.stdout, [line for line in shown.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("size", ["400,800", "1280,900"])
def test_it_shows_the_run_as_text_and_nothing_sticks_out(page: Page, tmp_path: Path, size: str) -> None:
    shown, complaints = look(page, tmp_path, size, f"#{page.token}")
    assert complaints == []
    body = shown[shown.index("<main>") : shown.index("<script")]
    seen = unescape(re.sub(r"<[^>]*>", " ", body))
    for words in (
        "working",
        "12 of 2",
        "alice",
        "late",
        "1.25",
        "2.0000",
        "mallory",
        "random:",
        "fedloom serve, since",
        "failed, round 2 of 9, /runs/ccc",
    ):
        assert words in seen
    assert body.count("<polyline") == 2
    assert "<img" not in body, "a name is text"
    assert HOSTILE[:28] in seen
    assert page.token not in body
    width = WIDE.search(shown)
    assert width, shown[-500:]
    assert int(width[1]) <= int(width[2])


def test_without_the_token_it_says_what_is_missing(page: Page, tmp_path: Path) -> None:
    shown, _ = look(page, tmp_path, "400,800", "")
    assert "it ends in the token" in shown
    assert "alice" not in shown
