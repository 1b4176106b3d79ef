"""The mapping of errors of kombu, its drivers and the operating system to errors of this package.

`ERROR_RULES` is the table of the brokers' answers and their meanings; docs/errors.md has the same table. After a lost
or silent connection the fate of the messages published on it is unknown. Error texts quote the broker, whose texts name
queues and arguments and never a payload.
"""

from __future__ import annotations

import contextlib
import re
import ssl
from collections.abc import Iterator, Sequence

import attrs
import kombu.exceptions
from amqp import exceptions as amqp

from unstract_core.errors import (
    ConfigurationError,
    ContractError,
    Meaning,
    NoRoom,
    QueueFull,
    TransportError,
    TransportNotReady,
    TransportRefused,
    TransportUnavailable,
)

CONNECTING = "connect to the broker"
"""The operation that opens a connection, in the texts of errors."""
_INEQUIVALENT = re.compile(
    r"inequivalent arg '(?P<name>[^']*)' for (?P<kind>queue|exchange) .*?"
    r"received (?P<ours>.*?) but current is (?P<theirs>.*)"
)
_TYPED = re.compile(r"the value (.*) of type '\w+'")
_ADVICE = (
    ("reserved prefix", "Choose a name that does not begin with 'amq.'"),
    ("connection limit", "Raise that limit on the broker, or close connections"),
    ("queue limit", "Raise that limit on the broker, or delete queues"),
    ("invalid arg", "Correct queue_arguments (in a URL the options that begin with x-)"),
    ("exclusive access", "The queue is exclusive to another connection. Use a queue of another name"),
    ("no queue", "Declare the queue, or set declare=True so that it is declared here"),
)
"""The advice for texts of RabbitMQ; the first that fits is used."""
_QUOTED_COMMAND = " of pipeline caused error: "
"""The text between the command, with parts of a message, and the error in texts of Redis' driver."""


class Unroutable(TransportNotReady):
    """The broker has no queue of that name."""


class Nacked(QueueFull):
    """The broker refused the message, because its queue is full."""


class Blocked(NoRoom):
    """The broker accepts no messages now: its memory or disk space is low."""


class InDoubt(Blocked):
    """A message was sent before the broker stopped accepting messages, and is not confirmed yet.

    Attributes:
        tag: The delivery tag for its confirm (`PublisherConfirms`). 0 (default): the confirm cannot be read later.
    """

    def __init__(self, message: str = "", tag: int = 0) -> None:
        super().__init__(message, fate_unknown=True)
        self.tag = tag


@attrs.frozen
class ErrorRule:
    """One row of the table.

    Attributes:
        keys: AMQP's reply codes or methods, or error classes of Redis' driver. Words of the broker's text may follow
            after a space. If two keys match, the key with words applies.
        meaning: The meaning of the answer.
        cause: The reason for the answer; a cell of the table in docs/errors.md.
        advice: The remedy, for the error's text.
        says: The words before the broker's text in the error's text.
        kind: The class of the error.
    """

    keys: tuple[str, ...]
    meaning: Meaning
    cause: str
    advice: str = ""
    says: str = ""
    kind: type[TransportError] = TransportUnavailable


_UNAVAILABLE, _IN_DOUBT, _NOT_READY, _REFUSED = Meaning

ERROR_RULES = (
    ErrorRule(
        ("311", "406 larger than configured max size"),
        _REFUSED,
        "the message exceeds the broker's limit",
        kind=TransportRefused,
    ),
    ErrorRule(
        ("403", "530"),
        _NOT_READY,
        "user, password, virtual host or permission",
        "Check the user, password, virtual host and permissions",
        kind=TransportNotReady,
    ),
    ErrorRule(
        ("404", "405", "406"),
        _NOT_READY,
        "the queue is missing, is exclusive to another connection, or has other arguments",
        kind=TransportNotReady,
    ),
    ErrorRule(("312",), _NOT_READY, "there is no queue of that name; the broker returns the message", kind=Unroutable),
    ErrorRule(("basic.nack",), _UNAVAILABLE, "the queue is full (`x-overflow=reject-publish`)", kind=Nacked),
    ErrorRule(
        ("connection.blocked",),
        _UNAVAILABLE,
        "memory or disk space of the broker is low, and the message was not sent",
        kind=Blocked,
    ),
    ErrorRule(
        ("connection.blocked unconfirmed",),
        _IN_DOUBT,
        "memory or disk space of the broker is low, and the message was sent before the broker reported it",
        kind=InDoubt,
    ),
    ErrorRule(
        ("AuthenticationError", "AuthenticationWrongNumberOfArgsError"),
        _NOT_READY,
        "Redis rejects the user or the password",
        "Check the user and password in the URL",
        "Redis refused",
        TransportNotReady,
    ),
    ErrorRule(
        ("AuthorizationError",),
        _NOT_READY,
        "Redis rejects the user, or the user's rights",
        "Check the user and password in the URL, and the rights of the user (ACL)",
        "Redis refused",
        TransportNotReady,
    ),
    ErrorRule(
        ("NoPermissionError",),
        _NOT_READY,
        "a right to a command or key of Redis is missing",
        "Give the user the right to these commands and keys (ACL)",
        "Redis refused",
        TransportNotReady,
    ),
    ErrorRule(
        ("ResponseError DB index", "ValueError Database is int"),
        _NOT_READY,
        "Redis has no database of that number",
        "End the URL with the number of a database: redis://host:6379/0",
        "there is no such database",
        TransportNotReady,
    ),
    ErrorRule(
        ("ResponseError wrong kind of value", "ResponseError unknown command"),
        _NOT_READY,
        "a key of the queue's name is used for something else, or Redis lacks a command",
        "Check that no other program uses a key of the queue's name",
        "Redis refused",
        TransportNotReady,
    ),
    ErrorRule(
        ("ResponseError",),
        _UNAVAILABLE,
        "any other refusal of Redis: memory is full, a replica is read-only",
        says="Redis refused for now",
    ),
    ErrorRule(("other",), _IN_DOUBT, "any other answer, a lost connection, no answer"),
)
_ANY_OTHER = ERROR_RULES[-1]
_BY_KIND: dict[str, list[tuple[str, ErrorRule]]] = {}
for _answer in ERROR_RULES:
    for _key in _answer.keys:
        _kind, _, _words = _key.partition(" ")
        _BY_KIND.setdefault(_kind, []).append((_words, _answer))


