"""Health check of a side of a deployment: `python -m fedloom.deployment.health server FOLDER`, or `… client`.

Docker runs it: exit code 0, or 1 and why. It starts often, so it needs the standard library alone: importing psutil
would take longer than all of the check.
"""

from __future__ import annotations

import http.client
import ssl
import sys
import tomllib
from pathlib import Path

WAIT_SECONDS = 10.0
GATEWAY_ERRORS = range(502, 505)
CHILDREN = {
    "worker": b"fedloom.deployment.client.worker_process",
    "SuperNode": b"fedloom.deployment.flower.programs\0supernode",
    "tasks": b"client-tasks",
}
"""Processes that a client's `fedloom join` keeps alive, and the words that each has in its command line, where the
kernel puts a zero byte between two of them, or for its name: one that is a fork has the line of another."""


def check_server(folder: Path) -> str:
    """Say what is wrong with the server whose certificate lies in this folder; nothing where clients would reach it.

    nginx must answer with that certificate, and have a SuperLink behind it.
    """
    try:
        port = int(tomllib.loads((folder / "server.toml").read_text(encoding="utf-8"))["port"])
        trust = ssl.create_default_context(cafile=folder / "ca.crt")
        connection = http.client.HTTPSConnection("localhost", port, timeout=WAIT_SECONDS, context=trust)
        connection.request("GET", "/v1/fleet/")
        status = connection.getresponse().status
        connection.close()
    except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}"
    return f"HTTP {status}: no SuperLink behind the proxy" if status in GATEWAY_ERRORS else ""


def check_client(parent: int = 1) -> str:
    """Say what does not run among the descendants of a process; the first process of a container is 1."""
    parents, commands = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            # The name, in brackets, may hold anything; behind it stand the state and the parent.
            name, _, behind = (path / "stat").read_bytes().partition(b"(")[2].rpartition(b")")
            parents[int(path.name)] = int(behind.split()[1])
            commands[int(path.name)] = name + b"\0" + (path / "cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
    family = {parent}
    while more := {child for child, of in parents.items() if of in family} - family:
        family |= more
    missing = [
        what for what, word in CHILDREN.items() if not any(word in commands.get(process, b"") for process in family)
    ]
    return f"not running: {', '.join(missing)}" if missing else ""


def main() -> None:
    """Print what is wrong, and exit with 1 if anything is."""
    match sys.argv[1:]:
        case ["server", folder]:
            wrong = check_server(Path(folder))
        case ["client"]:
            wrong = check_client()
        case _:
            wrong = "usage: python -m fedloom.deployment.health server FOLDER | client"
    print(wrong or "well")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
