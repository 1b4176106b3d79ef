"""`ReplyWaiter`: lets any number of threads wait for replies with one connection.

The first caller that waits starts a thread, which listens for replies and queries those of all callers at once. Each
caller then reads its own reply through the pool. While the thread has no connection, gets no answer or has ended, each
caller polls itself, once per `poll_interval`. The next caller starts the thread again.
"""

from __future__ import annotations

import logging
import threading
import time

from transports.postgres.connection import Rows
from transports.postgres.connector import Connector
from transports.postgres.listener import Listener
from transports.postgres.statements import Statements
from unstract_core.errors import TransportClosed, TransportError
from unstract_core.observability.log_events import emit
from unstract_core.values import error_text

logger = logging.getLogger("unstract_wire.postgres")

_PAUSE = 0.25
_LONGEST_PAUSE = 5.0
_IDLE = 60.0
_LATE = 1.0
"""Seconds by which the thread may be late before callers poll themselves."""


class ReplyWaiter:
    """Wakes waiting threads when their reply is there. Thread-safe.

    Args:
        connector: makes the thread's connection.
        statements: the statements of the schema.
        channel: the channel of replies; None to poll only.
        poll_interval: seconds between two polls.
        limit: seconds that a statement may take.
    """

    def __init__(
        self, connector: Connector, statements: Statements, channel: str | None, *, poll_interval: float, limit: float
    ) -> None:
        self._connector = connector
        self._statements = statements
        self._channel = channel
        self._poll_interval = poll_interval
        self._limit = limit
        self._closed = False
        self.reset()

    def reset(self) -> None:
        """Start again in a forked child: thread, connection and lock are the parent's."""
        self._lock = threading.RLock()  # a transport may be collected, and so closed, while this thread holds it
        self._waiting: dict[str, list[threading.Event]] = {}
        self._has_new_key = False
        self._failing = False
        self._succeeded_at = time.monotonic()
        self._listener: Listener | None = None

    @property
    def waiting(self) -> int:
        """The number of callers that wait."""
        with self._lock:
            return sum(map(len, self._waiting.values()))

    @property
    def is_connected(self) -> bool:
        """Whether the thread has a connection."""
        listener = self._listener
        return listener is not None and listener.backend_pid is not None

    def wait(self, key: str, deadline: float) -> None:
        """Wait until the caller must query its reply.

        Args:
            key: the key of the reply.
            deadline: when to return at the latest, on the monotonic clock.

        Raises:
            TransportClosed: the transport was closed.
        """
        event = threading.Event()
        seconds = min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)
        with self._lock:
            if self._closed:
                raise TransportClosed("wait for a reply: the transport was closed")
            listener = self._started()
            self._waiting.setdefault(key, []).append(event)
            self._has_new_key = True
            works = listener is not None and not self._failing
        if listener is not None and works:
            listener.wake()
        try:
            while not event.wait(min(seconds, self._poll_interval)):
                seconds = deadline - time.monotonic()
                if seconds <= 0 or not works or self._succeeded_at < time.monotonic() - 2 * self._poll_interval - _LATE:
                    break
        finally:
            self._forget(key, event)
        if self._closed:
            raise TransportClosed("wait for a reply: the transport was closed")

    def close(self) -> None:
        """End all waits with TransportClosed, and end the thread."""
        with self._lock:
            self._closed = True
            self._wake_all()
            if self._listener is not None:
                self._listener.wake()

    def _forget(self, key: str, event: threading.Event) -> None:
        with self._lock:
            events = self._waiting.get(key, [])
            if event in events:
                events.remove(event)
            if not events:
                self._waiting.pop(key, None)

    def _wake_all(self) -> None:
        for events in self._waiting.values():
            for event in events:
                event.set()

    def _wake_callers(self, answered: Rows) -> None:
        with self._lock:
            for (key,) in answered:
                for event in self._waiting.pop(key, ()):
                    event.set()

    def _started(self) -> Listener | None:
        """Return the listener of the thread, which is started if there is none; None if no thread can be started."""
        if self._listener is None:
            listener = Listener(self._connector, self._channel, payloads=[""], limit=self._limit)
            thread = threading.Thread(target=self._run, args=(listener,), name="unstract-wire-replies", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                listener.close()
                return None
            self._listener = listener
        return self._listener

    def _run(self, listener: Listener) -> None:
        try:
            self._serve(listener)
        except Exception as exc:
            emit(logger, logging.ERROR, "reply_waiter_failed", error_type=type(exc).__name__)
        finally:
            with self._lock:
                self._listener = None
                self._wake_all()
            listener.close()

    def _serve(self, listener: Listener) -> None:
        longest = _PAUSE
        while not self._closed:
            with self._lock:
                keys = list(self._waiting)
                self._has_new_key = False
            listener.forget_notifications()
            try:
                if keys:
                    rows = listener.execute("look for replies", self._statements["answered"], {"keys": keys})
                    self._wake_callers(rows)
                    self._note_success()
                    longest = _PAUSE
                pause = self._poll_interval if keys else _IDLE
            except TransportError as exc:
                self._note_failure(exc)
                pause, longest = longest, min(_LONGEST_PAUSE, 2 * longest)
            with self._lock:
                look_again = (self._has_new_key and not self._failing) or self._closed
            if not look_again:
                listener.wait(min(pause, _LONGEST_PAUSE) if self._failing else pause)

    def _note_success(self) -> None:
        with self._lock:
            was_failing, self._failing = self._failing, False
            self._succeeded_at = time.monotonic()
        if was_failing:
            emit(logger, logging.INFO, "reply_waiter_back")

    def _note_failure(self, failure: TransportError) -> None:
        """Let the callers poll themselves. The first failure of an outage is logged."""
        with self._lock:
            is_first, self._failing = not self._failing, True
            if is_first:
                self._wake_all()
        if is_first:
            fields = {"error_type": type(failure).__name__, "error": error_text(failure)}
            emit(logger, logging.WARNING, "reply_waiter_away", **fields)
