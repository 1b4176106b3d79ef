"""Wake-ups, debounced: a NOTIFY in every commit takes a global lock and halves the throughput of a busy database.

The first message to a channel goes out with its own commit, so that an idle system reacts in milliseconds. What
follows within `window` seconds is announced once, at its end, by a thread of this process; a wake-up that is lost with
the process is made good by the listeners' polling.
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

WINDOW = 0.01
SILENCE = 10.0
"""Seconds without announcements after the server's queue of them was full."""

Result = TypeVar("Result")


@attrs.frozen
class Channels:
    """The names of a schema's channels: one for its queues (the payload is the queue's name), one for replies."""

    queues: str
    replies: str

    @classmethod
    def of(cls, schema: str) -> Channels:
        key = hashlib.blake2b(schema.encode(), digest_size=8).hexdigest()
        return cls(f"unstract_wire_queue_{key}", f"unstract_wire_reply_{key}")


class Notifier:
    """Decides which commits carry a NOTIFY, and sends the late ones. Thread-safe."""

    def __init__(self, pool: Pool, statements: Statements, channels: Channels, *, window: float = WINDOW) -> None:
        self._pool = pool
        self._statements = statements
        self.channels = channels
        self._window = window
        self._closed = False
        self.reset()

    def reset(self) -> None:
        """Begin anew, in a forked child: the thread is the parent's, and the lock may be held for ever."""
        self._changed = threading.Condition()
        self._last: dict[str | None, float] = {}
        self._late: dict[str | None, float] = {}
        self._started = False
        self._silent_until = 0.0

    @property
    def silent(self) -> bool:
        """Whether nothing is announced, because the server's queue of notifications was full."""
        return time.monotonic() < self._silent_until

    def announced(self, queues: Iterable[str | None], commit: Callable[[list[str | None]], Result]) -> Result:
        """Run `commit` with those of `queues` (None for the replies) that it shall announce; announce the others later.

        Where the server's queue of notifications is full, nothing took effect, and `commit` is run again with none.
        """
        concerned = list(dict.fromkeys(queues))
        leading = self._leading(concerned)
        try:
            result = commit(leading)
        except NotifyQueueFull:
            if not leading:
                raise
            self._be_silent()
            return commit([])
        self.trailing(queue for queue in concerned if queue not in leading)
        return result

    def announced_lately(self, queue: str) -> bool:
        """Tell whether a commit need not announce this queue, because its window has not ended."""
        return time.monotonic() - self._last.get(queue, -1.0) < self._window

    def trailing(self, queues: Iterable[str | None]) -> None:
        """Announce `queues`, which were committed without a NOTIFY, when their window ends."""
        with self._changed:
            if self.silent:
                return
            was_idle = not self._late
            for queue in queues:
                self._late.setdefault(queue, self._last.get(queue, 0.0) + self._window)
            if self._late:
                self._start()
            if was_idle:
                self._changed.notify()

    def close(self) -> None:
        """Announce at once what was to be announced later, if that costs no wait, and end the thread."""
        with self._changed:
            self._closed = True
            late, self._late = list(self._late), {}
            self._changed.notify()
        if late:
            self._announce(late, timeout=0.0)

    def end(self) -> None:
        """End the thread, and announce nothing any more."""
        with self._changed:
            self._closed = True
            self._late = {}
            self._changed.notify()

    def _leading(self, queues: Sequence[str | None]) -> list[str | None]:
        now = time.monotonic()
        with self._changed:
            if self.silent:
                return []
            first = [queue for queue in queues if now - self._last.get(queue, -1.0) >= self._window]
            self._last.update(dict.fromkeys(first, now))
            if len(self._last) > 10_000:
                self._last = {queue: then for queue, then in self._last.items() if now - then < self._window}
        return first

    def _be_silent(self) -> None:
        with self._changed:
            self._silent_until = time.monotonic() + SILENCE
            self._late.clear()
        emit(logger, logging.WARNING, "notify_queue_full", seconds=SILENCE)

    def _start(self) -> None:
        if not self._started:
            thread = threading.Thread(target=self._serve, name="unstract-wire-notify", daemon=True)
            with contextlib.suppress(RuntimeError):  # no thread to be had: the listeners poll
                thread.start()
                self._started = True

    def _serve(self) -> None:
        while (due := self._next()) is not None:
            self._announce(due)

    def _announce(self, queues: Sequence[str | None], *, timeout: float | None = None) -> None:
        channels = [self.channels.replies if queue is None else self.channels.queues for queue in queues]
        parameters = {"channels": channels, "payloads": [queue or "" for queue in queues]}
        try:
            self._pool.execute("announce messages", self._statements["notify"], parameters, timeout=timeout)
        except NotifyQueueFull:
            self._be_silent()
        except ContractError:
            return  # a wake-up is only a hint: the listeners poll

    def _next(self) -> list[str | None] | None:
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
