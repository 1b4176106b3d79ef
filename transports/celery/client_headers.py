"""The headers of a message that belong to the client: neither Celery's, nor this package's, nor a broker's."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any

from transports.celery.encode import BROKERS_HEADERS, CELERYS_HEADERS, HEADERS_HEADER, ORG_HEADER, TRACE_HEADERS
from unstract_core.codec import MAX_HEADERS_BYTES, check_headers
from unstract_core.errors import PayloadError
from unstract_core.observability.log_events import NewNames, emit
from unstract_core.producer.executor import FAIRNESS_HEADER

logger = logging.getLogger("unstract_wire.celery")

_left_out = NewNames()
"""The names of headers for which a warning was logged."""


def client_headers(headers: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the `headers` of the wire: the client's own headers that are texts, and those that this package sent.

    A client's headers are beside Celery's, or in a table `headers`, as instrumentation writes them. If they are too
    large for the wire, the context of a trace has priority. The names of the others are logged.

    Args:
        headers: The headers of a message.
    """
    ours = headers.get(HEADERS_HEADER)
    if ours is not None:
        try:
            ours = check_headers(ours, "$.headers")
        except PayloadError:
            return None  # as on every transport: anything but an object of texts counts as absent
    known = {**_unknown_headers(headers.get("headers")), **_unknown_headers(headers), **(ours or {})}
    room = MAX_HEADERS_BYTES
    kept: set[str] = set()
    for name in sorted(known, key=lambda name: name not in TRACE_HEADERS):
        with contextlib.suppress(PayloadError):
            check_headers({name: known[name]}, "$.headers")
            if (size := len(name.encode()) + len(known[name].encode())) <= room:
                room -= size
                kept.add(name)
    if left_out := [name for name in known if name not in kept]:
        _note_left_out(tuple(sorted(left_out)))
    carried = {name: value for name, value in known.items() if name in kept}
    return carried if carried or ours is not None else None


def _unknown_headers(headers: Any) -> dict[str, Any]:
    """Return the headers that are neither Celery's nor this package's nor a broker's."""
    if not isinstance(headers, Mapping):
        return {}
    ours = (FAIRNESS_HEADER, ORG_HEADER, HEADERS_HEADER)
    return {
        name: value
        for name, value in headers.items()
        if value is not None
        and isinstance(name, str)
        and name not in CELERYS_HEADERS
        and name not in ours
        and not BROKERS_HEADERS.fullmatch(name)
    }


def _note_left_out(names: tuple[str, ...]) -> None:
    """Log the names of headers that are too large for the wire, once: a sender sends the same ones every time."""
    if _left_out.are(names):
        emit(logger, logging.WARNING, "message_headers_left_out", names=NewNames.shown(names), count=len(names))
