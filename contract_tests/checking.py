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
        return calls + "".join(f"; before that, {one}" for one in self.violations[:1])

    def raise_violation(self) -> None:
        """Raise the first violation since the last call, if there was one."""
        violations, self.violations = self.violations, []
        if violations:
            raise violations[0]

    @contextlib.contextmanager
    def call(self, what: str) -> Iterator[None]:
        thread = threading.get_ident()
        outer = self.running.get(thread)
        self.running[thread] = what
        try:
            yield
        except (ContractError, AssertionError):
            raise
        except Exception as exc:
            raise self._violation(
                f"{what} raised {type(exc).__name__}: {exc}" + ("" if "harness" in what else _REMEDY)
            ) from exc
        finally:
            if outer is None:
                self.running.pop(thread, None)
            else:
                self.running[thread] = outer

    def check(self, found: object, fine: object, what: str, promised: str) -> None:
        if not fine:
            shown = repr(found)
            shown = shown if len(shown) <= 300 else shown[:300] + "..."
            raise self._violation(f"{what} returned {shown}, where the protocol requires {promised}")

    def _violation(self, problem: str) -> ProtocolViolation:
        """Record a violation for `raise_violation`, and return it."""
        self.violations.append(ProtocolViolation(f"{self.owner}: {problem}"))
        return self.violations[-1]


class CheckedTransport:
    def __init__(self, transport: Any, calls: CallMonitor) -> None:
        self.unchecked = transport
        self._calls = calls

    @property
    def capabilities(self) -> Capabilities:
        with self._calls.call("capabilities"):
            found = self.unchecked.capabilities
        self._calls.check(found, isinstance(found, Capabilities), "capabilities", "a Capabilities")
        return found  # type: ignore[no-any-return]

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        what = f"send() of {len(messages)}"
        with self._calls.call(what):
            found = self.unchecked.send(messages) if within is None else self.unchecked.send(messages, within=within)
        fine = _many(found, str) and len(found) == len(messages) == len(set(found))
        self._calls.check(found, fine, what, "one distinct id (str) for each message")
        self._calls.unsettled.update(one.queue for one in messages)
        return found  # type: ignore[no-any-return]

    def reply(self, key: str, *, timeout: float = 0, consume: bool = False) -> Reply | None:
        what = f"reply(timeout={timeout}, consume={consume})"
        with self._calls.call(what):
            found = self.unchecked.reply(key, timeout=timeout, consume=consume)
        fine = found is None or (isinstance(found, Reply) and found.key == key)
        self._calls.check(found, fine, what, "the Reply under that key, or None")
        return found  # type: ignore[no-any-return]

    def subscribe(self, queues: Sequence[str], *, lease: float) -> CheckedSubscription:
        what = f"subscribe(lease={lease})"
        with self._calls.call(what):
            found = self.unchecked.subscribe(queues, lease=lease)
        missing = [name for name in ("receive", "renew", "settle", "wake", "close") if not hasattr(found, name)]
        self._calls.check(found, not missing, what, f"a Subscription (it has no {', '.join(missing)})")
        return CheckedSubscription(found, self._calls, queues)

    def close(self) -> None:
        with self._calls.call("close()"):
            self.unchecked.close()

    def queues(self, names: Sequence[str] | None = None) -> Sequence[QueueState]:
        with self._calls.call("queues()"):
            found = self.unchecked.queues(names)
        self._calls.check(found, _many(found, QueueState), "queues()", "a sequence of QueueState")
        return found  # type: ignore[no-any-return]

    def waiting_tasks(self, queue: str, limit: int = 1000) -> Mapping[str, int]:
        with self._calls.call("waiting_tasks()"):
            found = self.unchecked.waiting_tasks(queue, limit)
        fine = isinstance(found, Mapping) and all(map(_counts, found.items()))
        self._calls.check(found, fine, "waiting_tasks()", "a mapping of task names (str) to their counts (int)")
        return found  # type: ignore[no-any-return]

    @property
    def dead(self) -> CheckedDeadLetters:
        return CheckedDeadLetters(self.unchecked.dead, self._calls)


class CheckedSubscription:
    def __init__(self, subscription: Any, calls: CallMonitor, queues: Sequence[str]) -> None:
        self.unchecked = subscription
        self._calls = calls
        self._queues = set(queues)

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        what = f"receive(limit={limit}, wait={wait:g})"
        with self._calls.call(what):
            found = self.unchecked.receive(limit=limit, wait=wait)
        fine = _many(found, Delivery) and len(found) <= limit and all(map(self._is_whole, found))
        self._calls.check(found, fine, what, "up to `limit` deliveries of its queues, each with a payload or a problem")
        return found  # type: ignore[no-any-return]

    def renew(self, deliveries: Sequence[Delivery]) -> Sequence[bool]:
        return self._answers(f"renew() of {len(deliveries)}", self.unchecked.renew, deliveries)

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        answers = self._answers(f"settle() of {len(settlements)}", self.unchecked.settle, settlements)
        effective = [one for one, answer in zip(settlements, answers, strict=True) if answer]
        self._calls.unsettled.subtract(one.delivery.queue for one in effective if one.verdict is not Verdict.RETRY)
        self._calls.unsettled.update(one.follow_up.queue for one in effective if one.follow_up is not None)
        return answers

    def wake(self) -> None:
        with self._calls.call("wake()"):
            self.unchecked.wake()

    def close(self) -> None:
        with self._calls.call("close() of a subscription"):
            self.unchecked.close()

    def _answers(self, what: str, call: Callable[[Any], Any], given: Sequence[Any]) -> Sequence[bool]:
        with self._calls.call(what):
            found = call(given)
        self._calls.check(found, _many(found, bool) and len(found) == len(given), what, "one bool for each of them")
        return found  # type: ignore[no-any-return]

    def _is_whole(self, delivery: Delivery) -> bool:
        named = isinstance(delivery.id, str) and delivery.queue in self._queues
        counted = type(delivery.attempt) is int and delivery.attempt >= 1
        return named and counted and (delivery.payload is None) == bool(delivery.problem)


class CheckedDeadLetters:
    def __init__(self, dead: Any, calls: CallMonitor) -> None:
        self._dead = dead
        self._calls = calls

    def find(self, **options: Any) -> Sequence[DeadLetter]:
        found: Sequence[DeadLetter] = self._called("find", DeadLetter, **options)
        return found

    def get(self, ids: Sequence[str]) -> Sequence[DeadLetter]:
        found: Sequence[DeadLetter] = self._called("get", DeadLetter, ids)
        return found

    def replay(self, ids: Sequence[str] | None = None, *, queue: str | None = None) -> Sequence[str]:
        found: Sequence[str] = self._called("replay", str, ids, queue=queue)
        return found

    def purge(self, **options: Any) -> int:
        with self._calls.call("dead.purge()"):
            found = self._dead.purge(**options)
        self._calls.check(found, type(found) is int, "dead.purge()", "the number of removed letters (int)")
        return found  # type: ignore[no-any-return]

    def _called(self, name: str, kind: type, *args: Any, **options: Any) -> Any:
        with self._calls.call(f"dead.{name}()"):
            found = getattr(self._dead, name)(*args, **options)
        self._calls.check(found, _many(found, kind), f"dead.{name}()", f"a sequence of {kind.__name__}")
        return found


def _many(found: object, kind: type) -> bool:
    return isinstance(found, Sequence) and not isinstance(found, str) and all(isinstance(one, kind) for one in found)


def _counts(entry: tuple[object, object]) -> bool:
    name, count = entry
    return isinstance(name, str) and type(count) is int and count >= 1
