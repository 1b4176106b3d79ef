"""`Kit`: the operations that the tests share, over the transport under test.

The messages of a store are visible at once, those of a broker a moment later. `take`, `nothing` and `remaining` handle
the difference.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from contract_tests.checking import CallMonitor, CheckedSubscription, CheckedTransport, ProtocolViolation
from contract_tests.harness import Harness
from contract_tests.messages import make_settlement, message
from contract_tests.requires import skip_not_claimed
from contract_tests.time_limits import start
from unstract_core import Capabilities, Consumer, Delivery, Reply, Transport, TransportError, Verdict
from unstract_core.values.limits import JSONValue

T = TypeVar("T")

MAX_WAIT = 20.0
"""Seconds to wait for an expected message, over a transport with a `moment`."""

LONG = 30.0
"""Seconds of a wait that another event ends earlier."""

SOON = 10.0
"""Seconds within which that event ends the wait, also on a busy machine."""

RECOVERY = 20.0
"""Seconds within which a transport works again after a cut."""


class Kit:
    """The transport under test, with the operations that the tests share."""

    def __init__(self, harness: Harness) -> None:
        self.harness = harness
        self.calls = CallMonitor(harness.name)
        self._issued: list[str] = []

    @property
    def capabilities(self) -> Capabilities:
        return self.harness.capabilities

    @property
    def moment(self) -> float:
        return self.harness.moment

    @property
    def max_wait(self) -> float:
        return MAX_WAIT if self.moment else 0.0

    @contextlib.contextmanager
    def open(self) -> Iterator[CheckedTransport]:
        """Open a transport of the harness. Each of its calls is checked."""
        with self._entered("transport()", self.harness.transport) as transport:
            missing = [name for name in ("send", "reply", "subscribe", "close") if not hasattr(transport, name)]
            self.calls.check(transport, not missing, "the harness", f"a Transport (it has no {', '.join(missing)})")
            yield CheckedTransport(transport, self.calls)

    def queue(self, suffix: str = "") -> str:
        """Return a new, unused name for a queue or a reply key."""
        self._issued.append(f"q-{uuid.uuid4().hex[:12]}{suffix}")
        return self._issued[-1]

    def use(self, *queues: str) -> None:
        """Register queues whose names the test chose, so that `clean` removes them, too."""
        self._issued += queues

    def clean(self) -> None:
        """Let the harness remove the queues that were named since the last call."""
        queues, self._issued = self._issued, []
        with self.calls.call("the harness's clean()"):
            self.harness.clean(queues)

    def inject(self, transport: CheckedTransport, queue: str, text: str) -> None:
        self._hook("inject", transport, queue, text)
        self.calls.unsettled[queue] += 1

    def expire(self, transport: CheckedTransport, queue: str) -> None:
        self._hook("expire", transport, queue)

    def stored(self, transport: CheckedTransport, queue: str) -> list[Any]:
        """Return the stored messages of a queue; skip the test if the harness cannot read them."""
        found = self._hook("stored", transport, queue)
        if found is None:
            skip_not_claimed("the harness cannot read stored messages")
        self.calls.check(found, isinstance(found, Sequence), "the harness's stored()", "a sequence, or None")
        return list(found)

    def sever(self, transport: CheckedTransport) -> None:
        """Cut the transport's connections; skip the test if there are none."""
        if not self._hook("sever", transport):
            skip_not_claimed("the harness has no connections to cut")

    def reissue(self, transport: CheckedTransport, id: str, as_id: str) -> None:
        """Give a message the id of an earlier one; skip the test if ids are never reused."""
        if not hasattr(self.harness, "reissue") or not self._hook("reissue", transport, id, as_id):
            skip_not_claimed("the harness cannot reuse an id")

    @contextlib.contextmanager
    def caller(self, transport: CheckedTransport) -> Iterator[Any]:
        """Open a DB-API connection of the application."""
        with self._entered("caller()", lambda: self.harness.caller(transport.unchecked)) as connection:
            yield connection

    def take(self, subscription: CheckedSubscription, count: int, *, limit: int = 0) -> list[Delivery]:
        """Receive expected messages; from a store in one call.

        Args:
            subscription: The subscription to receive from.
            count: The number of messages that must arrive.
            limit: The number of messages to receive at most, if there are more; 0 for `count`.
        """
        limit = limit or count
        found: list[Delivery] = []
        while len(found) < limit:
            wait = self.max_wait if len(found) < count else self.moment
            more = subscription.receive(limit=limit - len(found), wait=wait)
            found += more
            if not more or not self.moment:
                break
        return found

    def take_one(self, subscription: CheckedSubscription) -> Delivery:
        """Receive one expected message."""
        found = self.take(subscription, 1)
        assert len(found) == 1, "an expected message was not received"
        return found[0]

    def take_and_acknowledge(self, subscription: CheckedSubscription) -> Delivery:
        """Receive one expected message, and acknowledge it."""
        found = self.take_one(subscription)
        assert list(subscription.settle([make_settlement(found, Verdict.ACK)])) == [True]
        return found

    def nothing(self, subscription: CheckedSubscription) -> bool:
        """Return whether no message can be received."""
        return not subscription.receive(limit=10, wait=self.moment)

    def remaining(self, transport: CheckedTransport, *queues: str, count: int = 0) -> list[Delivery]:
        """Receive every message that is left in the queues, including claimed and delayed ones.

        For the end of a test: the subscription of the returned deliveries is closed.

        Args:
            transport: The open transport.
            queues: The queues to empty.
            count: The number of messages that must arrive.
        """
        for queue in queues:
            self.expire(transport, queue)
        subscription = transport.subscribe(queues, lease=60)
        try:
            return self.take(subscription, count, limit=max(1000, count))
        finally:
            subscription.close()

    def drain(self, consumer: Consumer, *, timeout: float = 20.0) -> int:
        """Let a consumer settle every message of its queues; return the number of task runs.

        Without `inspection`, a queue counts as empty after a moment without messages. A busy machine may be slower, so
        drain is repeated while sent messages are still unsettled.
        """
        ran, until = consumer.drain(timeout=timeout), time.monotonic() + self.max_wait
        if not self.capabilities.inspection:
            while any(self.calls.unsettled[queue] > 0 for queue in consumer.queues) and time.monotonic() < until:
                ran += consumer.drain(timeout=timeout)
        return ran

    def answered(self, transport: CheckedTransport, key: str) -> Reply:
        """Return an expected reply."""
        found = transport.reply(key, timeout=self.max_wait)
        assert found is not None, "an expected reply was not found"
        return found

    def ask(self, transport: CheckedTransport, *keys: str) -> None:
        """Send a message with each reply key to a queue without a worker."""
        queue = self.queue()
        transport.send([message("t", queue, reply_key=key) for key in keys])

    def answer(self, transport: CheckedTransport, *replies: Reply) -> None:
        """Write each reply in turn: send a message with its key, and settle it with the reply."""
        queue = self.queue()
        subscription = transport.subscribe([queue], lease=60.0)
        for reply in replies:
            transport.send([message("t", queue, reply_key=reply.key)])
            delivery = self.take_one(subscription)
            assert list(subscription.settle([make_settlement(delivery, Verdict.ACK, reply=reply)])) == [True]
        subscription.close()

    def bury(self, transport: CheckedTransport, queue: str, reason: str = "r", *, result: JSONValue = None) -> Delivery:
        """Receive one message of a queue and dead-letter it."""
        subscription = transport.subscribe([queue], lease=60.0)
        delivery = self.take_one(subscription)
        buried = make_settlement(delivery, Verdict.BURY, reason=reason, result=result)
        assert list(subscription.settle([buried])) == [True]
        subscription.close()
        return delivery

    @contextlib.contextmanager
    def running(self, transport: Transport, tasks: Any, *queues: str, **options: Any) -> Iterator[Consumer]:
        """Run a consumer on its own thread until the block ends."""
        consumer = Consumer(transport, tasks, list(queues), **options)
        ended = start(consumer.run)
        try:
            yield consumer
        finally:
            consumer.stop()
            ended(30)
        self.calls.raise_violation()

    @contextlib.contextmanager
    def _entered(self, what: str, make: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[Any]:
        """Enter and leave the context manager of a hook. Both are recorded as calls of the harness."""
        with contextlib.ExitStack() as stack:
            with self.calls.call(f"the harness's {what}"):
                found = stack.enter_context(make())
            try:
                yield found
            finally:
                with self.calls.call(f"the end of the harness's {what}"):
                    stack.close()

    def _hook(self, name: str, transport: CheckedTransport, *args: Any) -> Any:
        what = f"the harness's {name}()"
        with self.calls.call(what):
            try:
                return getattr(self.harness, name)(transport.unchecked, *args)
            except NotImplementedError as exc:
                raise ProtocolViolation(
                    f"{self.calls.owner}: its harness does not implement {name}(); write that hook"
                ) from exc


def wait_until(condition: Callable[[], object], *, timeout: float = 30.0, what: str = "condition") -> None:
    """Poll `condition` until it is true.

    Args:
        condition: A function without arguments.
        timeout: Seconds after which the assertion fails.
        what: The awaited event, for the error text.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(0.01)


@contextlib.contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Yield a function that returns the seconds since the block began."""
    started = time.monotonic()
    yield lambda: time.monotonic() - started


def retry_outages(call: Callable[[], T], *, once: bool = False) -> T:
    """Repeat a call until it raises no TransportError, for at most `RECOVERY` seconds.

    Args:
        call: The function to call.
        once: Whether to raise an error with an unknown fate instead of repeating the call.
    """
    until = time.monotonic() + RECOVERY
    while True:
        try:
            return call()
        except TransportError as exc:
            if once and getattr(exc, "fate_unknown", True):
                raise
            assert time.monotonic() < until, f"the transport did not recover within {RECOVERY:g} s"
            time.sleep(0.1)
