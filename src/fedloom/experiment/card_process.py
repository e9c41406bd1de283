"""Process that trains on a further device, of this machine or of a node: it has the base model, and is told jobs.

`cards` starts it, never a person. It ends when whoever started it does: its socket is closed then. On a node, standard
input and output stand for the socket, as ssh brings them.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import astuple
from typing import Any

import torch

from fedloom import __version__
from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.errors import FedloomError, RunError
from fedloom.experiment.building import load_adapted_model, open_source
from fedloom.experiment.job_frames import pack_result, unpack_jobs
from fedloom.experiment.session import hash_base
from fedloom.experiment.silence import BEAT_SECONDS
from fedloom.host.frames import Frame, receive_frame, send_frame
from fedloom.progress import Progress
from fedloom.recipe.recipe import Recipe
from fedloom.training.engines import Engine, open_engine

CHUNK_BYTES = 2**20


class NotWantedError(Exception):
    """Work that nobody waits for any more: something else was said meanwhile."""


class Line:
    """End of the socket to the run that this process trains for."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._speaking = threading.Lock()

    def tell(self, do: str, **facts: Any) -> None:
        """Send a few words."""
        with self._speaking:
            send_frame(self._connection, Frame({"do": do, **facts}))

    def watch(self, progress: Progress) -> None:
        """Tell of a step; give up where something else is said.

        Raises:
            NotWantedError
        """
        self.tell("progress", row=astuple(progress))
        if select.select([self._connection], [], [], 0)[0]:
            raise NotWantedError

    def say(self, what: str, detail: str) -> None:
        """Tell people something."""
        self.tell("say", what=what, detail=detail)

    def serve(self) -> None:
        """Load the model of a recipe, and carry out jobs until the other end is closed.

        Raises:
            OSError: it is.
        """
        told = receive_frame(self._connection).manifest
        try:
            with self._beating():
                adapted, engine, base = self._open(told)
        except FedloomError as error:
            self.tell("failed", why=str(error))
            return
        self.tell("ready", base=base)
        while True:
            asked = receive_frame(self._connection)
            if asked.manifest["do"] == "train":
                with suppress(NotWantedError):
                    for result in engine.train(unpack_jobs(asked, adapted.layout)):
                        send_frame(self._connection, pack_result(result))
                self.tell("done", lowered_to=engine.lowered_to)

    @contextmanager
    def _beating(self) -> Iterator[None]:
        """Say now and then that this process is there, until the block ends: a large model takes long to come."""
        ended = threading.Event()

        def beat() -> None:
            with suppress(OSError):
                while not ended.wait(BEAT_SECONDS):
                    self.tell("loads")

        beats = threading.Thread(target=beat, daemon=True)
        beats.start()
        try:
            yield
        finally:
            ended.set()
            beats.join()

    def _open(self, told: Mapping[str, Any]) -> tuple[AdaptedModel, Engine, str]:
        if told["version"] != __version__:
            raise RunError(f"it has fedloom {__version__}, and the run has {told['version']}")
        if told["threads"]:
            torch.set_num_threads(told["threads"])
        recipe = Recipe.model_validate(told["recipe"])
        adapted = load_adapted_model(recipe, open_source(recipe))
        # Before the engine tries the model: bitsandbytes changes how it keeps its weights when they are first used.
        base = hash_base(adapted)
        engine = open_engine(told["engine"], adapted, recipe.data, self.watch, self.say)
        return adapted, engine, base


def serve_streams() -> None:
    """Serve at standard input and output. What anything prints meanwhile goes to standard error."""
    source, sink = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    connection, ours = socket.socketpair()

    def bring() -> None:
        with suppress(OSError):
            while read := os.read(source, CHUNK_BYTES):
                ours.sendall(read)
        with suppress(OSError):
            ours.shutdown(socket.SHUT_WR)

    def take() -> None:
        with suppress(OSError):
            while read := ours.recv(CHUNK_BYTES):
                written = 0
                while written < len(read):
                    written += os.write(sink, read[written:])
        # Nobody reads any more: the next word that is sent says so.
        with suppress(OSError):
            ours.shutdown(socket.SHUT_RDWR)

    threading.Thread(target=bring, daemon=True).start()
    taking = threading.Thread(target=take, daemon=True)
    taking.start()
    with connection, suppress(OSError):
        Line(connection).serve()
    taking.join()


def main() -> None:
    """Serve at the socket whose descriptor is the argument."""
    with socket.socket(fileno=int(sys.argv[1])) as connection, suppress(OSError):
        Line(connection).serve()


if __name__ == "__main__":
    main()
