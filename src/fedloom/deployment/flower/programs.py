"""Flower's programs as fedloom runs them, each with Flower's own arguments. No torch here.

Flower starts a process for every task, which for a message is a second or two of loading. Here a task is a fork of a
process that has loaded it all, and on a client that process is a fork of the SuperNode: they have most of their memory
together. It takes tasks of one kind, and runs no app but ours. Flower lets anyone who reaches a SuperLink operate it:
here that takes a secret. What is changed in Flower is held to the version installed by tests.
"""

from __future__ import annotations

import ctypes
import gc
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fedloom.deployment.flower.bundle import check_app
from fedloom.deployment.flower.guard import SECRET_HEADER, Guard, bound_answers
from fedloom.deployment.flower.pulls import Looks, slower
from fedloom.deployment.flower.registry import run_nodes
from fedloom.deployment.processes import AND, CONTROL_SECRET, RUNTIME_SOCKET, SOCKETS, take_arguments
from fedloom.errors import DeploymentError
from fedloom.host.frames import listen

POLL_SECONDS = 0.5
"""Time between two looks of a SuperNode for messages; while it waits for its own app it looks six times as often.
Flower's own 3 and 0.5 seconds are most of what a round costs."""
BACKOFF_SECONDS = 0.1
"""Time before a part of a message that is not there yet is asked for again. Flower's own is 1."""
RETRY_SECONDS = 4
"""Longest time for which a SuperNode leaves a server alone that does not answer. Flower's own is 20."""
QUIET_SECONDS, IDLE_SECONDS = 30.0, 0.5
"""Time without a task, after which tasks are looked for less often, and the time between two looks then. Ten looks a
second, and answers to them, are three quarters of the processor time of a client at rest."""
UNTOLD_SECONDS = 5.0
"""Time between two looks for tasks on a client at rest, whose SuperNode tells of each message: nothing waits for it."""
END_SECONDS = 1
"""Time for which a SuperLink that is to end goes on with what it is asked."""
END_WITH_PARENT, BE_NAMED = 1, 15
"""Numbers of Linux's PR_SET_PDEATHSIG and PR_SET_NAME."""
TASK_NAME, TASKS_NAME = b"fedloom-task", b"client-tasks"
"""Names of a process for one task, and of the one on a client that starts those."""
LOADED = (
    *("flwr.supernode.cli.flower_supernode", "flwr.supernode.main", "uvicorn"),
    *(
        "flwr.supercore.cli.flower_superexec",
        "flwr.supernode.cli.flwr_clientapp",
        "flwr.supernode.runtime.run_clientapp",
    ),
    "fedloom.deployment.flower.apps",
)
"""Modules of a SuperNode, and of what carries out its tasks."""


def run_superlink() -> None:
    """Run Flower's SuperLink, behind a guard."""
    from flwr.supercore.http_logging import RoutineAccessFilter
    from flwr.superlink import extensions
    from flwr.superlink.cli import flower_superlink

    bound_answers()
    # Two lines a second for each client, and as many as they like for strangers, would fill the disk.
    RoutineAccessFilter.filter = lambda self, record: False  # type: ignore[method-assign]
    # Flower calls this with its app before it serves it; in Flower as it comes it does nothing.
    extensions.configure_app = lambda app: app.add_middleware(Guard)
    # Looks that wait for messages would keep it from ending.
    program: Any = import_module("flwr.superlink.cli.flower_superlink")
    program.uvicorn = SimpleNamespace(run=partial(program.uvicorn.run, timeout_graceful_shutdown=END_SECONDS))
    flower_superlink()


def run_flwr() -> None:
    """Run Flower's command line, and have it tell the guard its secret."""
    from flwr.cli.app import app

    tell_secret()
    app()


def tell_secret() -> None:
    """Have all requests of this process to a SuperLink tell its guard the secret."""
    from flwr.supercore.protobuf.client import ProtobufClient

    make: Any = ProtobufClient.__init__

    def make_with_secret(self: Any, *arguments: Any, **named: Any) -> None:
        make(self, *arguments, **named)
        self._client.headers[SECRET_HEADER] = os.environ[CONTROL_SECRET]

    ProtobufClient.__init__ = make_with_secret  # type: ignore[method-assign]


