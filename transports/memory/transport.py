"""`MemoryTransport`: the producer's side, and the dead letters."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from urllib.parse import urlsplit

from transports.memory.store import Store
from transports.memory.subscription import MemorySubscription
from unstract_core.clock import SYSTEM_CLOCK, Clock
from unstract_core.errors import ConfigurationError, NotSupported
from unstract_core.transport import (
    Capabilities,
    DeadLetter,
    Message,
    QueueState,
    Reply,
    check_subscription,
    write_message,
)


class MemoryTransport:
    """A transport inside one process: for tests, and the sample for transport authors. Its messages end with it.

    It is thread-safe: any number of subscriptions and consumers may share one. The conformance kit holds it to the same
    guarantees as PostgreSQL.

    Args:
        clock: Drives leases, delays, times to live and waits: a `Clock`. A function that returns seconds is accepted
            too; waits then follow the clock of the machine. Default: the clock of the machine.
    """

    capabilities = Capabilities(
        atomic_send=True,
        atomic_settle=True,
        delay=True,
        priority=True,
        order_across_queues=True,
        replies=True,
        status=True,
        fencing=True,
        counts_crashes=True,
        dead_letters=True,
        inspection=True,
    )

    def __init__(self, *, clock: Clock | Callable[[], float] = SYSTEM_CLOCK) -> None:
        self._store = Store(clock, SYSTEM_CLOCK) if callable(clock) else Store(clock.monotonic, clock)
        self.dead = MemoryDeadLetters(self._store)

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        """Enqueue all of `messages` or none, and return their ids. Raises PayloadError; NotSupported for `within`."""
        if within is not None:
            raise NotSupported("the memory transport has no transactions to send within; send without within=")
        written = [(message, json.dumps(write_message(message))) for message in messages]
        with self._store.using():
            ids = [self._store.add(message, text) for message, text in written]
            self._store.changed.notify_all()
        return ids

    def reply(self, key: str, *, timeout: float = 0, consume: bool = False) -> Reply | None:
        """Return the reply under `key`, waiting up to `timeout` seconds for it; None when there is none."""
        waits = self._store.waits
        deadline = waits.monotonic() + timeout
        with self._store.changed:
            while True:
                self._store.check_open()
                reply = self._store.read_reply(key, consume=consume)
                remaining = deadline - waits.monotonic()
                if reply is not None or remaining <= 0:
                    return reply
                waits.wait(self._store.changed, remaining)

    def subscribe(self, queues: Sequence[str], *, lease: float) -> MemorySubscription:
        """Receive from `queues`; see `unstract_core.Transport.subscribe`."""
        names = check_subscription(queues, lease)
        with self._store.using():
            return MemorySubscription(self._store, names, lease)

    def queues(self, names: Sequence[str] | None = None) -> Sequence[QueueState]:
        """Return the state of each queue of `names`, or of all that hold anything."""
        with self._store.using():
            return self._store.states(names)

    def waiting_tasks(self, queue: str, limit: int = 1000) -> Mapping[str, int]:
        """Return the names of the tasks of the first `limit` ready messages of `queue`, with their counts."""
        with self._store.using():
            return self._store.waiting_tasks(queue, limit)

    def close(self) -> None:
        """End every waiting call, and every later one, with TransportClosed. Closing twice is allowed."""
        with self._store.changed:
            self._store.closed = True
            self._store.changed.notify_all()


class MemoryDeadLetters:
    """The dead letters of a MemoryTransport; see `unstract_core.DeadLetters`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def find(self, *, queue: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        with self._store.using():
            found = [letter for letter in self._store.dead.values() if queue in (None, letter.queue)]
        return found[::-1][:limit]

    def get(self, ids: Sequence[str]) -> Sequence[DeadLetter]:
        with self._store.using():
            return [self._store.dead[id] for id in ids if id in self._store.dead]

    def replay(self, ids: Sequence[str] | None = None, *, queue: str | None = None) -> Sequence[str]:
        with self._store.using():
            replayed = [letter.id for letter in self._chosen(ids, queue)]
            for id in replayed:
                self._store.replay(self._store.dead.pop(id))
            self._store.changed.notify_all()
        return replayed

    def purge(self, *, ids: Sequence[str] | None = None, queue: str | None = None, older_than: float = 0.0) -> int:
        with self._store.using():
            doomed = [letter.id for letter in self._chosen(ids, queue) if self._store.age(letter) >= older_than]
            for id in doomed:
                del self._store.dead[id]
        return len(doomed)

    def _chosen(self, ids: Sequence[str] | None, queue: str | None) -> list[DeadLetter]:
        letters = self._store.dead.values()
        return [one for one in letters if (ids is None or one.id in ids) and queue in (None, one.queue)]


def from_url(url: str) -> MemoryTransport:
    """Return a fresh transport for "memory://". Raises ConfigurationError for a URL that asks for more."""
    parts = urlsplit(url)
    if parts.netloc or parts.path.strip("/") or parts.query:
        raise ConfigurationError("memory:// takes no host, name or options")
    return MemoryTransport()
