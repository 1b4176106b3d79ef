"""What follows from the end of a task: (delivery, outcome) -> Settlement, and nothing else.

Every rule about answers, continuations, retries and burials stands here, once, without I/O; a transport only carries
a settlement out, and the consumer only brings outcomes. Two rules explain the others:

- A task that somebody waits for (`reply_key`, `on_success`, `on_error`) has cost money by the time it raised. It is
  never run again because it raised; its sender hears the real error instead.
- Whatever ends a message tells its sender: a message that cannot be read, or that nobody can run, too.
"""

from __future__ import annotations

import datetime
import hashlib
import uuid
from collections.abc import Container, Iterator
from typing import Literal, TypeAlias, cast

import attrs

from unstract_core.codec import Salvage, check_headers, check_name, salvage, value_to_json
from unstract_core.errors import (
    ConfigurationError,
    ContinuationNotAllowed,
    ContractError,
    DeadlineExceeded,
    Expired,
    MalformedPayload,
    PayloadError,
    TooManyAttempts,
    UnknownTask,
    WorkerLost,
)
from unstract_core.payload import ContinuationSpec, FairnessKey, TaskPayload
from unstract_core.transport import (
    LONGEST_DELAY,
    REPLY_TTL,
    STATUS_TTL,
    Delivery,
    Message,
    Reply,
    ReplyStatus,
    Settlement,
    Verdict,
)
from unstract_core.values import cut, error_parts, error_text, normalise, normalise_members
from unstract_core.values.limits import JSONValue

CONTINUATION_IDS = uuid.UUID("5b0f1f0e-54f9-5a52-9a34-6a2f0c1e7c55")
"""The namespace of continuation ids: uuid5 of "<dispatch id>/on_success" or "/on_error" in it."""


StatusPayload: TypeAlias = Literal["none", "result"]


class RetryLater(Exception):
    """Raised by a task that wants to be run again, `delay` seconds from now (the policy's backoff when None).

    It counts as an attempt; when the attempts are used up it is a failure like any other, with the text of the
    exception that it was raised from, if there is one. Raises ConfigurationError for a delay that makes no sense.
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
    """How often a task may be delivered, how long to wait before it is run again, and what its end may lead to.

    `asked_attempts` counts instead of `max_attempts`, where it is more, for a task that asks to be run again. Without
    `retry_raised` a task is never run again because it raised, as Celery's `max_retries=0` says. With `never_rerun` a
    task is started once, whatever happens: it is not retried, and a message that a worker took and never settled is
    given up. Waits are in seconds.

    Attributes:
        status_payload: What the status of a success keeps: "result", or "none" (status and error only). None (default):
            "none" where on_success carries the result, "result" where nothing else does.
        returned_failure: The status of a task that returned `"success": false`: "completed" (default) or "failed".
        allowed_continuations: The (queue, task) pairs that a continuation may name; a task of None stands for every
            task of the queue. None (default) allows all.
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
        """Return the policy for a task that may carry `asked_attempts` and `retry_raised`, as those of Celery do."""
        asked, again = getattr(task, "asked_attempts", None), getattr(task, "retry_raised", None)
        policy = attrs.evolve(self, asked_attempts=asked) if isinstance(asked, int) else self
        return attrs.evolve(policy, retry_raised=again) if isinstance(again, bool) else policy

    def allows(self, queue: str, task_name: str) -> bool:
        allowed = self.allowed_continuations
        return allowed is None or (queue, None) in allowed or (queue, task_name) in allowed

    @property
    def most_attempts(self) -> int:
        return 1 if self.never_rerun else max(self.max_attempts, self.asked_attempts)

    def delay(self, delivery: Delivery) -> float:
        """Double the wait with each attempt, less up to a quarter: spread, yet the same for the same delivery."""
        longest = min(self.backoff * 2.0 ** min(delivery.attempt - 1, 32), self.backoff_max)
        seed = hashlib.blake2b(f"{delivery.queue}/{delivery.id}/{delivery.attempt}".encode(), digest_size=4).digest()
        return longest * (1 - int.from_bytes(seed) / 2**32 / 4)


@attrs.frozen
class Returned:
    """The task returned. `replaced` lists the paths at which its result had to be made to fit."""

    result: JSONValue
    replaced: tuple[str, ...] = ()

    @classmethod
    def of(cls, value: object) -> Returned:
        replaced: list[str] = []
        result = normalise(value, lenient=True, replaced=replaced)
        return cls(result, tuple(replaced))


