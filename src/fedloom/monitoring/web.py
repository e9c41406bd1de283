"""Small web server for whoever looks at a run: GET alone, bounded in bytes, seconds and connections.

It works in a thread of its own that ends with the run. Whatever fails in it is said once, and the run goes on.
"""

from __future__ import annotations

import io
import re
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_address
from types import MappingProxyType
from typing import Any, NamedTuple

from fedloom.monitoring.observer import Observer
from fedloom.progress import Say

MOST_CONNECTIONS = 16
MOST_HEAD_BYTES = 8 * 2**10
SECONDS = 5.0
"""Time that a request may take to come, and its answer to go."""
PACE_SECONDS = 0.01
"""Rest before each connection: a flood of requests takes little of the time that the run needs."""
LOOK_SECONDS = 0.2
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Answer(NamedTuple):
    """Answer to a request."""

    body: str
    kind: str = "text/plain; charset=utf-8"
    """Type of the body, as HTTP names it."""
    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = MappingProxyType({})


Respond = Callable[[str, Mapping[str, str]], Answer | None]
"""A function from a path and a request's headers, by their names in small letters, to an answer, or None where there is
no such path."""


class Web:
    """Server at an address, from its start until it is closed."""

    def __init__(self, word: str, address: tuple[str, int], respond: Respond, say: Say) -> None:
        """Listen at a host and port, 0 for a free one. `word` is what is said of it begins with.

        An address that can't be had is said, and nothing is served then.
        """
        self._word, self._say, self._said = word, say, False
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        try:
            self._server = _Server(address, respond, self.complain)
        except OSError as error:  # a name that nobody knows is one, too
            self.complain(f"can't listen at {address[0]} port {address[1]} ({error.strerror or error})")
            return
        serve = self._server.serve_forever
        self._thread = threading.Thread(target=serve, args=(LOOK_SECONDS,), name=f"fedloom {word}", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int | None:
        """Port that it listens on; None where it does not."""
        return self._server.server_address[1] if self._server else None

    def complain(self, what: str) -> None:
        """Say what failed, the first time."""
        if not self._said:
            self._said = True
            self._say(self._word, f"{what}; the run goes on")

    def close(self) -> None:
        """End it, with its thread. More than once does no harm."""
        server, self._server = self._server, None
        if server and self._thread:
            server.shutdown()
            server.server_close()
            self._thread.join()


class Answering(Observer):
    """Observer with a server of its own, by which it answers whoever looks until it is closed."""

    _web: Web

    @property
    def port(self) -> int | None:
        """Port that it answers at; None where it does not."""
        return self._web.port

    def close(self) -> None:
        self._web.close()


def is_loopback(host: str) -> bool:
    """Return whether only this machine can connect to an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_named_here(host: str) -> bool:
    """Return whether a request's Host header names localhost or an address, as it does unless a name leads here.

    A page of somebody's, open in a browser of this machine, can have a name of theirs lead to the loopback, and then
    read what is answered there (DNS rebinding).
    """
    name = re.sub(r":\d+$", "", host)
    try:
        return bool(ip_address(name.strip("[]")))
    except ValueError:
        return name.lower() in ("", "localhost")


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = MOST_CONNECTIONS

    def __init__(self, address: tuple[str, int], respond: Respond, complain: Callable[[str], object]) -> None:
        self.respond, self.complain = respond, complain
        self._places = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)

    def get_request(self) -> Any:
        time.sleep(PACE_SECONDS)
        return super().get_request()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread can be had
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Complain of a bug; who hangs up is none."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            self.complain(f"can't be shown ({type(error).__name__})")


class _Handler(BaseHTTPRequestHandler):
    """Handler of one connection, which has one request."""

    server: _Server

    def setup(self) -> None:
        super().setup()
        # By hand: what the standard library reads may come byte by byte without end, and have 100 headers of 64 KiB.
        self.rfile = io.BytesIO(self._read_head())
        self.connection.settimeout(SECONDS)

    def _read_head(self) -> bytes:
        """Return a request until its empty line; nothing where that does not come in time, or within the bytes."""
        until, head = time.monotonic() + SECONDS, bytearray()
        with suppress(OSError):
            while len(head) <= MOST_HEAD_BYTES and (left := until - time.monotonic()) > 0:
                self.connection.settimeout(left)
                part = self.connection.recv(MOST_HEAD_BYTES)
                head += part
                if b"\r\n\r\n" in head:
                    return bytes(head)
                if not part:
                    break
        return b""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        # A proxy that speaks HTTP/2 writes names in small letters.
        found = self.server.respond(path, {name.lower(): value for name, value in self.headers.items()})
        self._send(found or Answer("there is nothing here\n", status=HTTPStatus.NOT_FOUND))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that is none, or no GET, in words that hold nothing of it."""
        status = HTTPStatus(code)
        if status == HTTPStatus.NOT_IMPLEMENTED:
            self._send(Answer("GET alone\n", status=HTTPStatus.METHOD_NOT_ALLOWED, headers={"Allow": "GET"}))
        else:
            self._send(Answer(f"{status.phrase}\n", status=status))

    def _send(self, answer: Answer) -> None:
        body = answer.body.encode("utf-8", errors="replace")
        self.close_connection = True
        if self.request_version == "HTTP/0.9":  # it has no headers
            return
        self.send_response_only(answer.status)
        told = {**HEADERS, "Content-Type": answer.kind, "Content-Length": str(len(body)), "Connection": "close"}
        for name, value in {**told, **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of single requests."""
