"""`CeleryTransport`: tasks over a message broker, in Celery's own message protocol, through kombu alone.

A real Celery worker runs what is sent here and fires its callbacks, and our Consumer runs what a real Celery client
sends. docs/celery.md says what is equal and what is not.
"""

from __future__ import annotations

import math
import re
import ssl as tls
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, urlencode

from transports.celery.broker import BrokerSettings, connection_of
from transports.celery.dead_letters import CeleryDeadLetters
from transports.celery.encode import check_queue, task_message
from transports.celery.publishers import Publishers
from transports.celery.reply_queue import ReplyQueue
from transports.celery.subscription import CelerySubscription
from unstract_core.codec import check_name
from unstract_core.errors import (
    ConfigurationError,
    NotSupported,
    PayloadError,
    TransportClosed,
    TransportError,
    TransportUnavailable,
)
from unstract_core.payload import HIGHEST_PRIORITY
from unstract_core.transport import Capabilities, Message, QueueState, Reply, check_subscription

_SPEAKS_AMQP = re.compile("(amqps?|pyamqp)://", re.IGNORECASE)


class CeleryTransport:
    """Celery's wire over any broker that kombu reaches: `amqp://` above all, `redis://` and `memory://` too.

    `queue_arguments` are those with which queues are declared, as Celery's app declares them: for every queue
    (`{"x-queue-type": "quorum"}`, `{"x-max-priority": 10}`), or by queue (`{"my_queue": {...}}`). `declare=False`
    declares nothing: then the queues must be there, or subscribing raises TransportNotReady. A publish is confirmed
    within `confirm_timeout` seconds or raises; `connect_timeout` limits each attempt to connect. `heartbeat` is asked
    of the broker for connections that receive, 0 for none. `pool_size` connections publish. `default_queue` takes the
    links that name no queue, as Celery's does. A message with time limits is refused, unless `ignore_time_limits`.
    `ssl` and `transport_options` are kombu's; where `ssl` does not say otherwise (`cert_reqs`, `server_hostname`), the
    certificate of an `amqps://` broker has to be valid, and its name that of the URL.

    Claims no atomic settlement, no transactional send, no status and no fencing: what a broker cannot do raises
    NotSupported. `send` and `reply` are thread-safe. Raises ConfigurationError for settings that cannot work.
    """

    def __init__(
        self,
        url: str,
        *,
        queue_arguments: Mapping[str, Any] | None = None,
        declare: bool = True,
        connect_timeout: float = 5.0,
        confirm_timeout: float = 30.0,
        heartbeat: float = 30.0,
        pool_size: int = 4,
        default_queue: str = "celery",
        ignore_time_limits: bool = False,
        ssl: Any = False,
        transport_options: Mapping[str, Any] | None = None,
    ) -> None:
        for name, seconds in (("connect_timeout", connect_timeout), ("confirm_timeout", confirm_timeout)):
            if not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
                raise ConfigurationError(f"{name} must be a positive number of seconds, not {seconds!r}")
        if not isinstance(heartbeat, int | float) or not 0 <= heartbeat < math.inf:
            raise ConfigurationError(f"heartbeat must be a number of seconds, 0 for none, not {heartbeat!r}")
        if not isinstance(pool_size, int) or pool_size < 1:
            raise ConfigurationError(f"pool_size must be a whole number of at least 1, not {pool_size!r}")
        if not isinstance(url, str) or "://" not in url:
            raise ConfigurationError("the URL of a broker is like amqp://user:password@host:5672/vhost")
        if queue_arguments is not None and not isinstance(queue_arguments, Mapping):
            raise ConfigurationError("queue_arguments are a mapping, such as {'x-queue-type': 'quorum'}")
        self._settings = BrokerSettings(
            url=url,
            queue_arguments=dict(queue_arguments or {}),
            declare=declare,
            connect_timeout=connect_timeout,
            confirm_timeout=confirm_timeout,
            heartbeat=heartbeat,
            ssl=_checking(url, ssl),
            transport_options=dict(transport_options or {}),
        )
        connection_of(self._settings)  # what cannot work is refused now, not at the first message
        try:
            check_name(default_queue, "default_queue")
        except PayloadError as exc:
            raise ConfigurationError(f"default_queue must be the name of a queue: {exc}") from exc
        self._default_queue = default_queue
        self._time_limits = ignore_time_limits
        self._closed = False
        self._publishers = Publishers(self._settings, pool_size)
        self._reply_queue = ReplyQueue(self._settings)
        self.dead = CeleryDeadLetters(self._publishers, default_queue)

    @property
    def capabilities(self) -> Capabilities:
        """The capabilities that this transport claims.

        Priorities need queues that keep ten of them (`x-max-priority`); only quorum queues count unsettled deliveries.
        """
        arguments = self._settings.queue_arguments
        ranks = arguments.get("x-max-priority")
        return Capabilities(
            delay=True,
            priority=isinstance(ranks, int) and ranks >= HIGHEST_PRIORITY and self._speaks_amqp,
            replies=True,
            counts_crashes=arguments.get("x-queue-type") == "quorum" and self._speaks_amqp,
            dead_letters=True,
        )

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        """Publish, wait for the broker's confirms, and return the tasks' ids.

        Raises PayloadError before anything is sent; TransportUnavailable, TransportNotReady and TransportRefused, which
        name the message and its queue. After an error some of several messages may have been sent: then, and where no
        confirm came, `fate_unknown` is True. Sending again under the same task_id is what makes a doubled task
        recognisable.
        """
        if within is not None:
            raise NotSupported("a broker is not part of your database's transaction; send without within=")
        self._check_open()
        keys = [message.payload.reply_key for message in messages if message.payload.reply_key is not None]
        address = self._reply_queue.address if keys else ""
        out = [
            task_message(
                message,
                reply_to=address if message.payload.reply_key is not None else "",
                ranked=self._settings.keeps_priorities(message.queue),
            )
            for message in messages
        ]
        if not out:
            return []
        if keys:
            self._reply_queue.expect(keys)
        outcomes = self._publishers.publish("send", out)
        if errors := [error for error in outcomes if error is not None]:
            raise _of_several(errors, len(out))
        return [one.id for one in out]

    def reply(self, key: str, *, timeout: float = 0, consume: bool = False) -> Reply | None:
        """Return the reply under `key`, waiting up to `timeout` seconds; None when there is none yet.

        Answers for what this process has sent with a `reply_key`; raises NotSupported for any other key, because a
        broker keeps no status.
        """
        self._check_open()
        return self._reply_queue.reply(key, timeout=timeout, consume=consume)

    def queues(self, names: Sequence[str] | None = None) -> Sequence[QueueState]:
        """Raises NotSupported: AMQP has no list of queues and their messages."""
        self._check_open()
        raise NotSupported("a broker does not report the state of its queues; use its own tools (rabbitmqctl)")

    def subscribe(self, queues: Sequence[str], *, lease: float) -> CelerySubscription:
        """Receive from `queues`. There are no leases: a message is ours while its connection lives.

        Args:
            queues: the names of the queues.
            lease: the time in seconds within which the consumer renews its deliveries.
        """
        names = check_subscription(queues, lease)
        for name in names:
            check_queue(name)
        self._check_open()
        return CelerySubscription(
            self._settings,
            names,
            lease=lease,
            default_queue=self._default_queue,
            time_limits=self._time_limits,
            transport_closed=lambda: self._closed,
        )

    def close(self) -> None:
        """Give back connections and threads; waiting calls end. Closing twice is allowed."""
        self._closed = True
        self._reply_queue.close()
        self._publishers.close()

    @property
    def _speaks_amqp(self) -> bool:
        return _SPEAKS_AMQP.match(self._settings.url) is not None

    def _check_open(self) -> None:
        if self._closed:
            raise TransportClosed("this Celery transport was closed")


