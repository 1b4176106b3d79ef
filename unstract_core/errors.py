"""Every error that this package raises: one tree under ContractError.

    ContractError
     +-- PayloadError (ValueError)        a value that the wire cannot carry; `.path` is its JSON path
     |    +-- MalformedPayload            a stored message that cannot be read
     |    +-- SignatureError              a callback signature that a continuation cannot represent
     +-- ConfigurationError               a URL, option, extra or registry that cannot work
     +-- NotSupported                     the transport does not claim the capability that the call needs
     +-- UnknownTask                      this worker has no task of the message's name
     +-- TooManyAttempts                  a message exceeded `max_attempts` deliveries without being settled
     +-- Expired                          a message was delivered after its `expires` time
     +-- WorkerLost                       the worker that claimed a task never settled it; the task is never run twice
     +-- ContinuationNotAllowed           a message names a callback that this worker may not send
     +-- DeadlineExceeded                 a task exceeded its deadline
     +-- TaskFailed                       the task of a blocking call raised, or could not be run
     +-- ReplyTimeout (TimeoutError)      the deadline of a blocking call passed without a reply
     +-- GateFailed                       a gate cannot choose the transport for a dispatch
     +-- TransportError                   `.effect`: what it changed; `.remedy`: what to do
          +-- TransportUnavailable        it cannot be reached now; `.fate_unknown`: the operation may have taken effect
          |    +-- NoRoom                 it accepts no message now; the text has the reason
          |         +-- QueueFull         one queue is full
          +-- TransportRefused            rejected for good: the same operation fails again
          +-- TransportNotReady           its tables or queues do not exist, or may not be used
          +-- TransportClosed             used after close()

Guarantee: every error can be pickled with its attributes. A driver's error appears only as `__cause__`.
"""

from __future__ import annotations

import enum


class Meaning(enum.Enum):
    """The meaning of an error of a database or broker: may a second try succeed, and may this one have taken effect?"""

    UNAVAILABLE = "unavailable"
    IN_DOUBT = "unavailable, in doubt"
    NOT_READY = "not ready"
    REFUSED = "refused"


class ContractError(Exception):
    """The root of the tree: catch it to catch every error that this package raises on purpose."""

    @property
    def problem(self) -> str:
        """The error's text without its path, its effect and its remedy."""
        return str(self.args[0]) if self.args else ""


class PayloadError(ContractError, ValueError):
    """A value that the wire cannot carry.

    Attributes:
        path: The JSON path of the value. `$` is the message, or the value itself if it has no message.
    """

    def __init__(self, message: str = "", *, path: str = "$") -> None:
        super().__init__(message)
        self.path = path

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


class MalformedPayload(PayloadError):
    """A stored message that cannot be read as a task.

    Attributes:
        problems: Every reason, each with its path.
    """

    def __init__(self, message: str = "", *, path: str = "$", problems: tuple[str, ...] = ()) -> None:
        super().__init__(message, path=path)
        self.problems = problems

    def __str__(self) -> str:
        return self.problem


class SignatureError(PayloadError):
    """A callback signature that a continuation cannot represent without loss; nothing was sent."""


class ConfigurationError(ContractError):
    """A configuration that cannot work; raised at start, before the first message."""


class NotSupported(ContractError):
    """The transport does not claim the capability that the call needs."""


class UnknownTask(ContractError):
    """This worker has no task of that name."""


class TooManyAttempts(ContractError):
    """The message exceeded `max_attempts` deliveries without being settled, usually because it crashes its worker."""


class Expired(ContractError):
    """The message was delivered after its `expires` time; its task was not run."""


class WorkerLost(ContractError):
    """The worker that claimed the task never settled it. The task may have run, and is never run twice."""


class ContinuationNotAllowed(ContractError):
    """A message names a callback that this worker's configuration does not allow."""


class DeadlineExceeded(ContractError):
    """The task exceeded its deadline; it may still be running."""


class TaskFailed(ContractError):
    """The task of a blocking call failed; the text is the task's own error, as `Type: message`."""


class ReplyTimeout(ContractError, TimeoutError):
    """No reply came within the deadline. The task may still be waiting, running or finished."""


class GateFailed(ContractError):
    """A gate cannot choose the transport for a dispatch.

    Attributes:
        code: The provider's name for the reason, such as `FLAG_NOT_FOUND`; "" if it has none.
    """

    def __init__(self, message: str = "", *, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class TransportError(ContractError):
    """An operation on a queue failed. The text is the problem, then its effect, then its remedy.

    Attributes:
        effect: The change that the failed operation made, such as "nothing was sent"; "" if it is not known.
        remedy: The action for an operator; "" if there is none.
    """

    def __init__(self, message: str = "", *, effect: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.effect = effect
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.problem}; {self.effect}" if self.effect else self.problem
        return f"{text}{'. ' if self.effect else '; '}{self.remedy}" if self.remedy else text


class TransportUnavailable(TransportError):
    """The database or broker cannot be reached now.

    Attributes:
        fate_unknown: True if the operation may have taken effect although no answer came. A second try may then take
            effect twice. False if nothing took effect and a second try is safe.
    """

    def __init__(self, message: str = "", *, fate_unknown: bool = False, effect: str = "", remedy: str = "") -> None:
        super().__init__(message, effect=effect, remedy=remedy)
        self.fate_unknown = fate_unknown


class NoRoom(TransportUnavailable):
    """The transport accepts no message now; the text has the reason. The message is valid, and its sender keeps it.

    A settlement that raises this error is tried again without a limit on the number of tries.
    """


class QueueFull(NoRoom):
    """One queue accepts no message now; others do. Its messages are still delivered, so that it can shrink."""


class TransportRefused(TransportError):
    """The database or broker rejected the operation for good; nothing of it took effect."""


class TransportNotReady(TransportError):
    """The tables or queues of the transport do not exist, or this user may not use them; `remedy` has the action."""


class TransportClosed(TransportError):
    """The transport or subscription was closed before the call.

    Attributes:
        fate_unknown: True if a blocking call had sent its task before the transport was closed.
    """

    fate_unknown: bool = False
