"""The live page: by its token alone, of the run's facts alone, and nothing in it from elsewhere."""

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.boards import HOSTILE, asked, make_board
from support.tiny import make_recipe

import fedloom
from fedloom import run
from fedloom.errors import DeploymentError
from fedloom.monitoring.board import Board
from fedloom.monitoring.observer import Observer
from fedloom.monitoring.page import DOCUMENT, Page
from fedloom.monitoring.web import is_loopback
from fedloom.run_options import Asked, observed, read_address

TEMPLATE = Path(fedloom.__file__).parent / "monitoring" / "page.html.j2"
REPORT = Path(fedloom.__file__).parent / "report" / "page.html.j2"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def page(said: list[str]) -> Iterator[Page]:
    page = Page(make_board(), ("127.0.0.1", 0), lambda what, detail: said.append(f"{what} {detail}"))
    yield page
    page.close()


def port_of(page: Page) -> int:
    assert page.port is not None
    return page.port


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


@pytest.mark.long
def test_its_address_is_said_with_the_token(page: Page, said: list[str]) -> None:
    assert said == [f"page http://127.0.0.1:{page.port}/#{page.token}"]
    assert len(page.token) >= 32


def test_with_its_token_the_run_is_told_and_without_it_nothing(page: Page) -> None:
    with asked(port_of(page), "GET", DOCUMENT, {"Authorization": f"Bearer {page.token}"}) as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "application/json"
        told = json.loads(answer.read())
    assert told["losses"]["central"] == [[0, 5.0], [1, 4.75], [2, 4.5]]
    assert [client["name"] for client in told["clients"]] == ["alice", "bob"]
    with asked(port_of(page), "GET", DOCUMENT, {"authorization": f"Bearer {page.token}"}) as answer:
        assert answer.status == 200, "as a proxy writes it that speaks HTTP/2"
    wrong = ("", page.token, "Bearer ", f"Bearer {page.token}x", f"Bearer {page.token[:-1]}", "Bearer é", "Basic x")
    for headers in ({}, *({"Authorization": given} for given in wrong)):
        for path in (DOCUMENT, f"{DOCUMENT}?token={page.token}", "/else"):
            with asked(port_of(page), "GET", path, headers) as answer:
                body = answer.read()
                assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
                assert b"alice" not in body


def test_the_frame_has_nothing_of_the_run_and_a_policy_that_lets_in_its_own_script_alone(page: Page) -> None:
    frames, nonces = [], []
    for _ in range(2):
        with asked(port_of(page), "GET", "/") as answer:
            policy, shown = answer.headers["Content-Security-Policy"], answer.read().decode()
        (nonce,) = set(re.findall(r"'nonce-([\w-]+)'", policy))
        assert policy.startswith("default-src 'none';")
        for directive in ("frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'", "connect-src 'self'"):
            assert directive in policy
        assert "unsafe" not in policy
        assert re.findall(r"<(?:script|style)[^>]*>", shown) == [
            f'<style nonce="{nonce}">',
            f'<script nonce="{nonce}">',
        ]
        assert "alice" not in shown
        assert page.token not in shown
        frames.append(shown.replace(nonce, ""))
        nonces.append(nonce)
    assert frames[0] == frames[1]
    assert nonces[0] != nonces[1]


def test_the_frame_loads_nothing_and_makes_no_markup_of_text() -> None:
    text = TEMPLATE.read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\s'\"]+", text)) == {"http://www.w3.org/2000/svg"}, "which is a name"
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(| style=|\bon\w+=", text
    )


def test_it_looks_as_the_report_does() -> None:
    def palette(path: Path) -> list[str]:
        return re.findall(r":root \{ --ink.*\}", path.read_text(encoding="utf-8"))

    assert palette(TEMPLATE) == palette(REPORT)[:2]


@pytest.mark.long
def test_names_that_others_chose_come_without_control_characters(page: Page) -> None:
    with asked(port_of(page), "GET", DOCUMENT, {"Authorization": f"Bearer {page.token}"}) as answer:
        (trouble,) = json.loads(answer.read())["troubles"]
    assert HOSTILE[:28] in trouble["why"], "the page makes text of it"
    assert not re.search(r"[\x00-\x1f\u202e]", trouble["why"])


def test_an_address_open_to_the_network_is_said(said: list[str]) -> None:
    page = Page(Board("fedloom run"), ("0.0.0.0", 0), lambda what, detail: said.append(f"{what} {detail}"))
    page.close()
    assert "open to the network" in said[1]
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "fed.example.org")] == [
        *(True, True, True, False, False)
    ]


def test_a_run_shows_itself_while_it_works_and_its_page_ends_with_it(tmp_path: Path) -> None:
    shown: list[dict[str, object]] = []

    class Visitor(Observer):
        def show_round(self, record: object) -> None:
            page = next(one for one in observers if isinstance(one, Page))
            with asked(port_of(page), "GET", DOCUMENT, {"Authorization": f"Bearer {page.token}"}) as answer:
                shown.append(json.loads(answer.read()))

    with observed("fedloom run", tmp_path / "run", lambda *told: None, Asked(free_port())) as observers:
        run(make_recipe(), tmp_path / "run", Observer(), observers=[*observers, Visitor()])
    assert [told["state"] for told in shown] == ["working"] * 3
    assert [len(told["rows"]) for told in shown] == [1, 2, 3]  # type: ignore[arg-type]
    assert [one.port for one in observers if isinstance(one, Page)] == [None]


@pytest.mark.long
def test_a_page_that_can_not_be_had_ends_no_run(tmp_path: Path) -> None:
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with observed("fedloom run", None, lambda what, why: said.append(f"{what} {why}"), Asked(port)) as observers:
            assert run(make_recipe(), tmp_path / "run", Observer(), observers=observers).status["state"] == "done"
    assert said == [f"page can't listen at 127.0.0.1 port {port} (Address already in use); the run goes on"]


@pytest.mark.parametrize("text", ["", "here", "127.0.0.1:99999", "http://127.0.0.1:8080", ":8080", "::1:8080"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(DeploymentError, match=r"^--page: not HOST:PORT: .*; name one as 127\.0\.0\.1:8080"):
        read_address("--page", text)
    assert read_address("--page", "8080") == ("127.0.0.1", 8080)
    assert read_address("--page", "[::1]:8080") == ("::1", 8080)
    assert read_address("--page", None) is None