def run_supernode() -> None:
    """Run Flower's SuperNode, which looks for messages more often, and takes no app but ours.

    It gives messages out on a Unix socket in a private folder. A port of the loopback is anybody's who is there first.
    What carries the messages out, with the arguments behind `AND`, is a fork of it.
    """
    check, tell = _fork_tasks(sys.argv.index(AND))
    import uvicorn
    from flwr.supercore.retry import http_retry
    from flwr.supernode import start_client_internal as node
    from flwr.supernode.cli import flower_supernode
    from flwr.supernode.fleet_http_client import FleetHttpClient as Fleet

    looks = Looks(Fleet.PullMessages)

    def sleep(seconds: float) -> None:
        check()  # without it a message would wait for ever
        # The longer of its two sleeps comes after a look that found nothing.
        time.sleep(looks.rest_seconds(POLL_SECONDS) if seconds / 6 >= POLL_SECONDS else seconds / 6)

    program: Any = import_module("flwr.supernode.cli.flower_supernode")
    listen(runtime_socket()).close()  # uvicorn's own gets the rights of one that lies there
    program.uvicorn = SimpleNamespace(Server=uvicorn.Server, Config=partial(uvicorn.Config, uds=runtime_socket()))
    # A SuperNode does this first with an app that it was sent.
    node.get_fused_config_from_fab = checked(node.get_fused_config_from_fab)  # type: ignore
    # Its loop sleeps for constants of its own, 3 s and 0.5 s; nothing else in that module uses `time`.
    node.time = SimpleNamespace(sleep=sleep)  # type: ignore
    Fleet.PullMessages = lambda client, request: looks.pull(client, request)  # type: ignore
    wait_for_answer: Any = node._push_messages

    def tell_and_wait(**told: Any) -> None:
        tell()  # its loop comes here once a message lies there whole
        wait_for_answer(**told)

    node._push_messages = tell_and_wait  # type: ignore
    http_retry.MAX_RETRY_DELAY = RETRY_SECONDS  # type: ignore
    http_retry.RetryInvoker = patient(http_retry.RetryInvoker)  # type: ignore
    try:
        flower_supernode()
    except Exception:
        traceback.print_exc()
    # An error in its loop Flower only writes down. Its threads would keep the process, which does nothing any more:
    # `join` starts another.
    os._exit(1)


def _fork_tasks(place: int) -> tuple[Callable[[], None], Callable[[], object]]:
    """Start what carries out the messages, with the arguments behind a place.

    Returns what raises once it has ended, and what tells it that there is a message.
    """
    for module in LOADED:
        import_module(module)
    # A collection in either process would touch, and so copy, the memory that they share.
    gc.freeze()
    sys.argv, words = sys.argv[:place], [sys.argv[0], *sys.argv[place + 1 :]]
    news, telling = os.pipe()

    def run() -> None:
        os.close(telling)
        run_client_tasks(news)

    child = _fork(TASKS_NAME, words, run)
    os.close(news)

    def check() -> None:
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            raise DeploymentError("what carries out the messages ended")

    return check, partial(os.write, telling, b".")


def patient(invoker: Callable[..., Any]) -> Callable[..., Any]:
    """Have a link that is cut in a TLS handshake tried again: Flower takes it for a wrong certificate, and gives up."""
    import httpx

    def build(*args: Any, should_giveup: Callable[[Exception], bool], **options: Any) -> Any:
        def gives_up(error: Exception) -> bool:
            is_a_cut = isinstance(error, httpx.TransportError) and "certificate" not in str(error).lower()
            return not is_a_cut and should_giveup(error)

        return invoker(*args, should_giveup=gives_up, **options)

    return build


def runtime_socket() -> str:
    """Return the path of the socket on which this client's SuperNode gives out messages."""
    return str(Path(os.environ[SOCKETS]) / RUNTIME_SOCKET)


def ask_through_socket() -> None:
    """Have all requests of this process to its SuperNode go through its socket, whatever address they name."""
    import httpx
    from flwr.supercore.protobuf.client import ProtobufClient

    make: Any = ProtobufClient.__init__

    def make_with_socket(self: Any, *arguments: Any, **named: Any) -> None:
        make(self, *arguments, **named)
        self._client.close()
        # Nothing here is TLS: the certificates of all the web's authorities would take 9 MB.
        transport = httpx.HTTPTransport(uds=runtime_socket(), verify=False)
        self._client = httpx.Client(transport=transport, timeout=self._client.timeout)

    ProtobufClient.__init__ = make_with_socket  # type: ignore[method-assign]


def run_client_tasks(news: int) -> None:
    """Run Flower's SuperExec, for a SuperNode's messages, of each of which a byte in `news` tells."""
    ask_through_socket()
    _run_tasks(client_executor(news))


def run_server_tasks() -> None:
    """Run Flower's SuperExec, for a SuperLink's one app."""
    from flwr.supercore.constant import TaskType
    from flwr.superlink.cli.flwr_serverapp import flwr_serverapp

    tell_secret()
    _run_tasks(_executor(TaskType.SERVER_APP, flwr_serverapp, "flwr.superlink.runtime.run_serverapp"))


