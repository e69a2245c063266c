"""Messages between agents and the supervisor: one JSON object a line, over TCP, never blocking.

The run folder is on a network file system, where seconds may pass before one node sees what another wrote: what is
urgent goes through a socket. Nobody without the attempt's token is listened to, and nothing but JSON is read.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from typing import Any

LONGEST = 1 << 24  # bytes of a line; more is not one of ours


class Line:
    """One end of a connection. `closed` once the other end is gone, or broke the rules."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self.closed = False
        self._received = b""
        self._unsent = b""

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Sends what goes out at once; the rest with the next call of `send` or `flush`."""
        self._unsent += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        try:
            while self._unsent and not self.closed:
                self._unsent = self._unsent[self.connection.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True

    def drain(self, seconds: float) -> None:
        """Waits until everything is sent: the last words before the process ends."""
        deadline = time.monotonic() + seconds
        while self._unsent and not self.closed and time.monotonic() < deadline:
            select.select([], [self], [], 0.1)
            self.flush()

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have arrived whole."""
        try:
            while part := self.connection.recv(1 << 16):
                self._received += part
            self.closed = True
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        *lines, self._received = self._received.split(b"\n")
        try:
            messages: list[Any] = [json.loads(line) for line in lines]
        except ValueError:
            messages = [None]
        if len(self._received) > LONGEST or not all(isinstance(message, dict) for message in messages):
            self.close()
            return []
        return messages

    def close(self) -> None:
        self.closed = True
        self.connection.close()


def listen(host: str) -> socket.socket:
    """A listening socket on a port that the kernel picks: on every interface, or on this machine's own alone."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.bind(("127.0.0.1" if host in ("127.0.0.1", "localhost") else "", 0))
    listener.listen(4096)
    listener.setblocking(False)
    return listener


def connect(address: str, *, seconds: float) -> Line:
    """Connects to HOST:PORT. Raises OSError.

    When the other end's kernel has not confirmed for `seconds` what was sent, the line closes: the node, or the way to
    it, is lost. A process there that is slow does not count, its kernel confirms.
    """
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host.strip("[]"), int(port)), timeout=seconds)
    with contextlib.suppress(AttributeError, OSError):  # Linux has it
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * seconds))
    return Line(connection)
