"""Programs that a model wrote, run with their tests; and the share of problems that k tries would solve.

Each program runs in a process of its own, confined by `confinement`: this module starts it, and believes nothing of
what comes back but a word that the program was not told.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from fedloom.errors import RunError

Verdict = Literal["passed", "failed", "late"]
"""Outcome of a program: it came to its end, it stopped before, or its time was up."""
PROGRAM = Path(__file__).with_name("confinement.py")
OVERHEAD_SECONDS = 60.0
"""Most that a machine under load takes around the program's own time."""
MOST_BYTES = 1 << 16
"""Most that is read of what comes back."""


@dataclass(frozen=True)
class Limits:
    """Limits of a program, which the kernel holds it to."""

    seconds: float = 10.0
    """Time on the clock, from its start."""
    memory_bytes: int = 1 << 30
    """Address space of each of its processes."""
    processes: int = 8
    """Processes and threads at once."""
    file_bytes: int = 16 << 20
    """Size of a file that it writes."""
    folder_bytes: int = 64 << 20
    """Size of all of them, which are in memory."""


LIMITS = Limits()


def run_program(program: str, limits: Limits = LIMITS, *, confined: bool = True) -> Verdict:
    """Run a Python program, with the standard library alone, and return whether it came to its end.

    Without `confined` it has the limits and a fresh folder, and may all the same do whatever the user may who runs it.

    Raises:
        RunError: this machine does not give what confines it.
    """
    token = secrets.token_hex(16)
    python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    with tempfile.TemporaryDirectory(prefix="fedloom-code-", ignore_cleanup_errors=True) as folder:
        told = {
            "program": program, "token": token, "confined": confined, "python": python, "folder": folder,
            "seconds": limits.seconds, "folder_bytes": limits.folder_bytes,
            "limits": {
                "RLIMIT_CPU": math.ceil(limits.seconds) + 1, "RLIMIT_AS": limits.memory_bytes,
                "RLIMIT_NPROC": limits.processes, "RLIMIT_FSIZE": limits.file_bytes, "RLIMIT_CORE": 0,
                "RLIMIT_NOFILE": 64,
            },
        }  # fmt: skip
        said = _ask(python, json.dumps(told).encode(), limits.seconds + OVERHEAD_SECONDS)
    steps = said.split(b"\n")
    if b"started" not in steps and b"late" not in steps:
        reason = steps[0].decode(errors="replace").removeprefix("not confined: ") or "Python does not start there"
        raise RunError(
            f"this machine can't confine a program: {reason}",
            where="generated code",
            mend="run it as root or where a user may make namespaces (a container often may not), or allow it to run"
            " unconfined on a machine that has nothing to lose",
        )
    if token.encode() in said:
        return "passed"
    return "late" if b"late" in steps else "failed"


def run_programs(
    programs: Sequence[str], limits: Limits = LIMITS, *, confined: bool = True, at_once: int | None = None
) -> list[Verdict]:
    """Run programs, a few at once (as many as there are cores), and return their outcomes in order.

    Raises:
        RunError: as `run_program`.
    """
    with ThreadPoolExecutor(at_once or os.cpu_count() or 1) as workers:
        return list(workers.map(partial(run_program, limits=limits, confined=confined), programs))


def pass_at_k(tries: int, passed: int, k: int) -> float:
    """Return the probability that one of k tries passes, estimated without bias from more of them.

    1 − C(n − c, k) / C(n, k) for c of n tries that passed (Chen et al. 2021, arXiv 2107.03374, equation 1).
    """
    assert 0 <= passed <= tries, "more passed than were tried"
    assert 1 <= k <= tries, "k tries can't be judged by fewer"
    return 1.0 - math.comb(tries - passed, k) / math.comb(tries, k)


def _ask(python: str, request: bytes, seconds: float) -> bytes:
    """Start the program that confines, tell it what to run, and return what it says; all that it started is ended."""
    process = subprocess.Popen(
        [python, "-I", "-S", str(PROGRAM)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={}, cwd="/", start_new_session=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        # It reads all before it starts anything; if it can't start itself, it says nothing.
        with suppress(BrokenPipeError):
            process.stdin.write(request)
            process.stdin.close()
        return _read(process.stdout.fileno(), seconds)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def _read(pipe: int, seconds: float) -> bytes:
    """Return what comes out of a pipe until its end, or until too much has come or the time is up."""
    until, found = time.monotonic() + seconds, b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while len(found) < MOST_BYTES and selector.select(max(0.0, until - time.monotonic())):
            if not (piece := os.read(pipe, MOST_BYTES)):
                break
            found += piece
    return found
