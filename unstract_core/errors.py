"""Every error that this package raises, under one root.

    ContractError
     +-- PayloadError (ValueError)        data that the wire cannot carry; `.path` says where
     |    +-- MalformedPayload            a stored message that cannot be read
     |    +-- SignatureError              a callback signature that cannot be translated without loss
     +-- ConfigurationError               a URL, option, extra or registry that cannot work
     +-- NotSupported                     asked of a transport that does not claim the capability
     +-- UnknownTask                      a message names a task that this worker does not have
     +-- TooManyAttempts                  a message was delivered too often without ever being settled
     +-- Expired                          a message was delivered after the time it was to be run before
     +-- WorkerLost                       a task that is never run twice was lost with the worker that had it
     +-- Expired                          a message came to a worker after the moment that its sender had set
     +-- ContinuationNotAllowed           a message names a callback that this worker may not send
     +-- DeadlineExceeded                 a task ran for longer than its worker lets it
     +-- TaskFailed                       a blocking call's task raised, or could not be run
     +-- ReplyTimeout (TimeoutError)      a blocking call's deadline passed without an answer
     +-- GateFailed                       a gate cannot tell which way a dispatch is to go
     +-- TransportError
          +-- TransportUnavailable        away for now; `.fate_unknown` tells whether it may have happened
          |    +-- NoRoom                 takes no message for now, and says why
          |         +-- QueueFull         one queue is full
          +-- TransportRefused            refused for good: trying the same again cannot help
          +-- TransportNotReady           its tables or queues are not there yet
          +-- TransportClosed             used after close()

Guarantee: every one of them can be pickled. A driver's own error appears only as `__cause__`.
"""

from __future__ import annotations

import enum


class Meaning(enum.Enum):
    """What an answer of a database or broker means: can the same operation succeed later, and did it take effect?"""

    UNAVAILABLE = "unavailable"
    IN_DOUBT = "unavailable, in doubt"
    NOT_READY = "not ready"
    REFUSED = "refused"


class ContractError(Exception):
    """The root: catch this to catch whatever this package raises on purpose."""


class PayloadError(ContractError, ValueError):
    """A value that the wire cannot carry.

    `path` is the JSON path of the offender, `$` being the message (or the value that was given alone).
    """

    def __init__(self, message: str = "", *, path: str = "$") -> None:
        super().__init__(message)
        self.path = path

    def __str__(self) -> str:
        return f"{self.path}: {self.args[0] if self.args else ''}"


class MalformedPayload(PayloadError):
    """A stored message that cannot be read as a task. `problems` lists every reason, each with its path."""

    def __init__(self, message: str = "", *, path: str = "$", problems: tuple[str, ...] = ()) -> None:
        super().__init__(message, path=path)
        self.problems = problems

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class SignatureError(PayloadError):
    """A callback signature that would lose something on the way; nothing has been sent."""


class ConfigurationError(ContractError):
    """A set-up that cannot work: raised at start, before the first message."""


class NotSupported(ContractError):
    """The transport does not claim the capability that the call needs."""


class UnknownTask(ContractError):
    """No task of that name is registered in this worker."""


class TooManyAttempts(ContractError):
    """The message has cost a worker its life too often to be given to another."""


class Expired(ContractError):
    """The message was delivered after its `expires` time; its task was not run."""


class WorkerLost(ContractError):
    """The worker that had taken the task never settled it; it may have run, and is never run twice."""


class Expired(ContractError):
    """The message was to be run before a moment that has passed. It was not run."""


class ContinuationNotAllowed(ContractError):
    """A message names a callback that is not among those that this worker may send."""


class DeadlineExceeded(ContractError):
    """The task ran for longer than its worker lets it; it may be running still."""


class TaskFailed(ContractError):
    """The task of a blocking call failed; the text is the task's own, as `Type: message`."""


class ReplyTimeout(ContractError, TimeoutError):
    """No reply came within the deadline. The task may still be waiting, running or finished."""


class GateFailed(ContractError):
    """A gate cannot tell which way a dispatch is to go; `code` is its provider's own name for why."""

    def __init__(self, message: str = "", *, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class TransportError(ContractError):
    """Something between this process and its queue went wrong."""


class TransportUnavailable(TransportError):
    """The transport is away for now.

    `fate_unknown` is True where the request may have been carried out although no answer came: doing it again
    may double it. Where it is False nothing has happened and trying again is safe.
    """

    def __init__(self, message: str = "", *, fate_unknown: bool = False) -> None:
        super().__init__(message)
        self.fate_unknown = fate_unknown


class NoRoom(TransportUnavailable):
    """The transport takes no message for now, and says why; the message is not at fault, and is kept until it can go.

    A settlement that meets it is tried again for as long as it takes, and is never given up for it.
    """


class QueueFull(NoRoom):
    """One queue takes no message for now; others do. Its messages go on being received, so that it can shrink."""


class TransportRefused(TransportError):
    """The transport understood the request and refuses it for good; nothing of it took effect."""


class TransportNotReady(TransportError):
    """The tables or queues that the transport works on do not exist, or this user may not use them."""


class TransportClosed(TransportError):
    """The transport or subscription was closed before.

    Attributes:
        fate_unknown: True where a blocking call had sent its task before the transport was closed.
    """

    fate_unknown: bool = False
