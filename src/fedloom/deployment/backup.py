"""Backup of a server's folder: one file with its keys and its queue, and the folder made of it again. No torch here.

The file is JSON of names and texts, and not an archive, so it can hold no paths, links or owners. On its way back each
name must be one that a server's folder has, and all together a server that could serve.
"""

from __future__ import annotations

import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedloom.deployment.addresses import read_host
from fedloom.deployment.approvals import (
    CLIENTS,
    NAME,
    REVOKED,
    SEEN,
    format_time,
    last_seen,
    list_approvals,
    list_revoked,
)
from fedloom.deployment.approvals import MOST_LETTERS as MOST_FILE_LETTERS
from fedloom.deployment.certificates import read_certificate
from fedloom.deployment.client_keys import check_private
from fedloom.deployment.keys import Security, read_server
from fedloom.deployment.queue import MOST_BYTES as MOST_RUN_BYTES
from fedloom.deployment.queue import NAME as RUN_NAME
from fedloom.deployment.queue import QUEUE, Queue, parse_entry
from fedloom.errors import DeploymentError
from fedloom.host.files import flush, hash_json, new_file, replace_folder, write_private, writing

FORMAT = 1
SECRET, PUBLIC = ("ca.key", "server.key", "signing.key"), ("ca.crt", "server.crt", "server.toml")
MAY_LACK = "signing.key"
"""File that a folder from before questions were signed has not."""
RUN_FILE = re.compile(rf"{QUEUE}/{RUN_NAME.pattern}", re.ASCII)
KEY_FILE = re.compile(rf"(?:{CLIENTS}|{REVOKED})/{NAME.pattern}(?:-\d{{8}}-\d{{6}})?\.pub")
MOST_BYTES = 64 * 2**20
"""Largest backup that is read: 100,000 clients' keys have 40 MB."""
AGAIN = "run it again"
OTHER = "name a file that fedloom provision backup wrote"


def back_up(folder: Path, to: Path) -> int:
    """Write a server's folder into one file, which its owner alone may read, and return the number of its clients.

    Raises:
        DeploymentError: no server is set up there, its keys are not one server's, or the file is there.
        RunError: it can't be written; nothing of it is left.
    """
    security = read_server(folder)
    check_whole(security)
    names = [name for name in (*SECRET, *PUBLIC) if name != MAY_LACK or (folder / name).exists()]
    names += [f"{part}/{file.name}" for part in (CLIENTS, REVOKED) for file in sorted((folder / part).glob("*.pub"))]
    names += [f"{QUEUE}/{path.name}" for path in Queue(folder).paths().values()]
    try:
        files = {name: (folder / name).read_text(encoding="utf-8") for name in names}
    except (OSError, ValueError) as error:
        raise DeploymentError("can't be read whole", where=str(folder), mend=AGAIN) from error
    seen = {name: moment for name in security.clients() if (moment := last_seen(folder, name))}
    told = {"files": files, "seen": {name: format_time(moment) for name, moment in seen.items()}}
    if to.exists():
        raise DeploymentError("the file exists", where=str(to), mend="name another with --to")
    text = json.dumps({"fedloom_backup": FORMAT, "sha256": hash_json(told), **told}, indent=1)
    with writing(to, AGAIN), new_file(to) as made:
        write_private(made, text.encode())
    flush(to.parent)
    return len(security.clients())


