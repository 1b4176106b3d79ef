"""What a test works with: the transport under test, opened and checked, and the few things that every test does.

A store shows at once what was done to it, a broker a moment later. `take`, `nothing` and `remaining` know the
difference, so that no test has to.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from contract_tests.checking import CallMonitor, CheckedSubscription, CheckedTransport, ProtocolViolation
from contract_tests.harness import Harness
from contract_tests.messages import message
from contract_tests.requires import skip_not_claimed
from contract_tests.time_limits import start
from unstract_core import Capabilities, Consumer, Delivery, Reply, Settlement, Transport, TransportError, Verdict
from unstract_core.values.limits import JSONValue

T = TypeVar("T")

MAX_WAIT = 20.0
"""Seconds to wait for what must come, over a transport that takes a moment."""

LONG = 30.0
"""Seconds of a wait that something is to end."""

SOON = 10.0
"""Seconds within which it has ended then, also on a machine that is busy with something else."""

RECOVERY = 20.0
"""Seconds within which a transport whose connections were cut works again."""


class Kit:
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
        """Open a transport of the harness, every call of which is checked."""
        with self._entered("transport()", self.harness.transport) as transport:
            missing = [name for name in ("send", "reply", "subscribe", "close") if not hasattr(transport, name)]
            self.calls.check(transport, not missing, "the harness", f"a Transport (it has no {', '.join(missing)})")
            yield CheckedTransport(transport, self.calls)

    def queue(self, suffix: str = "") -> str:
        """Return the name of a queue, or of a reply, that nothing else uses."""
        self._issued.append(f"q-{uuid.uuid4().hex[:12]}{suffix}")
        return self._issued[-1]

    def use(self, *queues: str) -> None:
        """Let these queues, whose names are the test's own, be removed with the others."""
        self._issued += queues

    def clean(self) -> None:
        """Let the harness remove the queues whose names were given out since this was last called."""
        queues, self._issued = self._issued, []
        with self.calls.call("the harness's clean()"):
            self.harness.clean(queues)

    def inject(self, transport: CheckedTransport, queue: str, text: str) -> None:
        self._hook("inject", transport, queue, text)
        self.calls.unsettled[queue] += 1

    def expire(self, transport: CheckedTransport, queue: str) -> None:
        self._hook("expire", transport, queue)

    def stored(self, transport: CheckedTransport, queue: str) -> list[Any]:
        """Return what is stored of a queue's messages; skip where the harness cannot tell."""
        found = self._hook("stored", transport, queue)
        if found is None:
            skip_not_claimed("the harness tells nothing of what is stored")
        self.calls.check(found, isinstance(found, Sequence), "the harness's stored()", "a sequence, or None")
        return list(found)

    def sever(self, transport: CheckedTransport) -> None:
        """Cut the transport's connections; skip where there are none."""
        if not self._hook("sever", transport):
            skip_not_claimed("the harness has no connections to cut")

    def reissue(self, transport: CheckedTransport, id: str, as_id: str) -> None:
        """Give a message the id of an earlier one; skip where ids never come again."""
        if not hasattr(self.harness, "reissue") or not self._hook("reissue", transport, id, as_id):
            skip_not_claimed("the harness cannot make an id come again")

    @contextlib.contextmanager
    def caller(self, transport: CheckedTransport) -> Iterator[Any]:
        """Open a DB-API connection of the application's own."""
        with self._entered("caller()", lambda: self.harness.caller(transport.unchecked)) as connection:
            yield connection

    def take(self, subscription: CheckedSubscription, count: int, *, limit: int = 0) -> list[Delivery]:
        """Receive the `count` messages that must come, and up to `limit` if there are more; from a store in one go."""
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
        """Receive the message that must come."""
        found = self.take(subscription, 1)
        assert len(found) == 1, "a message that must be there was not received"
        return found[0]

    def take_and_acknowledge(self, subscription: CheckedSubscription) -> Delivery:
        """Receive the message that must come, and acknowledge it."""
        found = self.take_one(subscription)
        assert list(subscription.settle([Settlement(found, Verdict.ACK)])) == [True]
        return found

    def nothing(self, subscription: CheckedSubscription) -> bool:
        """Whether nothing is to be had."""
        return not subscription.receive(limit=10, wait=self.moment)

    def remaining(self, transport: CheckedTransport, *queues: str, count: int = 0) -> list[Delivery]:
        """Take everything that is left in the queues, held and delayed messages too; at least `count` are waited for.

        For the end of a test: what it returns is held by a subscription that is closed.
        """
        for queue in queues:
            self.expire(transport, queue)
        subscription = transport.subscribe(queues, lease=60)
        try:
            return self.take(subscription, count, limit=max(1000, count))
        finally:
            subscription.close()

    def drain(self, consumer: Consumer, *, timeout: float = 20.0) -> int:
        """Let a consumer end everything that is in its queues; return how many times a task was run.

        A transport that cannot be looked into calls a queue empty from which nothing has come for a moment. On a busy
        machine that proves nothing: it is asked again for as long as something must be there.
        """
        ran, until = consumer.drain(timeout=timeout), time.monotonic() + self.max_wait
        if not self.capabilities.inspection:
            while any(self.calls.unsettled[queue] > 0 for queue in consumer.queues) and time.monotonic() < until:
                ran += consumer.drain(timeout=timeout)
        return ran

    def answered(self, transport: CheckedTransport, key: str) -> Reply:
        """Return the reply that must be there."""
        found = transport.reply(key, timeout=self.max_wait)
        assert found is not None, "a reply that must be there was not found"
        return found

    def ask(self, transport: CheckedTransport, *keys: str) -> None:
        """Send a message for each key that asks for an answer under it, to a queue that nobody works on."""
        queue = self.queue()
        transport.send([message("t", queue, reply_key=key) for key in keys])

    def answer(self, transport: CheckedTransport, *replies: Reply) -> None:
        """Settle a message that asks for it with each reply, one after the other, as workers would."""
        queue = self.queue()
        subscription = transport.subscribe([queue], lease=60.0)
        for reply in replies:
            transport.send([message("t", queue, reply_key=reply.key)])
            delivery = self.take_one(subscription)
            assert list(subscription.settle([Settlement(delivery, Verdict.ACK, reply=reply)])) == [True]
        subscription.close()

    def bury(self, transport: CheckedTransport, queue: str, reason: str = "r", *, result: JSONValue = None) -> Delivery:
        """Receive one message of a queue and bury it."""
        subscription = transport.subscribe([queue], lease=60.0)
        delivery = self.take_one(subscription)
        assert list(subscription.settle([Settlement(delivery, Verdict.BURY, reason=reason, result=result)])) == [True]
        subscription.close()
        return delivery

    @contextlib.contextmanager
    def running(self, transport: Transport, tasks: Any, *queues: str, **options: Any) -> Iterator[Consumer]:
        """Run a consumer on a thread of its own until the block ends."""
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
        """Enter what a hook of the harness gives, and leave it; both are calls that can be told of."""
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
                raise ProtocolViolation(f"{self.calls.owner}: its harness does not implement {name}()") from exc


def wait_until(condition: Callable[[], object], *, timeout: float = 30.0, what: str = "condition") -> None:
    """Poll `condition` until it is true; fail with `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(0.01)


@contextlib.contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Yield a clock that tells the seconds since here."""
    started = time.monotonic()
    yield lambda: time.monotonic() - started


def retry_outages(call: Callable[[], T], *, once: bool = False) -> T:
    """Call until it raises no TransportError any more: an outage may be told, once or for a moment.

    What must be done `once` is not tried again where its fate is unknown.
    """
    until = time.monotonic() + RECOVERY
    while True:
        try:
            return call()
        except TransportError as exc:
            if once and getattr(exc, "fate_unknown", True):
                raise
            assert time.monotonic() < until, f"the transport has not recovered within {RECOVERY:g} s"
            time.sleep(0.1)
