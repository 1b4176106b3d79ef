"""`from_url`: returns a transport for a libpq URL with options of this package."""

from __future__ import annotations

import re
from functools import cache
from typing import Any
from urllib.parse import unquote

import psycopg

from transports.postgres.transport import PostgresTransport
from unstract_core.errors import ConfigurationError

_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_OPTIONS: dict[str, Any] = {
    "schema": str,
    "listen": _BOOLEANS.__getitem__,
    "notify_within": _BOOLEANS.__getitem__,
    "poll_interval": float,
    "pool_size": int,
    "timeout": float,
    "statement_timeout": float,
}
_USER = re.compile(r"\w+://[^/@]*@")
"""The part in which libpq searches for a user and a password. A question mark in it does not begin the query."""


def from_url(url: str) -> PostgresTransport:
    """Return a transport for a libpq URL.

    Args:
        url: the URL. Its query may contain options of `PostgresTransport`: `schema`, `listen`, `notify_within`,
            `poll_interval`, `pool_size`, `timeout` and `statement_timeout`. Options of libpq are passed on unchanged.

    Raises:
        ConfigurationError: an option is unknown, or its value is invalid.
    """
    user = _USER.match(url)
    start = url.find("?", user.end() if user else 0)
    address, query = (url, "") if start < 0 else (url[:start], url[start + 1 :])
    own: dict[str, Any] = {}
    libpq: list[str] = []
    for part in filter(None, query.split("&")):
        name, _, value = part.partition("=")
        if (name := unquote(name)) in _OPTIONS:
            own[name] = _option(name, unquote(value))
        elif name in _libpq_options():
            libpq.append(part)
        else:
            shown = repr(name) if name.isidentifier() else "that is no name"  # it may be a part of a password
            raise ConfigurationError(
                f"unknown option {shown} in the PostgreSQL URL; use {', '.join(_OPTIONS)}, or an option of libpq"
            )
    return PostgresTransport(f"{address}?{'&'.join(libpq)}" if libpq else address, **own)


@cache
def _libpq_options() -> frozenset[str]:
    names = {option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults()}
    return frozenset(names | {"ssl"})  # the JDBC spelling that libpq takes in URLs


def _option(name: str, value: str) -> Any:
    try:
        return _OPTIONS[name](value)
    except (ValueError, KeyError) as exc:
        raise ConfigurationError(
            f"the URL option {name}={value!r} is not understood; write true or false for a switch, a number for seconds"
        ) from exc
