"""Callers that wait for replies: any number of threads, one connection.

The first waiting caller starts the waiter, a thread that listens for replies and looks, for all keys at once, whether
they have come. Each caller then reads its own reply through the pool.
"""

from __future__ import annotations

import threading
import time

from transports.postgres.connections import Connector
from transports.postgres.session import Session
from transports.postgres.statements import Statements
from unstract_core.errors import TransportClosed, TransportError

_PAUSE = 0.25


class ReplyWaiter:
    """Tells waiting threads when their reply is there. `poll_interval` in seconds."""

    def __init__(
        self, connector: Connector, statements: Statements, channel: str | None, *, poll_interval: float
    ) -> None:
        self._connector = connector
        self._statements = statements
        self._channel = channel
        self._poll_interval = poll_interval
        self._closed = False
        self.reset()

    def reset(self) -> None:
        """Begin anew, in a forked child: thread, session and lock are the parent's."""
        self._lock = threading.Lock()
        self._waiting: dict[str, list[threading.Event]] = {}
        self._fresh = False
        self._session: Session | None = None

    def wait(self, key: str, deadline: float) -> bool:
        """Wait until `key` is answered (True) or the monotonic `deadline` has passed (False)."""
        event = threading.Event()
        with self._lock:
            if self._closed:
                raise TransportClosed("wait for a reply: the transport was closed")
            self._start()
            self._waiting.setdefault(key, []).append(event)
            self._fresh = True
            session = self._session
        if session is not None:
            session.wake()
        try:
            answered = event.wait(min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX))
        finally:
            self._forget(key, event)
        if self._closed:
            raise TransportClosed("wait for a reply: the transport was closed")
        return answered

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for events in self._waiting.values():
                for event in events:
                    event.set()
            if self._session is not None:
                self._session.wake()

    def _forget(self, key: str, event: threading.Event) -> None:
        with self._lock:
            events = self._waiting.get(key, [])
            if event in events:
                events.remove(event)
            if not events:
                self._waiting.pop(key, None)

    def _start(self) -> None:
        if self._session is None:
            self._session = Session(self._connector, self._channel)
            thread = threading.Thread(
                target=self._serve, args=(self._session,), name="unstract-wire-replies", daemon=True
            )
            thread.start()

    def _serve(self, session: Session) -> None:
        while not self._closed:
            with self._lock:
                keys = list(self._waiting)
                self._fresh = False
            session.heard()
            try:
                if keys:
                    self._tell(session.execute("look for replies", self._statements["answered"], {"keys": keys}))
                pause = self._poll_interval
            except TransportError:
                pause = _PAUSE
            with self._lock:
                fresh = self._fresh or self._closed
            if not fresh:
                session.wait(pause if keys else 60.0)
        session.close()

    def _tell(self, answered: list[tuple[str]]) -> None:
        with self._lock:
            for (key,) in answered:
                for event in self._waiting.pop(key, ()):
                    event.set()
