"""The small web server: GET alone, bounded, and never in the way of the run."""

import socket
import threading
import time
from collections.abc import Iterator, Mapping

import pytest
from support.boards import asked
from support.marks import first

from fedloom.monitoring import web
from fedloom.monitoring.web import MOST_CONNECTIONS, MOST_HEAD_BYTES, Answer, Web


class Told:
    """What was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, what: str, detail: str) -> None:
        self.lines.append(f"{what}: {detail}")


def respond(path: str, headers: Mapping[str, str]) -> Answer | None:
    if path == "/bug":
        raise ValueError("private")
    return Answer("hello\n") if path == "/" else None


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def server(told: Told) -> Iterator[Web]:
    server = Web("page", ("127.0.0.1", 0), respond, told)
    yield server
    server.close()


def port_of(server: Web) -> int:
    assert server.port is not None
    return server.port


def test_get_is_answered_and_no_other_method(server: Web) -> None:
    with asked(port_of(server), "GET", "/?more") as answer:
        assert (answer.status, answer.read()) == (200, b"hello\n")
        assert answer.headers["Server"] is None
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    with asked(port_of(server), "GET", "/else") as answer:
        assert answer.status == 404
    for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "<script>"):
        with asked(port_of(server), method, "/") as answer:
            assert (answer.status, answer.headers["Allow"]) == (405, "GET")
            assert b"script" not in answer.read()


def knock(port: int, sent: bytes) -> bytes:
    """All that comes back until the connection is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(sent)
        found = b""
        try:
            while part := connection.recv(4096):
                found += part
        except ConnectionResetError:
            pass
    return found


@pytest.mark.parametrize(
    "sent",
    first(
        [
            b"\r\n\r\n",
            b"GET\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n",
            b"GET /" + b"x" * 2 * MOST_HEAD_BYTES + b" HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * MOST_HEAD_BYTES,
            bytes(range(256)) + b"\r\n\r\n",
        ],
        keep=3,
    ),
    ids=["empty", "no path", "version", "many headers", "long path", "no end", "bytes"],
)
def test_what_is_no_request_gets_nothing(server: Web, told: Told, sent: bytes) -> None:
    assert b"hello" not in knock(port_of(server), sent)
    assert b"hello" in knock(port_of(server), b"GET / HTTP/1.1\r\n\r\n")
    assert told.lines == []


def test_who_sends_byte_by_byte_is_cut_off_and_who_comes_meanwhile_is_answered(
    server: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "SECONDS", 1.0)
    slow = [socket.create_connection(("127.0.0.1", port_of(server)), timeout=20) for _ in range(MOST_CONNECTIONS - 1)]
    try:
        began = time.monotonic()
        with asked(port_of(server), "GET", "/") as answer:
            assert answer.status == 200
        while time.monotonic() < began + 0.8:
            slow[0].sendall(b"G")
            time.sleep(0.1)
        for one in slow:
            assert one.recv(1) == b"", "the first too, which sent something all the time"
        assert time.monotonic() < began + 10
    finally:
        for one in slow:
            one.close()


@pytest.mark.long
def test_there_are_no_more_threads_than_places(server: Web) -> None:
    before = threading.active_count()
    many = [socket.create_connection(("127.0.0.1", port_of(server)), timeout=20) for _ in range(4 * MOST_CONNECTIONS)]
    try:
        many[-1].settimeout(20)
        assert many[-1].recv(1) == b"", "it is turned away at once"
        assert threading.active_count() <= before + MOST_CONNECTIONS
    finally:
        for one in many:
            one.close()


def test_a_bug_is_said_once_and_nothing_ends(server: Web, told: Told) -> None:
    for _ in range(3):
        assert knock(port_of(server), b"GET /bug HTTP/1.1\r\n\r\n") == b""
    assert told.lines == ["page: can't be shown (ValueError); the run goes on"]
    assert b"hello" in knock(port_of(server), b"GET / HTTP/1.1\r\n\r\n")


def test_an_address_that_is_taken_is_said_and_nothing_fails(server: Web, told: Told) -> None:
    another = Web("page", ("127.0.0.1", port_of(server)), respond, told)
    assert another.port is None
    assert told.lines == [
        f"page: can't listen at 127.0.0.1 port {port_of(server)} (Address already in use); the run goes on"
    ]
    another.close()


def test_its_threads_end_with_it(told: Told) -> None:
    before = set(threading.enumerate())
    server = Web("page", ("::1" if socket.has_ipv6 else "127.0.0.1", 0), respond, told)
    port = server.port
    server.close()
    server.close()
    assert server.port is None
    assert port is None or set(threading.enumerate()) <= before
