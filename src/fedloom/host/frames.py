"""Frames between two processes of one machine: a JSON manifest and raw bytes. Never pickle; no torch here."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEAD = struct.Struct(">QQ")
CREDENTIALS = struct.Struct("3i")
"""Process, user and group at the other end of a Unix socket, as Linux tells them."""
MOST_MANIFEST_BYTES = 2**24
MOST_PAYLOAD_BYTES = 2**36


@dataclass(frozen=True)
class Frame:
    """Message of one process to another: words, and the numbers that go with them (float32, little-endian)."""

    manifest: Mapping[str, Any]
    payload: bytes = b""


def send_frame(connection: socket.socket, frame: Frame) -> None:
    """Write a frame whole.

    Raises:
        OSError: the other side is gone, or takes longer than the connection's timeout.
    """
    connection.sendall(pack_head(frame))
    if frame.payload:
        connection.sendall(frame.payload)


def pack_head(frame: Frame) -> bytes:
    """Return all of a frame that comes before its numbers."""
    manifest = json.dumps(frame.manifest).encode()
    return HEAD.pack(len(manifest), len(frame.payload)) + manifest


def unpack_frame(data: bytes) -> Frame | None:
    """Return the frame that is written in a file, or None where it is not whole."""
    if len(data) < HEAD.size:
        return None
    manifest_bytes, payload_bytes = HEAD.unpack_from(data)
    start = HEAD.size + manifest_bytes
    manifest = read_manifest(data[HEAD.size : start])
    return None if manifest is None or len(data) != start + payload_bytes else Frame(manifest, data[start:])


def receive_frame(connection: socket.socket, most_payload_bytes: int = MOST_PAYLOAD_BYTES) -> Frame:
    """Read a frame whole.

    Raises:
        OSError: the other side is gone, says nothing within the connection's timeout, or speaks something else, as
            does who claims to send more than there can be.
    """
    manifest_bytes, payload_bytes = HEAD.unpack(_read(connection, HEAD.size))
    if manifest_bytes > MOST_MANIFEST_BYTES or payload_bytes > most_payload_bytes:
        raise ConnectionError("not a fedloom frame")
    manifest = read_manifest(_read(connection, manifest_bytes))
    if manifest is None:
        raise ConnectionError("not a fedloom frame")
    return Frame(manifest, _read(connection, payload_bytes))


def read_manifest(told: bytes | str) -> Mapping[str, Any] | None:
    """Return what a JSON text says, or None where it is not JSON or not a mapping."""
    try:
        manifest = json.loads(told)
    except (ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) else None


def ask(path: str, frame: Frame, *, patience_seconds: float, answer_seconds: float) -> Frame:
    """Ask whoever listens at a path, and return the answer; ask again for a while where nobody is there yet.

    Raises:
        OSError: nobody answered in time.
    """
    until = time.monotonic() + patience_seconds
    while True:
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(answer_seconds)
                connection.connect(path)
                send_frame(connection, frame)
                return receive_frame(connection)
        except TimeoutError:
            # It is there and works: asked again, it would do the work twice.
            raise
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def listen(path: str) -> socket.socket:
    """Listen at a path, for this user alone; a socket that a killed process left there is replaced."""
    Path(path).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen()
    return listener


def accept(listener: socket.socket) -> socket.socket:
    """Wait for a connection of this user's; another's is closed, should the folder's rights have let it come so far.

    Raises:
        OSError: nobody comes within the listener's timeout.
    """
    while True:
        connection, _ = listener.accept()
        if not hasattr(socket, "SO_PEERCRED"):  # not Linux: the folder's rights are all there is
            return connection
        told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        if CREDENTIALS.unpack(told)[1] == os.getuid():
            return connection
        connection.close()


def _read(connection: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    view, filled = memoryview(data), 0
    while filled < count:
        found = connection.recv_into(view[filled:])
        if not found:
            raise ConnectionError("the other side is gone")
        filled += found
    return bytes(data)
