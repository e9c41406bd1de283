"""Both apps under Flower's simulation: Ray carries the messages, and the adapter is that of a local run."""

import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")
pytest.importorskip("ray", reason="Ray is not installed: pip install 'flwr[simulation]'")

from support.federation_here import run_here, split, timeless, tiny

from fedloom.deployment.processes import SOCKETS, Child, hand_over, private_folder, programs_environment
from fedloom.deployment.server.serving import RemoteClients, with_limits
from fedloom.deployment.server.superlink import SuperLink
from fedloom.experiment.run import run
from fedloom.monitoring.observer import Observer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SIMULATION = """\
from flwr.simulation import run_simulation
from fedloom.deployment.flower.apps import client_app, server_app
backend = {"init_args": {"num_cpus": 2, "include_dashboard": False}, "client_resources": {"num_cpus": 1}}
run_simulation(server_app, client_app, num_supernodes=2, backend_config=backend)
"""


class Simulation(SuperLink):
    """Flower's simulation where its SuperLink would be."""

    def open(self) -> None:
        environment = {**self._environment, SOCKETS: str(self._folder), "RAY_USAGE_STATS_ENABLED": "0"}
        self._child = Child([sys.executable, "-c", SIMULATION], self._log, environment)
        until = time.monotonic() + 200
        while self._app is None:
            try:
                self._app, _ = self._listener.accept()
            except TimeoutError:
                self._wait(until, "its app does not start")
        self._app.settimeout(60)


def test_the_apps_make_the_same_adapter_in_flowers_simulation(tmp_path: Path) -> None:
    asked = with_limits(tiny("data.clients=2", "federation.rounds=1"))
    local = run_here(asked, tmp_path / "local")
    with ExitStack() as stack:
        folder = stack.enter_context(private_folder())
        for client, data in enumerate(split(asked, tmp_path / "split")):
            command = [sys.executable, "-m", "fedloom.deployment.client.worker_process"]
            words = ["--socket", f"{folder}/worker-{client}.sock", "--name", f"client-{client}", "--data", str(data)]
            words += ["--journal", str(tmp_path / f"client-{client}.journal.jsonl")]
            environment = programs_environment(folder) | hand_over(words)
            worker = Child(command, tmp_path / f"client-{client}.log", environment)
            stack.callback(worker.end)
        link = stack.enter_context(closing(Simulation(folder, 0, None, lambda what, detail: None)))
        host = RemoteClients(link, 200.0)
        simulated = run(asked, tmp_path / "simulated", Observer(), clients=host)
    assert [record["adapter_sha256"] for record in simulated.rounds] == [
        record["adapter_sha256"] for record in local.rounds
    ]
    assert timeless(simulated.rounds) == timeless(local.rounds)
    assert (tmp_path / "client-1.log").read_text().count("training") == 1
