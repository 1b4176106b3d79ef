"""The options in a broker's URL."""

from __future__ import annotations

import re
import ssl as tls
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, urlencode

from unstract_core.errors import ConfigurationError

_AMQP = re.compile("(amqps?|pyamqp)://", re.IGNORECASE)
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_OPTIONS: dict[str, Any] = {
    "connect_timeout": float,
    "confirm_timeout": float,
    "heartbeat": float,
    "pool_size": int,
    "default_queue": str,
    "declare": _BOOLEANS.__getitem__,
    "ignore_time_limits": _BOOLEANS.__getitem__,
}
"""The options of `CeleryTransport` that a URL may have, and how each is read."""
_QUEUE_ARGUMENT = re.compile(r"x-[a-z-]+")
_ARGUMENT_BOOLEANS = {"true": True, "false": False}
_TLS_OPTION = re.compile(r"ssl_(ca_certs|certfile|keyfile|cert_reqs|server_hostname|ciphers)")
_CERT_REQS = {"required": tls.CERT_REQUIRED, "optional": tls.CERT_OPTIONAL, "none": tls.CERT_NONE}


def is_amqp(url: str) -> bool:
    """Whether a URL is one of AMQP, and not of a broker that kombu emulates."""
    return _AMQP.match(url) is not None


def options_of(url: str) -> dict[str, Any]:
    """Return the arguments of `CeleryTransport` for a URL (`from_url`).

    Raises:
        ConfigurationError: An option has a bad value.
    """
    address, _, query = url.removeprefix("celery+").partition("?")
    options: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    encryption: dict[str, Any] = {}
    kombu_options: list[tuple[str, str]] = []
    if "://" in query:
        raise ConfigurationError(
            "options belong after the last of several URLs: amqp://one//;amqp://two//?heartbeat=10"
        )
    if "@" in query and "@" not in address:
        raise ConfigurationError(
            "the URL has an @ among its options: write the ? of a password as %3F, or the @ as %40"
        )
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name in _OPTIONS:
            try:
                options[name] = _OPTIONS[name](value)
            except (ValueError, KeyError) as exc:
                raise ConfigurationError(f"the URL option {name}={value!r} is not understood") from exc
        elif _QUEUE_ARGUMENT.fullmatch(name):
            arguments[name] = int(value) if value.isdigit() else _ARGUMENT_BOOLEANS.get(value, value)
        elif name.startswith("ssl_") and is_amqp(address):
            encryption[name.removeprefix("ssl_")] = _tls_option(address, name, value)
        else:
            kombu_options.append((name, value))
    if kombu_options:
        address += "?" + urlencode(kombu_options)
    return {"url": address, "queue_arguments": arguments, "ssl": encryption or False, **options}


def checked_tls(url: str, ssl: Any) -> Any:
    """Return kombu's `ssl` so that a certificate must be valid for the name in the URL; its driver omits that check."""
    if not (ssl or url.lower().startswith("amqps:")) or not is_amqp(url):
        return ssl
    options = dict(ssl) if isinstance(ssl, Mapping) else {}
    if "context" not in options and options.get("cert_reqs") is not tls.CERT_NONE:
        options.setdefault("server_hostname", None)  # None means the host of the URL
    return options or True


def _tls_option(address: str, name: str, value: str) -> Any:
    if not address.lower().startswith("amqps:"):
        raise ConfigurationError(f"the URL option {name} needs amqps://; this URL would not be encrypted")
    if not _TLS_OPTION.fullmatch(name) or (name == "ssl_cert_reqs" and value not in _CERT_REQS):
        raise ConfigurationError(
            f"the URL option {name}={value!r} is not understood; there are ssl_ca_certs, ssl_certfile, ssl_keyfile, "
            "ssl_cert_reqs (required, optional or none), ssl_server_hostname and ssl_ciphers"
        )
    return _CERT_REQS[value] if name == "ssl_cert_reqs" else value
