"""Docker's health checks of a server that answers, one that does not, and of a client's processes."""

import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="comes with Flower: pip install 'fedloom[deploy]'")

from support.federation_here import find_process

from fedloom.deployment.flower.programs import BE_NAMED, TASKS_NAME
from fedloom.deployment.health import check_client, check_server
from fedloom.deployment.keys import Security, init
from fedloom.deployment.processes import free_port

WORDS = (
    ["fedloom.deployment.client.worker_process"],
    ["fedloom.deployment.flower.programs", "supernode"],
    ["a fork of the SuperNode", "its tasks"],
)
"""Words of the command lines that `fedloom join` starts; the last has a name instead."""


@contextmanager
def answering(security: Security, status: int) -> Iterator[None]:
    """Something that answers on the server's port, with the server's certificate."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *told: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", security.port), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(security.certificate, security.key)
    # The handshake is left to the first read, where a client that hangs up ends its own request alone.
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "wrong"), [(403, ""), (404, ""), (401, ""), (502, "no SuperLink"), (504, "no SuperLink")]
)
def test_a_server_is_well_when_its_proxy_answers_and_has_something_behind_it(
    status: int, wrong: str, tmp_path: Path
) -> None:
    security = init(tmp_path / "server", "fed.example.org", free_port())
    with answering(security, status):
        found = check_server(security.folder)
    assert wrong in found
    assert bool(found) == bool(wrong)


def test_a_server_that_is_not_there_or_another_is_not_well(tmp_path: Path) -> None:
    port = free_port()
    security = init(tmp_path / "server", "fed.example.org", port)
    other = init(tmp_path / "other", "fed.example.org", port)
    assert "ConnectionRefusedError" in check_server(security.folder)
    with answering(other, 403):
        assert "certificate verify failed" in check_server(security.folder)
    assert "FileNotFoundError" in check_server(tmp_path / "nothing")


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="no /proc")
def test_a_client_is_well_while_both_of_its_processes_run() -> None:
    sleep = "import time; time.sleep(60)"
    name = f"bytes.fromhex('{TASKS_NAME.hex()}')"  # so that it stands in no command line
    named = f"import ctypes; ctypes.CDLL(None).prctl({BE_NAMED}, {name}); {sleep}"
    codes = (sleep, sleep, named)
    started = [subprocess.Popen([sys.executable, "-c", code, *words]) for code, words in zip(codes, WORDS, strict=True)]
    try:
        for words in WORDS:
            find_process(os.getpid(), words[-1])
        find_process(os.getpid(), TASKS_NAME.decode())
        assert check_client(os.getpid()) == ""
        started[0].kill()
        started[0].wait()
        assert check_client(os.getpid()) == "not running: worker"
        started.append(subprocess.Popen([sys.executable, "-c", sleep, "another.programs", "supernode"]))
        find_process(os.getpid(), "another.programs")
        started[1].kill()
        started[1].wait()
        assert check_client(os.getpid()) == "not running: worker, SuperNode", "another's program is not the SuperNode"
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert check_client(os.getpid()) == "not running: worker, SuperNode, tasks"


def test_the_check_is_a_command_that_starts_without_numpy(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "fedloom.deployment.health"]
    done = subprocess.run([*command, "server", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "FileNotFoundError" in done.stdout
    assert "numpy" not in done.stderr
    assert subprocess.run(command, capture_output=True, text=True).stdout.startswith("usage")
