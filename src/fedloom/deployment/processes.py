"""Processes that a command starts and watches: they end with it, however it ends. No torch here."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path

from fedloom.errors import DeploymentError
from fedloom.host.files import Lock

LEASH = "import ctypes,os,signal,sys; ctypes.CDLL(None).prctl(1,signal.SIGTERM); os.execvp(sys.argv[1],sys.argv[1:])"
"""Program that runs another one which Linux ends when its parent is killed."""
GRACE_SECONDS = 10.0
PREFIX, LOCK = "fedloom-", "owner.lock"
"""Names of private folders begin so, and each has a file that its owner keeps locked."""
FLOWER = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",  # seconds, for 1
    # Bytes, for 5 MB. Two of them travel at once, and must in 30 seconds: on a link of 0.6 Mbit/s these do.
    "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(2**20),
    "OPENBLAS_NUM_THREADS": "1",  # of numpy's, which only moves bytes there
}
"""Settings of Flower's programs: they report to nobody, start apps sooner, get through slow links, and have no threads
to fork."""
CONTROL_SECRET = "FEDLOOM_CONTROL_SECRET"
"""Environment variable with the secret that a SuperLink demands of whoever operates it. Others on this machine can
reach its port, too."""

KEYS_ARE_IN = "FEDLOOM_KEYS_ARE_IN"
"""Environment variable that names a file: when it is there, a SuperLink has its clients' keys, as they were when it was
last changed."""


class Child:
    """Process with all that it starts, whose output goes to a file."""

    def __init__(self, command: Sequence[str], log: Path | None, environment: Mapping[str, str]) -> None:
        self._command, self.log, self._environment = list(command), log, dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, again if need be; what is left of it is ended before."""
        self.end()
        # A session of its own, so that `end` reaches all that it starts, and Ctrl-C in a terminal reaches none of it.
        leash = [sys.executable, "-c", LEASH] if sys.platform == "linux" else []
        with open(self.log, "ab") if self.log else nullcontext() as output:
            self._process = subprocess.Popen(
                [*leash, *self._command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                env=self._environment,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    @property
    def ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def end(self) -> None:
        """Ask it to end, and after a while make it; its own children too."""
        if self._process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_SECONDS)
        self._process = None


class ChildGroup:
    """Processes that are of no use without each other: where one ended, all are started again."""

    def __init__(self, *children: Child) -> None:
        self._children = children

    def start(self) -> None:
        self.end()
        for child in self._children:
            child.start()

    @property
    def ended(self) -> bool:
        return any(child.ended for child in self._children)

    @property
    def log(self) -> Path | None:
        """Log of the first that ended."""
        return next((child.log for child in self._children if child.ended), None)

    def end(self) -> None:
        for child in reversed(self._children):
            child.end()


def programs_environment(home: Path) -> dict[str, str]:
    """Return an environment for Flower's programs: quiet, with a home of their own, this Python's programs first."""
    here = str(Path(sys.executable).parent)
    return {**os.environ, **FLOWER, "FLWR_HOME": str(home), "PATH": os.pathsep.join([here, os.environ.get("PATH", "")])}


def check_flower() -> None:
    """Refuse to go on without Flower.

    Raises:
        DeploymentError
    """
    if find_spec("flwr") is None:
        raise DeploymentError("Flower is not installed", mend="install it: pip install 'fedloom[deploy]'")


def flower_command(program: str, *words: str) -> list[str]:
    """Return the command line of one of Flower's programs, as `flower.programs` runs it."""
    return [sys.executable, "-m", "fedloom.deployment.flower.programs", program, *words]


def write_secret(folder: Path) -> Path:
    """Write the secret that whoever takes tasks of a SuperNode or SuperLink must know: everyone here can reach them."""
    path = folder / "tasks.secret"
    path.write_bytes(secrets.token_bytes(32))
    return path


def tasks_command(kind: str, address: str, secret: Path, ca: Path | None) -> list[str]:
    """Return the command line of what carries out the tasks of a SuperNode (`client`) or a SuperLink (`server`)."""
    trust = ["--root-certificates", str(ca)] if ca else ["--insecure"]
    words = ("--runtime-api-address", address, "--superexec-auth-secret-file", str(secret), *trust)
    return flower_command(f"{kind}-tasks", *words)


@contextmanager
def private_folder() -> Iterator[Path]:
    """Make a folder for sockets, settings and logs that nobody else can look into, and remove it afterwards.

    Folders that killed processes left behind are removed too: a living owner holds a lock.
    """
    _sweep()
    # Paths of Unix sockets are short, so it is not in the run directory.
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as name, ExitStack() as stack:
        stack.enter_context(Lock(Path(name) / "taken"))
        (Path(name) / "taken").rename(Path(name) / LOCK)  # only now it is seen, held
        yield Path(name)


def _sweep() -> None:
    """Remove folders of processes that are gone."""
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"):
        # Another user's "lock" may be a pipe, which would be opened for ever.
        if lock.parent.lstat().st_uid != os.getuid():
            continue
        with suppress(OSError), Lock(lock, rights=None):  # held by its owner, or swept by another
            shutil.rmtree(lock.parent, ignore_errors=True)


def rest(seconds: float, check: Callable[[], None]) -> None:
    """Wait some seconds; meanwhile, `check` may raise."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        check()
        time.sleep(0.1)


def free_port() -> int:
    """Find a port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tail(log: Path, lines: int = 3) -> str:
    """Return the end of a log, for an error message."""
    if not log.is_file():
        return ""
    return " / ".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-lines:])[-500:]