def _of_several(errors: Sequence[TransportError], size: int) -> TransportError:
    """Return what to raise when some of a batch failed: that others were sent must not go unsaid."""
    (first, *_), sent = errors, size - len(errors)
    for one in errors:
        if isinstance(one, TransportUnavailable) and one.fate_unknown:
            return one
    if not sent:
        return first
    error = TransportUnavailable(f"{first}; {sent} of the {size} messages were sent", fate_unknown=True)
    error.__cause__ = first
    return error


_YES_OR_NO = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_OURS: dict[str, Any] = {
    "connect_timeout": float,
    "confirm_timeout": float,
    "heartbeat": float,
    "pool_size": int,
    "default_queue": str,
    "declare": _YES_OR_NO.__getitem__,
    "ignore_time_limits": _YES_OR_NO.__getitem__,
}
_ARGUMENT = re.compile(r"x-[a-z-]+")
_TLS = re.compile(r"ssl_(ca_certs|certfile|keyfile|cert_reqs|server_hostname|ciphers)")
_REQUIRED = {"required": tls.CERT_REQUIRED, "optional": tls.CERT_OPTIONAL, "none": tls.CERT_NONE}
_TRUTHS = {"true": True, "false": False}


def from_url(url: str) -> CeleryTransport:
    """Return a transport for a broker's URL; `celery+memory://` names kombu's broker inside the process.

    The options `connect_timeout`, `confirm_timeout`, `heartbeat`, `pool_size`, `default_queue`, `declare` and
    `ignore_time_limits` are ours and taken out of its query, and so are queue arguments such as `x-queue-type=quorum`,
    `x-max-priority=10` and `x-single-active-consumer=true`. An `amqps://` URL may have `ssl_ca_certs`, `ssl_certfile`,
    `ssl_keyfile` (files), `ssl_cert_reqs` (`required`, `none`), `ssl_server_hostname` and `ssl_ciphers`. The others are
    kombu's. Raises ConfigurationError for a bad value or an unknown option.
    """
    address, _, query = url.removeprefix("celery+").partition("?")
    options: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    kombus: list[tuple[str, str]] = []
    if "://" in query:
        raise ConfigurationError(
            "options stand behind the last of several URLs: amqp://one//;amqp://two//?heartbeat=10"
        )
    if "@" in query and "@" not in address:
        raise ConfigurationError(
            "the URL has an @ among its options: write the ? of a password as %3F, or the @ as %40"
        )
    encrypted: dict[str, Any] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name in _OURS:
            try:
                options[name] = _OURS[name](value)
            except (ValueError, KeyError) as exc:
                raise ConfigurationError(f"the URL option {name}={value!r} is not understood") from exc
        elif _ARGUMENT.fullmatch(name):
            arguments[name] = int(value) if value.isdigit() else _TRUTHS.get(value, value)
        elif name.startswith("ssl_") and _SPEAKS_AMQP.match(address):
            encrypted[name.removeprefix("ssl_")] = _tls_option(address, name, value)
        else:
            kombus.append((name, value))
    if kombus:
        address += "?" + urlencode(kombus)
    return CeleryTransport(address, queue_arguments=arguments, ssl=encrypted or False, **options)


def _tls_option(address: str, name: str, value: str) -> Any:
    if not address.lower().startswith("amqps:"):
        raise ConfigurationError(f"the URL option {name} goes with amqps://; this URL would not be encrypted")
    if not _TLS.fullmatch(name) or (name == "ssl_cert_reqs" and value not in _REQUIRED):
        raise ConfigurationError(
            f"the URL option {name}={value!r} is not understood; there are ssl_ca_certs, ssl_certfile, ssl_keyfile, "
            "ssl_cert_reqs (required, optional or none), ssl_server_hostname and ssl_ciphers"
        )
    return _REQUIRED[value] if name == "ssl_cert_reqs" else value


def _checking(url: str, ssl: Any) -> Any:
    """Return kombu's `ssl`, so that a certificate is held to the name in the URL, which its driver leaves out."""
    if not (ssl or url.lower().startswith("amqps:")) or not _SPEAKS_AMQP.match(url):
        return ssl
    options = dict(ssl) if isinstance(ssl, Mapping) else {}
    if "context" not in options and options.get("cert_reqs") is not tls.CERT_NONE:
        options.setdefault("server_hostname", None)  # which stands for the URL's
    return options or True
