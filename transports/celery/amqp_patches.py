"""How long a connection of py-amqp waits, and the heartbeats that are due meanwhile.

py-amqp by itself waits anew whenever a heartbeat of the broker's arrives: for ever, where the broker lives and has no
answer. And it sends none of its own while it waits, so that the broker ends the connection. Asked not to wait at all,
it waits for the rest of a frame that has begun, without an end and at full speed: so it is never asked that. And while
it writes it reads nothing, so that it cannot notice that the broker has blocked the connection.
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
"""Seconds between two looks at the heartbeats, at the most."""
_SHORTEST = 0.001
_GLANCE = 0.05
"""Seconds for which the rest of a frame is waited for between two pieces of what is written."""
_USER_TIMEOUT: int | None = getattr(socket, "TCP_USER_TIMEOUT", None)
_PIECE = 65536
"""Bytes that are written at once."""


def check_platform() -> None:
    """Raise ConfigurationError where a connection cannot be waited on."""
    if not hasattr(select, "poll"):
        raise ConfigurationError(
            "this process has no select.poll, by which connections to a broker are waited on: eventlet's monkey_patch "
            "removes it. Use threads or gevent in the processes that send and consume, instead of eventlet"
        )


class Waits:
    """The waits of an open connection: each has a limit of some seconds, and heartbeats are tended in all of them.

    A broker that blocks publishers stops reading, also in the middle of a message. The rest of that message is kept
    here, and written when the broker reads again. Frames that arrive during a write are handled by `drain_events`.

    Args:
        connection: An open connection of py-amqp.
        seconds: The longest wait; for a write, the longest time in which the broker reads nothing.
        blocked: Returns whether the broker has said that it takes no messages for now.
    """

    def __init__(self, connection: Any, seconds: float, blocked: Callable[[], bool]) -> None:
        check_platform()
        self.wrote_at = 0.0
        """When something was last written that a blocked broker had left unread, on the monotonic clock."""
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
        """Let no later wait be longer than this."""
        self._seconds = seconds
        self._slice = min(TICK, self._connection.heartbeat / 4) if self._connection.heartbeat else seconds
        self._connection.sock.settimeout(seconds)

    def drain_events(self, timeout: float | None = None) -> None:
        """Handle what the broker has sent. Raises TimeoutError where that is nothing."""
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
                tend(connection)

    def write(self, data: Any) -> None:
        """Write a part of a frame, as py-amqp's own transport does; all of it is written or kept when this returns."""
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
            self._bear_a_full_window(True)

    def _write_rest(self) -> None:
        try:
            done = self._send(self._rest)
        except OSError as exc:
            self._connection.collect()
            raise ConnectionResetError(f"the rest of a message could not be written ({exc})") from exc
        del self._rest[:done]
        self.wrote_at = time.monotonic()
        if not self._rest:
            self._bear_a_full_window(False)

    def _bear_a_full_window(self, bears: bool) -> None:
        """Let the connection live although its peer reads nothing: py-amqp has the kernel end it after a second."""
        if _USER_TIMEOUT is not None:
            with contextlib.suppress(OSError):  # which the next write raises
                self._connection.sock.setsockopt(socket.IPPROTO_TCP, _USER_TIMEOUT, 0 if bears else self._user_timeout)

    def _send(self, data: Any) -> int:
        """Write until all is written or the broker blocks; returns how many bytes were written."""
        sock, done = self._connection.sock, 0
        ends = time.monotonic() + self._seconds
        with memoryview(data) as view:
            while done < len(view):
                pending = _pending(sock)
                ready = 0
                for _, events in self._either.poll(0 if pending else 1000 * min(self._slice, TICK)):
                    ready |= events
                if ready & ~select.POLLIN:  # there is room, or an error that is raised now
                    with contextlib.suppress(TimeoutError):
                        done += sock.send(view[done : done + _PIECE])
                        ends = time.monotonic() + self._seconds
                        continue
                elif ready or pending:
                    self._take_in()
                if self._blocked():
                    break
                if time.monotonic() >= ends:
                    raise TimeoutError("the broker reads nothing more")
        return done

    def _take_in(self) -> None:
        """Read a frame and keep it: handling it may write, and the frame that is being written is not complete."""
        connection = self._connection
        try:
            with connection.transport.having_timeout(_GLANCE):
                frame = connection.transport.read_frame()
        except TimeoutError:
            return
        if is_about_the_connection(frame):
            connection.on_inbound_frame(frame)
        else:
            connection.bytes_recv += 1
            self._frames.append(frame)


def _pending(sock: Any) -> int:
    """Return how many bytes TLS has read already; without TLS there are none."""
    pending = getattr(sock, "pending", None)
    return pending() if pending is not None else 0


def tend(connection: Any) -> None:
    """Send a heartbeat where one is due. Raises, and closes the connection, where the broker's own are missing."""
    try:
        connection.heartbeat_tick()
    except Exception:
        connection.collect()
        raise
