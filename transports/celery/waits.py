"""How long a connection of py-amqp waits, and the heartbeats that are due meanwhile.

py-amqp by itself waits anew whenever a heartbeat of the broker's arrives: for ever, where the broker lives and has no
answer. And it sends none of its own while it waits, so that the broker ends the connection. Asked not to wait at all,
it waits for the rest of a frame that has begun, without an end and at full speed: so it is never asked that.
"""

from __future__ import annotations

import select
import time
from typing import Any

from unstract_core.errors import ConfigurationError

TICK = 1.0
"""Seconds between two looks at the heartbeats, at the most."""
_SHORTEST = 0.001


def check_platform() -> None:
    """Raise ConfigurationError where a connection cannot be waited on."""
    if not hasattr(select, "poll"):
        raise ConfigurationError(
            "this process has no select.poll, by which connections to a broker are waited on: eventlet's monkey_patch "
            "removes it. Use threads or gevent in the processes that send and consume, instead of eventlet"
        )


def limit_waits(connection: Any, seconds: float) -> None:
    """Let no wait on an open connection be longer than this, and have heartbeats tended in all of them."""
    slice_ = min(TICK, connection.heartbeat / 4) if connection.heartbeat else seconds
    check_platform()
    arrivals = select.poll()
    arrivals.register(connection.sock, select.POLLIN)

    def drain_events(timeout: float | None = None) -> None:
        if timeout == 0 and not arrivals.poll(0) and not _pending(connection.sock):
            raise TimeoutError
        ends = time.monotonic() + (seconds if timeout is None else timeout)
        while True:
            try:
                if connection.blocking_read(max(_SHORTEST, min(slice_, ends - time.monotonic()))):
                    return
            except TimeoutError:
                if time.monotonic() >= ends:
                    raise
                tend(connection)

    connection.sock.settimeout(seconds)  # for what is written
    connection.drain_events = drain_events


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
