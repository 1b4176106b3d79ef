"""A TCP proxy between a client and its server: it loses the answer that a test tells it to, or plays a pooler."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator


class Proxy:
    """Listens on `port` and passes on to `target`. One thread for each direction of a connection."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.hide_the_process = False
        self._marker: bytes | None = None
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def lose_the_answer_to(self, marker: bytes) -> None:
        """Pass on the next request that holds `marker`, and cut its connection when the answer comes."""
        self._marker = marker

    @property
    def has_lost(self) -> bool:
        return self._marker is None

    def close(self) -> None:
        for one in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                self._sockets += [client, server]
                doomed = threading.Event()
                threading.Thread(target=self._requests, args=(client, server, doomed), daemon=True).start()
                threading.Thread(target=self._answers, args=(server, client, doomed), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket, doomed: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                if self._marker is not None and self._marker in data:
                    self._marker = None
                    doomed.set()
                server.sendall(data)
        _end(client, server)

    def _answers(self, server: socket.socket, client: socket.socket, doomed: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while (data := server.recv(65536)) and not doomed.is_set():
                client.sendall(_with_another_process(data) if self.hide_the_process else data)
        _end(client, server)


def _with_another_process(data: bytes) -> bytes:
    """Replace the process id in the server's BackendKeyData, as a pooler does."""
    start = data.find(b"K\0\0\0\x0c")
    return data if start < 0 else data[: start + 5] + b"\0\0\0\7" + data[start + 9 :]


def _end(*sockets: socket.socket) -> None:
    for one in sockets:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def proxy(host: str, port: int) -> Iterator[Proxy]:
    between = Proxy((host, port))
    try:
        yield between
    finally:
        between.close()
