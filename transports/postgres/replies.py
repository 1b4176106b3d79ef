"""Callers that wait for replies: any number of threads, one connection.

The first waiting caller starts the waiter, a thread that listens for replies and looks, for all keys at once, whether
they have come. Each caller then reads its own reply through the pool. While the thread gets no connection or no answer,
or has ended, each caller looks for itself, once in `poll_interval` seconds; the next one to wait starts a thread where
there is none.
"""

from __future__ import annotations

import logging
import threading
import time

from transports.postgres.connections import Connector
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
"""Seconds by which the waiter's look may be late before callers look for themselves."""


class ReplyWaiter:
    """Tells waiting threads when their reply is there. `poll_interval` in seconds."""

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
        """Begin anew, in a forked child: thread, session and lock are the parent's."""
        self._lock = threading.RLock()  # a transport may be collected, and so closed, in the middle
        self._waiting: dict[str, list[threading.Event]] = {}
        self._fresh = False
        self._failing = False
        self._succeeded_at = time.monotonic()
        self._listener: Listener | None = None

    def wait(self, key: str, deadline: float) -> None:
        """Wait until `key` is answered, or the monotonic `deadline` has passed, or there is reason to look again."""
        event = threading.Event()
        seconds = min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)
        with self._lock:
            if self._closed:
                raise TransportClosed("wait for a reply: the transport was closed")
            listener = self._started()
            self._waiting.setdefault(key, []).append(event)
            self._fresh = True
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

    def _started(self) -> Listener | None:
        """Return the session of the waiter's thread, which is started where there is none; None if it cannot be."""
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
                self._fresh = False
            listener.forget_notifications()
            try:
                if keys:
                    self._wake_callers(
                        listener.execute("look for replies", self._statements["answered"], {"keys": keys})
                    )
                    self._note_success()
                    longest = _PAUSE
                pause = self._poll_interval if keys else _IDLE
            except TransportError as exc:
                self._note_failure(exc)
                pause, longest = longest, min(_LONGEST_PAUSE, 2 * longest)
            with self._lock:
                fresh = (self._fresh and not self._failing) or self._closed
            if not fresh:
                listener.wait(min(pause, _LONGEST_PAUSE) if self._failing else pause)

    def _note_success(self) -> None:
        with self._lock:
            could_not, self._failing = self._failing, False
            self._succeeded_at = time.monotonic()
        if could_not:
            emit(logger, logging.INFO, "reply_waiter_back")

    def _note_failure(self, failure: TransportError) -> None:
        """Let the callers look for themselves; log the first failure of an outage."""
        with self._lock:
            could, self._failing = not self._failing, True
            if could:
                self._wake_all()
        if could:
            fields = {"error_type": type(failure).__name__, "error": error_text(failure)}
            emit(logger, logging.WARNING, "reply_waiter_away", **fields)

    def _wake_callers(self, answered: list[tuple[str]]) -> None:
        with self._lock:
            for (key,) in answered:
                for event in self._waiting.pop(key, ()):
                    event.set()
