"""A TCP proxy between a client and its server, which can drop requests, stop forwarding, or imitate a pooler."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator


class Proxy:
    """Listens on `port` and forwards to `target`, with one thread for each direction of a connection.

    Attributes:
        port: The port on 127.0.0.1.
        away: Whether to close every new connection at once.
        latency: Seconds to delay each request.
        hide_the_process: Whether to replace the process id that PostgreSQL sends, as a pooler does.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.hide_the_process = False
        self.away = False
        self.latency = 0.0
        self._marker: bytes | None = None
        self._passes = True
        self._swallowed: bytes | None = None
        self._lines: list[_Line] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def lose_the_answer_to(self, marker: bytes) -> None:
        """Forward the next request that contains `marker`, and cut its connection when the response arrives."""
        self._marker, self._passes = marker, True

    def lose(self, marker: bytes) -> None:
        """Cut the connection of the next request that contains `marker`, without forwarding it."""
        self._marker, self._passes = marker, False

    def swallow(self, marker: bytes) -> None:
        """Drop the next response that contains `marker`, and keep its connection."""
        self._swallowed = marker

    def say(self, data: bytes) -> None:
        """Send bytes to the client of each connection, as if the server had."""
        for line in self._lines:
            with contextlib.suppress(OSError):
                line.client.sendall(data)

    @property
    def has_lost(self) -> bool:
        return self._marker is None

    def cut(self) -> None:
        """Cut every connection."""
        for line in self._lines:
            line.end()

    def stall_after(self, size: int) -> None:
        """Stop forwarding on each open connection after `size` more bytes of the server."""
        for line in self._lines:
            line.left = size

    def fall_silent(self) -> None:
        """Stop forwarding on the open connections, including their end. New connections work."""
        for line in self._lines:
            line.silent = True

    @property
    def connections(self) -> int:
        """The number of connections so far."""
        return len(self._lines)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for line in self._lines:
            line.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    if self.away:
                        raise ConnectionRefusedError
                    line = _Line(client, socket.create_connection(self._target))
                except OSError:
                    client.close()
                    continue
                self._lines.append(line)
                threading.Thread(target=self._requests, args=(line,), daemon=True).start()
                threading.Thread(target=self._answers, args=(line,), daemon=True).start()

    def _requests(self, line: _Line) -> None:
        with contextlib.suppress(OSError):
            while data := line.client.recv(65536):
                if line.silent:
                    continue
                if self.latency:
                    time.sleep(self.latency)
                if self._marker is not None and self._marker in data:
                    self._marker = None
                    if not self._passes:
                        break
                    line.doomed = True
                line.server.sendall(data)
        line.end()

    def _answers(self, line: _Line) -> None:
        with contextlib.suppress(OSError):
            while (data := line.server.recv(65536)) and not line.doomed:
                if self._swallowed is not None and self._swallowed in data:
                    self._swallowed = None
                elif not line.silent:
                    line.pass_on(_with_another_process(data) if self.hide_the_process else data)
        if not line.silent:
            line.end()


class _Line:
    """One connection. If `doomed`, it ends with the next response; if `silent`, it drops the bytes of both sides."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.doomed = self.silent = False
        self.left: int | None = None

    def pass_on(self, data: bytes) -> None:
        if self.left is not None:
            data = data[: self.left]
            self.left -= len(data)
            self.silent = not self.left
        self.client.sendall(data)

    def end(self) -> None:
        for one in (self.client, self.server):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.end()
        self.client.close()
        self.server.close()


def _with_another_process(data: bytes) -> bytes:
    """Replace the process id in the server's BackendKeyData, as a pooler does."""
    start = data.find(b"K\0\0\0\x0c")
    return data if start < 0 else data[: start + 5] + b"\0\0\0\7" + data[start + 9 :]


@contextlib.contextmanager
def proxy(host: str, port: int) -> Iterator[Proxy]:
    between = Proxy((host, port))
    try:
        yield between
    finally:
        between.close()
