"""Flower's side of a deployment: two thin apps that pass frames on. No torch here.

Flower starts a process for every message to a client, in which loading a model would be paid each time. So what it
carries is unpacked elsewhere: the server app talks to `fedloom serve`, the client app to the worker of `fedloom join`,
each over a Unix socket of its own machine.
"""

from __future__ import annotations

import json
import os
import socket
import time

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedloom.deployment.wire import SERVE_SOCKET, Frame, ask, receive_frame, send_frame

WORKER_PATIENCE_SECONDS = 120.0
"""For which a client waits for its worker: one that died is being started again."""
SERVER_PATIENCE_SECONDS = 60.0

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
        connection.connect(os.environ[SERVE_SOCKET])
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
