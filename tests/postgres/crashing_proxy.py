"""A proxy that cuts a connection at a byte of a request or of its answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

import attrs
from proxy import Proxy, _Line

Side: TypeAlias = Literal["client", "server"]

_READY_FOR_QUERY = b"Z\0\0\0\5I"
"""The end of an answer outside a transaction."""


@attrs.define
class Exchange:
    """The bytes of both sides, from the first byte of a request to the last of its answer.

    Attributes:
        marker: the bytes that identify the request.
        allowed: the bytes of one side after which the connection is cut. A request comes in one piece and has a length
            that depends on the name of its prepared statement, so its bytes are counted from the end: 0 is all of it.
        passed: the bytes so far, by side.
        line: the connection.
        is_cut: whether the connection was cut.
    """

    marker: bytes
    allowed: dict[Side, int]
    passed: dict[Side, bytes] = attrs.field(factory=lambda: {"client": b"", "server": b""})
    line: _Line | None = None
    is_cut: bool = False

    @property
    def is_over(self) -> bool:
        return self.is_cut or _READY_FOR_QUERY in self.passed["server"]

    def take(self, side: Side, data: bytes) -> bytes:
        """Return the bytes to pass on."""
        allowed = self.allowed.get(side)
        if allowed is not None:
            room = max(0, len(data) + allowed) if side == "client" else allowed - len(self.passed[side])
            self.is_cut = self.is_cut or len(data) >= room
            data = data[:room]
        passed = self.passed[side] + data
        if side == "server" and _READY_FOR_QUERY in passed:  # a notification may come right behind it
            passed = passed[: passed.index(_READY_FOR_QUERY) + len(_READY_FOR_QUERY)]
        self.passed[side] = passed
        return data


class CuttingProxy(Proxy):
    """Cuts one connection at a time, at a byte of an exchange, and otherwise passes everything on."""

    exchange: Exchange | None = None

    def watch(self, marker: bytes, allowed: dict[Side, int]) -> Exchange:
        """Watch the exchange that begins with the next request that contains `marker`."""
        self.exchange = Exchange(marker, allowed)
        return self.exchange

    def _requests(self, line: _Line) -> None:
        self._pass(line, "client")

    def _answers(self, line: _Line) -> None:
        self._pass(line, "server")

    def _pass(self, line: _Line, side: Side) -> None:
        source, target = (line.client, line.server) if side == "client" else (line.server, line.client)
        with contextlib.suppress(OSError):
            while (data := source.recv(65536)) and not line.doomed:
                exchange = self.exchange
                if exchange is not None and side == "client" and exchange.marker in data:
                    exchange.line = line
                if exchange is not None and exchange.line is line:
                    data = exchange.take(side, data)
                    if exchange.is_over:
                        self.exchange = None
                # Before the last byte is passed on: what the other side answers to it must not pass any more.
                line.doomed = exchange is not None and exchange.is_cut and exchange.line is line
                target.sendall(data)
                if line.doomed:
                    break
        line.end()


def boundaries(stream: bytes) -> Sequence[int]:
    """Return where each message of PostgreSQL's protocol begins, and one place inside of it, and the end of all."""
    places, start = [], 0
    while start < len(stream):
        length = 1 + int.from_bytes(stream[start + 1 : start + 5])
        places += [start, start + length // 2]
        start += length
    return [*places, start]


@contextlib.contextmanager
def cutting(host: str, port: int) -> Iterator[CuttingProxy]:
    between = CuttingProxy((host, port))
    try:
        yield between
    finally:
        between.close()