@attrs.frozen
class _Failure:
    """Why a delivery failed, as data.

    Attributes:
        error_type: The name of the error's type.
        message: The error's own text; "" if it has none.
    """

    error_type: str
    message: str = ""

    @property
    def error(self) -> str:
        """The text for the sender: `Type: message`, inside the value domain and at most `ERROR_LIMIT` characters."""
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
    """The message is never run again: malformed, unknown, expired, delivered too often, or rejected by its task."""

    @classmethod
    def because(cls, error: ContractError) -> Rejected:
        """Return the rejection for an error of this package."""
        return cls(*error_parts(error))


@attrs.frozen
class Ignored:
    """The task asked for no consequence: no reply, no continuation, no retry."""


Outcome: TypeAlias = Returned | Raised | RetryAsked | Rejected | Ignored


def outcome_of(exc: BaseException, task: object = None) -> Raised | RetryAsked | Rejected | Ignored:
    """Return the outcome of a task that raised.

    Args:
        exc: The exception.
        task: The task. A task of another framework may have a method `outcome_of(exc)`: it returns the outcome that
            the framework's own exception asks for, and None for every other exception.
    """
    if isinstance(exc, RetryLater):
        return RetryAsked(*error_parts(exc if exc.__cause__ is None else exc.__cause__), delay=fit_delay(exc.delay))
    of_the_framework = getattr(task, "outcome_of", None)
    found = of_the_framework(exc) if callable(of_the_framework) else None
    return found if isinstance(found, RetryAsked | Rejected | Ignored) else Raised(*error_parts(exc))


def fit_delay(seconds: object) -> float | None:
    """Return a delay that a transport takes, the nearest one where it is out of range; None for no number."""
    if not isinstance(seconds, int | float) or seconds != seconds:
        return None
    return min(max(0.0, seconds), LONGEST_DELAY)


def overdue(deadline: float) -> DeadlineExceeded:
    """Return the error of a task that ran for longer than `deadline` seconds."""
    return DeadlineExceeded(f"deadline of {deadline:g} s exceeded")


def settle(delivery: Delivery, outcome: Outcome, policy: RetryPolicy) -> Settlement:
    """Return what is to be done about a delivery that ended with `outcome`. Pure, and never raises.

    Should a rule ever fail on a message, the message is buried with its result and the reason.
    """
    try:
        return _by_rule(delivery, outcome, policy)
    except Exception as exc:  # whatever a message holds, it must have an end
        result = outcome.result if isinstance(outcome, Returned) else None
        reason = cut(f"no rule could be applied: {error_text(exc)}")
        return Settlement(delivery, Verdict.BURY, reason=reason, result=result, outcome="failure")


def _by_rule(delivery: Delivery, outcome: Outcome, policy: RetryPolicy) -> Settlement:
    match outcome:
        case Returned(result):
            return _succeeded(delivery, result, policy)
        case Ignored():
            return Settlement(delivery, Verdict.ACK)
        case RetryAsked(delay=delay) if delivery.attempt < policy.most_attempts:
            return _again(delivery, outcome.error, policy.delay(delivery) if delay is None else delay)
        case Raised() | RetryAsked():
            if _awaited(_sender(delivery)):
                return _failed(delivery, outcome.error, outcome.error_type, Verdict.ACK, policy)
            if delivery.attempt < policy.max_attempts and policy.retry_raised and not policy.never_rerun:
                return _again(delivery, outcome.error, policy.delay(delivery))
            return _failed(delivery, outcome.error, outcome.error_type, Verdict.BURY, policy)
        case Rejected():
            return _failed(delivery, outcome.error, outcome.error_type, Verdict.BURY, policy)


def rejection(
    delivery: Delivery, known: Container[str], policy: RetryPolicy, now: datetime.datetime
) -> Rejected | None:
    """Say why a delivery must not be run: unreadable, delivered too often, not among `known` task names, with a
    continuation that the policy does not allow, too late."""
    if delivery.payload is None:
        return Rejected.because(MalformedPayload(delivery.problem or "unreadable"))
    if policy.never_rerun and delivery.attempt > 1:
        lost = "another worker took this task and did not end it; it may have run, and is not run again"
        return Rejected.because(WorkerLost(lost))
    if delivery.attempt > policy.most_attempts:
        times = f"delivered {delivery.attempt} times and never settled; the limit is {policy.most_attempts}"
        return Rejected.because(TooManyAttempts(times))
    name = delivery.payload.task_name
    if name not in known:
        return Rejected.because(UnknownTask(f"no task {name!r} in the worker of queue {delivery.queue!r}"))
    if (unwanted := _not_allowed(delivery, policy)) is not None:
        return Rejected.because(ContinuationNotAllowed(unwanted))
    return expiry(delivery, now)


