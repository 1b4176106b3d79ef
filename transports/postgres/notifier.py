"""Wake-ups, debounced: a NOTIFY in every commit takes a global lock and halves the throughput of a busy database.

The first message to a channel goes out with its own commit, so that an idle system reacts in milliseconds. What
follows within `window` seconds is announced once, at its end, by a thread of this process; a wake-up that is lost with
the process is made good by the listeners' polling.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterable

import attrs

from transports.postgres.connections import Pool
from transports.postgres.statements import Statements
from unstract_core.errors import ContractError

WINDOW = 0.01


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

    def leading(self, queues: Iterable[str | None]) -> list[str | None]:
        """Return those of `queues` (None for the replies) that the coming commit shall announce itself."""
        now = time.monotonic()
        with self._changed:
            first = [queue for queue in dict.fromkeys(queues) if now - self._last.get(queue, -1.0) >= self._window]
            self._last.update(dict.fromkeys(first, now))
            if len(self._last) > 10_000:
                self._last = {queue: then for queue, then in self._last.items() if now - then < self._window}
        return first

    def announced_lately(self, queue: str) -> bool:
        """Tell whether `leading` would return nothing for this queue."""
        return time.monotonic() - self._last.get(queue, -1.0) < self._window

    def trailing(self, queues: Iterable[str | None]) -> None:
        """Announce `queues`, which were committed without a NOTIFY, when their window ends."""
        with self._changed:
            was_idle = not self._late
            for queue in queues:
                self._late.setdefault(queue, self._last.get(queue, 0.0) + self._window)
            if was_idle and self._late:
                self._start()
                self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _start(self) -> None:
        if not self._started:
            self._started = True
            threading.Thread(target=self._serve, name="unstract-wire-notify", daemon=True).start()

    def _serve(self) -> None:
        while (due := self._next()) is not None:
            channels = [self.channels.replies if queue is None else self.channels.queues for queue in due]
            try:
                with self._pool.connection("announce messages") as connection:
                    connection.execute(
                        self._statements["notify"],
                        {"channels": channels, "payloads": [queue or "" for queue in due]},
                    )
            except ContractError:
                continue  # a wake-up is only a hint: the listeners poll

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
