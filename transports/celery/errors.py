"""The one place where an error of kombu, its drivers or the operating system becomes one of ours.

What the broker said decides: a lost or silent connection leaves the fate of what was published on it unknown, a
channel that the broker closed tells why. Texts carry the broker's own words, which name queues and arguments and
never a payload.
"""

from __future__ import annotations

import contextlib
import re
import ssl
from collections.abc import Iterator

import kombu.exceptions
from amqp import exceptions as amqp

from unstract_core.errors import (
    ConfigurationError,
    ContractError,
    NoRoom,
    QueueFull,
    TransportError,
    TransportNotReady,
    TransportRefused,
    TransportUnavailable,
)

CONNECTING = "connect to the broker"
"""What is being done when a connection is opened."""
_INEQUIVALENT = re.compile(
    r"inequivalent arg '(?P<name>[^']*)' for (?P<kind>queue|exchange) .*?"
    r"received (?P<ours>.*?) but current is (?P<theirs>.*)"
)
_TYPED = re.compile(r"the value (.*) of type '\w+'")
_NOT_READY = (amqp.AccessRefused, amqp.NotFound, amqp.ResourceLocked, amqp.NotAllowed, amqp.PreconditionFailed)
_ADVICE = (
    ("reserved prefix", "Choose a name that does not begin with 'amq.'"),
    ("connection limit", "Raise that limit on the broker, or close connections"),
    ("queue limit", "Raise that limit on the broker, or delete queues"),
    ("invalid arg", "Correct queue_arguments (in a URL the options that begin with x-)"),
    ("exclusive access", "The queue is exclusive to another connection: use a queue of another name"),
    ("no queue", "Declare the queue, or set declare=True so that it is declared here"),
)
"""What to do, by words of the broker's; the first that fits."""
_QUOTED_COMMAND = " of pipeline caused error: "
"""After which the driver of Redis says what is wrong; before it stands the command, with parts of a message."""
_REDIS_REFUSALS = {
    "AuthenticationError": "Check the user and password in the URL",
    "AuthorizationError": "Check the user and password in the URL, and the rights of the user (ACL)",
    "NoPermissionError": "Give the user the right to these commands and keys (ACL)",
}


class Unroutable(TransportNotReady):
    """The broker has no queue of that name."""


class Nacked(QueueFull):
    """The broker refused to take the message, as a queue that is full does."""


class Blocked(NoRoom):
    """The broker takes no messages for now, as with too little memory or disk space, and has said so."""


class InDoubt(Blocked):
    """A message that was handed over before the broker said so; `tag` is its number, by which its confirm is known."""

    def __init__(self, message: str, tag: int) -> None:
        super().__init__(message, fate_unknown=True)
        self.tag = tag


@contextlib.contextmanager
def mapped(doing: str, *, fate_unknown: bool = False) -> Iterator[None]:
    """Turn every error of a driver inside the block into ours, with the driver's as its cause.

    `fate_unknown` says that something may have taken effect when the connection is lost in the block.
    """
    try:
        yield
    except ContractError:
        raise
    except Exception as exc:
        raise translate(exc, doing, fate_unknown=fate_unknown) from exc


def translate(exc: Exception, doing: str, *, fate_unknown: bool = False) -> TransportError | ConfigurationError:
    """Return our error for a driver's; what is no refusal of the broker's is taken for a lost connection.

    py-amqp raises AttributeError and the like on a connection that was lost meanwhile, so no kind is left out.
    """
    said = _said(exc)
    if isinstance(exc, amqp.PreconditionFailed) and (found := _INEQUIVALENT.search(said)):
        return TransportNotReady(f"{doing}: {_inequivalent(found)}")
    if isinstance(exc, amqp.ContentTooLarge) or (
        isinstance(exc, amqp.PreconditionFailed) and "larger than configured max size" in said
    ):
        return TransportRefused(f"{doing}: {said}")
    if isinstance(exc, _NOT_READY):
        fits = [advice for words, advice in _ADVICE if words in said]
        if isinstance(exc, amqp.AccessRefused | amqp.NotAllowed):
            fits.append("Check the user, password, virtual host and permissions")
        return TransportNotReady(". ".join([f"{doing}: {said.rstrip('.')}", *fits[:1]]))
    if isinstance(exc, ImportError):
        return ConfigurationError(f"{doing}: {exc}; install the driver, such as pip install 'kombu[redis]'")
    if isinstance(exc, kombu.exceptions.EncodeError):
        return TransportRefused(f"{doing}: cannot be serialised ({type(exc).__name__})")
    if (refusal := _redis_refusal(exc, doing, said)) is not None:
        return refusal
    said = said or type(exc).__name__
    fate = "; whether it took effect is unknown, so it was not tried again" if fate_unknown else "; nothing was done"
    return TransportUnavailable(f"{doing}: {_what_happened(exc, doing)} ({said}){fate}", fate_unknown=fate_unknown)