def _not_allowed(delivery: Delivery, policy: RetryPolicy) -> str | None:
    """Say which continuation of a readable message this worker may not send, before the task costs anything."""
    if policy.allowed_continuations is None:
        return None
    payload = cast(TaskPayload, delivery.payload)
    named = [("on_success", payload.on_success), ("on_error", payload.on_error)]
    found = [(kind, spec.queue, spec.task_name) for kind, spec in named if spec is not None]
    for kind, queue, task_name in (*found, *delivery.further_continuations):
        if not policy.allows(queue, task_name):
            return (
                f"{kind} names task {task_name!r} on queue {queue!r}, which the worker of queue {delivery.queue!r} may "
                f"not send; allow it with --allow-continuation {queue}:{task_name} or Consumer(allow_continuations=...)"
            )
    return None


def expiry(delivery: Delivery, now: datetime.datetime) -> Rejected | None:
    """Return the rejection of a delivery that has expired; None if a task may start.

    Args:
        delivery: The delivery.
        now: The time, with a time zone.
    """
    if delivery.expires is None or now < delivery.expires:
        return None
    return Rejected.because(Expired(f"the message expired at {delivery.expires.isoformat()}; it was not run"))


def with_headers(settlement: Settlement, headers: dict[str, str]) -> Settlement:
    """Return a settlement whose continuation carries these headers instead of its parent's."""
    follow_up = settlement.follow_up
    if follow_up is None:
        return settlement
    return attrs.evolve(
        settlement, follow_up=attrs.evolve(follow_up, payload=attrs.evolve(follow_up.payload, headers=headers))
    )


def fallbacks(settlement: Settlement, refusal: str, policy: RetryPolicy | None = None) -> Iterator[Settlement]:
    """Yield what to try, in order, when a transport refuses a settlement for good.

    A retry is tried without its delay. Then the message is buried and its sender told: by its callback and its status
    or reply, or by one of them, because the other may be what was refused; each time with the result, and then without
    it, which may be what was refused. At last it is buried with its result alone, and then without. So a result that
    was paid for ends in the dead letters, or else its sender hears that it is lost.
    """
    if settlement.verdict is Verdict.RETRY and settlement.delay:
        yield attrs.evolve(settlement, delay=0.0)
    delivery = settlement.delivery
    what = f"{settlement.reason} (settling it failed" if settlement.reason else "result delivery failed"
    error = cut(f"{what}: {refusal}" + (")" if settlement.reason else ""))
    told = _failed(delivery, error, settlement.error_type, Verdict.BURY, policy or RetryPolicy())
    result = _result_of(settlement)
    telling = [told]
    if told.follow_up is not None and told.reply is not None:
        telling += [attrs.evolve(told, reply=None), attrs.evolve(told, follow_up=None)]
    if told.follow_up is not None or told.reply is not None:
        telling.append(attrs.evolve(told, follow_up=None, reply=None))
    for one in telling:
        if result is not None:
            yield attrs.evolve(one, result=result)
        yield one


def _result_of(settlement: Settlement) -> JSONValue:
    if settlement.result is not None or settlement.reason:
        return settlement.result
    follow_up = settlement.follow_up
    if follow_up is not None and follow_up.payload.args:
        return follow_up.payload.args[0]
    return settlement.reply.result if settlement.reply is not None else None


def _succeeded(delivery: Delivery, result: JSONValue, policy: RetryPolicy) -> Settlement:
    payload = cast(TaskPayload, delivery.payload)
    if payload.reply_key is not None:
        reply = Reply(payload.reply_key, "completed", result=result, ttl=REPLY_TTL)
        return Settlement(delivery, Verdict.ACK, reply=reply, outcome="success")
    if not payload.has_continuations:
        return Settlement(delivery, Verdict.ACK, outcome="success")
    status = None
    if payload.task_id:
        status = _status(_dispatch_id(delivery, payload), result, policy, carried=payload.on_success is not None)
    follow_up = _follow_up(delivery, payload, payload.on_success, "on_success", result) if payload.on_success else None
    return Settlement(delivery, Verdict.ACK, follow_up=follow_up, reply=status, outcome="success")


