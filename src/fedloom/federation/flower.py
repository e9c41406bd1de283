"""Flower's side of a deployment: two thin apps that pass frames on. The only module that imports flwr; no torch here.

Flower starts a process for every message to a client, in which loading a model would be paid each time. So what it
carries is unpacked elsewhere: the server app talks to `fedloom serve`, the client app to the worker of `fedloom join`,
each over a Unix socket of its own machine. Importing Flower alone takes two seconds of a core, so a client's processes
are forked from one that has done it.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import multiprocessing.forkserver
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run

from fedloom.deployment.app import check_app
from fedloom.deployment.wire import Frame, ask, receive_frame, send_frame

WORKER_PATIENCE_SECONDS = 120.0
"""For which a client waits for its worker: one that died is being started again."""
SERVER_PATIENCE_SECONDS = 60.0
HOME = "fedloom.federation.flower"
"""This module, whatever it was started as."""
PR_SET_NAME = 15
POLL_SECONDS = 0.5
"""Between two looks of a SuperNode for messages. Flower's own 3 seconds are most of what a round costs."""

server_app = ServerApp()
client_app = ClientApp()


@client_app.train()
def work(message: Message, context: Context) -> Message:
    """Hand a question to this client's worker, and its answer back."""
    frame = to_frame(message.content)
    left = message.metadata.created_at + message.metadata.ttl - time.time()
    answer = ask(
        str(context.node_config["socket"]),
        frame,
        patience_seconds=min(WORKER_PATIENCE_SECONDS, max(left, 1.0)),
        answer_seconds=max(left, 1.0),
    )
    return Message(to_record(answer), reply_to=message)


@server_app.main()
def relay(grid: Grid, context: Context) -> None:
    """Do what `fedloom serve` asks: tell who is there, send a question, look for answers."""
    arrived: list[Message] = []
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(SERVER_PATIENCE_SECONDS)
        connection.connect(str(context.run_config["socket"]))
        connection.settimeout(None)  # as long as `fedloom serve` lives: its end closes the connection
        while True:
            asked = receive_frame(connection)
            match asked.manifest["do"]:
                case "nodes":
                    # With node keys the name is the one that the key was registered with: nobody else can bear it.
                    there = [[str(node.node_id), node.name, node.last_activated_at] for node in grid.get_nodes()]
                    send_frame(connection, Frame({"nodes": there}))
                case "send":
                    told = asked.manifest
                    record = to_record(Frame(told["manifest"], asked.payload))
                    message = Message(record, dst_node_id=int(told["node"]), message_type="train", ttl=told["ttl"])
                    send_frame(connection, Frame({"message": next(iter(grid.push_messages([message])))}))
                case "pull":
                    arrived = arrived or [*grid.pull_messages(asked.manifest["messages"])]
                    send_frame(connection, _answer(arrived.pop()) if arrived else Frame({"message": ""}))
                case "end":
                    return


def run_supernode() -> None:
    """Flower's SuperNode, with its own arguments.

    It looks for messages more often, takes no app but ours, and has our SuperExec.
    """
    from flwr.supernode import start_client_internal as node
    from flwr.supernode.cli import flower_supernode

    def sleep(seconds: float) -> None:
        time.sleep(min(seconds, POLL_SECONDS))

    # What it does first with an app that it was sent.
    take_app = node.get_fused_config_from_fab  # type: ignore

    def check_and_take_app(bundle: bytes, run: Run) -> UserConfig:
        check_app(bundle)
        return take_app(bundle, run)

    node.get_fused_config_from_fab = check_and_take_app  # type: ignore

    def start(command: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", HOME, *command])

    node.time = SimpleNamespace(sleep=sleep)  # type: ignore
    node.subprocess = SimpleNamespace(Popen=start)  # type: ignore
    flower_supernode()


def run_superexec() -> None:
    """Flower's SuperExec, which the SuperNode starts to start processes."""
    from flwr.supercore.cli.flower_superexec import flower_superexec

    fork_client_apps()
    flower_superexec()


def fork_client_apps() -> None:
    """Have Flower's processes for messages forked from one that has imported what they need."""
    from flwr.supercore.superexec.executor import subprocess_executor

    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([HOME, "flwr.supernode.cli"])
    multiprocessing.forkserver.ensure_running()  # before the first message

    def start(command: list[str], **_: object) -> None:
        forks.Process(target=run_client_app, args=(command,), daemon=True).start()

    subprocess_executor.subprocess = SimpleNamespace(Popen=start, DEVNULL=None)  # type: ignore


def run_client_app(command: list[str]) -> None:
    """Flower's process for one message."""
    from flwr.supernode.cli import flwr_clientapp

    sys.argv = command
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_NAME, command[0].encode())  # what `ps` and `top` show
    flwr_clientapp()


def _answer(message: Message) -> Frame:
    told = {"message": message.metadata.reply_to_message_id}
    if message.has_error():
        return Frame({**told, "error": f"Flower's error {message.error.code}"})
    frame = to_frame(message.content)
    return Frame({**told, "manifest": frame.manifest}, frame.payload)


def to_record(frame: Frame) -> RecordDict:
    """A frame as Flower sends it: one array, one text."""
    numbers = np.frombuffer(frame.payload, dtype="<f4")
    told = ConfigRecord({"manifest": json.dumps(dict(frame.manifest))})
    return RecordDict({"numbers": ArrayRecord({"all": Array(numbers)}), "told": told})


def to_frame(record: RecordDict) -> Frame:
    """The inverse of `to_record`."""
    manifest = json.loads(str(record.config_records["told"]["manifest"]))
    numbers = record.array_records["numbers"]["all"].numpy()
    return Frame(manifest, numbers.astype("<f4", copy=False).tobytes())


if __name__ == "__main__":
    if sys.argv[1:2] == ["flower-superexec"]:
        del sys.argv[0]
        run_superexec()
    else:
        run_supernode()
