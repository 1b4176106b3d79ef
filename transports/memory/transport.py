"""`MemoryTransport`: the producer's side, and the dead letters."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from transports.memory.store import Store
from transports.memory.subscription import MemorySubscription
from unstract_core.codec import check_name
from unstract_core.errors import ConfigurationError, NotSupported, TransportClosed
from unstract_core.transport import Capabilities, DeadLetter, Message, QueueState, Reply, write_message


class MemoryTransport:
    """A transport inside one process. Thread-safe. `clock` (seconds) drives leases, delays and ttls."""

    capabilities = Capabilities(
        atomic_send=True,
        atomic_settle=True,
        delay=True,
        priority=True,
        replies=True,
        status=True,
        fencing=True,
        dead_letters=True,
        inspection=True,
    )

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = Store(clock)
        self._closed = False
        self.dead = MemoryDeadLetters(self._store)

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        self._check_open()
        if within is not None:
            raise NotSupported("the memory transport has no transactions to send within; send without within=")
        written = [(message, json.dumps(write_message(message))) for message in messages]
        with self._store.changed:
            ids = [self._store.add(message, text) for message, text in written]
            self._store.changed.notify_all()
        return ids

    def reply(self, key: str, *, timeout: float = 0, consume: bool = False) -> Reply | None:
        deadline = time.monotonic() + timeout
        with self._store.changed:
            while True:
                self._check_open()
                reply = self._store.read_reply(key, consume=consume)
                remaining = deadline - time.monotonic()
                if reply is not None or remaining <= 0:
                    return reply
                self._store.changed.wait(remaining)

    def subscribe(self, queues: Sequence[str], *, lease: float) -> MemorySubscription:
        self._check_open()
        for queue in queues:
            check_name(queue, "$.queue")
        if not queues or not lease > 0:
            raise ConfigurationError("subscribe to at least one queue, with a lease of more than 0 seconds")
        return MemorySubscription(self._store, queues, lease)

    def queues(self, names: Sequence[str] | None = None) -> Sequence[QueueState]:
        self._check_open()
        with self._store.changed:
            return self._store.states(names)

    def close(self) -> None:
        self._closed = True
        with self._store.changed:
            self._store.changed.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise TransportClosed("this memory transport was closed")


class MemoryDeadLetters:
    """The buried messages of a MemoryTransport."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def find(self, *, queue: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        with self._store.changed:
            found = [letter for letter in self._store.dead.values() if queue in (None, letter.queue)]
        return found[::-1][:limit]

    def get(self, ids: Sequence[str]) -> Sequence[DeadLetter]:
        with self._store.changed:
            return [self._store.dead[id] for id in ids if id in self._store.dead]

    def replay(self, ids: Sequence[str]) -> Sequence[str]:
        with self._store.changed:
            replayed = [id for id in dict.fromkeys(ids) if id in self._store.dead]
            for id in replayed:
                self._store.replay(self._store.dead.pop(id))
            self._store.changed.notify_all()
        return replayed

    def purge(self, *, ids: Sequence[str] | None = None, queue: str | None = None, older_than: float = 0.0) -> int:
        with self._store.changed:
            doomed = [
                letter.id
                for letter in self._store.dead.values()
                if (ids is None or letter.id in ids)
                and queue in (None, letter.queue)
                and self._store.age(letter) >= older_than
            ]
            for id in doomed:
                del self._store.dead[id]
        return len(doomed)


def from_url(url: str) -> MemoryTransport:
    """Return a fresh transport for "memory://". Raises ConfigurationError for a URL that asks for more."""
    parts = urlsplit(url)
    if parts.netloc or parts.path.strip("/") or parts.query:
        raise ConfigurationError(f"memory:// takes no host, name or options; got {url!r}")
    return MemoryTransport()
