"""One round in Flower's simulation engine: a part of `engines.py`, and no program.

A client builds its model in every call, as in Flower's tutorials.
"""

from __future__ import annotations

import logging
import os
import time
import warnings

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def simulate_round(shape: str, clients: int, steps: int, batch: int, length: int, threads: int) -> tuple[float, float]:
    """Seconds of the whole simulation, and of its only round alone."""
    warnings.simplefilter("ignore")
    import torch
    from flwr.client import ClientApp, NumPyClient
    from flwr.common import Context, ndarrays_to_parameters
    from flwr.server import ServerApp, ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.CRITICAL)

    def weights_of(model):
        return [value.detach().cpu().numpy() for value in model.parameters() if value.requires_grad]

    class Client(NumPyClient):
        def __init__(self, number: int) -> None:
            self.number = number

        def fit(self, parameters, config):
            from workload import build_adapted, make_blocks

            torch.set_num_threads(threads)
            model = build_adapted(shape).model
            trained = [value for value in model.parameters() if value.requires_grad]
            for value, given in zip(trained, parameters, strict=True):
                value.data.copy_(torch.from_numpy(given))
            blocks = make_blocks(batch * steps, self.number, length)
            optimizer = torch.optim.AdamW(trained, lr=1e-5)
            model.train()
            for tokens_BT in blocks.tokens_NT.to(model.device).split(batch):
                optimizer.zero_grad(set_to_none=False)
                model(input_ids=tokens_BT, labels=tokens_BT).loss.backward()
                optimizer.step()
            return weights_of(model), len(blocks), {}

    class Timed(FedAvg):
        started = seconds = 0.0

        def configure_fit(self, *arguments, **named):
            Timed.started = time.perf_counter()
            return super().configure_fit(*arguments, **named)

        def aggregate_fit(self, round, results, failures):
            Timed.seconds = time.perf_counter() - Timed.started
            assert len(results) == clients, failures
            return super().aggregate_fit(round, results, failures)

    def make_client(context: Context):
        return Client(int(context.node_config["partition-id"])).to_client()

    def make_server(context: Context) -> ServerAppComponents:
        from workload import build_adapted

        initial = ndarrays_to_parameters(weights_of(build_adapted(shape).model))
        strategy = Timed(initial_parameters=initial, fraction_evaluate=0.0, min_available_clients=clients)
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=1))

    gpus = torch.cuda.device_count()
    started = time.perf_counter()
    run_simulation(
        server_app=ServerApp(server_fn=make_server),
        client_app=ClientApp(client_fn=make_client),
        num_supernodes=clients,
        backend_config={"client_resources": {"num_cpus": os.cpu_count() or 1, "num_gpus": gpus}},
    )
    return time.perf_counter() - started, Timed.seconds
