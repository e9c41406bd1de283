"""Flower's SuperLink: starts and watches it, submits the app to it, and is the `Transport` that the two make."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedloom.deployment.approvals import note_seen, read_approval
from fedloom.deployment.flower.bundle import write_app
from fedloom.deployment.keys import Security
from fedloom.deployment.processes import (
    CONTROL_SECRET,
    KEYS_ARE_IN,
    SERVE_SOCKET,
    Child,
    flower_child,
    flower_command,
    hand_over,
    programs_environment,
    tail,
    tasks_words,
    write_secret,
)
from fedloom.deployment.server.exchange import Answer, Node
from fedloom.deployment.signing import Signer
from fedloom.errors import DeploymentError
from fedloom.host.frames import Frame, accept, listen, read_manifest, receive_frame, send_frame

FREE_SECONDS = 20.0
"""Time within which a SuperLink whose server was killed ends and frees its port."""
START_SECONDS = 120.0
"""Time within which the SuperLink, its app and what they need must come up."""
ANSWER_SECONDS = 60.0
"""Time within which the app answers what it is asked here."""
NOTE_SECONDS = 60.0
"""Time between two notes of who is there."""
RESTARTS = 5
"""Restarts of a SuperLink that ends, in a row without an answer in between, before it is given up."""
SETTLED_SECONDS = 600.0
"""Time after which a SuperLink that ends had worked, whether it brought answers or not: a service waits for weeks."""


class SuperLink:
    """Running SuperLink with our app on it. It listens on the loopback alone; without `security`, to anyone there."""

    def __init__(
        self,
        folder: Path,
        port: int,
        security: Security | None,
        say: Callable[[str, str], object],
    ) -> None:
        self._folder, self._port, self._security = folder, port, security
        self._signer = Signer(security.signing_key) if security else None
        self._say = say
        self._check: Callable[[], object] = lambda: None
        self._log, self._tasks_log = folder / "superlink.log", folder / "tasks.log"
        self._socket = folder / "serve.sock"
        self._keys_are_in = folder / "keys-are-in"
        self._environment = programs_environment(folder / "flower") | {
            SERVE_SOCKET: str(self._socket),
            KEYS_ARE_IN: str(self._keys_are_in),
            CONTROL_SECRET: secrets.token_hex(32),
        }
        self._app: socket.socket | None = None
        self._child: Child | None = None
        self._tasks: Child | None = None
        self._secret = write_secret(folder)
        self._restarts = 0
        self._opened_at = 0.0
        self._registered: dict[str, str] = {}
        """Keys of the clients that were approved at the last look, by the clients' names."""
        self._taken: dict[str, str] = {}
        """Keys that this SuperLink took, by the clients' names; also of clients that were revoked since."""
        self._warned: set[str] = set()
        """Warnings of approvals that were given."""
        self._noted: set[str] = set()
        """Names of the clients that were there at the last look."""
        self._noted_at = float("-inf")
        write_app(folder / "app")
        (folder / "flower").mkdir()
        trust = f'root-certificates = "{security.ca}"' if security else "insecure = true"
        self._address = f"{'localhost' if security else '127.0.0.1'}:{port}"
        connection = f'[superlink.here]\naddress = "{self._address}"\n{trust}\n'
        (folder / "flower" / "config.toml").write_text(connection, encoding="utf-8")
        self._listener = listen(str(self._socket))
        self._listener.settimeout(0.2)

    def watch(self, check: Callable[[], object]) -> None:
        """Call `check` at every wait: it raises where the run is to end."""
        self._check = check

    @property
    def is_open(self) -> bool:
        """True once it was opened: whoever uses it next finds it so."""
        return self._child is not None

    def open(self) -> None:
        """Start it, register the clients' keys and submit the app.

        Raises:
            DeploymentError: it does not come up.
        """
        # A server that was killed leaves a SuperLink that is about to end: `--resume` may come before it has.
        free_by = time.monotonic() + FREE_SECONDS
        if self._listens():
            self._say("server", f"port {self._port} is taken: it is waited for, {FREE_SECONDS:.0f} s at most")
        while self._listens():
            self._check()
            if time.monotonic() > free_by:
                raise DeploymentError(f"port {self._port} is taken", mend=mend_port(self._security))
            time.sleep(0.2)
        words = ["--host", "127.0.0.1", "--port", str(self._port)]
        # Flower would install what an app asks for, and start its apps itself: the first is no app's business, and
        # the second is done by `programs`, faster.
        words += ["--disable-runtime-dependency-installation", "--isolation", "process"]
        words += ["--superexec-auth-secret-file", str(self._secret)]
        if self._security:
            words += ["--ssl-ca-certfile", str(self._security.ca), "--ssl-certfile", str(self._security.certificate)]
            words += ["--ssl-keyfile", str(self._security.key), "--enable-supernode-auth"]
        else:
            words += ["--insecure"]
        self._keys_are_in.unlink(missing_ok=True)
        self._child = flower_child("superlink", words, self._log, self._environment)
        until = time.monotonic() + START_SECONDS
        while not self._listens():
            self._wait(until, "it does not listen")
        self._registered, self._taken = {}, {}
        self._register()  # until it is done, clients are told to come again
        words = tasks_words(self._address, self._secret, self._security.ca if self._security else None)
        self._tasks = flower_child("server-tasks", words, self._tasks_log, self._environment)
        self._submit(until)

    def _submit(self, until: float) -> None:
        """Start the app, and wait until it connects."""
        self._flower("run", str(self._folder / "app"), "here")
        while True:
            try:
                self._app = accept(self._listener)
            except TimeoutError:
                if self._tasks and self._tasks.ended:
                    raise DeploymentError(f"the server app can't be started: {tail(self._tasks_log)}") from None
                self._wait(until, f"its app does not start ({tail(self._tasks_log)})")
                continue
            self._app.settimeout(ANSWER_SECONDS)
            self._opened_at = time.monotonic()
            return

    def close(self) -> None:
        """End all of it."""
        if self._app:
            self._app.close()
        self._listener.close()
        self._end()

    def nodes(self) -> Sequence[Node]:
        self._register()
        nodes = [Node(*told) for told in self._ask(Frame({"do": "nodes"})).manifest["nodes"]]
        if self._security is None:
            return nodes
        # Revoked since they connected: Flower itself lets them stay.
        if revoked := [node.id for node in nodes if node.name not in self._registered]:
            self._change_nodes({}, revoked)
        known = [node for node in nodes if node.name in self._registered]
        self._note({node.name for node in known})
        return known

    def _note(self, names: set[str]) -> None:
        """Note who is there: who came at once, and all of them from time to time."""
        now = time.monotonic()
        if self._security and (names - self._noted or now - self._noted_at > NOTE_SECONDS):
            self._noted_at = now
            with suppress(OSError):  # a disk that is full ends a run where something is lost by it
                note_seen(self._security.folder, names)
        self._noted = names

    def send(self, node: Node, frame: Frame, seconds: float) -> str:
        if self._signer:
            frame = self._signer.sign(frame, node.name, seconds)
        told = {"do": "send", "node": node.id, "ttl": seconds, "manifest": frame.manifest}
        return str(self._ask(Frame(told, frame.payload)).manifest["message"])

    def pull(self, messages: Collection[str]) -> Answer | None:
        found = self._ask(Frame({"do": "pull", "messages": [*messages]}))
        answer = read_answer(found)
        if answer:
            self._restarts = 0
        return answer

    def reopen(self) -> None:
        """Start the app again, and where that does not help, the SuperLink.

        Raises:
            DeploymentError: it ended too often, or does not come up.
        """
        if time.monotonic() - self._opened_at > SETTLED_SECONDS:
            self._restarts = 0
        self._restarts += 1
        if self._restarts > RESTARTS:
            raise DeploymentError(f"the SuperLink ended {RESTARTS} times in a row: {tail(self._log)}")
        if self._app:
            self._app.close()
        if self._child and self._tasks and not self._child.ended and self._restarts == 1:
            # Clients stay connected to a SuperLink that stays: where only its app ended, that alone is replaced, once.
            with suppress(DeploymentError):  # it may have ended meanwhile
                self._tasks.start()
                self._submit(time.monotonic() + START_SECONDS)
                return
        self._end()
        self.open()

    def _end(self) -> None:
        for child in (self._tasks, self._child):
            if child:
                child.end()

    def _ask(self, frame: Frame) -> Frame:
        self._check()
        assert self._app is not None, "the SuperLink is not open"
        send_frame(self._app, frame)
        return receive_frame(self._app)

    def _register(self) -> None:
        """Register the keys that were approved since the last look, and note which were revoked.

        Raises:
            ConnectionResetError: a name has another key now, or a revoked key is back, so the SuperLink was ended: it
                has to be opened again.
        """
        looked = time.time()
        files = self._security.clients() if self._security else {}
        listed = {}
        for name, file in files.items():
            with suppress(FileNotFoundError):  # revoked just now
                if key := self._look_at(file):
                    listed[name] = key
        new = [name for name, key in listed.items() if self._registered.get(name) != key]
        self._registered = listed
        # Flower may still take the old key of a name, and never takes a key again that it let go. A new SuperLink does.
        if any(name in self._taken or listed[name] in self._taken.values() for name in new):
            self._say("keys", "a key was replaced or approved again: restarting the SuperLink")
            self._end()
            self._restarts = 0  # it did not end by itself
            raise ConnectionResetError("the clients' keys changed")

        refused = self._change_nodes({name: listed[name] for name in new}, ()) if new else {}
        for name in new:
            if name in refused:
                self._say("refused", f"{name}'s key, which Flower does not take: {refused[name]}")
            else:
                self._taken[name] = listed[name]
        self._keys_are_in.touch()
        os.utime(self._keys_are_in, (looked, looked))

    def _look_at(self, file: Path) -> str:
        """Return the key of an approval, or nothing where it has ended or can't be read; warn of each once.

        Raises:
            FileNotFoundError: it was revoked just now.
        """
        try:
            approval = read_approval(file)
            what, words, key = "keys", approval.describe_end(), approval.key
            if approval.state == "expired":
                what, key = "expired", ""
        except DeploymentError as error:
            what, words, key = "refused", str(error), ""
        if words and words not in self._warned:
            self._warned.add(words)
            self._say(what, words)
        return key

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0

    def _wait(self, until: float, what: str) -> None:
        self._check()
        if (self._child and self._child.ended) or time.monotonic() > until:
            raise DeploymentError(f"the SuperLink does not start: {what}: {tail(self._log)}")
        time.sleep(0.1)

    def _flower(self, *words: str) -> None:
        """Run one of Flower's own commands.

        Raises:
            DeploymentError: it failed.
        """
        told = self._run("flwr", *words, "--format", "json")
        if not told.get("success"):
            raise DeploymentError(f"flwr {words[0]} failed: {told.get('error-message')}")

    def _change_nodes(self, keys: Mapping[str, str], let_go: Sequence[str]) -> Mapping[str, str]:
        """Register keys by their clients' names, let go of nodes, and return who was refused and why."""
        asked = json.dumps({"register": dict(keys), "unregister": [*let_go]})
        ca = str(self._security.ca) if self._security else ""
        return self._run("nodes", self._address, ca, told=asked)

    def _run(self, program: str, *words: str, told: str = "") -> dict[str, Any]:
        """Run a program that operates the SuperLink, and return the JSON object that it prints.

        Raises:
            DeploymentError: it prints none.
        """
        try:
            done = subprocess.run(
                flower_command(program),
                env={**self._environment, **hand_over(words)},
                input=told,
                capture_output=True,
                text=True,
                timeout=START_SECONDS,
                start_new_session=True,  # Ctrl-C is this process's to hear
            )
        except subprocess.TimeoutExpired:
            raise DeploymentError(f"{program} took more than {START_SECONDS:.0f} seconds") from None
        # Flower may print lines of its own around its JSON.
        with suppress(ValueError):
            answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1])
            return answer
        raise DeploymentError(f"{program} failed: {(done.stderr.strip() or done.stdout.strip())[-300:]}")


def mend_port(security: Security | None) -> str:
    """Return what to do about a port that is taken: a local server's is written in its kits."""
    if security and security.is_local:
        return (
            "end whatever listens there; or make another server, and new kits of it: fedloom provision init --host"
            f" {security.host} --port N --server FOLDER"
        )
    return "end whatever listens there, or choose another with --port"


def read_answer(found: Frame) -> Answer | None:
    """Read a client's answer, if the app has one; the client's part of it may be anything."""
    told = found.manifest
    if not told["message"]:
        return None
    if "error" in told:
        return Answer(told["message"], None, told["error"], is_gone=told.get("is_gone", False))
    manifest = read_manifest(told["manifest"])
    if manifest is None:
        return Answer(told["message"], None, "not a fedloom answer")
    return Answer(told["message"], Frame(manifest, found.payload), "")