def _status(key: str, result: JSONValue, policy: RetryPolicy, *, carried: bool) -> Reply:
    """Return the status of a task that returned; `carried` says that on_success carries its result."""
    if policy.returned_failure == "failed" and (error := _returned_failure(result)) is not None:
        return Reply(key, "failed", error=error, ttl=STATUS_TTL)
    kept = policy.status_payload or ("none" if carried else "result")
    return Reply(key, "completed", result=result if kept == "result" else None, ttl=STATUS_TTL)


def _returned_failure(result: JSONValue) -> str | None:
    """Return the error text of a result that says `"success": false`; None of any other."""
    if not isinstance(result, dict) or result.get("success") is not False:
        return None
    error = result.get("error")
    if not isinstance(error, str):
        error = "" if error is None else value_to_json(error)
    return cut(error) if error.strip() else 'the task returned "success": false without an error text'


def _failed(delivery: Delivery, error: str, error_type: str, verdict: Verdict, policy: RetryPolicy) -> Settlement:
    sender = _sender(delivery)
    reply = None
    if sender.reply_key is not None:
        reply = Reply(sender.reply_key, "failed", error=error, ttl=REPLY_TTL)
    elif sender.task_id is not None or sender.on_error is not None:
        reply = Reply(_dispatch_id(delivery, sender), "failed", error=error, ttl=STATUS_TTL)
    follow_up = None
    if sender.on_error is not None and _may_tell(delivery, sender.on_error, policy):
        told = attrs.evolve(sender.on_error, kwargs=with_error(sender.on_error.kwargs, error))
        follow_up = _follow_up(delivery, sender, told, "on_error", _dispatch_id(delivery, sender))
    return Settlement(
        delivery, verdict, follow_up=follow_up, reply=reply, reason=error, outcome="failure", error_type=error_type
    )


def _may_tell(delivery: Delivery, on_error: ContinuationSpec, policy: RetryPolicy) -> bool:
    further = [(queue, task_name) for kind, queue, task_name in delivery.further_continuations if kind == "on_error"]
    return all(policy.allows(*named) for named in [(on_error.queue, on_error.task_name), *further])


def _again(delivery: Delivery, error: str, delay: float) -> Settlement:
    return Settlement(delivery, Verdict.RETRY, delay=delay, reason=error)


def _sender(delivery: Delivery) -> TaskPayload | Salvage:
    return delivery.payload if delivery.payload is not None else salvage(delivery.raw)


def _awaited(sender: TaskPayload | Salvage) -> bool:
    return sender.reply_key is not None or (isinstance(sender, TaskPayload) and sender.has_continuations)


def _dispatch_id(delivery: Delivery, sender: TaskPayload | Salvage) -> str:
    """Return the id under which the sender knows its dispatch; what no text may hold is mended in a foreign one."""
    return cut(sender.task_id or delivery.id)


def with_error(kwargs: dict[str, JSONValue], error: str) -> dict[str, JSONValue]:
    """Put the error text where the product's callbacks look: `callback_kwargs["error"]`, if there is room for it."""
    wanted = kwargs.get("callback_kwargs")
    if isinstance(wanted, dict) and wanted.get("error") is None:
        return {**kwargs, "callback_kwargs": {**wanted, "error": error}}
    return kwargs


def _follow_up(
    delivery: Delivery, sender: TaskPayload | Salvage, spec: ContinuationSpec, kind: str, first: JSONValue
) -> Message:
    parent = cut(sender.task_id or f"{delivery.queue}/{delivery.id}")
    payload = TaskPayload(
        task_name=spec.task_name,
        args=[first],
        kwargs=normalise_members(spec.kwargs, lenient=True),
        queue=spec.queue,
        fairness=_fit_fairness(sender.fairness),
        task_id=str(uuid.uuid5(CONTINUATION_IDS, f"{parent}/{kind}")),
        headers=_fit_headers(sender.headers),
    )
    return Message(payload, spec.queue, org_id=_fit_owner(delivery.org_id) or "", priority=delivery.priority)


def _fit_fairness(fairness: FairnessKey | None) -> FairnessKey | None:
    return attrs.evolve(fairness, org_id=_fit_owner(fairness.org_id)) if fairness is not None else None


def _fit_headers(headers: dict[str, str] | None) -> dict[str, str] | None:
    try:
        return None if headers is None else check_headers(headers, "$.headers")
    except PayloadError:
        return None


def _fit_owner(org_id: str | None) -> str | None:
    """Leave out what only a foreign writer sends and the wire would refuse: its sender must be told all the same."""
    try:
        if org_id:
            check_name(org_id, "$.org_id")
    except PayloadError:
        return None
    return org_id
