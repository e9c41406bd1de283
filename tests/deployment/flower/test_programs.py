"""Changes to Flower, held to the Flower that is installed."""

import inspect
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from fedloom.deployment.flower import programs

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
    now += programs.QUIET_SECONDS - 1
    executor.rest(0.1)
    now += 2
    executor.rest(0.1)
    assert rests == [programs.IDLE_SECONDS, 0.1, 0.1, programs.IDLE_SECONDS]


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


def is_app_of(session: int, comm: Path) -> bool:
    try:
        return comm.read_text() == "fedloom-task\n" and os.getsid(int(comm.parent.name)) == session
    except OSError:  # it has just ended
        return False