def restore(file: Path, folder: Path) -> Security:
    """Make a server's folder of a backup, whole or not at all.

    Raises:
        DeploymentError: the file is no whole backup, others can read it, or the folder exists.
        RunError: it can't be written; nothing of it is left.
    """
    told = read_backup(file)
    if os.path.lexists(folder):
        raise DeploymentError("the folder exists", where=str(folder), mend="name another with --to")
    with writing(folder, AGAIN), replace_folder(folder, existing="refuse", durable=True) as made:
        made.chmod(0o700)
        for part in (CLIENTS, REVOKED, SEEN, QUEUE):
            (made / part).mkdir()
        for name, text in told["files"].items():
            write_private(made / name, text.encode())
            if name in PUBLIC or KEY_FILE.fullmatch(name):
                (made / name).chmod(0o644)
        for name, moment in told["seen"].items():
            (made / SEEN / name).touch(0o600)
            os.utime(made / SEEN / name, (moment.timestamp(), moment.timestamp()))
        try:
            check_whole(read_server(made))
        except DeploymentError as error:
            raise DeploymentError(f"not the backup of a server: {error.what}", where=str(file), mend=OTHER) from error
    return read_server(folder)


def read_backup(file: Path) -> dict[str, Any]:
    """Read the files and times in a backup; each name is one of a server's folder, and nothing is written yet.

    Raises:
        DeploymentError: the file is no whole backup, or others can read it.
    """
    try:
        check_private(file)
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
    except OSError as error:
        raise DeploymentError(f"can't read the backup: {error.strerror}", where=str(file), mend=OTHER) from None
    if len(content) > MOST_BYTES:
        raise DeploymentError(f"larger than {MOST_BYTES:,} bytes", where=str(file), mend=OTHER)
    try:
        told = json.loads(content)
        version, stated, files, seen = (told[key] for key in ("fedloom_backup", "sha256", "files", "seen"))
        is_whole = version == FORMAT and stated == hash_json({"files": files, "seen": seen})
    except Exception as error:  # of a dozen kinds, from a file that may be anything
        raise DeploymentError("not a backup of fedloom provision backup", where=str(file), mend=OTHER) from error
    if not is_whole:
        raise DeploymentError("damaged, or of another version of fedloom", where=str(file), mend=OTHER)
    try:
        for name, text in files.items():
            is_run = RUN_FILE.fullmatch(name)
            if not (name in (*SECRET, *PUBLIC) or KEY_FILE.fullmatch(name) or is_run):
                raise ValueError(name)
            if len(text) > (MOST_RUN_BYTES if is_run else MOST_FILE_LETTERS):
                raise ValueError(name)
            content = text.encode()
            if is_run:
                parse_entry(content, Path(name))
        moments = {name: datetime.fromisoformat(moment).astimezone(UTC) for name, moment in seen.items()}
        if strange := [name for name in moments if f"{CLIENTS}/{name}.pub" not in files]:
            raise ValueError(strange[0])
    except (AttributeError, TypeError, ValueError, OverflowError, DeploymentError) as error:
        raise DeploymentError("it holds what no server's folder does", where=str(file), mend=OTHER) from error
    return {"files": files, "seen": moments}


def check_whole(security: Security) -> None:
    """Refuse a folder whose keys and certificates are not one server's, or in which an approval or a run is damaged.

    Raises:
        DeploymentError
    """
    read_host(security.host, where=str(security.folder / "server.toml"))
    try:
        _check_keys(security)
    except Exception as error:  # of a dozen kinds, from files that may be anything
        raise DeploymentError(
            "its keys and certificates do not belong together",
            where=str(security.folder),
            mend="bring them back from a backup",
        ) from error
    list_approvals(security.folder)
    list_revoked(security.folder)
    for damaged in Queue(security.folder).read()[1]:
        raise damaged


def _check_keys(security: Security) -> None:
    """Raise whatever comes where a key is another's than its certificate's, or is none, or the authority another."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    def load(name: str) -> Any:
        return load_pem_private_key((security.folder / name).read_bytes(), None)

    ca, certificate = read_certificate(security.ca), read_certificate(security.certificate)
    certificate.verify_directly_issued_by(ca)
    for name, known in (("ca.key", ca), ("server.key", certificate)):
        if load(name).public_key() != known.public_key():
            raise ValueError(name)
    if security.signing_key.exists() and not isinstance(load(security.signing_key.name), Ed25519PrivateKey):
        raise ValueError(security.signing_key.name)
