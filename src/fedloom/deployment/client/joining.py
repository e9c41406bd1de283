"""Client's node, as `fedloom join` runs it: starts and watches Flower's SuperNode and the worker. No torch here."""

from __future__ import annotations

import math
import os
import re
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path

from fedloom.deployment.addresses import split_address
from fedloom.deployment.approvals import warn_of
from fedloom.deployment.client.hearing import HEARD, hearing
from fedloom.deployment.client.journal import ELSEWHERE, Journal, describe_ledger, standing
from fedloom.deployment.client.own_documents import check_there
from fedloom.deployment.client.policy import Policy, policy_to_toml
from fedloom.deployment.client.preflight import Greeting, await_server
from fedloom.deployment.client.reading import keeps_ledger
from fedloom.deployment.client.secret import read_secret, secret_path
from fedloom.deployment.client.task_file import describe_tasks
from fedloom.deployment.client_keys import check_name, check_private, public_key_of
from fedloom.deployment.fingerprints import identify_client, identify_server
from fedloom.deployment.keys import LOCAL, NEXT, read_authority
from fedloom.deployment.processes import (
    AND,
    SOCKETS,
    WORKER_SOCKET,
    Child,
    check_flower,
    flower_child,
    hand_over,
    private_folder,
    programs_environment,
    rest,
    tail,
    tasks_words,
    write_secret,
)
from fedloom.errors import DeploymentError
from fedloom.host.files import Lock, read_holder
from fedloom.host.signals import Interruption

