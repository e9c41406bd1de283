"""Many clients in one process, without a model: a part of `scale.py`, which starts it as a process of its own.

    python bench/scripted.py FOLDER

They speak Flower's protocol as its SuperNode does, and answer at once. FOLDER has the clients' kits and
`clients.json`, the facts that each tells. The looks for messages are fedloom's own, and so is what is read of a
question; Flower's are the requests, their signatures and the heartbeats. The client behind the last kit comes once a
file `all` lies there. What was asked of the server is written to `asked.json` every second.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects
from flwr.supercore.retry import http_retry
from flwr.supernode import fleet_http_connection
from flwr.supernode.fleet_http_client import FleetHttpClient
from options import open_parser

from fedloom.deployment.client.joining import Kit, read_kit
from fedloom.deployment.flower.apps import to_frame, to_record
from fedloom.deployment.flower.programs import POLL_SECONDS, RETRY_SECONDS
from fedloom.deployment.flower.pulls import Looks
from fedloom.deployment.signing import Verifier
from fedloom.host.frames import Frame
from fedloom.training.client_report import ClientReport

FACTS, ASKED, ALL = "clients.json", "asked.json", "all"
AGAIN_SECONDS = 2.0
"""Pause before a client that was turned away comes again, as `fedloom join` has it."""
UNKNOWN = ("holdout_loss_before", "holdout_loss_after")


class Tally:
    """Requests of all clients and their bytes, bodies and headers, by the path that was asked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.requests: Counter[str] = Counter()
        self.bytes_up: Counter[str] = Counter()
        self.bytes_down: Counter[str] = Counter()

    def note(self, response: httpx.Response) -> None:
        path = response.request.url.path.rpartition("/")[2]
        with self._lock:
            self.requests[path] += 1
            self.bytes_up[path] += len(response.request.content) + header_bytes(response.request.headers)
            self.bytes_down[path] += len(response.content) + header_bytes(response.headers)

    def write(self, path: Path) -> None:
        """Write what was counted, whole or not at all."""
        with self._lock:
            told = json.dumps({name: dict(value) for name, value in vars(self).items() if name[0] != "_"})
        path.with_suffix(".new").write_text(told, encoding="utf-8")
        path.with_suffix(".new").replace(path)


def header_bytes(headers: httpx.Headers) -> int:
    return sum(len(name) + len(value) + 4 for name, value in headers.raw)


TALLY = Tally()
HERE = threading.local()
"""This thread's client of Flower's API, and the address that its requests come from."""


class CountedClient(FleetHttpClient):
    """Flower's client, with looks for messages that are numbered and requests that are counted."""

    def __init__(self, *arguments: Any, verify: Any = True, **named: Any) -> None:
        super().__init__(*arguments, verify=verify, **named)
        # Each client comes from an address of its own, as from a machine of its own: nginx has limits for one.
        timeout = self._client.timeout
        self._client.close()
        transport = httpx.HTTPTransport(verify=verify, local_address=HERE.address)
        self._client = httpx.Client(transport=transport, timeout=timeout)
        self.looks = Looks(FleetHttpClient.PullMessages)
        HERE.client = self

    def PullMessages(self, request: Any) -> Any:  # noqa: N802  (Flower's name)
        return self.looks.pull(self, request)

    def _send(self, *arguments: Any, **named: Any) -> httpx.Response:
        response = super()._send(*arguments, **named)
        TALLY.note(response)
        return response


class Client(threading.Thread):
    """Client that stays, whatever becomes of the server."""

    def __init__(self, kit: Kit, number: int, facts: dict[str, object]) -> None:
        super().__init__(daemon=True, name=kit.name)
        assert kit.key, "a kit over TLS has a key"
        private: Any = load_ssh_private_key(kit.key.read_bytes(), None)
        self._kit, self._facts, self._keys = kit, {**facts, "name": kit.name}, (private, private.public_key())
        self._address = f"127.0.{1 + number // 200}.{1 + number % 200}"
        self._verifier = Verifier(kit.signer, kit.name)
        self._random = np.random.default_rng(number)

    def run(self) -> None:
        HERE.address = self._address
        while True:
            with suppress(BaseException):  # SystemExit is Flower's way to say that the key was not taken
                self._stay()
            time.sleep(AGAIN_SECONDS)

    def _stay(self) -> None:
        told = self._kit.server, False, self._kit.ca.encode(), self._keys
        with fleet_http_connection.http_request_response(*told) as connection:
            _, receive, send, get_run, get_fab, pull_object, push_object, confirm = connection
            known: set[int] = set()
            while True:
                if (received := receive()) is None:
                    time.sleep(HERE.client.looks.rest_seconds(POLL_SECONDS))
                    continue
                message, tree = received
                run = message.metadata.run_id
                if run not in known:
                    get_fab(get_run(run).fab_hash, run)
                    known.add(run)
                parts = list(dict.fromkeys(one.object_id for one in iterate_object_tree(tree)))
                contents = pull_objects(parts, lambda part, run=run: pull_object(run, part))
                confirm(run, message.metadata.message_id)
                asked: Any = inflate_object_from_contents(tree.object_id, contents)
                answer = Message(to_record(self._answer(to_frame(asked.content))), reply_to=message)
                answer.metadata.__dict__["_message_id"] = answer.object_id
                objects = get_all_nested_objects(answer)
                lacking, session = send(answer, get_object_tree(answer), 0.0)
                for part in lacking:
                    push_object(run, session, part, objects[part].deflate())

    def _answer(self, frame: Frame) -> Frame:
        """Answer as a worker does, but for the work: an update is the adapter that came, moved a little."""
        asked = self._verifier.open(frame)
        told = asked.manifest
        match told["do"]:
            case "meet":
                return Frame(self._facts)
            case "train":
                weights_P = np.frombuffer(asked.payload, dtype="<f4")
                moved_P = weights_P + self._random.standard_normal(len(weights_P), dtype=np.float32) * 1e-3
                report = {name: 1.0 for name in ClientReport.__dataclass_fields__ if name not in UNKNOWN}
                report |= {"examples": 1, "tokens": 1, "steps": 1, "round": told["round"], "client": told["client"]}
                return Frame({"layout": told["layout"], "report": report}, moved_P.astype("<f4").tobytes())
            case "evaluate":
                # No two alike: what is the same the SuperLink has already, and is not sent.
                return Frame({"score": [5.0 + float(self._random.random()), 0, 1]})
            case _:
                return Frame({"tasks": None})


def main() -> None:
    parser = open_parser(__doc__)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="made by scale.py")
    folder = parser.parse_args().folder
    if not (folder / FACTS).is_file():
        parser.error(f"{folder} has no {FACTS}")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # with which Flower's heartbeat ends a process whose key was refused
    http_retry.MAX_RETRY_DELAY = RETRY_SECONDS
    fleet_http_connection.FleetHttpClient = CountedClient
    kits = [read_kit(path) for path in sorted(folder.glob("*.kit"))]
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    clients = [Client(kit, number, facts) for number, kit in enumerate(kits)]
    for client in clients[:-1]:
        client.start()
    while True:
        if not clients[-1].is_alive() and (folder / ALL).exists():
            clients[-1].start()
        TALLY.write(folder / ASKED)
        time.sleep(1.0)


if __name__ == "__main__":
    main()
