"""How long a connection of py-amqp waits, and the heartbeats that are due meanwhile.

py-amqp by itself waits anew whenever a heartbeat of the broker's arrives: for ever, where the broker lives and has no
answer. And it sends none of its own while it waits, so that the broker ends the connection.
"""

from __future__ import annotations

import time
from typing import Any

TICK = 1.0
"""Seconds between two looks at the heartbeats, at the most."""


def limit_waits(connection: Any, seconds: float) -> None:
    """Let no wait on an open connection be longer than this, and have heartbeats tended in all of them."""
    slice_ = min(TICK, connection.heartbeat / 4) if connection.heartbeat else seconds

    def drain_events(timeout: float | None = None) -> None:
        ends = time.monotonic() + (seconds if timeout is None else timeout)
        while True:
            try:
                if connection.blocking_read(min(slice_, max(0.0, ends - time.monotonic()))):
                    return
            except TimeoutError:
                if time.monotonic() >= ends:
                    raise
                tend(connection)

    connection.sock.settimeout(seconds)  # for what is written
    connection.drain_events = drain_events


def tend(connection: Any) -> None:
    """Send a heartbeat where one is due. Raises, and closes the connection, where the broker's own are missing."""
    try:
        connection.heartbeat_tick()
    except Exception:
        connection.collect()
        raise
