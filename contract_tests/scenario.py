"""A consumer over the transport under test. Its tasks behave as their message says, and its callbacks record calls."""

from __future__ import annotations

import re
import sys
from typing import Any

import attrs
import pytest

from contract_tests.checking import CheckedTransport
from contract_tests.kit import Kit
from contract_tests.messages import message, then
from unstract_core import Consumer, NotSupported, RetryLater, Tasks

tasks = Tasks()


class HostileError(Exception):
    def __str__(self) -> str:
        raise SystemExit("no text for you")


class Leave(BaseException):
    pass


class HostileResult:
    def __repr__(self) -> str:
        raise SystemExit("no repr for you")


@tasks.register("behave")
def behave(how: str, *rest: Any) -> Any:
    """Return, raise or misbehave as the message says."""
    match how:
        case "return":
            return rest[0] if rest else None
        case "raise":
            raise ValueError("the real reason")
        case "exit":
            sys.exit(3)
        case "interrupt":
            raise KeyboardInterrupt
        case "leave":
            raise Leave("for good")
        case "hostile error":
            raise HostileError
        case "hostile result":
            return {"kept": 1, "bad": HostileResult()}
        case "generator":
            return (n for n in range(3))
        case "three that do not fit":
            return {"ratio": float("nan"), "pages": ["fits", "secret\0"], "scan": b"secret", "total": 7}
        case "huge":
            return {"success": True, "data": "x" * 80_000_000}
        case "later":
            raise RetryLater(delay=0.01)
    raise AssertionError(how)


FAILURES = {
    "raise": "ValueError: the real reason",
    "exit": "SystemExit: 3",
    "interrupt": "KeyboardInterrupt",
    "leave": "Leave: for good",
    "hostile error": "HostileError: <its message cannot be printed>",
}
"""The ways in which a task fails, with the error text that its sender gets."""

ODD_RESULTS = {
    "hostile result": re.escape('{"bad": "<unprintable HostileResult>", "kept": 1}'),
    "generator": r'"<generator object behave\.<locals>\.<genexpr> at 0x[0-9a-f]+>"',
    "huge": r'\{"data": "<unstract-wire: .*beyond.*", "success": true\}',
}
"""Results that the wire does not allow, with a pattern of the normalised result."""


@attrs.define
class Scenario:
    """A transport with two queues of a consumer, and the recorded calls of its callbacks."""

    kit: Kit
    transport: CheckedTransport
    queue: str
    """The queue of the tasks."""
    callbacks: str
    """The queue of the callbacks."""
    seen: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = attrs.field(factory=list)
    """Name ("ok" or "err"), args and kwargs of each callback that was called."""

    def consume(self, **options: Any) -> Consumer:
        registry = dict(tasks)
        for name in ("ok", "err"):
            registry[name] = lambda *args, name=name, **kwargs: self.seen.append((name, args, kwargs))
        options = {"backoff": 0.01, "max_attempts": 3, **options}
        consumer = Consumer(self.transport, registry, [self.queue, self.callbacks], **options)
        self.kit.drain(consumer)
        self.kit.calls.raise_violation()
        return consumer

    def send(self, *args: Any, task: str = "behave", **options: Any) -> None:
        self.transport.send([message(task, self.queue, *args, **options)])

    def callbacks_to(self, **kwargs: Any) -> dict[str, Any]:
        return {"on_success": then("ok", self.callbacks, **kwargs), "on_error": then("err", self.callbacks, **kwargs)}

    def buried(self, *reasons: str) -> bool:
        """Return whether the dead letters' reasons start with these; True without `dead_letters`."""
        if not self.kit.capabilities.dead_letters:
            return True
        found = sorted(letter.reason for letter in self.transport.dead.find(queue=self.queue))
        return len(found) == len(reasons) and all(
            one.startswith(reason) for one, reason in zip(found, sorted(reasons), strict=True)
        )

    def empty(self) -> bool:
        return not self.kit.remaining(self.transport, self.queue, self.callbacks)

    def status_is(self, task_id: str, status: str, *, result: Any = None, error: str = "") -> bool:
        """Return whether a dispatch has this status. An `error` that ends with "..." is a prefix.

        Without `status`, check that reading the status raises NotSupported.
        """
        if not self.kit.capabilities.status:
            with pytest.raises(NotSupported):
                self.transport.reply(task_id)
            return True
        found = self.transport.reply(task_id)
        assert found is not None
        same = found.error == error or (error.endswith("...") and found.error.startswith(error[:-3]))
        return (found.status, found.result) == (status, result) and same
