"""The outcomes of a task, and the policy that the rules of continuation.py apply to them: values, without I/O."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Literal, TypeAlias, cast

import attrs

from unstract_core.errors import ConfigurationError, ContractError, DeadlineExceeded
from unstract_core.transport import LONGEST_DELAY, Delivery, ReplyStatus
from unstract_core.values import cut, error_parts, normalise
from unstract_core.values.limits import JSONValue

StatusPayload: TypeAlias = Literal["none", "result"]


class RetryLater(Exception):
    """A task raises it to run again later. The run counts as an attempt.

    After the last attempt it is a failure like any other. The error text is then that of the exception that it was
    raised from (`raise RetryLater(60) from exc`), or its own.

    Args:
        delay: Seconds until the next run, from 0 to `LONGEST_DELAY`. None (default): the consumer's back-off.

    Raises:
        ConfigurationError: The delay is no such number.
    """

    delay: float | None = None

    def __init__(self, delay: float | None = None) -> None:
        if delay is not None and fit_delay(delay) != delay:
            raise ConfigurationError(f"RetryLater(delay=...) takes seconds from 0 to {LONGEST_DELAY:g}, not {delay!r}")
        super().__init__(delay)
        self.delay = delay

    def __str__(self) -> str:
        return "asked to be run again" + ("" if self.delay is None else f" in {self.delay:g} s")


@attrs.frozen
class RetryPolicy:
    """How often a message is delivered, how long a retry waits, and which consequences its task may have.

    Attributes:
        max_attempts: How many deliveries a message may have. Default: 5.
        backoff: Seconds before the first retry; each further retry waits twice as long. Default: 1.
        backoff_max: The longest wait before a retry, in seconds. Default: 300.
        asked_attempts: How many deliveries a task may have that asks for a retry; the larger of this number and
            `max_attempts` counts. Default: 0.
        never_rerun: Whether a task starts at most once. Its message is not retried, and a later delivery is rejected
            because its first worker was lost. Default: False.
        retry_raised: Whether a task that raised may run again. Default: True; False is Celery's `max_retries=0`.
        status_payload: The content of a success's status: "result", or "none" (status and error only). None (default):
            "none" if on_success carries the result, else "result".
        returned_failure: The status of a task that returned `"success": false`: "completed" (default) or "failed".
        allowed_continuations: The (queue, task) pairs that a continuation may name; a task of None stands for every
            task of the queue. None (default): all.
    """

    max_attempts: int = 5
    backoff: float = 1.0
    backoff_max: float = 300.0
    asked_attempts: int = 0
    never_rerun: bool = False
    retry_raised: bool = True
    status_payload: StatusPayload | None = None
    returned_failure: ReplyStatus = "completed"
    allowed_continuations: frozenset[tuple[str, str | None]] | None = None

    def of(self, task: object) -> RetryPolicy:
        """Return the policy of a task: with its own `asked_attempts` and `retry_raised`, if it has these attributes."""
        asked, again = getattr(task, "asked_attempts", None), getattr(task, "retry_raised", None)
        policy = attrs.evolve(self, asked_attempts=asked) if isinstance(asked, int) else self
        return attrs.evolve(policy, retry_raised=again) if isinstance(again, bool) else policy

    def allows(self, queue: str, task_name: str) -> bool:
        """Whether a continuation may send this task to this queue."""
        allowed = self.allowed_continuations
        return allowed is None or (queue, None) in allowed or (queue, task_name) in allowed

    @property
    def most_attempts(self) -> int:
        """After how many deliveries a message is rejected."""
        return 1 if self.never_rerun else max(self.max_attempts, self.asked_attempts)

    def delay(self, delivery: Delivery) -> float:
        """Return the seconds before a delivery is retried.

        The wait doubles with each attempt, up to `backoff_max`. Up to a quarter of it is left out, so that
        messages that failed together do not return together. The same delivery always gets the same wait.
        """
        longest = min(self.backoff * 2.0 ** min(delivery.attempt - 1, 32), self.backoff_max)
        seed = hashlib.blake2b(f"{delivery.queue}/{delivery.id}/{delivery.attempt}".encode(), digest_size=4).digest()
        return longest * (1 - int.from_bytes(seed) / 2**32 / 4)


@attrs.frozen
class Returned:
    """The task returned.

    Attributes:
        result: Its result, inside the value domain.
        replaced: The JSON paths at which a value outside of the domain was replaced.
    """

    result: JSONValue
    replaced: tuple[str, ...] = ()

    @classmethod
    def of(cls, value: object) -> Returned:
        """Return the outcome of a task that returned any Python value."""
        replaced: list[str] = []
        result = normalise(value, lenient=True, replaced=replaced)
        return cls(result, tuple(replaced))


@attrs.frozen
class _Failure:
    """The error of a delivery that failed, as data.

    Attributes:
        error_type: The name of the error's type.
        message: The error's own text; "" if it has none.
    """

    error_type: str
    message: str = ""

    @property
    def error(self) -> str:
        """The text for the sender: `Type: message`, inside the value domain, at most `ERROR_LIMIT` characters."""
        return cut(f"{self.error_type}: {self.message}" if self.message else self.error_type)


@attrs.frozen
class Raised(_Failure):
    """The task raised an error."""


@attrs.frozen
class RetryAsked(_Failure):
    """The task asked to be run again.

    Attributes:
        delay: Seconds until then; None (default) for the policy's backoff.
    """

    delay: float | None = None


@attrs.frozen
class Rejected(_Failure):
    """The message must not run: it is unreadable, unknown, expired, delivered too often, or rejected by its task."""

    @classmethod
    def because(cls, error: ContractError) -> Rejected:
        """Return the rejection for an error of this package."""
        return cls(*error_parts(error))


@attrs.frozen
class Ignored:
    """The task asked for no consequence: no reply, no continuation, no retry."""


Outcome: TypeAlias = Returned | Raised | RetryAsked | Rejected | Ignored
ExceptionReader: TypeAlias = Callable[[BaseException], RetryAsked | Rejected | Ignored | None]


def outcome_of(exc: BaseException) -> Raised | RetryAsked | Rejected | Ignored:
    """Return the outcome of a task that raised.

    An exception of another framework may ask for an outcome, as Celery's Ignore does. Its reader is the entry point of
    the group `unstract_core.exceptions` with the name of the framework's package. The reader returns None for an
    exception that asks for nothing.
    """
    if isinstance(exc, RetryLater):
        return RetryAsked(*error_parts(exc if exc.__cause__ is None else exc.__cause__), delay=fit_delay(exc.delay))
    for package in dict.fromkeys(_package(kind) for kind in type(exc).__mro__):
        if (read := _exception_reader(package)) is not None:
            with contextlib.suppress(Exception):  # a reader that fails must not hide the task's own error
                if (outcome := read(exc)) is not None:
                    return outcome
    return Raised(*error_parts(exc))


def _package(kind: type) -> str:
    module = getattr(kind, "__module__", None)
    return module.partition(".")[0] if isinstance(module, str) else ""


@functools.cache
def _exception_reader(package: str) -> ExceptionReader | None:
    for entry in entry_points(group="unstract_core.exceptions", name=package):
        with contextlib.suppress(Exception):  # a reader whose driver is missing reads nothing
            return cast(ExceptionReader, entry.load())
    return None


def fit_delay(seconds: object) -> float | None:
    """Return the nearest delay, in seconds, that a transport accepts; None if `seconds` is not a number."""
    if not isinstance(seconds, int | float) or seconds != seconds:
        return None
    return min(max(0.0, seconds), LONGEST_DELAY)


def overdue(deadline: float) -> DeadlineExceeded:
    """Return the error of a task that ran for longer than `deadline` seconds."""
    return DeadlineExceeded(f"deadline of {deadline:g} s exceeded")
