"""nginx in front of the SuperLink: what it is told, that it ends with the server, and is started again without it."""

import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from http.client import HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="comes with Flower: pip install 'fedloom[deploy]'")

from fedloom.deployment.keys import Security, init
from fedloom.deployment.processes import free_port
from fedloom.deployment.server import nginx as module
from fedloom.deployment.server.nginx import find_nginx, proxy, write_configuration
from fedloom.deployment.status import STATUS_PATH
from fedloom.errors import DeploymentError


class Counts(BaseHTTPRequestHandler):
    """SuperLink of a sort: it takes every signature, and answers how many bytes came."""

    def do_GET(self) -> None:
        self._answer(204, b"")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self._answer(200, str(len(body)).encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        if status == 200:
            self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def counts(security: Security) -> Iterator[int]:
    """Serve `Counts` over TLS with a server's certificate, and give its port."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(security.certificate, security.folder / "server.key")
    with ThreadingHTTPServer(("127.0.0.1", 0), Counts) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


with_nginx = pytest.mark.skipif(find_nginx() is None, reason="nginx is not installed")


def make(folder: Path) -> Security:
    """Make the keys of a server that is not for this machine alone."""
    return init(folder, "127.0.0.2", free_port())


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.2", port)) == 0


def becomes(wanted: Callable[[], bool]) -> bool:
    until = time.monotonic() + 30
    while not wanted() and time.monotonic() < until:
        time.sleep(0.05)
    return wanted()


def test_it_lets_through_the_fleet_and_nothing_else(tmp_path: Path) -> None:
    security = init(tmp_path / "server", "fed.example.org", 8443)
    text = write_configuration(security, 8000).read_text()
    assert "listen 8443 ssl" in text
    assert re.findall(r"location (\S+ ?\S*) {", text) == [
        "/v1/fleet/",
        f"= {STATUS_PATH}",
        "= /signature",
        "@later",
        "/",
    ]
    assert "server 127.0.0.1:8000;" in text
    assert "location /v1/fleet/ {\n      # Before a byte of the body is read.\n      auth_request /signature;" in text
    assert "location = /signature {\n      internal;" in text
    assert "location / { return 403; }" in text
    assert "proxy_ssl_verify on" in text
    assert text.count("{") == text.count("}")


@with_nginx
def test_a_part_of_an_adapter_comes_through_whoever_runs_the_server(tmp_path: Path) -> None:
    """A larger one lies on the disk on its way, in a folder that is its owner's alone: root's workers are no others."""
    security = make(tmp_path / "a")
    trust = ssl.create_default_context(cafile=security.ca)
    with counts(security) as inner, proxy(security, inner, tmp_path, print):
        for size in (1, 2**20 + 1000, 2**22):
            with closing(HTTPSConnection("127.0.0.2", security.port, context=trust, timeout=30)) as connection:
                connection.request("POST", "/v1/fleet/push-object", bytes(size))
                answer = connection.getresponse()
                assert (answer.status, answer.read()) == (200, str(size).encode())
    assert "Permission denied" not in (security.folder / "nginx.log").read_text()


@with_nginx
@pytest.mark.skipif(not module.has_ipv6(), reason="no IPv6 here")
def test_it_listens_on_both_families(tmp_path: Path) -> None:
    security = make(tmp_path / "a")
    with proxy(security, 1, tmp_path, print):
        assert listens(security.port)
        with socket.create_connection(("::1", security.port), timeout=30):
            pass


def test_without_ipv6_it_is_not_asked_to_listen_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_ipv6", lambda: False)
    assert "[::]" not in write_configuration(make(tmp_path / "a"), 8000).read_text()


def test_clients_elsewhere_are_not_served_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_nginx", lambda: None)
    with (
        pytest.raises(DeploymentError, match="nginx is not installed"),
        proxy(make(tmp_path / "a"), 1, tmp_path, print),
    ):
        pass
    with proxy(init(tmp_path / "local", "localhost", 8443), 8000, tmp_path, print):
        pass


@with_nginx
@pytest.mark.parametrize("name", ["server", "a folder; with $odd {names}"])
def test_it_listens_as_long_as_it_is_wanted(name: str, tmp_path: Path) -> None:
    security = make(tmp_path / name)
    with proxy(security, 1, tmp_path, print):
        assert listens(security.port)
    assert not listens(security.port)
    assert "emerg" not in (tmp_path / "nginx.log").read_text()


@pytest.mark.long
@with_nginx
def test_a_port_that_something_else_has_is_said(tmp_path: Path) -> None:
    security = make(tmp_path / "server")
    with socket.socket() as other:
        other.bind(("", security.port))
        other.listen()
        with (
            pytest.raises(DeploymentError, match=r"nginx does not start: .*Address already in use.*; end what listens"),
            proxy(security, 1, tmp_path, print),
        ):
            pass


@pytest.mark.long
@with_nginx
def test_it_is_started_again_where_it_ended_or_left_its_workers_behind(tmp_path: Path) -> None:
    security, said = make(tmp_path / "server"), []
    number = security.folder / "nginx.pid"
    with proxy(security, 1, tmp_path, lambda what, detail: said.append(f"{what}: {detail}")):
        for times in (1, 2):
            before = number.read_text()
            os.kill(int(before), signal.SIGKILL)
            assert becomes(lambda then=before: number.is_file() and number.read_text() not in ("", then))
            assert becomes(lambda: listens(security.port))
            assert said == ["restart: nginx ended; starting it again"] * times
    assert becomes(lambda: not listens(security.port))


@with_nginx
@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends what a killed process started")
def test_it_does_not_outlive_a_server_that_is_killed(tmp_path: Path) -> None:
    security = make(tmp_path / "server")
    code = f"""
import time
from pathlib import Path
from fedloom.deployment.keys import open_server
from fedloom.deployment.server.nginx import proxy
with proxy(open_server(Path({str(security.folder)!r})), 1, Path({str(tmp_path)!r}), print):
    time.sleep(600)
"""
    server = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert becomes(lambda: listens(security.port))
    finally:
        server.kill()
        server.wait()
    assert becomes(lambda: not listens(security.port))
    with proxy(security, 1, tmp_path, print):  # what it left behind is in nobody's way
        assert listens(security.port)
    with suppress(FileNotFoundError):
        assert (security.folder / "nginx.pid").read_text() == ""