@contextlib.contextmanager
def mapped(doing: str, *, fate_unknown: bool = False) -> Iterator[None]:
    """Map every error of a driver in the block to an error of this package, with the driver's error as its cause.

    Args:
        doing: The operation, for the texts of errors.
        fate_unknown: Whether the operation may have taken effect if the connection is lost in the block; False by
            default.
    """
    try:
        yield
    except ContractError:
        raise
    except Exception as exc:
        raise translate(exc, doing, fate_unknown=fate_unknown) from exc


def rule_for(kinds: Sequence[str], said: str = "") -> ErrorRule:
    """Return the row of the table for an error.

    Args:
        kinds: The keys of the error, the most specific first: a reply code, a method, or an error class of the driver.
        said: The broker's text; "" (default) for none.
    """
    rows = [row for kind in kinds for row in _BY_KIND.get(kind, ())]
    fits = [answer for words, answer in rows if words and words in said]
    return next(iter(fits or [answer for words, answer in rows if not words]), _ANY_OTHER)


def translate(exc: Exception, doing: str, *, fate_unknown: bool = False) -> TransportError | ConfigurationError:
    """Return the error of this package for an error of a driver.

    An error that is not a refusal of the broker counts as a lost connection. That includes every other class, because
    py-amqp raises AttributeError and others on a connection that was lost meanwhile.

    Args:
        exc: The error.
        doing: The operation, for the text of the error.
        fate_unknown: Whether the operation may have taken effect if the connection was lost; False by default.
    """
    said = _said(exc)
    if isinstance(exc, amqp.PreconditionFailed) and (mismatch := _INEQUIVALENT.search(said)):
        problem, remedy = _inequivalent(mismatch)
        return TransportNotReady(f"{doing}: {problem}", remedy=remedy)
    if isinstance(exc, ImportError):
        return ConfigurationError(f"{doing}: {exc}; install the driver, such as pip install 'kombu[redis]'")
    if isinstance(exc, kombu.exceptions.EncodeError):
        return TransportRefused(f"{doing}: cannot be serialised ({type(exc).__name__})")
    answer = rule_for(_kinds(exc), said)
    if answer is not _ANY_OTHER:
        return _refusal(answer, doing, said)
    said = said or type(exc).__name__
    fate = "whether it took effect is unknown, so it was not tried again" if fate_unknown else "nothing was done"
    return TransportUnavailable(
        f"{doing}: {_what_happened(exc, doing)} ({said})", effect=fate, fate_unknown=fate_unknown
    )


def _inequivalent(mismatch: re.Match[str]) -> tuple[str, str]:
    """Return how an existing queue or exchange differs from the one to declare, and the remedy."""
    ours, theirs = (_TYPED.sub(r"\1", mismatch[whose]) for whose in ("ours", "theirs"))
    name, difference = mismatch["name"], f"{mismatch['name']} is {theirs} there, and {ours} was asked for"
    if mismatch["kind"] == "exchange":
        return (
            f"an exchange of the queue's name exists with other properties: {difference}. Celery declares a direct, "
            "durable exchange for each queue",
            "use a queue of another name, delete the exchange if nothing needs it, or declare the queue yourself and "
            "set declare=False",
        )
    if not name.startswith("x-"):
        return (
            f"the queue exists with other properties: {difference}",
            "use a queue of another name, or set declare=False to use the queue as it is",
        )
    written = theirs.strip("'")
    in_a_url = f" (in a URL ?{name}={written})" if theirs != "none" else ""
    return (
        f"the queue exists with other arguments: {difference}",
        f"pass queue_arguments= as the queue has them{in_a_url}, or delete the queue, with the messages in it",
    )


def _refusal(answer: ErrorRule, doing: str, said: str) -> TransportError:
    """Return the error for an answer of the broker: nothing took effect."""
    text = f"{doing}: {answer.says}: {said}" if answer.says else f"{doing}: {said}"
    if answer.meaning is Meaning.UNAVAILABLE:
        return answer.kind(text, effect="nothing was done")
    if answer.meaning is Meaning.REFUSED:
        return answer.kind(text)
    fits = [advice for words, advice in _ADVICE if words in said] if not answer.says else []
    advice = [*fits, answer.advice][0]
    return answer.kind(f"{text.rstrip('.')}. {advice}" if advice else text.rstrip("."))


def _kinds(exc: Exception) -> list[str]:
    """Return the keys of an error in the table; the driver of Redis is not imported here."""
    if isinstance(exc, amqp.AMQPError):
        return [str(type(exc).code)]
    return [
        kind.__name__
        for kind in type(exc).__mro__
        if kind.__module__.startswith("redis.") or kind is ValueError  # kombu's, for a database
    ]


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
