"""`CeleryTransport`: tasks over a message broker, in Celery's own message protocol, through kombu alone.

A Celery worker runs the tasks that this transport sends, with their callbacks, and the package's Consumer runs the
tasks of a Celery client. docs/celery.md lists the differences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transports.celery.broker_settings import BrokerSettings, connection_of
from transports.celery.broker_url import checked_tls, is_amqp, options_of
from transports.celery.dead_letters import CeleryDeadLetters
from transports.celery.encode import check_queue, task_message
from transports.celery.publishers import PublisherPool
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


class CeleryTransport:
    """Celery's wire over a broker that kombu supports: `amqp://`, `redis://` and `memory://`.

    `send` and `reply` are thread-safe. Atomic settlement, transactional send, status and fencing are not claimed:
    operations that a broker does not have raise NotSupported.

    Args:
        url: The URL of the broker.
        queue_arguments: The arguments with which queues are declared, as Celery's app declares them: for every queue
            (`{"x-queue-type": "quorum"}`, `{"x-max-priority": 10}`), or by queue (`{"my_queue": {...}}`). None
            (default) for none.
        declare: Whether queues are declared (default). Otherwise they must exist: `subscribe` raises TransportNotReady
            if one does not.
        connect_timeout: The limit in seconds of each attempt to connect; 5 by default.
        confirm_timeout: The time in seconds within which the broker confirms a message, or `send` raises; 30 by
            default.
        heartbeat: The interval in seconds of the heartbeats of connections that receive; 30 by default, 0 for none.
        pool_size: The highest number of connections that publish; 4 by default.
        default_queue: The queue of links that name none, as in Celery; "celery" by default.
        ignore_time_limits: Whether tasks with time limits are run without the limits; they are refused by default.
        ssl: kombu's `ssl`. By default the certificate of an `amqps://` broker must be valid for the name in the URL;
            `cert_reqs` and `server_hostname` change that.
        transport_options: kombu's transport options; None (default) for none.

    Attributes:
        dead: The dead letters.

    Raises:
        ConfigurationError: A setting has no valid value, or no connection can be made with it.
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
            raise ConfigurationError("the URL of a broker must be like amqp://user:password@host:5672/vhost")
        if queue_arguments is not None and not isinstance(queue_arguments, Mapping):
            raise ConfigurationError("queue_arguments must be a mapping, such as {'x-queue-type': 'quorum'}")
        self._settings = BrokerSettings(
            url=url,
            queue_arguments=dict(queue_arguments or {}),
            declare=declare,
            connect_timeout=connect_timeout,
            confirm_timeout=confirm_timeout,
            heartbeat=heartbeat,
            ssl=checked_tls(url, ssl),
            transport_options=dict(transport_options or {}),
        )
        connection_of(self._settings)  # raises now for unusable settings, not at the first message
        try:
            check_name(default_queue, "default_queue")
        except PayloadError as exc:
            raise ConfigurationError(f"default_queue must be the name of a queue: {exc}") from exc
        self._default_queue = default_queue
        self._time_limits = ignore_time_limits
        self._closed = False
        self._publishers = PublisherPool(self._settings, pool_size)
        self._reply_queue = ReplyQueue(self._settings)
        self.dead = CeleryDeadLetters(self._publishers, default_queue)

    @property
    def capabilities(self) -> Capabilities:
        """The capabilities that this transport claims.

        Priorities need queues that keep ten of them (`x-max-priority`); only quorum queues count unsettled deliveries.
        """
        arguments, amqp = self._settings.queue_arguments, is_amqp(self._settings.url)
        ranks = arguments.get("x-max-priority")
        return Capabilities(
            delay=True,
            priority=isinstance(ranks, int) and ranks >= HIGHEST_PRIORITY and amqp,
            replies=True,
            counts_crashes=arguments.get("x-queue-type") == "quorum" and amqp,
            dead_letters=True,
        )

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        """Publish, wait for the broker's confirms, and return the tasks' ids.

        After an error some of several messages may have been sent. If that is so, or if a confirm is missing,
        `fate_unknown` is True. Send again with the same task_id, so that a doubled task can be recognised.

        Args:
            messages: The messages.
            within: Not supported by a broker; None.

        Raises:
            PayloadError: The wire cannot carry a message; nothing was sent.
            NotSupported: `within` is given.
            TransportUnavailable: The broker cannot be reached, or has not confirmed a message.
            TransportNotReady: A queue is missing, or access is denied.
            TransportRefused: The broker refused a message for good.
        """
        if within is not None:
            raise NotSupported("a broker has no part in a database transaction. Send without within=")
        self._check_open()
        keys = [message.payload.reply_key for message in messages if message.payload.reply_key is not None]
        address = self._reply_queue.address if keys else ""
        out = [
            task_message(
                message,
                reply_to=address if message.payload.reply_key is not None else "",
                with_priority=self._settings.keeps_priorities(message.queue),
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
        return [message.id for message in out]

    def reply(self, key: str, *, timeout: float = 0, consume: bool = False) -> Reply | None:
        """Return the reply under a key; None if it has not arrived in time.

        Args:
            key: The `reply_key` of a message that this process has sent.
            timeout: The time in seconds to wait; 0 by default.
            consume: Whether later calls return the status only; False by default.

        Raises:
            NotSupported: This process sent no message with that key: a broker keeps no status.
        """
        self._check_open()
        return self._reply_queue.reply(key, timeout=timeout, consume=consume)

    def queues(self, names: Sequence[str] | None = None) -> Sequence[QueueState]:
        """Raise NotSupported: AMQP cannot list queues and their messages."""
        self._check_open()
        raise NotSupported("a broker does not report the state of its queues. Use its own tools (rabbitmqctl)")

    def subscribe(self, queues: Sequence[str], *, lease: float) -> CelerySubscription:
        """Receive from queues. There are no leases: a message belongs to a connection until the connection breaks.

        Args:
            queues: The names of the queues.
            lease: The time in seconds within which the consumer renews its deliveries.
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
        """Close the connections and end the thread; waiting calls end. Closing twice is allowed."""
        self._closed = True
        self._reply_queue.close()
        self._publishers.close()

    def _check_open(self) -> None:
        if self._closed:
            raise TransportClosed("this Celery transport was closed")


def _of_several(errors: Sequence[TransportError], size: int) -> TransportError:
    """Return the error to raise for a batch in which some messages failed; it says how many were sent."""
    (first, *_), sent = errors, size - len(errors)
    for error in errors:
        if isinstance(error, TransportUnavailable) and error.fate_unknown:
            return error
    if not sent:
        return first
    partial = TransportUnavailable(f"{first}; {sent} of the {size} messages were sent", fate_unknown=True)
    partial.__cause__ = first
    return partial


def from_url(url: str) -> CeleryTransport:
    """Return a transport for a broker's URL; `celery+memory://` names kombu's broker inside the process.

    The query of the URL may have:

    - options of `CeleryTransport`: `connect_timeout`, `confirm_timeout`, `heartbeat`, `pool_size`, `default_queue`,
      `declare` and `ignore_time_limits`;
    - queue arguments, such as `x-queue-type=quorum`, `x-max-priority=10` and `x-single-active-consumer=true`;
    - with `amqps://`: `ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile` (files), `ssl_cert_reqs` (`required`, `none`),
      `ssl_server_hostname` and `ssl_ciphers`;
    - options of kombu.

    Raises:
        ConfigurationError: An option is unknown or has a bad value.
    """
    return CeleryTransport(**options_of(url))
