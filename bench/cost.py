"""Cost of a server by the number of its clients, reckoned from constants that `scale.py` measured.

    python bench/cost.py [--clients 10 30 100 1000] [--adapter-bytes 6291456]

How many requests a round takes follows from what Flower does with a message; what one costs was measured. `MEASURED`
holds what the model is held to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from options import open_parser

CHUNK_BYTES = 2**20
"""Part of an adapter in one request (`fedloom.deployment.processes.FLOWER`)."""
WAIT_SECONDS = 10.5
"""Time between two looks of a client at rest: the wait at the server, and a rest."""
HEARTBEAT_SECONDS = 20.0


@dataclass(frozen=True)
class Constants:
    """What was measured on two cores of an AMD EPYC that others kept busy, with Flower 1.41 and Python 3.11."""

    request_seconds: float = 0.010
    """Processor seconds of the SuperLink for a client's request of a round, with the server app's own that belongs to
    it and nginx's question whether it is signed, at a priority above others'. With little else on the machine 0.009,
    among others at a load of 15 0.013."""
    look_seconds: float = 0.0067
    """Processor seconds of the SuperLink for a look that finds nothing, or a heartbeat."""
    rest_cores: float = 0.032
    """Part of a core that a SuperLink without a client takes: `serve` looks who is there, and for answers."""
    superlink_bytes: float = 115e6
    client_bytes: float = 0.25e6
    """Memory of the SuperLink without a client, and what each adds to it, answers aside."""
    request_up_bytes: float = 880.0
    request_down_bytes: float = 133.0
    """Bytes of a request and of its answer, headers for the most part, without what the next two name."""
    answer_bytes: float = 1840.0
    question_bytes: float = 2610.0
    """Words of an answer and of a question, and the names of their parts."""


@dataclass(frozen=True)
class Cost:
    """Cost of a server: of all its clients together."""

    requests: float
    """Requests of clients in a round."""
    rest_requests: float
    """Requests of clients in a second at rest."""
    superlink_seconds: float
    """Processor seconds of the SuperLink in a round. It is one process with one lock, so no round takes less."""
    rest_cores: float
    superlink_bytes: float
    """Memory of the SuperLink, where it holds no answer."""
    answers_bytes: float
    """Memory that answers take in the SuperLink at most, and then on the server's disk, until they are counted."""
    up_bytes: float
    down_bytes: float
    """Bytes that clients send to the server in a round, and that it sends to them."""


def parts(payload_bytes: int) -> int:
    """Return how many objects Flower makes of a message: itself, its record, the words, and those of its numbers."""
    if not payload_bytes:
        return 3
    return 4 if payload_bytes <= CHUNK_BYTES else 6 + math.ceil(payload_bytes / CHUNK_BYTES)


def reckon(clients: int, adapter_bytes: int, evaluations: float = 1.0, constants: Constants = Constants()) -> Cost:
    """Return the cost of a server whose clients all train in each round, and score it so many times."""
    asked = parts(adapter_bytes)
    # A look, what it found, that it came; the answer, and its parts.
    train, evaluate = 3 + asked + asked, 3 + asked + parts(0)
    requests = clients * (train + evaluations * evaluate)
    rest = clients * (1 / WAIT_SECONDS + 1 / HEARTBEAT_SECONDS)
    return Cost(
        requests=requests,
        rest_requests=rest,
        superlink_seconds=requests * constants.request_seconds,
        rest_cores=constants.rest_cores + rest * constants.look_seconds,
        superlink_bytes=constants.superlink_bytes + clients * constants.client_bytes,
        answers_bytes=clients * float(adapter_bytes),
        up_bytes=requests * constants.request_up_bytes
        + clients * (adapter_bytes + (1 + evaluations) * constants.answer_bytes),
        down_bytes=requests * constants.request_down_bytes
        + clients * (1 + evaluations) * (adapter_bytes + constants.question_bytes),
    )


ADAPTER_BYTES = 7168
"""Adapter of the recipe `tiny`."""
MEASURED: dict[int, dict[str, float]] = {
    10: {
        "seconds": 14.1,
        "requests": 219,
        "superlink_seconds": 2.87,
        "rest_cores": 0.042,
        "superlink_bytes": 118e6,
        "up_bytes": 301e3,
        "down_bytes": 225e3,
    },
    30: {
        "seconds": 10.4,
        "requests": 646,
        "superlink_seconds": 6.94,
        "rest_cores": 0.071,
        "superlink_bytes": 119e6,
        "up_bytes": 894e3,
        "down_bytes": 673e3,
    },
    100: {
        "seconds": 34.2,
        "requests": 2492,
        "superlink_seconds": 25.15,
        "rest_cores": 0.132,
        "superlink_bytes": 127e6,
        "up_bytes": 3274e3,
        "down_bytes": 2293e3,
    },
}
"""What `scale.py` measured by the number of clients, with `tiny`."""


def errors(clients: int) -> dict[str, float]:
    """Return by which part of what was measured with so many clients the model is off.

    Clients that wait for others look and send heartbeats as at rest, for as long as a round took.
    """
    said, told = vars(reckon(clients, ADAPTER_BYTES)), {**MEASURED[clients]}
    seconds = told.pop("seconds", 0.0)
    looks = seconds * said["rest_requests"]
    said["requests"] += looks
    said["superlink_seconds"] += seconds * said["rest_cores"]
    said["up_bytes"] += looks * Constants.request_up_bytes
    said["down_bytes"] += looks * Constants.request_down_bytes
    return {name: said[name] / value - 1 for name, value in told.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = open_parser(__doc__)
    parser.add_argument("--clients", type=int, nargs="*", default=[10, 30, 100, 1000])
    parser.add_argument("--adapter-bytes", type=int, default=ADAPTER_BYTES)
    parser.add_argument("--evaluations", type=float, default=1.0, help="of a client in a round, on the average")
    options = parser.parse_args(arguments)
    print("| clients | requests a round | SuperLink: s a round | of a core at rest | MB | answers, MB | up, down, MB |")
    print("|---|---|---|---|---|---|---|")
    for clients in options.clients:
        said = reckon(clients, options.adapter_bytes, options.evaluations)
        print(
            f"| {clients:,} | {said.requests:,.0f} | {said.superlink_seconds:,.0f} | {said.rest_cores:.2f} | "
            f"{said.superlink_bytes / 1e6:,.0f} | {said.answers_bytes / 1e6:,.1f} | "
            f"{said.up_bytes / 1e6:,.1f}, {said.down_bytes / 1e6:,.1f} |"
        )
    for clients in MEASURED:
        told = ", ".join(f"{name} {100 * error:+.0f} %" for name, error in errors(clients).items())
        print(f"\nAgainst what was measured with {clients}: {told}")


if __name__ == "__main__":
    main()