def _inequivalent(found: re.Match[str]) -> str:
    """Say in what a queue or an exchange that is there differs from the one that was to be declared."""
    ours, theirs = (_TYPED.sub(r"\1", found[whose]) for whose in ("ours", "theirs"))
    name, difference = found["name"], f"{found['name']} is {theirs} there, and {ours} was asked for"
    if found["kind"] == "exchange":
        return (
            f"an exchange of the queue's name exists with other properties: {difference}. Celery declares a direct, "
            "durable exchange for each queue. Use a queue of another name, delete the exchange if nothing needs it, or "
            "declare the queue yourself and set declare=False"
        )
    if not name.startswith("x-"):
        return (
            f"the queue exists with other properties: {difference}. Use a queue of another name, or set declare=False "
            "to use the queue as it is"
        )
    written = theirs.strip("'")
    in_a_url = f" (in a URL ?{name}={written})" if theirs != "none" else ""
    return (
        f"the queue exists with other arguments: {difference}. Pass queue_arguments= as the queue has them{in_a_url}, "
        "or delete the queue, with what waits in it"
    )


def _redis_refusal(exc: Exception, doing: str, said: str) -> TransportError | None:
    """Return our error where Redis has answered, and refused; its driver is not imported here."""
    kinds = {kind.__name__ for kind in type(exc).__mro__ if kind.__module__.startswith("redis.")}
    for kind, advice in _REDIS_REFUSALS.items():
        if kind in kinds:
            return TransportNotReady(f"{doing}: Redis refused: {said.rstrip('.')}. {advice}")
    if "DB index" in said or (isinstance(exc, ValueError) and said.startswith("Database is int")):  # kombu's own
        advice = "The URL ends with the number of a database: redis://host:6379/0"
        return TransportNotReady(f"{doing}: there is no such database: {said.rstrip('.')}. {advice}")
    if "ResponseError" not in kinds:
        return None
    if "wrong kind of value" in said or "unknown command" in said:
        return TransportNotReady(
            f"{doing}: Redis refused: {said}. Is a key of the queue's name used for something else?"
        )
    return TransportUnavailable(f"{doing}: Redis refused for now: {said}; nothing was done")


def _what_happened(exc: Exception, doing: str) -> str:
    if _silent(exc):
        return "the broker did not answer in time"
    if isinstance(exc, ssl.SSLCertVerificationError):
        return (
            "the broker's certificate is not accepted; check ssl_ca_certs, and that the URL has the certificate's name"
        )
    if isinstance(exc, ssl.SSLError):
        return "TLS failed; check that the port of the URL expects TLS, and the certificates"
    if doing == CONNECTING:
        return "the broker cannot be reached; check host and port in the URL, and that the broker runs"
    return "the connection to the broker was lost"


def _silent(exc: BaseException) -> bool:
    link: BaseException | None = exc
    while link is not None:
        if isinstance(link, TimeoutError) or type(link).__name__ == "TimeoutError":  # the driver of Redis has its own
            return True
        link = link.__cause__
    return False


def _said(exc: BaseException) -> str:
    text = getattr(exc, "reply_text", None)
    said = str(text if text is not None else exc).strip()
    return said.rpartition(_QUOTED_COMMAND)[2]
