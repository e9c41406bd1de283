"""Many clients of one machine at once: all come through, and none is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from fedloom.deployment.server.nginx import find_nginx

BENCH = Path(__file__).parents[2] / "bench" / "deployment.py"
if find_nginx() is None:
    pytest.skip("nginx is not installed", allow_module_level=True)
if not Path("/proc/self/smaps_rollup").exists():
    pytest.skip("processes are looked at through /proc", allow_module_level=True)


def measure(*words: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, str(BENCH), *words], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check_all_came_through(found: dict[str, Any]) -> None:
    assert (found["lost"], found["ended"], found["refused"], found["restarts"]) == (0, 0, 0, 0), found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_four_clients_with_an_echo_come_through() -> None:
    found = measure("--many", "4", "--rounds", "3", "--rest", "1")
    check_all_came_through(found)
    assert len(found["round_seconds"]) == 3


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_hundred_clients_with_an_echo_come_through() -> None:
    check_all_came_through(measure("--many", "100", "--rounds", "3"))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_thirty_clients_with_a_model_each_come_through_tiny() -> None:
    found = measure("--many", "30", "--tiny", "--rounds", "3")
    check_all_came_through(found)
    assert found["updates"] == 30 * 3
