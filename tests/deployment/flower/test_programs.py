"""Changes to Flower, held to the Flower that is installed."""

import inspect
import os
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from fedloom.deployment.flower import programs
from fedloom.deployment.flower.pulls import SLOWER_TIMES
from fedloom.deployment.processes import AND
from fedloom.errors import DeploymentError

LAUNCH = """
import sys, time
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor.types import ExecutionSpec
from fedloom.deployment.flower.programs import client_executor

client_executor().launch(
    ExecutionSpec(
        task_type=TaskType.CLIENT_APP,
        runtime_api_address=sys.argv[1],
        token=" ".join(["a", "token"]),
        insecure=True,
        root_certificates_path=None,
        runtime_dependency_install=False,
        parent_pid=None,
        suppress_output=False,
        task_id=1,
    )
)
time.sleep(120)
"""


def test_the_supernode_is_what_was_changed() -> None:
    from flwr.supernode import start_client_internal as node

    started = inspect.getsource(node.start_client_internal)
    assert "isolation == ISOLATION_MODE_SUBPROCESS" in started
    assert "time.sleep(3)" in started
    assert "get_fused_config_from_fab(fab.content, run_info)" in inspect.getsource(node._pull_and_store_message)
    assert started.index("_pull_and_store_message(") < started.index("time.sleep(3)") < started.index("_push_messages(")


def test_tasks_are_looked_for_often_while_there_are_some_and_seldom_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supercore.superexec import run_superexec
    from flwr.supercore.superexec.executor import subprocess_executor
    from flwr.supernode.runtime import run_clientapp

    monkeypatch.setattr(run_clientapp, "install_from_fab", run_clientapp.install_from_fab)  # which it changes
    monkeypatch.setattr(subprocess_executor, "subprocess", subprocess_executor.subprocess)
    source = inspect.getsource(run_superexec)
    assert source.count("time.sleep(task_poll_interval)") == source.count("time.sleep") == 1
    assert source.index("executor.reconcile()") < source.index("time.sleep(")
    executor, rests = programs.client_executor(), []
    clock = SimpleNamespace(monotonic=lambda: now, sleep=rests.append)
    monkeypatch.setattr(programs, "time", clock)
    now, tasks = 1000.0, False

    def waitid(*which: int) -> None:
        if not tasks:
            raise ChildProcessError

    # Not the real ones: this process has children of other tests.
    names = ("P_ALL", "WEXITED", "WNOHANG", "WNOWAIT", "WIFSIGNALED")
    of_system = {name: getattr(os, name) for name in names}
    fake = SimpleNamespace(waitid=waitid, waitpid=lambda which, how: (0, 0), **of_system)
    monkeypatch.setattr(programs, "os", fake)
    executor.reconcile()
    executor.rest(0.1)
    tasks = True
    executor.reconcile()
    executor.rest(0.1)
    tasks = False
    now += programs.QUIET_SECONDS - 1
    executor.reconcile()
    executor.rest(0.1)
    now += 2
    executor.reconcile()
    executor.rest(0.1)
    executor.reconcile()
    now += 1  # for which the look took
    executor.rest(0.1)
    assert rests == [programs.IDLE_SECONDS, 0.1, 0.1, programs.IDLE_SECONDS, SLOWER_TIMES]


def test_what_carries_out_messages_rests_until_it_is_told_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supercore.superexec.executor import subprocess_executor
    from flwr.supernode.runtime import run_clientapp

    monkeypatch.setattr(run_clientapp, "install_from_fab", run_clientapp.install_from_fab)  # which it changes
    monkeypatch.setattr(subprocess_executor, "subprocess", subprocess_executor.subprocess)
    monkeypatch.setattr(programs, "UNTOLD_SECONDS", 0.3)
    news, telling = os.pipe()
    executor = programs.client_executor(news)
    executor.looked = time.monotonic()
    os.write(telling, b"..")
    executor.rest(0.1)
    assert time.monotonic() - executor.looked < 0.3
    executor.rest(0.1)
    assert time.monotonic() - executor.looked >= 0.3
    os.close(telling)
    with pytest.raises(SystemExit, match="its SuperNode ended"):
        executor.rest(0.1)
    os.close(news)


@pytest.mark.skipif(sys.platform != "linux", reason="it looks at /proc")
def test_a_message_gets_a_process_that_imports_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as runtime:
        runtime.settimeout(120)
        command = [sys.executable, "-c", LAUNCH, f"127.0.0.1:{runtime.getsockname()[1]}"]
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        try:
            connection, _ = runtime.accept()
            with connection:
                assert connection.recv(100).startswith(b"POST /v1/runtime/")
                (found,) = [path.parent for path in Path("/proc").glob("[0-9]*/comm") if is_app_of(process.pid, path)]
                assert b"a token" not in (found / "cmdline").read_bytes()
                ticks = [int(word) for word in (found / "stat").read_text().rpartition(")")[2].split()[11:13]]
                assert sum(ticks) / os.sysconf("SC_CLK_TCK") < 1.0  # of importing Flower it would be two
        finally:
            os.killpg(process.pid, 9)
            process.wait()


def is_app_of(parent: int, comm: Path) -> bool:
    """Whether a process is a task of this one; what a task starts itself has its name until it is another program."""
    try:
        stat = (comm.parent / "stat").read_text().rpartition(")")[2].split()
        return comm.read_text() == "fedloom-task\n" and int(stat[1]) == parent
    except OSError:  # it has just ended
        return False


ENDS = """
import os, sys, threading, time
from flwr.supernode import cli
from fedloom.deployment.flower import programs
from fedloom.deployment.flower.pulls import SLOWER_TIMES
from fedloom.deployment.processes import AND

done, finish = os.pipe()

def lose_its_loop():
    threading.Thread(target=time.sleep, args=(600,)).start()  # as its API's does, which keeps the process
    tell_arguments()
    os.read(done, 1)  # its child ends with it, and may not have begun

def tell_arguments():
    os.write(1, f"{sys.argv}{os.linesep}".encode())  # in one piece: the other writes at the same time

def run_client_tasks(news):
    tell_arguments()
    os.write(finish, b".")

programs.run_client_tasks = run_client_tasks
cli.flower_supernode = lose_its_loop
sys.argv = ["programs", "--superlink", "there", AND, "--insecure"]
programs.run_supernode()
"""


@pytest.mark.long
def test_a_supernode_that_has_lost_its_loop_ends_and_each_part_gets_its_own_arguments(tmp_path: Path) -> None:
    """Flower writes an error in its loop down, and leaves a process that does nothing."""
    environment = {**os.environ, "FEDLOOM_SOCKETS": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 1, done.stderr
    assert sorted(done.stdout.splitlines()) == ["['programs', '--insecure']", "['programs', '--superlink', 'there']"]


def test_what_carries_out_messages_is_missed_once_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "LOADED", ())
    monkeypatch.setattr(programs.gc, "freeze", lambda: None)
    monkeypatch.setattr(sys, "argv", ["programs", AND, "--insecure"])
    reading, writing = os.pipe()
    monkeypatch.setattr(programs, "run_client_tasks", lambda news: os.read(reading, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from Python 3.12 on: that other threads are not there in the child
        check, _ = programs._fork_tasks(1)
    check()
    os.write(writing, b"x")

    def go_on() -> None:
        while True:
            check()

    with pytest.raises(DeploymentError, match="what carries out the messages ended"):
        go_on()
    os.close(reading)
    os.close(writing)