def client_executor(news: int | None = None) -> Any:
    """Make what starts a process for each message, of Flower's type."""
    from flwr.supercore.constant import TaskType
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    return _executor(TaskType.CLIENT_APP, flwr_clientapp, "flwr.supernode.runtime.run_clientapp", news)


def _run_tasks(executor: Any) -> None:
    from flwr.supercore.cli.flower_superexec import flower_superexec
    from flwr.supercore.superexec import run_superexec

    run_superexec.get_executor = lambda *chosen, **told: executor  # type: ignore
    run_superexec.time = SimpleNamespace(sleep=executor.rest)  # type: ignore  # its loop's, and nothing else
    # A collection in a forked process would touch, and so copy, all the memory that it shares with this one.
    gc.freeze()
    flower_superexec()


def _executor(kind: Any, program: Callable[[], object], module: str, news: int | None = None) -> Any:
    """Make an executor that forks for a task: `program` carries it out, and unpacks the app in `module`.

    Where bytes in `news` tell of tasks, it rests until one comes.
    """
    from flwr.supercore.superexec.executor import subprocess_executor

    import fedloom.deployment.flower.apps  # noqa: F401  (what the app imports)

    class Forks(subprocess_executor.SubprocessExecutor):
        """Starts a task as Flower's own executor does, but for the program."""

        worked = looked = 0.0

        def get_eligible_capacity(self, supported_task_types: set[Any], **told: Any) -> tuple[set[Any], set[str]]:
            return supported_task_types & {kind}, set()

        def reconcile(self) -> None:
            """Reap finished children. If one was killed, exit so that the SuperNode is restarted too: it could wait for
            ever for the lost answer."""
            self.looked = time.monotonic()
            with suppress(ChildProcessError):  # which says that there is no task
                os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                self.worked = time.monotonic()
                while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                    if os.WIFSIGNALED(ended[1]):
                        raise SystemExit("a task was killed")

        def rest(self, seconds: float) -> None:
            """Wait until the next look for a task: the longer, the slower the last one was."""
            if news is None:
                now = time.monotonic()
                is_quiet = now - self.worked > QUIET_SECONDS
                time.sleep(slower(IDLE_SECONDS if is_quiet else seconds, now - self.looked))
                return
            # A task that is under way may be killed.
            is_at_rest = self.worked < self.looked
            told, _, _ = select.select([news], [], [], UNTOLD_SECONDS if is_at_rest else IDLE_SECONDS)
            if told and not os.read(news, 64):
                raise SystemExit("its SuperNode ended")

    def start(command: Sequence[str], **told: Any) -> None:
        _fork(TASK_NAME, command, program)

    task: Any = import_module(module)
    task.install_from_fab = checked(task.install_from_fab)
    subprocess_executor.subprocess = SimpleNamespace(Popen=start, DEVNULL=None)  # type: ignore
    return Forks()


def _fork(name: bytes, words: Sequence[str], program: Callable[[], object]) -> int:
    """Start a process that has this name and these arguments and ends with its parent; return its number."""
    from flwr.supercore.exit import exit_handler

    parent = os.getpid()
    if child := os.fork():
        return child
    # From here on this is the child, which must never return to its parent's code: it ends in `os._exit`.
    with suppress(AttributeError, OSError):  # not Linux: it ends with its task
        ctypes.CDLL(None).prctl(END_WITH_PARENT, signal.SIGKILL)
        ctypes.CDLL(None).prctl(BE_NAMED, name)
    code = 1
    try:
        if os.getppid() != parent:
            raise SystemExit("its parent has ended")
        exit_handler.registered_exit_handlers.clear()  # they are the parent's, as is what they close
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        sys.argv = [*words]
        program()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
        if isinstance(ended.code, str):
            print(ended.code)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def checked(take: Callable[..., Any]) -> Callable[..., Any]:
    """Have `take` refuse, with DeploymentError, an app that is not ours."""

    def check_and_take(bundle: bytes, *others: Any, **named: Any) -> Any:
        check_app(bundle)
        return take(bundle, *others, **named)

    return check_and_take


PROGRAMS = {
    "superlink": run_superlink,
    "supernode": run_supernode,
    "server-tasks": run_server_tasks,
    "flwr": run_flwr,
    "nodes": run_nodes,
}

if __name__ == "__main__":
    from flwr.supercore import constant

    constant.PULL_INITIAL_BACKOFF = BACKOFF_SECONDS  # type: ignore  # before what takes it from there
    run = PROGRAMS[sys.argv[1]]
    sys.argv[1:] = take_arguments()
    run()
