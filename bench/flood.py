"""Flood of a server by hosts that it does not know: what an honest client sees of it, and what the SuperLink keeps.

    python bench/flood.py [--posts 5000]

nginx and the SuperLink are started as `fedloom serve` starts them, the flood is a process of its own, and addresses of
the loopback stand for hosts. Requests are half sent: all of the header, and a part of the body. An honest client looks
for messages over a new connection each time, as one that comes back does.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from options import open_parser

from fedloom.deployment.keys import Security, approve, init, request
from fedloom.deployment.processes import private_folder
from fedloom.deployment.server.nginx import proxy
from fedloom.deployment.server.superlink import SuperLink

HOST = "127.0.0.2"
"""Address of the server: no loopback in the eyes of `provision`, so nginx is before it."""
PATH = "/v1/fleet/pull-messages"
PROBE_SECONDS = 10.0
"""Time after which an honest client's question counts as unanswered."""
AT_ONCE = 40


@dataclass(frozen=True)
class Seen:
    """What an honest client and the server's machine saw of a flood."""

    probes: int
    answered: int
    median_seconds: float
    worst_seconds: float
    superlink_bytes: int
    """The most that the SuperLink held, beyond what it held before."""
    disk_bytes: int
    """The most that lay in nginx's folder for bodies."""
    held: int
    """Connections of the flood that were open when it was complete."""


@dataclass(frozen=True)
class Server:
    """Server with one approved client."""

    security: Security
    superlink: int
    """Number of the SuperLink's process."""
    key: Path


@contextmanager
def serve() -> Iterator[Server]:
    """Start nginx and the SuperLink before a flood."""
    with ExitStack() as stack:
        folder = stack.enter_context(private_folder())
        security = init(folder / "server", HOST, fixed_port(20_000))
        approve(security.folder, request("alice", folder), folder)
        inner = fixed_port(security.port + 1)
        quiet = lambda *words: None  # noqa: E731
        stack.enter_context(proxy(security, inner, folder, quiet))
        link = stack.enter_context(closing(SuperLink(folder, inner, security, quiet)))
        link.open()
        assert link._child is not None
        yield Server(security, link._child.pid, folder / "alice.key")


def fixed_port(first: int) -> int:
    """Find a free port that no connection of a flood takes: those have higher ones."""
    for port in range(first, 32_000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise RuntimeError("no free port")


def flood(port: int, posts: int, addresses: int, body_bytes: int, sent_bytes: int, seconds: float) -> None:
    """Open so many half-sent requests, say how many are open still, and hold them."""
    trust = ssl._create_unverified_context()
    header = (
        f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/protobuf\r\nContent-Length: {body_bytes}\r\n\r\n"
    )
    piece = header.encode() + b"\0" * sent_bytes

    def post(number: int) -> ssl.SSLSocket | None:
        try:
            plain = socket.create_connection((HOST, port), 30, (f"127.0.1.{1 + number % addresses}", 0))
            connection = trust.wrap_socket(plain)
            connection.sendall(piece)
        except OSError:
            return None
        return connection

    with ThreadPoolExecutor(AT_ONCE) as pool:
        opened = [connection for connection in pool.map(post, range(posts)) if connection]
    print(sum(1 for connection in opened if is_open(connection)), flush=True)
    time.sleep(seconds)


def is_open(connection: ssl.SSLSocket) -> bool:
    """Whether the server has not closed it. What it answered lies before that."""
    connection.settimeout(0.001)
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return True
    except OSError:
        return False
    return False


class Honest:
    """Approved client that looks for messages."""

    def __init__(self, server: Server) -> None:
        from flwr.proto.fleet_pb2 import ActivateNodeRequest
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes

        self._server = server
        self._private = load_ssh_private_key(server.key.read_bytes(), None)
        public = public_key_to_bytes(self._private.public_key())
        with self._connect() as client:
            self._node = client.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=60)).node_id

    def _connect(self):  # type: ignore[no-untyped-def]
        from flwr.supernode.fleet_http_client import FleetHttpClient
        from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

        security = self._server.security
        return FleetHttpClient(
            f"https://{HOST}:{security.port}",
            interceptors=[NodeAuthHttpInterceptor(self._private, self._private.public_key())],
            verify=ssl.create_default_context(cafile=str(security.ca)),
            timeout=PROBE_SECONDS,
        )

    def look(self) -> float | None:
        """Look once; the seconds it took, or None where it got no answer."""
        import httpx
        from flwr.proto.fleet_pb2 import PullMessagesRequest
        from flwr.proto.node_pb2 import Node

        started = time.monotonic()
        try:
            with self._connect() as client:
                client.PullMessages(PullMessagesRequest(node=Node(node_id=self._node)))
        except httpx.HTTPError:
            return None
        return time.monotonic() - started


def attack(server: Server, honest: Honest, words: Sequence[object], seconds: float) -> Seen:
    """Flood a server, and look at it from when the flood begins until some seconds after it is complete."""
    before = resident_bytes(server.superlink)
    process = subprocess.Popen(
        [sys.executable, __file__, "--flood", str(server.security.port), *map(str, words)],
        stdout=subprocess.PIPE,
        text=True,
    )
    looks: list[float | None] = []
    most = disk = 0
    assert process.stdout is not None
    try:
        os.set_blocking(process.stdout.fileno(), False)
        line, until = "", time.monotonic() + 300
        while time.monotonic() < until:
            looks.append(honest.look())
            most = max(most, resident_bytes(server.superlink))
            disk = max(disk, sum(file.stat().st_blocks * 512 for file in bodies(server.security.folder)))
            if not line and (line := process.stdout.readline()):
                until = time.monotonic() + seconds
            time.sleep(0.25)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    answered = sorted(look for look in looks if look is not None)
    return Seen(
        len(looks),
        len(answered),
        median(answered) if answered else float("inf"),
        max(answered, default=float("inf")),
        most - before,
        disk,
        int(line or -1),
    )


def bodies(folder: Path) -> list[Path]:
    return [file for file in (folder / "nginx-body").glob("**/*") if file.is_file()]


def resident_bytes(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = open_parser(__doc__)
    parser.add_argument("--posts", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=15.0, help="to look on when a flood is complete")
    parser.add_argument("--flood", metavar=("PORT", "POSTS", "ADDRESSES", "BYTES", "SENT"), type=int, nargs=5)
    options = parser.parse_args()
    if options.flood:
        return flood(*options.flood, seconds=600)
    floods = {
        "none": (0, 1, 1000, 1),
        f"{options.posts:,} half-sent requests, one address": (options.posts, 1, 1000, 1),
        f"{options.posts:,} half-sent requests, fifty addresses": (options.posts, 50, 1000, 1),
        "60 bodies of 31 MB without their last byte": (60, 1, 31_000_000, 30_999_999),
        "60 bodies of 2 MB without their last byte": (60, 1, 2_000_000, 1_999_999),
    }
    print("| flood | looks answered | median, s | worst, s | SuperLink, MB more | on disk, MB | held open |")
    print("|---|---|---|---|---|---|---|")
    for what, words in floods.items():
        with serve() as server:
            seen = attack(server, Honest(server), words, options.seconds)
        print(
            f"| {what} | {seen.answered} of {seen.probes} | {seen.median_seconds:.3f} | {seen.worst_seconds:.2f} "
            f"| {seen.superlink_bytes / 1e6:.0f} | {seen.disk_bytes / 1e6:.0f} | {seen.held:,} |",
            flush=True,
        )
        print(json.dumps(asdict(seen)), file=sys.stderr)
    return None


if __name__ == "__main__":
    main()
