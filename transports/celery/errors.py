"""The one place where an error of kombu, its drivers or the operating system becomes one of ours.

What the broker said decides: a lost or silent connection leaves the fate of what was published on it unknown, a
channel that the broker closed tells why. Texts carry the broker's own words, which name queues and arguments and
never a payload.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import kombu.exceptions
from amqp import exceptions as amqp

from unstract_core.errors import (
    ConfigurationError,
    ContractError,
    TransportError,
    TransportNotReady,
    TransportRefused,
    TransportUnavailable,
)

_INEQUIVALENT = re.compile(r"inequivalent arg '(?P<name>[^']*)'.*?received (?P<ours>.*?) but current is (?P<theirs>.*)")
_TYPED = re.compile(r"the value (.*) of type '\w+'")
_NOT_READY = (amqp.AccessRefused, amqp.NotFound, amqp.ResourceLocked, amqp.NotAllowed, amqp.PreconditionFailed)


class Unroutable(TransportNotReady):
    """The broker has no queue of that name."""


class Nacked(TransportUnavailable):
    """The broker refused to take the message, as a queue that is full does."""


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
    if isinstance(exc, amqp.PreconditionFailed) and (found := _INEQUIVALENT.search(_said(exc))):
        ours, theirs = (_TYPED.sub(r"\1", found[whose]) for whose in ("ours", "theirs"))
        written = theirs.strip("'")
        said = f" (in a URL ?{found['name']}={written})" if found["name"].startswith("x-") and theirs != "none" else ""
        return TransportNotReady(
            f"{doing}: the queue exists with other arguments: {found['name']} is {theirs} there, and {ours} was asked "
            f"for. Pass queue_arguments= as the queue has them{said}, or delete it"
        )
    if isinstance(exc, amqp.AccessRefused | amqp.NotAllowed):
        return TransportNotReady(
            f"{doing}: {_said(exc).rstrip('.')}. Check the user, password, virtual host and permissions"
        )
    if isinstance(exc, amqp.ContentTooLarge) or (
        isinstance(exc, amqp.PreconditionFailed) and "larger than configured max size" in _said(exc)
    ):
        return TransportRefused(f"{doing}: {_said(exc)}")
    if isinstance(exc, _NOT_READY):
        return TransportNotReady(f"{doing}: {_said(exc)}")
    if isinstance(exc, ImportError):
        return ConfigurationError(f"{doing}: {exc}; install the driver, such as pip install 'kombu[redis]'")
    if isinstance(exc, kombu.exceptions.EncodeError):
        return TransportRefused(f"{doing}: cannot be serialised ({type(exc).__name__})")
    text = (
        f"{doing}: {'the broker did not answer in time' if _silent(exc) else 'the connection to the broker was lost'}"
    )
    said = _said(exc)
    text += f" ({said})" if said else f" ({type(exc).__name__})"
    fate = "; whether it took effect is unknown, so it was not tried again" if fate_unknown else "; nothing was done"
    return TransportUnavailable(text + fate, fate_unknown=fate_unknown)


def _silent(exc: BaseException) -> bool:
    link: BaseException | None = exc
    while link is not None:
        if isinstance(link, TimeoutError) or type(link).__name__ == "TimeoutError":  # the driver of Redis has its own
            return True
        link = link.__cause__
    return False


def _said(exc: BaseException) -> str:
    text = getattr(exc, "reply_text", None)
    return str(text if text is not None else exc).strip()
