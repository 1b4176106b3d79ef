"""Decides which commits contain a NOTIFY, so that idle workers wake within milliseconds.

A NOTIFY in every commit takes a global lock and halves the throughput of a busy database. So the first message to a
channel has a NOTIFY in its own commit. For later messages of the same `window`, a thread of this process sends one
NOTIFY when the window ends. If the process dies before that, the listeners find the messages when they poll.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import attrs

from transports.postgres.errors import NotifyQueueFull
from transports.postgres.pool import Pool
from transports.postgres.statements import Statements
from unstract_core.errors import ContractError
from unstract_core.observability.log_events import emit

logger = logging.getLogger("unstract_wire.postgres")

T = TypeVar("T")

WINDOW = 0.01
PAUSE = 10.0
"""Seconds without notifications after the server's queue of notifications was full."""
_MANY_QUEUES = 10_000


@attrs.frozen
class Channels:
    """The names of a schema's channels.

    Attributes:
        queues: the channel for ready messages; the payload is the queue's name.
        replies: the channel for replies; the payload is empty.
    """

    queues: str
    replies: str

    @classmethod
    def of(cls, schema: str) -> Channels:
        key = hashlib.blake2b(schema.encode(), digest_size=8).hexdigest()
        return cls(f"unstract_wire_queue_{key}", f"unstract_wire_reply_{key}")


class Notifier:
    """Chooses the notifications of each commit (`commit`), and sends the late ones. Thread-safe.

    In all methods, None as a queue means the channel of replies.

    Args:
        pool: runs the late notifications.
        statements: the statements of the schema.
        channels: its channels.
        window: seconds in which a channel is notified once.
    """

    def __init__(self, pool: Pool, statements: Statements, channels: Channels, *, window: float = WINDOW) -> None:
        self._pool = pool
        self._statements = statements
        self.channels = channels
        self._window = window
        self._closed = False
        self.reset()

    def reset(self) -> None:
        """Start again in a forked child: the thread is the parent's, and the lock may be held for ever."""
        self._changed = threading.Condition()
        self._last: dict[str | None, float] = {}
        self._late: dict[str | None, float] = {}
        self._started = False
        self._paused_until = 0.0

    @property
    def paused(self) -> bool:
        """Whether notifications are paused, because the server's queue of notifications was full."""
        return time.monotonic() < self._paused_until

    def commit(self, queues: Sequence[str | None], run: Callable[[list[str | None]], T]) -> T:
        """Run a commit that notifies those of `queues` that are due, and return its result.

        The thread notifies the others when their windows end. If the server's queue of notifications is full, nothing
        took effect, and the commit runs again without notifications.

        Args:
            queues: the queues of the commit.
            run: runs the commit; it gets the queues to notify.
        """
        notified = self._due(queues)
        try:
            result = run(notified)
        except NotifyQueueFull:
            if not notified:
                raise
            self._pause()
            notified = []
            result = run(notified)
        self._notify_later(queues, notified=notified)
        return result

    def close(self) -> None:
        """Send the late notifications now, if a connection is free, and end the thread."""
        with self._changed:
            self._closed = True
            late, self._late = list(self._late), {}
            self._changed.notify()
        if late:
            self._notify(late, timeout=0.0)

    def end(self) -> None:
        """End the thread and send nothing more."""
        with self._changed:
            self._closed = True
            self._late = {}
            self._changed.notify()

    def _due(self, queues: Iterable[str | None]) -> list[str | None]:
        """Return those of `queues` that a commit must notify now; a window begins for each."""
        now = time.monotonic()
        with self._changed:
            if self.paused:
                return []
            due = [queue for queue in dict.fromkeys(queues) if now - self._last.get(queue, -1.0) >= self._window]
            self._last.update(dict.fromkeys(due, now))
            if len(self._last) > _MANY_QUEUES:
                self._last = {queue: then for queue, then in self._last.items() if now - then < self._window}
        return due

    def _notify_later(self, queues: Iterable[str | None], *, notified: Sequence[str | None]) -> None:
        """Notify `queues` when their windows end, except those that the commit has notified."""
        with self._changed:
            if self.paused:
                return
            was_idle = not self._late
            for queue in queues:
                if queue not in notified:
                    self._late.setdefault(queue, self._last.get(queue, 0.0) + self._window)
            if self._late:
                self._start()
            if was_idle:
                self._changed.notify()

    def _pause(self) -> None:
        """Send no notifications for a while, because the server's queue of them is full."""
        with self._changed:
            self._paused_until = time.monotonic() + PAUSE
            self._late.clear()
        emit(logger, logging.WARNING, "notify_queue_full", seconds=PAUSE)

    def _start(self) -> None:
        if not self._started:
            thread = threading.Thread(target=self._serve, name="unstract-wire-notify", daemon=True)
            with contextlib.suppress(RuntimeError):  # without a thread the listeners poll
                thread.start()
                self._started = True

    def _serve(self) -> None:
        while (due := self._next()) is not None:
            self._notify(due)

    def _notify(self, queues: Sequence[str | None], *, timeout: float | None = None) -> None:
        channels = [self.channels.replies if queue is None else self.channels.queues for queue in queues]
        parameters = {"channels": channels, "payloads": [queue or "" for queue in queues]}
        try:
            self._pool.execute("announce messages", self._statements["notify"], parameters, timeout=timeout)
        except NotifyQueueFull:
            self._pause()
        except ContractError:
            return  # a notification is only a hint: the listeners poll

    def _next(self) -> list[str | None] | None:
        """Wait for the end of a window; return its queues, or None after `close`."""
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                due = [queue for queue, when in self._late.items() if when <= now]
                if due:
                    for queue in due:
                        del self._late[queue]
                        self._last[queue] = now
                    return due
                self._changed.wait(self._window if self._late else None)
            return None
