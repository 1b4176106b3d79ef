"""The settings with which a transport reaches its broker."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from typing import Any

import attrs
import kombu

from transports.celery.amqp_patches import check_platform
from transports.celery.encode import DEAD_SUFFIX
from unstract_core.errors import ConfigurationError

_REDIS = "redis"
"""kombu's name for the driver of Redis, under each of its schemes, and the package that this driver needs."""
_LONGEST_LOCAL_DELAY = 600.0
"""The longest time in seconds that a consumer keeps a delayed message. RabbitMQ takes a message back after 30 min."""
_VISIBILITY_TIMEOUT = 3600.0
"""The default of kombu's `visibility_timeout`: seconds until it redelivers unacknowledged messages on Redis."""
_UNEXPECTED = re.compile(r"unexpected keyword argument '([a-z_]{1,40})'")


@attrs.frozen
class BrokerSettings:
    """The settings of a `CeleryTransport`, which describes them; times are in seconds."""

    url: str = attrs.field(repr=False)
    queue_arguments: Mapping[str, Any]
    declare: bool
    connect_timeout: float
    confirm_timeout: float
    heartbeat: float
    ssl: Any
    transport_options: Mapping[str, Any]
    #: kombu's name for the kind of broker, such as "amqp" or "redis"; "" for a URL that kombu cannot read.
    driver: str = attrs.field(init=False)

    @driver.default
    def _(self) -> str:
        try:
            return str(kombu.Connection(self.url).get_transport_cls().driver_type)
        except Exception:  # `connection_of` raises the error
            return ""

    def arguments_of(self, queue: str) -> dict[str, Any]:
        """Return the arguments with which a queue is declared: its own if it has some, else those for every queue."""
        own = self.queue_arguments.get(queue)
        if isinstance(own, Mapping):
            return dict(own)
        if queue.endswith(DEAD_SUFFIX):
            return {name: value for name, value in self._common.items() if name == "x-queue-type"}
        return self._common

    def keeps_priorities(self, queue: str) -> bool:
        """Whether a queue orders its messages by priority."""
        limit = self.arguments_of(queue).get("x-max-priority")
        return isinstance(limit, int) and limit >= 1

    def may_be_quorum(self, queue: str) -> bool:
        """Whether a queue is a quorum queue, or is declared elsewhere with a type that is not known here."""
        kind = self.arguments_of(queue).get("x-queue-type")
        return kind == "quorum" or (kind is None and not self.declare)

    def queue(self, name: str) -> kombu.Queue:
        """Return a queue as Celery declares one by default: with a direct exchange of its name."""
        return kombu.Queue(name, kombu.Exchange(name), name, queue_arguments=self.arguments_of(name) or None)

    @property
    def longest_local_delay(self) -> float:
        """The longest time in seconds that a consumer may keep a delayed message on this broker."""
        if not self.is_redis:
            return _LONGEST_LOCAL_DELAY
        taken_back_after = self.transport_options.get("visibility_timeout") or _VISIBILITY_TIMEOUT
        return min(_LONGEST_LOCAL_DELAY, float(taken_back_after) * 0.4)

    @property
    def kombu_options(self) -> dict[str, Any]:
        """kombu's transport options, with the timeouts that kombu does not set for Redis by itself."""
        if not self.is_redis:
            return dict(self.transport_options)
        timeouts = {"socket_timeout": self.confirm_timeout, "socket_connect_timeout": self.connect_timeout}
        return {**timeouts, **self.transport_options}

    @property
    def is_redis(self) -> bool:
        """Whether kombu emulates a broker on Redis, by any of its schemes."""
        return self.driver == _REDIS

    @property
    def _common(self) -> dict[str, Any]:
        return {name: value for name, value in self.queue_arguments.items() if not isinstance(value, Mapping)}


def connection_of(settings: BrokerSettings, heartbeat: float = 0.0) -> kombu.Connection:
    """Return a connection of kombu that is not open yet.

    Args:
        settings: The settings; each of several URLs is checked.
        heartbeat: The interval in seconds that is asked of the broker; 0 (default) for no heartbeats.

    Raises:
        ConfigurationError: No connection can be made with these settings. The text does not quote a URL that cannot be
            parsed, because any part of it may be a password.
    """
    for url in settings.url.split(";")[1:]:
        _checked(settings, url, heartbeat)
    return _checked(settings, settings.url, heartbeat)


def _checked(settings: BrokerSettings, url: str, heartbeat: float) -> kombu.Connection:
    try:
        connection = kombu.Connection(
            url,
            heartbeat=heartbeat,
            connect_timeout=settings.connect_timeout,
            ssl=dict(settings.ssl) if isinstance(settings.ssl, Mapping) else settings.ssl,  # kombu writes into it
            transport_options=settings.kombu_options,
        )
        if settings.is_redis and importlib.util.find_spec(_REDIS) is None:  # kombu would fail on None
            raise ImportError(f"{_REDIS} is not installed: pip install 'kombu[{_REDIS}]'")
        is_amqp = connection.transport.driver_type == "amqp"  # imports the driver, which may be missing
    except (KeyError, ImportError) as exc:
        raise ConfigurationError(f"no broker can be reached by this URL: {exc}") from exc
    except TypeError as exc:
        if (option := _UNEXPECTED.search(str(exc))) is None:
            raise _unparsed() from None
        raise ConfigurationError(
            f"the URL has an option that neither this package nor kombu knows: {option[1]!r}. Pass kombu's "
            "transport options as CeleryTransport(url, transport_options={...})"
        ) from None
    except ValueError:
        raise _unparsed() from None
    if is_amqp:
        check_platform()
    return connection


def _unparsed() -> ConfigurationError:
    return ConfigurationError(
        "the URL cannot be parsed; expected amqp://user:password@host:5672/vhost, with the / ? # @ ; of a password "
        "written as %2F %3F %23 %40 %3B"
    )