AGAIN_SECONDS = 2.0
"""Pause before a process that ended is started again; it doubles each time."""
RESTARTS = 10
"""Restarts of a process within `SETTLED_SECONDS`, after which it is given up."""
SETTLED_SECONDS = 600.0
MOST_SECONDS = 30.0
"""Longest pause before a process that ends again and again is started again."""
REFUSED_SECONDS = 120.0
"""Time for which a server may refuse a key that it takes later: a SuperNode that was killed counts as connected for a
minute, and a key may have been approved since the server looked, which it does not while it computes."""
REFUSALS = (b"Failed to activate SuperNode", b"SuperNode terminated gracefully")
"""Words of Flower's SuperNode before it ends because its key was refused: when it begins, and after HTTP 401."""
UNTRUSTED = b"SSL/TLS handshake error detected"
"""Words of Flower's SuperNode before it ends because of the server's certificate: it may have expired in a run."""
TAKEN = b"SuperNode ID:"
"""Words of Flower's SuperNode when its key was taken."""
UNUSED_ADDRESS = "127.0.0.1:1"
"""Address that Flower wants to be told where a client's messages go through a Unix socket."""
AGAIN = "ask the server's owner for the kit again"
SIGNER = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Kit:
    """Server's address and certificate authority, with this client's name and key."""

    name: str
    server: str
    """Address of the server, HOST:PORT."""
    ca: str = ""
    """Certificate authority of the server, PEM: one certificate, whose fingerprint is shown."""
    key: Path | None = None
    signer: str = ""
    """Public key that the server's questions are signed with, in hexadecimal digits."""
    folder: Path = Path()
    """Folder of the kit's file."""
    approved: str = ""
    """Fingerprint of the key that was approved; empty in a kit from before one was told."""
    expires: datetime | None = None
    """End of the approval, as it was when the kit was written; None in a kit from before approvals had one."""

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the server that this kit leads to."""
        return identify_server(self.ca, self.signer)

    @property
    def end(self) -> str:
        """Words on the end of the approval; the server may have renewed it since, and has the last word."""
        if self.expires is None:
            return "approved without an end: the kit is from before approvals had one"
        ask = "have the server's owner renew it: fedloom provision renew"
        return f"approved until {self.expires:%Y-%m-%d}{warn_of(self.expires, ask)}"

    @property
    def journal(self) -> Path:
        """Place of this client's journal, if nobody says otherwise: beside the kit, by the client's name.

        Not by the name of the file, which who sends it can choose: a journal that begins anew would count from none.
        """
        return self.folder / f"{self.name}.journal.jsonl"


def open_kit(path: Path) -> Kit:
    """Read what a kit says, whoever wrote it; its key is not looked for.

    Raises:
        DeploymentError: the file is not a kit.
    """
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
        kit = Kit(
            str(told["name"]),
            str(told["server"]),
            str(told.get("ca", "")),
            signer=str(told.get("signer", "")),
            folder=path.parent,
            approved=str(told.get("key", "")),
            expires=_read_time(told.get("expires"), path),
        )
    except OSError as error:
        raise DeploymentError(
            f"can't read the kit: {error.strerror}", where=str(path), mend="name the file that the server's owner sent"
        ) from None
    except (ValueError, KeyError, RecursionError) as error:
        why = (
            f"it is not TOML: {error}" if isinstance(error, tomllib.TOMLDecodeError) else "it names no client or server"
        )
        raise DeploymentError(f"not a fedloom kit: {why}", where=str(path), mend=AGAIN) from None
    check_name(kit.name, where=str(path))
    return kit


def _read_time(told: object, path: Path) -> datetime | None:
    if told is None:
        return None
    if isinstance(told, datetime) and told.tzinfo:
        return told
    raise DeploymentError("not a time in UTC", where=f"{path}: expires", mend=AGAIN)


def read_kit(path: Path) -> Kit:
    """Read the kit that the server's owner sent, and find the key that `provision request` made: beside it, or here.

    Raises:
        DeploymentError: the file is not a kit, the key is not there, or others can read it.
    """
    kit = open_kit(path)
    host, _ = split_address(kit.server, where=f"{path}: server", mend=AGAIN)
    if not kit.ca and host not in LOCAL:
        raise DeploymentError(
            "a kit without a certificate is for this machine alone",
            where=str(path),
            mend=f"{AGAIN}: fedloom provision approve writes one with a certificate",
        )
    if (kit.ca or kit.signer) and not SIGNER.fullmatch(kit.signer):
        raise DeploymentError(
            "the kit does not say which key signs the server's questions",
            where=f"{path}: signer",
            mend="have the server's owner approve the request again, and send the new kit (fedloom provision approve)",
        )
    folders = path.parent, Path()
    if not kit.ca and any((folder / f"{kit.name}{end}").exists() for folder in folders for end in (".key", ".known")):
        raise DeploymentError(
            f"a kit without a certificate, where {kit.name}'s key lies: it would ask for no fingerprint",
            where=str(path),
            mend=f"{AGAIN}; to try things out, put this one in a folder of its own",
        )
    if not kit.ca:
        return kit
    kit = replace(kit, ca=read_authority(kit.ca, where=f"{path}: ca"))
    keys = [folder / f"{kit.name}.key" for folder in folders]
    if kit.approved:  # which may be the next one
        keys += [key.with_name(f"{key.name}{NEXT}") for key in keys]
    found = [key for key in keys if key.is_file()]
    for key in found:
        check_private(key)
        if not kit.approved or identify_client(kit.name, public_key_of(key)) == kit.approved:
            return replace(kit, key=key.resolve())
    if found:
        raise DeploymentError(
            f"the kit is for another key of {kit.name}'s than lies here",
            where=str(path),
            mend=f"join with the newest kit; {AGAIN}, or have the request beside the key approved",
        )
    raise DeploymentError(
        f"{kit.name}'s key is not there", where=str(keys[0]), mend="put the kit where fedloom provision request was run"
    )


@contextmanager
def at_work(name: str, journal: Path) -> Iterator[None]:
    """Be the only one that joins as this client with a journal of this folder, until the block ends.

    Raises:
        DeploymentError: another one does.
    """
    path = journal.with_name(f".{name}.lock")
    try:
        lock = Lock(path, 0o600)
        lock.sign()
    except BlockingIOError:
        raise DeploymentError(
            f"another fedloom join is at work as {name} ({read_holder(path).who})",
            where=str(path),
            mend="let it work, or end it (Ctrl-C where it runs) before you start this one",
        ) from None
    except OSError as error:
        raise DeploymentError(f"can't be written ({error.strerror})", where=str(path), mend=ELSEWHERE) from None
    with lock:
        yield


def join(
    kit: Kit,
    data: Path,
    policy: Policy,
    journal: Path,
    say: Callable[[str, str], object],
    *,
    policy_file: Path | None = None,
    keep: Path | None = None,
    tasks: str | None = None,
) -> None:
    """Take part until the process is told to end; `policy_file` is where the policy's owner can change it.

    `keep` is a folder for adapters that are this client's own, beside the journal if left out; `tasks` is a file of
    tasks of its own, whose counts are told.

    Raises:
        DataError: there are no such documents or tasks.
        DeploymentError: Flower is missing, the journal can't be kept, another process is this client, the server is
            another or refuses it, or what is started ends again and again.
    """
    check_there(data)
    if tasks:
        say("tasks", describe_tasks(tasks, policy))
    Journal(journal).check()
    if keeps_ledger(entries := standing(Journal(journal).read()), policy):
        say("privacy", describe_ledger(policy.privacy, entries))
    read_secret(secret_path(journal))
    check_flower()
    with at_work(kit.name, journal), private_folder() as folder, hearing(say) as output:
        log, secret = folder / "supernode.log", write_secret(folder)
        # As it is now, with what the command line says of the documents.
        rules = folder / "policy.toml"
        rules.write_text(policy_to_toml(policy), encoding="utf-8")
        options = {"socket": folder / WORKER_SOCKET, "name": kit.name, "data": data, "journal": journal}
        options |= {"policy": rules, "signer": kit.signer, "server": kit.server}
        given = {"policy_file": policy_file, "keep": keep, "tasks": tasks}
        options |= {key: value for key, value in given.items() if value}
        node = ["--superlink", kit.server, "--isolation", "process", "--superexec-auth-secret-file", str(secret)]
        if kit.key:
            ca = folder / "ca.crt"
            ca.write_text(kit.ca, encoding="utf-8")
            say("server", f"fingerprint {kit.fingerprint}: what its owner reads aloud")
            say("key", kit.end)
            node += ["--root-certificates", str(ca), "--auth-supernode-private-key", str(kit.key)]
        else:
            node += ["--insecure"]
        children: dict[str, Child] = {}
        try:
            with Interruption(partial(say, "leaving")) as interruption:
                greet = partial(await_server, kit.server, kit.ca, say, interruption.check)
                if words := greet().words:
                    say("server", words)
                command = [sys.executable, "-m", "fedloom.deployment.client.worker_process"]
                told = hand_over([f"--{key}={options[key]}" for key in options])
                children["worker"] = Child(command, None, {**os.environ, **told, **HEARD}, output=output)
                environment = programs_environment(folder / "flower") | {SOCKETS: str(folder)}
                work = tasks_words(UNUSED_ADDRESS, secret, None)
                children["SuperNode"] = flower_child("supernode", [*node, AND, *work], log, environment)
                say("joining", f"{kit.server} as {kit.name}")
                watch(children, RefusedKey(kit.name, log, greet, say), say, interruption.check)
        finally:
            for child in reversed(children.values()):
                child.end()


class RefusedKey:
    """Time for which the server has refused this client's key, over all starts of its SuperNode."""

    def __init__(self, name: str, log: Path, greet: Callable[[], Greeting], say: Callable[[str, str], object]) -> None:
        self._name, self._log, self._greet, self._say = name, log, greet, say
        self._read = 0
        self._first = self._last = -math.inf

    def look(self) -> bool:
        """Return whether the SuperNode ended because its key was refused.

        Raises:
            DeploymentError: the server is not going to take this client.
        """
        with self._log.open("rb") as log:
            log.seek(self._read)
            told = log.read()
        self._read += len(told)
        if TAKEN in told:
            self._last = -math.inf
        if UNTRUSTED in told:
            self._greet()  # this raises and says why
        if not any(refusal in told for refusal in REFUSALS):
            return False
        # A clock that is off is refused with the same words: this raises and says so.
        greeting = self._greet()
        now = time.monotonic()
        if now - self._last >= REFUSED_SECONDS:
            self._first = now
            minutes = REFUSED_SECONDS / 60
            self._say(
                "not yet",
                f"the server does not know {self._name}'s key yet, as when it has just started or has still to approve"
                f" it: trying for {minutes:.0f} minutes",
            )
        self._last = now
        # A server that has not looked at its clients' keys all that time is slow: it has not refused.
        if now - self._first >= REFUSED_SECONDS and greeting.keys_seconds < now - self._first:
            raise DeploymentError(
                f"the server refuses {self._name}'s key: it was not approved there, it is revoked, its approval has "
                "ended, another key took its place, or another fedloom join uses it",
                mend="ask the server's owner; look for a newer kit, and for another fedloom join with this one",
            )
        return True


