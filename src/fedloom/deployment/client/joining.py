"""Clients of a node, as `fedloom join` runs them: Flower's SuperNode of each, and one worker. No torch here."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
from fedloom.deployment.client.preflight import await_server
from fedloom.deployment.client.reading import keeps_ledger
from fedloom.deployment.client.secret import read_secret, secret_path
from fedloom.deployment.client.task_file import describe_tasks
from fedloom.deployment.client.watching import RefusedKey, watch
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
    tasks_words,
    write_secret,
)
from fedloom.errors import DeploymentError
from fedloom.host.files import Lock, read_holder
from fedloom.host.signals import Interruption

UNUSED_ADDRESS = "127.0.0.1:1"
"""Address that Flower wants to be told where a client's messages go through a Unix socket."""
AGAIN = "ask the server's owner for the kit again"
SIGNER = re.compile(r"[0-9a-f]{64}")
MOST_CLIENTS = 100
"""Clients of one process: their folders, in which sockets lie, have names of two digits at most."""


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


@dataclass(frozen=True)
class Member:
    """Client that takes part: its kit, and what its owner gave."""

    kit: Kit
    data: Path
    """Documents."""
    policy: Policy
    journal: Path
    policy_file: Path | None = None
    """Place where the policy's owner can change it."""
    keep: Path | None = None
    """Folder for adapters that are this client's own, beside the journal if left out."""
    tasks: str | None = None
    """File of tasks of its own, whose counts are told."""


def join(members: Sequence[Member], say: Callable[[str, str], object]) -> None:
    """Take part as clients that `check_together` let through, until the process is told to end.

    Each has a SuperNode of its own; all have one worker, and so one base model.

    Raises:
        DataError: there are no such documents or tasks.
        DeploymentError: Flower is missing, a journal can't be kept, another process is one of these clients, the
            server is another or refuses them, or what is started ends again and again.
    """
    kit = members[0].kit
    for one in members:
        _check(one, _saying(one, members, say))
    check_flower()
    with ExitStack() as stack:
        for one in members:
            stack.enter_context(at_work(one.kit.name, one.journal))
        folder = stack.enter_context(private_folder())
        if kit.key:
            say("server", f"fingerprint {kit.fingerprint}: what its owner reads aloud")
        homes = [folder / str(number) for number in range(len(members))]
        words: list[str] = []
        for one, home in zip(members, homes, strict=True):
            home.mkdir(0o700)
            words += [AND, *_worker_words(one, home)]
            if one.kit.key:
                _saying(one, members, say)("key", one.kit.end)
        output = stack.enter_context(hearing(say))
        children = stack.enter_context(ended_together())
        with Interruption(partial(say, "leaving")) as interruption:
            greet = partial(await_server, kit.server, kit.ca, say, interruption.check)
            if told := greet().words:
                say("server", told)
            command = [sys.executable, "-m", "fedloom.deployment.client.worker_process"]
            children["worker"] = Child(command, None, {**os.environ, **hand_over(words[1:]), **HEARD}, output=output)
            refused_keys = {}
            for one, home in zip(members, homes, strict=True):
                what = "SuperNode" if len(members) == 1 else f"SuperNode of {one.kit.name}"
                children[what] = node = start_node(one.kit, home)
                assert node.log, "it has one"
                refused_keys[what] = RefusedKey(one.kit.name, node.log, greet, say)
                say("joining", f"{kit.server} as {one.kit.name}")
            watch(children, refused_keys, say, interruption.check)


@contextmanager
def ended_together() -> Iterator[dict[str, Child]]:
    """Yield a place for processes, by what they are, which all end with the block: the last one first."""
    children: dict[str, Child] = {}
    try:
        yield children
    finally:
        for child in reversed(children.values()):
            child.end()


def check_together(members: Sequence[Member]) -> None:
    """Refuse clients that can't be at work in one process.

    Raises:
        DeploymentError: they are too many, of several servers, or have a name or a journal in common.
    """
    if len(members) > MOST_CLIENTS:
        raise DeploymentError(
            f"{len(members)} clients in one process", where="KIT", mend=f"start a fedloom join for each {MOST_CLIENTS}"
        )
    kit = members[0].kit
    for one in members:
        if (one.kit.server, one.kit.ca, one.kit.signer) != (kit.server, kit.ca, kit.signer):
            raise DeploymentError(
                f"{one.kit.name}'s kit is of another server than {kit.name}'s",
                where="KIT",
                mend="start a fedloom join for each server: clients that share a base model are asked in one run",
            )
    # What lies beside a journal has its name up to the ending.
    for what, found in (("name", [one.kit.name for one in members]),
                        ("journal", [str(one.journal.resolve()) for one in members]),
                        ("secret", [str(secret_path(one.journal).resolve()) for one in members])):  # fmt: skip
        if twice := next((one for number, one in enumerate(found) if one in found[:number]), None):
            raise DeploymentError(
                f"two clients have the {what} {twice}",
                where="KIT",
                mend="name each client once, with its own journal, whose name up to its ending is no other's",
            )


def _saying(one: Member, members: Sequence[Member], say: Callable[[str, str], object]) -> Callable[[str, str], object]:
    """Return what says a line of one client's, with its name where there are several."""
    return say if len(members) == 1 else lambda what, detail: say(what, f"{one.kit.name}: {detail}")


def _check(one: Member, say: Callable[[str, str], object]) -> None:
    """Look for what a client needs on this machine, and say what was told of it before.

    Raises:
        DataError: there are no such documents or tasks.
        DeploymentError: its journal can't be kept.
    """
    check_there(one.data)
    if one.tasks:
        say("tasks", describe_tasks(one.tasks, one.policy))
    Journal(one.journal).check()
    if keeps_ledger(entries := standing(Journal(one.journal).read()), one.policy):
        say("privacy", describe_ledger(one.policy.privacy, entries))
    read_secret(secret_path(one.journal))


def _worker_words(one: Member, home: Path) -> list[str]:
    """Return a client's options for the worker, whose socket for it lies in the client's folder."""
    # As it is now, with what the command line says of the documents.
    rules = home / "policy.toml"
    rules.write_text(policy_to_toml(one.policy), encoding="utf-8")
    options = {"socket": home / WORKER_SOCKET, "name": one.kit.name, "data": one.data, "journal": one.journal}
    options |= {"policy": rules, "signer": one.kit.signer, "server": one.kit.server}
    given = {"policy_file": one.policy_file, "keep": one.keep, "tasks": one.tasks}
    options |= {key: value for key, value in given.items() if value}
    return [f"--{key}={options[key]}" for key in options]


def start_node(kit: Kit, home: Path) -> Child:
    """Start a client's SuperNode, with what carries out its messages, in the client's folder.

    Questions come at the socket `WORKER_SOCKET` there.
    """
    secret = write_secret(home)
    node = ["--superlink", kit.server, "--isolation", "process", "--superexec-auth-secret-file", str(secret)]
    if kit.key:
        ca = home / "ca.crt"
        ca.write_text(kit.ca, encoding="utf-8")
        node += ["--root-certificates", str(ca), "--auth-supernode-private-key", str(kit.key)]
    else:
        node += ["--insecure"]
    environment = programs_environment(home / "flower") | {SOCKETS: str(home)}
    work = tasks_words(UNUSED_ADDRESS, secret, None)
    return flower_child("supernode", [*node, AND, *work], home / "supernode.log", environment)
