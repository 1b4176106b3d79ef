"""A consumer over the transport under test: tasks that do what their message says, and callbacks that remember."""

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
    """Do what the message says."""
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
"""How a task fails, and what its sender is told."""

ODD_RESULTS = {
    "hostile result": re.escape('{"bad": "<unprintable HostileResult>", "kept": 1}'),
    "generator": r'"<generator object behave\.<locals>\.<genexpr> at 0x[0-9a-f]+>"',
    "huge": r'\{"data": "<unstract-wire: .*beyond.*", "success": true\}',
}
"""Results that do not fit the wire, and what is left of them there."""


@attrs.define
class Scenario:
    """A transport with a consumer's two queues, and what the callbacks were given."""

    kit: Kit
    transport: CheckedTransport
    queue: str
    callbacks: str
    seen: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = attrs.field(factory=list)

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
        """Whether the dead letters of the queue, where there are any, have reasons that begin like these."""
        if not self.kit.capabilities.dead_letters:
            return True
        found = sorted(letter.reason for letter in self.transport.dead.find(queue=self.queue))
        return len(found) == len(reasons) and all(
            one.startswith(reason) for one, reason in zip(found, sorted(reasons), strict=True)
        )

    def empty(self) -> bool:
        return not self.kit.remaining(self.transport, self.queue, self.callbacks)

    def status_is(self, task_id: str, status: str, *, result: Any = None, error: str = "") -> bool:
        """Whether a dispatch has this status, "..." for more in its error; or that it cannot be known is said."""
        if not self.kit.capabilities.status:
            with pytest.raises(NotSupported):
                self.transport.reply(task_id)
            return True
        found = self.transport.reply(task_id)
        assert found is not None
        same = found.error == error or (error.endswith("...") and found.error.startswith(error[:-3]))
        return (found.status, found.result) == (status, result) and same
