"""Monkeypatches for an open connection of py-amqp: reads and writes with a time limit, and heartbeats during both.

Without them:

- py-amqp starts its wait again after each heartbeat. If the broker is alive and does not answer, it waits for ever.
- It sends no heartbeats while it waits, so that the broker ends the connection.
- With a timeout of 0, it reads the rest of an incomplete frame in a busy loop without a limit.
- It reads nothing while it writes, so that it cannot notice that the broker has blocked the connection.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from transports.celery.amqp_frame_patches import is_about_the_connection
from unstract_core.errors import ConfigurationError

TICK = 1.0
"""The longest time in seconds between two checks of the heartbeats."""
_SHORTEST = 0.001
_READ_TIMEOUT = 0.05
"""The time in seconds to wait for the rest of a frame between two writes."""
_USER_TIMEOUT: int | None = getattr(socket, "TCP_USER_TIMEOUT", None)
_CHUNK = 65536
"""The highest number of bytes of one write."""


def check_platform() -> None:
    """Raise ConfigurationError if this process cannot wait for a connection."""
    if not hasattr(select, "poll"):
        raise ConfigurationError(
            "this process has no select.poll, which connections to a broker need: eventlet's monkey_patch removes it. "
            "Use threads or gevent instead of eventlet in the processes that send and consume"
        )


class BoundedIO:
    """The reads and writes of an open connection, which it replaces: each has a time limit and sends due heartbeats.

    A broker that blocks publishers stops reading, even in the middle of a message. This object keeps the rest of that
    message, and writes it when the broker reads again. `drain_events` handles frames that arrive during a write.

    Args:
        connection: An open connection of py-amqp.
        seconds: The longest wait in seconds; for a write, the longest time in which the broker reads nothing.
        blocked: Returns whether the broker accepts no messages now.

    Attributes:
        wrote_at: When the rest of a message was last written, on the monotonic clock.
    """

    def __init__(self, connection: Any, seconds: float, blocked: Callable[[], bool]) -> None:
        check_platform()
        self.wrote_at = 0.0
        self._connection = connection
        self._blocked = blocked
        self._rest = bytearray()
        self._frames: deque[tuple[int, int, Any]] = deque()
        self._arrivals, self._either = select.poll(), select.poll()
        self._arrivals.register(connection.sock, select.POLLIN)
        self._either.register(connection.sock, select.POLLIN | select.POLLOUT)
        if _USER_TIMEOUT is not None:
            self._user_timeout = connection.sock.getsockopt(socket.IPPROTO_TCP, _USER_TIMEOUT)
        self.limit(seconds)
        connection.drain_events = self.drain_events
        connection.frame_writer = connection.frame_writer_cls(connection, self)

    def limit(self, seconds: float) -> None:
        """Limit every later wait to this time in seconds."""
        self._seconds = seconds
        self._slice = min(TICK, self._connection.heartbeat / 4) if self._connection.heartbeat else seconds
        self._connection.sock.settimeout(seconds)

    def drain_events(self, timeout: float | None = None) -> None:
        """Handle a frame of the broker. Raises TimeoutError if none arrives in time.

        Args:
            timeout: The time in seconds; None (default) for the longest wait.
        """
        connection = self._connection
        if self._rest and not self._blocked():
            self._write_rest()
        if timeout == 0 and not self._frames and not self._arrivals.poll(0) and not _pending(connection.sock):
            raise TimeoutError
        ends = time.monotonic() + (self._seconds if timeout is None else timeout)
        while True:
            try:
                if self._frames:
                    handled = connection.on_inbound_frame(self._frames.popleft())
                else:
                    handled = connection.blocking_read(max(_SHORTEST, min(self._slice, ends - time.monotonic())))
                if handled:
                    return
            except TimeoutError:
                if time.monotonic() >= ends:
                    raise
                keep_alive(connection)

    def write(self, data: Any) -> None:
        """Write a part of a frame, like py-amqp's own transport. On return all of it is written, or kept for later."""
        if self._rest:
            self._rest += data
            if not self._blocked():
                self._write_rest()
            return
        try:
            done = self._send(data)
        except TimeoutError:
            raise
        except OSError:
            self._connection.transport.connected = False
            raise
        if done < len(data):
            self._rest += data[done:]
            self._tolerate_full_window(True)

    def _write_rest(self) -> None:
        try:
            done = self._send(self._rest)
        except OSError as exc:
            self._connection.collect()
            raise ConnectionResetError(f"the rest of a message could not be written ({exc})") from exc
        del self._rest[:done]
        self.wrote_at = time.monotonic()
        if not self._rest:
            self._tolerate_full_window(False)

    def _tolerate_full_window(self, tolerates: bool) -> None:
        """Keep the connection if its peer reads nothing; py-amqp's setting lets the kernel end it after a second."""
        if _USER_TIMEOUT is not None:
            with contextlib.suppress(OSError):  # the next write raises it
                self._connection.sock.setsockopt(
                    socket.IPPROTO_TCP, _USER_TIMEOUT, 0 if tolerates else self._user_timeout
                )

    def _send(self, data: Any) -> int:
        """Write until all is written or the broker blocks; return the number of bytes."""
        sock, done = self._connection.sock, 0
        ends = time.monotonic() + self._seconds
        with memoryview(data) as view:
            while done < len(view):
                pending = _pending(sock)
                ready = 0
                for _, events in self._either.poll(0 if pending else 1000 * min(self._slice, TICK)):
                    ready |= events
                if ready & ~select.POLLIN:  # there is room, or an error that `send` raises
                    with contextlib.suppress(TimeoutError):
                        done += sock.send(view[done : done + _CHUNK])
                        ends = time.monotonic() + self._seconds
                        continue
                elif ready or pending:
                    self._read_frame()
                if self._blocked():
                    break
                if time.monotonic() >= ends:
                    raise TimeoutError("the broker reads nothing more")
        return done

    def _read_frame(self) -> None:
        """Read a frame and keep it: its handler may write, and the current write is not complete."""
        connection = self._connection
        try:
            with connection.transport.having_timeout(_READ_TIMEOUT):
                frame = connection.transport.read_frame()
        except TimeoutError:
            return
        if is_about_the_connection(frame):
            connection.on_inbound_frame(frame)
        else:
            connection.bytes_recv += 1
            self._frames.append(frame)


def _pending(sock: Any) -> int:
    """Return how many bytes TLS has read already; 0 without TLS."""
    pending = getattr(sock, "pending", None)
    return pending() if pending is not None else 0


def keep_alive(connection: Any) -> None:
    """Send a heartbeat if one is due. Raises, and closes the connection, if the broker's heartbeats are missing."""
    try:
        connection.heartbeat_tick()
    except Exception:
        connection.collect()
        raise
