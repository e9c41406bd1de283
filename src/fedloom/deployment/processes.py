"""Processes that a command starts and watches: they end with it, however it ends. No torch here."""

from __future__ import annotations

import ctypes
import json
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
INSTALL_FLOWER = "pip install 'flwr>=1.41,<1.42'"
"""Command for who has none. It does not name fedloom, which a stranger might publish under that name."""
CONTROL_SECRET = "FEDLOOM_CONTROL_SECRET"
"""Environment variable with the secret that a SuperLink demands of whoever operates it. Others on this machine can
reach its port, too."""
ARGUMENTS = "FEDLOOM_ARGUMENTS"
"""Environment variable with a program's arguments. A command line is read by everyone on a machine (`ps`), an
environment by its owner alone."""
AND = "--and"
"""Word between a SuperNode's arguments and those of what carries out its messages, and between a worker's clients."""
SERVE_SOCKET = "FEDLOOM_SERVE_SOCKET"
"""Environment variable that tells the server app where `fedloom serve` listens. Others who submit the app lack it."""
SOCKETS = "FEDLOOM_SOCKETS"
"""Environment variable that names the folder of a client's sockets."""
WORKER_SOCKET, RUNTIME_SOCKET = "worker.sock", "runtime.sock"
"""Names of a client's sockets: its worker's, and the one on which its SuperNode gives out messages."""
MOST_PATH_BYTES = 103
"""Longest path of a Unix socket; Linux takes 107 bytes, macOS 103."""

KEYS_ARE_IN = "FEDLOOM_KEYS_ARE_IN"
"""Environment variable that names a file: when it is there, a SuperLink has its clients' keys, as they were when it was
last changed."""


class Child:
    """Process with all that it starts, whose output goes to a file, or to a descriptor, `output`."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path | None,
        environment: Mapping[str, str],
        folder: Path | None = None,
        output: int | None = None,
    ) -> None:
        self._command, self.log, self._environment, self._folder = list(command), log, dict(environment), folder
        self._output = output
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, again if need be; what is left of it is ended before."""
        self.end()
        # A session of its own, so that `end` reaches all that it starts, and Ctrl-C in a terminal reaches none of it.
        leash = [sys.executable, "-c", LEASH] if sys.platform == "linux" else []
        with open(self.log, "ab") if self.log else nullcontext() as file:
            self._process = subprocess.Popen(
                [*leash, *self._command],
                stdin=subprocess.DEVNULL,
                stdout=file or self._output,
                stderr=subprocess.STDOUT if file else None,
                env=self._environment,
                cwd=self._folder,
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
        raise DeploymentError("Flower is not installed", mend=f"install it: {INSTALL_FLOWER}")


def flower_command(program: str) -> list[str]:
    """Return the command line of one of Flower's programs, as `flower.programs` runs it, but for its arguments."""
    return [sys.executable, "-m", "fedloom.deployment.flower.programs", program]


def flower_child(program: str, words: Sequence[str], log: Path, environment: Mapping[str, str]) -> Child:
    """Start one of Flower's programs, with arguments that nobody else on this machine can read."""
    return Child(flower_command(program), log, {**environment, **hand_over(words)})


def hand_over(words: Sequence[str]) -> dict[str, str]:
    """Return what a process needs in its environment for `take_arguments` to find these words."""
    return {ARGUMENTS: json.dumps([*words])}


def take_arguments() -> list[str]:
    """Return the arguments that this process was given, once: no process that it starts gets them too."""
    found: list[str] = json.loads(os.environ.pop(ARGUMENTS))
    return found


def hide_arguments() -> None:
    """Take the words behind a command's name out of what everyone on this machine can read of this process."""
    words = len(sys.argv) - 2
    if sys.platform != "linux" or words < 1 or sys.orig_argv[-words:] != sys.argv[2:]:
        return
    # The kernel shows memory of the process itself, from its field 48 to 49 (proc_pid_stat(5)). Python has a copy.
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    start += sum(len(os.fsencode(word)) + 1 for word in sys.orig_argv[:-words])
    ctypes.memset(start, 0, end - start)


def write_secret(folder: Path) -> Path:
    """Write the secret that whoever takes tasks of a SuperNode or SuperLink must know: everyone here can reach them."""
    path = folder / "tasks.secret"
    path.write_bytes(secrets.token_bytes(32))
    return path


def tasks_words(address: str, secret: Path, ca: Path | None) -> list[str]:
    """Return the arguments of what carries out the tasks of a SuperNode or a SuperLink."""
    trust = ["--root-certificates", str(ca)] if ca else ["--insecure"]
    return ["--runtime-api-address", address, "--superexec-auth-secret-file", str(secret), *trust]


@contextmanager
def private_folder() -> Iterator[Path]:
    """Make a folder for sockets, settings and logs that nobody else can look into, and remove it afterwards.

    Meanwhile, all that this process and its children write anywhere is their owner's alone, whatever the umask was.
    Folders that killed processes left behind are removed too: a living owner holds a lock.

    Raises:
        DeploymentError: the paths of sockets in it would be too long.
    """
    _sweep()
    # Paths of Unix sockets are short, so it is not in the run directory.
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as name, ExitStack() as stack:
        if len(os.fsencode(Path(name) / "99" / RUNTIME_SOCKET)) > MOST_PATH_BYTES:  # a client's own folder
            raise DeploymentError(
                "the path of the folder for temporary files is too long for sockets",
                where=tempfile.gettempdir(),
                mend="name a shorter one in the environment: TMPDIR=/tmp",
            )
        stack.callback(os.umask, os.umask(0o077))
        stack.enter_context(Lock(Path(name) / "taken"))
        (Path(name) / "taken").rename(Path(name) / LOCK)  # only now it is seen, held
        yield Path(name)


def _sweep() -> None:
    """Remove folders of processes that are gone."""
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"):
        with suppress(OSError):  # held by its owner, or swept by another, at any moment
            # Another user's "lock" may be a pipe, which would be opened for ever.
            if lock.parent.lstat().st_uid != os.getuid():
                continue
            with Lock(lock, rights=None):
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
