"""Link between two sockets of this machine that can be slow, and that can be cut."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CHUNK_BYTES = 4096
BUFFER_BYTES = 2**16
"""Small, so that what was sent is not all taken in at once."""


class SlowLink:
    """Carries bytes from its port to another of this machine, both ways."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._is_cut = False
        self._lost: set[socket.socket] = set()
        self._connections: set[socket.socket] = set()
        self.bytes_per_second = float("inf")
        """Speed of each way, for all connections together."""
        self.carried_bytes = 0
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break off what is under way, and take nothing new."""
        self._is_cut = True
        for connection in [*self._connections]:
            _close(connection)

    def heal(self) -> None:
        self._is_cut = False

    def vanish(self) -> None:
        """Carry nothing more of what is connected now, and tell neither side: a route or a firewall's table is lost.

        What connects later is carried.
        """
        self._lost |= self._connections

    def close(self) -> None:
        self.cut()
        _close(self._listener)

    def _accept(self) -> None:
        ways = threading.Lock(), threading.Lock()
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket()
            far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
            if self._is_cut or far.connect_ex(("127.0.0.1", self._to)):
                _close(near)
                far.close()
                continue
            self._connections |= {near, far}
            for source, target, way in ((near, far, ways[0]), (far, near, ways[1])):
                threading.Thread(target=self._carry, args=(source, target, way), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, way: threading.Lock) -> None:
        with suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                if source in self._lost:
                    continue
                with way:
                    left = float(len(data))
                    while left > 0 and not self._is_cut:  # a link that gets faster does so at once
                        time.sleep(min(left / self.bytes_per_second, 0.1))
                        left -= 0.1 * self.bytes_per_second
                target.sendall(data)
                self.carried_bytes += len(data)
        # The other side of a lost connection hears nothing of the end of this one.
        for connection in (source,) if source in self._lost else (source, target):
            self._connections.discard(connection)
            _close(connection)


def _close(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


@contextmanager
def slow_link(port: int) -> Iterator[SlowLink]:
    link = SlowLink(port)
    try:
        yield link
    finally:
        link.close()
