"""Boards of runs that never were, and requests to who shows them."""

import http.client
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedloom.experiment.run import plan
from fedloom.monitoring.board import Board
from fedloom.records.run import RoundRecord
from support.tiny import make_recipe

HOSTILE = "<img src=x onerror=alert(1)>\x1b[2J\u202e</script>"


def make_record(round: int, **more: Any) -> RoundRecord:
    took = {"train_seconds": 2.0, "aggregate_seconds": 0.5, "evaluate_seconds": 1.0}
    record = {"round": round, "clients": [0, 1], "lost": [], "train_tokens": 10, "client_losses": {"0": 3.0, "1": 3.5}}
    told = {"central_loss": 5.0 - round / 4, "client_loss": 4.9 - round / 4, "finished": "2026-11-26T10:00:00+00:00"}
    return {**record, **took, **told, "bytes_up": 100, "bytes_down": 200, "adapter_sha256": "0", **more}  # type: ignore[return-value,typeddict-item]


def make_board(rounds: int = 3, *, names: tuple[str, ...] = ("alice", "bob")) -> Board:
    """A board that heard of a run on real machines: of clients, of one that was turned away, and of some rounds."""
    from dataclasses import replace

    board = Board("fedloom serve", Path("runs/first"))
    board.show_step("waiting", "for 2 clients")
    board.show_step("refused", f"mallory: {HOSTILE}")
    board.show_plan(replace(plan(make_recipe()), elsewhere=names))
    board.show_folder(Path("runs/first"))
    board.show_clients(dict.fromkeys(names, "training"))
    for round in range(rounds):
        board.show_round(make_record(round))
    return board


@contextmanager
def asked(port: int, method: str, path: str, headers: dict[str, str] | None = None) -> Iterator[Any]:
    """The answer to a request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, headers=headers or {})
        yield connection.getresponse()
    finally:
        connection.close()
