"""Wrappers around the transport under test, which check the result and the errors of every call.

If a transport returns the wrong type, raises a driver's error or hangs, the running test fails with the name of the
transport, the call and the remedy.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from unstract_core import Capabilities, ContractError, DeadLetter, Delivery, QueueState, Reply
from unstract_core.transport import Message, Settlement, Verdict


class ProtocolViolation(AssertionError):
    """A transport or its harness violates the types of the protocol."""


_REMEDY = "; raise an error of unstract_core.errors instead, with the driver's error as its __cause__"


@attrs.define
class CallMonitor:
    """Records the running calls of a transport and the violations of those that have ended.

    A consumer treats any error of its transport as an outage and continues. So violations are kept until a test raises
    the first one.

    Attributes:
        owner: The name of the transport, for messages.
        running: The current call of each thread, by thread id.
        violations: The violations since the last `raise_violation`.
        unsettled: The number of messages sent to each queue, follow-ups included, and not settled for good. Replayed
            dead letters are not counted.
    """

    owner: str
    running: dict[int, str] = attrs.field(factory=dict)
    violations: list[ProtocolViolation] = attrs.field(factory=list)
    unsettled: Counter[str] = attrs.field(factory=Counter)

    def __str__(self) -> str:
        calls = "".join(f"; {self.owner} is in {call}" for call in dict(self.running).values())
        return calls + "".join(f"; before that, {violation}" for violation in self.violations[:1])

    def raise_violation(self) -> None:
        """Raise the first violation since the last call, if there was one."""
        violations, self.violations = self.violations, []
        if violations:
            raise violations[0]

    @contextlib.contextmanager
    def call(self, name: str) -> Iterator[None]:
        """Record a running call of this thread. An error outside unstract_core.errors is a violation."""
        thread = threading.get_ident()
        outer = self.running.get(thread)
        self.running[thread] = name
        try:
            yield
        except (ContractError, AssertionError):
            raise
        except Exception as exc:
            raise self._violation(
                f"{name} raised {type(exc).__name__}: {exc}" + ("" if "harness" in name else _REMEDY)
            ) from exc
        finally:
            if outer is None:
                self.running.pop(thread, None)
            else:
                self.running[thread] = outer

    def check(self, returned: object, valid: object, call: str, promised: str) -> None:
        """Check a returned value.

        Args:
            returned: The value, for the error text.
            valid: Whether the value is valid.
            call: The call that returned it.
            promised: The value that the protocol requires.

        Raises:
            ProtocolViolation: The value is not valid.
        """
        if not valid:
            shown = repr(returned)
            shown = shown if len(shown) <= 300 else shown[:300] + "..."
            raise self._violation(f"{call} returned {shown}, where the protocol requires {promised}")

    def _violation(self, problem: str) -> ProtocolViolation:
        """Record a violation for `raise_violation`, and return it."""
        self.violations.append(ProtocolViolation(f"{self.owner}: {problem}"))
        return self.violations[-1]


class CheckedTransport:
    """A transport whose calls are checked. `unchecked` is the transport itself."""

    def __init__(self, transport: Any, calls: CallMonitor) -> None:
        self.unchecked = transport
        self._calls = calls

    @property
    def capabilities(self) -> Capabilities:
        with self._calls.call("capabilities"):
            returned = self.unchecked.capabilities
        self._calls.check(returned, isinstance(returned, Capabilities), "capabilities", "a Capabilities")
        return returned  # type: ignore[no-any-return]

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        call = f"send() of {len(messages)}"
        with self._calls.call(call):
            returned = self.unchecked.send(messages) if within is None else self.unchecked.send(messages, within=within)
        valid = _many(returned, str) and len(returned) == len(messages) == len(set(returned))
        self._calls.check(returned, valid, call, "one distinct id (str) for each message")
        self._calls.unsettled.update(message.queue for message in messages)
        return returned  # type: ignore[no-any-return]

    def reply(self, key: str, *, timeout: float = 0, consume: bool = False) -> Reply | None:
        call = f"reply(timeout={timeout}, consume={consume})"
        with self._calls.call(call):
            returned = self.unchecked.reply(key, timeout=timeout, consume=consume)
        valid = returned is None or (isinstance(returned, Reply) and returned.key == key)
        self._calls.check(returned, valid, call, "the Reply under that key, or None")
        return returned  # type: ignore[no-any-return]

    def subscribe(self, queues: Sequence[str], *, lease: float) -> CheckedSubscription:
        call = f"subscribe(lease={lease})"
        with self._calls.call(call):
            returned = self.unchecked.subscribe(queues, lease=lease)
        missing = [name for name in ("receive", "renew", "settle", "wake", "close") if not hasattr(returned, name)]
        self._calls.check(returned, not missing, call, f"a Subscription (it has no {', '.join(missing)})")
        return CheckedSubscription(returned, self._calls, queues)

    def close(self) -> None:
        with self._calls.call("close()"):
            self.unchecked.close()

    def queues(self, names: Sequence[str] | None = None) -> Sequence[QueueState]:
        with self._calls.call("queues()"):
            returned = self.unchecked.queues(names)
        self._calls.check(returned, _many(returned, QueueState), "queues()", "a sequence of QueueState")
        return returned  # type: ignore[no-any-return]

    def waiting_tasks(self, queue: str, limit: int = 1000) -> Mapping[str, int]:
        with self._calls.call("waiting_tasks()"):
            returned = self.unchecked.waiting_tasks(queue, limit)
        valid = isinstance(returned, Mapping) and all(map(_counts, returned.items()))
        self._calls.check(returned, valid, "waiting_tasks()", "a mapping of task names (str) to their counts (int)")
        return returned  # type: ignore[no-any-return]

    @property
    def dead(self) -> CheckedDeadLetters:
        return CheckedDeadLetters(self.unchecked.dead, self._calls)


class CheckedSubscription:
    """A subscription whose calls are checked. `unchecked` is the subscription itself."""

    def __init__(self, subscription: Any, calls: CallMonitor, queues: Sequence[str]) -> None:
        self.unchecked = subscription
        self._calls = calls
        self._queues = set(queues)

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        call = f"receive(limit={limit}, wait={wait:g})"
        with self._calls.call(call):
            returned = self.unchecked.receive(limit=limit, wait=wait)
        valid = _many(returned, Delivery) and len(returned) <= limit and all(map(self._is_whole, returned))
        self._calls.check(
            returned, valid, call, "up to `limit` deliveries of its queues, each with a payload or a problem"
        )
        return returned  # type: ignore[no-any-return]

    def renew(self, deliveries: Sequence[Delivery]) -> Sequence[bool]:
        return self._results(f"renew() of {len(deliveries)}", self.unchecked.renew, deliveries)

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        results = self._results(f"settle() of {len(settlements)}", self.unchecked.settle, settlements)
        effective = [settlement for settlement, result in zip(settlements, results, strict=True) if result]
        self._calls.unsettled.subtract(
            settlement.delivery.queue for settlement in effective if settlement.verdict is not Verdict.RETRY
        )
        self._calls.unsettled.update(
            settlement.follow_up.queue for settlement in effective if settlement.follow_up is not None
        )
        return results

    def wake(self) -> None:
        with self._calls.call("wake()"):
            self.unchecked.wake()

    def close(self) -> None:
        with self._calls.call("close() of a subscription"):
            self.unchecked.close()

    def _results(self, call: str, method: Callable[[Any], Any], given: Sequence[Any]) -> Sequence[bool]:
        with self._calls.call(call):
            returned = method(given)
        self._calls.check(
            returned, _many(returned, bool) and len(returned) == len(given), call, "one bool for each of them"
        )
        return returned  # type: ignore[no-any-return]

    def _is_whole(self, delivery: Delivery) -> bool:
        named = isinstance(delivery.id, str) and delivery.queue in self._queues
        counted = type(delivery.attempt) is int and delivery.attempt >= 1
        return named and counted and (delivery.payload is None) == bool(delivery.problem)


class CheckedDeadLetters:
    """Dead letters whose calls are checked."""

    def __init__(self, dead: Any, calls: CallMonitor) -> None:
        self._dead = dead
        self._calls = calls

    def find(self, **options: Any) -> Sequence[DeadLetter]:
        returned: Sequence[DeadLetter] = self._called("find", DeadLetter, **options)
        return returned

    def get(self, ids: Sequence[str]) -> Sequence[DeadLetter]:
        returned: Sequence[DeadLetter] = self._called("get", DeadLetter, ids)
        return returned

    def replay(self, ids: Sequence[str] | None = None, *, queue: str | None = None) -> Sequence[str]:
        returned: Sequence[str] = self._called("replay", str, ids, queue=queue)
        return returned

    def purge(self, **options: Any) -> int:
        with self._calls.call("dead.purge()"):
            returned = self._dead.purge(**options)
        self._calls.check(returned, type(returned) is int, "dead.purge()", "the number of removed letters (int)")
        return returned  # type: ignore[no-any-return]

    def _called(self, name: str, kind: type, *args: Any, **options: Any) -> Any:
        with self._calls.call(f"dead.{name}()"):
            returned = getattr(self._dead, name)(*args, **options)
        self._calls.check(returned, _many(returned, kind), f"dead.{name}()", f"a sequence of {kind.__name__}")
        return returned


def _many(returned: object, kind: type) -> bool:
    return (
        isinstance(returned, Sequence)
        and not isinstance(returned, str)
        and all(isinstance(item, kind) for item in returned)
    )


def _counts(entry: tuple[object, object]) -> bool:
    name, count = entry
    return isinstance(name, str) and type(count) is int and count >= 1