def watch(
    children: Mapping[str, Child],
    refused_key: RefusedKey,
    say: Callable[[str, str], object],
    check: Callable[[], None],
) -> None:
    """Start again what ends, until `check` raises.

    Raises:
        DeploymentError: something ends again and again, or the server refuses this client.
    """
    restarts: dict[str, list[float]] = {what: [] for what in children}
    # A wait for one child holds up the others, which may have ended too: they are looked at when it is over.
    while True:
        check()
        for what, child in children.items():
            if child.ended:
                now = time.monotonic()
                recent = restarts[what] = [then for then in restarts[what] if now - then < SETTLED_SECONDS]
                log = child.log
                # A refused key ends the SuperNode every few seconds. That is not its fault, and has a limit of its own.
                if not (what == "SuperNode" and refused_key.look()):
                    recent.append(now)
                    if len(recent) > RESTARTS:
                        why = log and tail(log)
                        raise DeploymentError(f"the {what} ended {RESTARTS} times" + (f": {why}" if why else ""))
                    why = log and tail(log, 1)
                    say("restart", f"the {what} ended; starting it again" + (f" ({why})" if why else ""))
                rest(min(AGAIN_SECONDS * 2 ** max(len(recent) - 1, 0), MOST_SECONDS), check)
                child.start()
        time.sleep(0.2)
