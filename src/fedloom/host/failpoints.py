"""Named places in the code at which a test can make things go wrong: nothing happens while none is armed.

`FEDLOOM_FAILPOINT="state.renamed=kill@3"` kills the process the third time it comes by. Actions: `kill` (SIGKILL),
`stop` (SIGTERM), `raise` (an error that is a bug), `enospc` (a full disk), `memory` (none left), `sleep:SECONDS`.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable

NAMES = (
    "file.write",
    "file.written",
    "run.opened",
    "run.prepared",
    "run.loaded",
    "round.begins",
    "training.stepped",
    "client.trained",
    "round.aggregated",
    "evaluation.scored",
    "round.evaluated",
    "record.client",
    "record.round",
    "evaluation.written",
    "adapter.written",
    "adapter.between",
    "adapter.renamed",
    "state.file",
    "state.manifest",
    "state.flushed",
    "state.renamed",
    "state.pruned",
    "baselines.written",
    "personalised.written",
    "contributions.written",
    "report.written",
    "run.ends",
)
"""Every place that can fail, in the order of a run."""
OF_CLIENTS = ("round.noted", "answer.written", "answer.noted")
"""Places that only a client of a deployment comes by, in the order of a round with noise."""


_armed: tuple[str, str, int] | None = None
_passed = 0


def failpoint(name: str) -> None:
    """Come by a named place."""
    if _armed is not None:
        _come_by(name)


def arm(text: str) -> None:
    """Let the next run fail at NAME=ACTION[@N]; with an empty text, nowhere."""
    global _armed, _passed
    name, _, action = text.partition("=")
    action, _, number = action.partition("@")
    if text and (name not in (*NAMES, *OF_CLIENTS) or action.partition(":")[0] not in ACTIONS):
        raise ValueError(f"FEDLOOM_FAILPOINT: no place {name!r}, or no action {action!r}")
    _armed, _passed = (name, action, int(number or 1)) if text else None, 0


def _come_by(name: str) -> None:
    global _passed
    assert name in (*NAMES, *OF_CLIENTS), f"a place without a name: {name}"
    assert _armed is not None
    armed, action, number = _armed
    if name == armed:
        _passed += 1
        if _passed == number:
            kind, _, detail = action.partition(":")
            ACTIONS[kind](detail)


def _raise(_: str) -> None:
    raise RuntimeError("a failpoint")


def _enospc(_: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _memory(_: str) -> None:
    raise MemoryError("a failpoint")


ACTIONS: dict[str, Callable[[str], object]] = {
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda _: os.kill(os.getpid(), signal.SIGTERM),
    "raise": _raise,
    "enospc": _enospc,
    "memory": _memory,
    "sleep": lambda seconds: time.sleep(float(seconds)),
}

arm(os.environ.get("FEDLOOM_FAILPOINT", ""))
