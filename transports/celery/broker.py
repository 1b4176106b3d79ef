"""One connection to the broker, with a channel to publish on: declaring, publishing with confirms, hanging up.

Messages are published in one go and their confirms waited for together, so that a batch costs one round trip. Every
wait has a limit of `confirm_timeout` seconds. Brokers that kombu plays itself
(memory://, redis://) confirm by returning.

A broker that is short of memory or disk space blocks the connections that publish: it reads nothing more from them
until that is over. Then nothing is published, and what had been handed over before keeps its place: its confirm comes
when the broker goes on.

Not for two threads at once.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, TypeVar

import attrs
import kombu
from amqp.exceptions import MessageNacked
from kombu.common import maybe_declare

from transports.celery.amqp_frame_patches import note_blocks, tolerate_unreadable_properties
from transports.celery.amqp_patches import Waits, check_platform, tend
from transports.celery.compression import keep_compressed
from transports.celery.encode import DEAD_SUFFIX, Outgoing
from transports.celery.errors import CONNECTING, Blocked, InDoubt, Nacked, Unroutable, mapped, translate
from unstract_core.errors import ConfigurationError, TransportError, TransportUnavailable

_One = TypeVar("_One")
_IN_FLIGHT = 500
"""How many messages may wait for their confirms at once."""
_REDIS = "redis"
"""kombu's name for the driver of Redis, under each of its schemes, and the package that this driver needs."""
_UNEXPECTED = re.compile(r"unexpected keyword argument '([a-z_]{1,40})'")
_LONGEST_LOCAL_DELAY = 600.0
"""Seconds that a message may wait with a consumer for its time: RabbitMQ takes back what is held for half an hour."""
_VISIBILITY_TIMEOUT = 3600.0
"""Seconds after which kombu takes back what is held on Redis, unless `visibility_timeout` says otherwise."""
_BLOCKED_WAIT = 1.0
"""Seconds that a confirm is waited for over a connection that is blocked and will be asked again."""
_GOODBYE = 1.0
"""Seconds that a broker is given to answer when a connection is closed."""


@attrs.frozen
class BrokerSettings:
    """How a transport reaches its broker. Seconds throughout; see CeleryTransport."""

    url: str = attrs.field(repr=False)
    queue_arguments: Mapping[str, Any]
    declare: bool
    connect_timeout: float
    confirm_timeout: float
    heartbeat: float
    ssl: Any
    transport_options: Mapping[str, Any]
    driver: str = attrs.field(init=False)
    """kombu's name for what speaks to this broker, such as "amqp" or "redis"; "" for a URL that kombu cannot read."""

    @driver.default
    def _(self) -> str:
        try:
            return str(kombu.Connection(self.url).get_transport_cls().driver_type)
        except Exception:  # `connection_of` raises the error
            return ""

    def arguments_of(self, queue: str) -> dict[str, Any]:
        """Return the arguments with which a queue is declared: its own where there are such, else those for all."""
        own = self.queue_arguments.get(queue)
        if isinstance(own, Mapping):
            return dict(own)
        if queue.endswith(DEAD_SUFFIX):
            return {name: value for name, value in self._common.items() if name == "x-queue-type"}
        return self._common

    def keeps_priorities(self, queue: str) -> bool:
        limit = self.arguments_of(queue).get("x-max-priority")
        return isinstance(limit, int) and limit >= 1

    def may_be_quorum(self, queue: str) -> bool:
        """Whether a queue is a quorum queue, or may be one because it is declared elsewhere and its type not given."""
        kind = self.arguments_of(queue).get("x-queue-type")
        return kind == "quorum" or (kind is None and not self.declare)

    def queue(self, name: str) -> kombu.Queue:
        """Return a queue as Celery declares one by default: with a direct exchange of its name."""
        return kombu.Queue(name, kombu.Exchange(name), name, queue_arguments=self.arguments_of(name) or None)

    @property
    def longest_local_delay(self) -> float:
        """Seconds that a consumer may hold a message before its time, on this broker."""
        if not self.is_redis:
            return _LONGEST_LOCAL_DELAY
        taken_back_after = self.transport_options.get("visibility_timeout") or _VISIBILITY_TIMEOUT
        return min(_LONGEST_LOCAL_DELAY, float(taken_back_after) * 0.4)

    @property
    def kombus_options(self) -> dict[str, Any]:
        """Return kombu's transport options: without ours, a Redis that is silent is waited for without an end."""
        if not self.is_redis:
            return dict(self.transport_options)
        ours = {"socket_timeout": self.confirm_timeout, "socket_connect_timeout": self.connect_timeout}
        return {**ours, **self.transport_options}

    @property
    def is_redis(self) -> bool:
        """Whether kombu plays a broker on Redis, by any of its schemes."""
        return self.driver == _REDIS

    @property
    def _common(self) -> dict[str, Any]:
        return {name: value for name, value in self.queue_arguments.items() if not isinstance(value, Mapping)}


class Broker:
    """An open connection. `amqp` is true for a real broker, and false for one that kombu plays itself.

    `blocked` is why the broker takes no messages over it for now, None while it does; `on_block` is called with that.
    Messages whose confirm is missing meanwhile end as InDoubt; one that is `lasting` gives up waiting for them soon,
    because its owner asks for the answers later (`answer_to`).
    """

    def __init__(
        self,
        settings: BrokerSettings,
        *,
        heartbeat: float = 0.0,
        lasting: bool = False,
        on_block: Callable[[str | None], None] = lambda reason: None,
    ) -> None:
        self.blocked: str | None = None
        self._unblocked_at = 0.0
        self._settings = settings
        self._lasting = lasting
        self._on_block = on_block
        self._confirms = _Confirms()
        self._failed = False
        with mapped(CONNECTING):
            self.connection = connection_of(settings, heartbeat)
            try:
                more = max(0, len(self.connection.alt) - 1)  # each URL once: kombu would pause, and try again
                self.connection.ensure_connection(max_retries=more, reraise_as_library_errors=False)
                self.amqp = self.connection.transport.driver_type == "amqp"
                if self.amqp:
                    self._waits = Waits(
                        self.connection.connection, settings.confirm_timeout, lambda: self.blocked is not None
                    )
                    tolerate_unreadable_properties(self.connection.connection)
                    note_blocks(self.connection.connection, self._note_block)
                self._channel = self._declaring = self._open_channel()
                if self.amqp:  # so that a queue that is refused closes no other channel
                    self._declaring = self.connection.channel()
                self._producer = kombu.Producer(self._channel, serializer="json")
            except BaseException:
                self.hang_up()
                raise

    @property
    def has_hung_up(self) -> bool:
        """Whether the broker, or the network, has ended the connection while it was idle."""
        if not self.amqp:
            return False
        try:
            while self.usable:
                self.connection.drain_events(timeout=0)
        except TimeoutError:
            return not self.connection.connected
        except Exception:
            return True
        return not self.usable

    def channel(self) -> Any:
        """Open a channel on which something lasts; when the broker closes it the connection is of no more use.

        py-amqp opens such a channel anew by itself, without its consumers, its confirms and what it was to acknowledge.
        """
        channel = self.passing_channel()
        if self.amqp:
            channel.on_open = self._note_reopened
        return channel

    def passing_channel(self) -> Any:
        """Open a channel for one use. The connection stays of use when the broker closes the channel."""
        channel = keep_compressed(self.connection.channel())
        if self._settings.is_redis:
            _requeue_first(channel)
        return channel

    def in_requeue_order(self, messages: Sequence[_One]) -> Sequence[_One]:
        """Return messages in the order in which they have to be requeued to stand in their queue as given.

        On Redis each requeued message becomes the first of its queue, so the last one has to be requeued first.
        """
        return messages[::-1] if self._settings.is_redis else messages

    def tend(self) -> None:
        """Send a heartbeat where one is due. Raises, and closes the connection, where the broker's own are missing."""
        if self.amqp:
            tend(self.connection.connection)

    def declare(self, queue: kombu.Queue, doing: str) -> None:
        """Declare a queue, once for this connection."""
        with mapped(f"{doing}: declare queue {queue.name!r}"):
            maybe_declare(queue, self._declaring)

    def find(self, queue: str, doing: str) -> None:
        """See that a queue is there, and declare it where that is ours to do; kombu's own brokers have every queue."""
        if self._settings.declare:
            self.declare(self._settings.queue(queue), doing)
        elif self.amqp:
            with mapped(f"{doing}: look for queue {queue!r}"):
                self._declaring.queue_declare(queue, passive=True)

    def state_of(self, queue: str) -> tuple[int, int]:
        """Return how many messages of a queue are ready, and how many consumers it has; it has to be there."""
        found = self._declaring.queue_declare(queue, passive=True)
        return found.message_count, found.consumer_count

    def hurry(self, seconds: float) -> None:
        """Wait no longer than this for anything but confirms from now on."""
        if self.amqp:
            self._waits.limit(seconds)

    def publish(
        self, doing: str, messages: Sequence[Outgoing], *, together: bool = False
    ) -> list[TransportError | None]:
        """Publish, and return for each message what kept it from being accepted: None where it was confirmed.

        Where a queue cannot be declared the messages for others are sent all the same; none is if `together`. Never
        raises a TransportError, for some may have been accepted. After an error that concerns the connection the
        broker is of no more use (`usable`).
        """
        if self.blocked is not None:
            return [_blocked(_at(doing, message), self.blocked) for message in messages]
        refused: dict[int, TransportError] = {}
        for number, message in enumerate(messages):
            if (error := self._refusal(doing, message)) is not None:
                refused[number] = error
                if together or not self.usable:
                    return [error] * len(messages)
        ready = [message for number, message in enumerate(messages) if number not in refused]
        outcomes: list[TransportError | None] = []
        for start in range(0, len(ready), _IN_FLIGHT):
            batch = ready[start : start + _IN_FLIGHT]
            if outcomes and not self.usable:
                outcomes += [_undone(outcomes[-1], _at(doing, message)) for message in batch]
            elif self.blocked is not None:
                outcomes += [_blocked(_at(doing, message), self.blocked) for message in batch]
            else:
                outcomes += self._publish(doing, batch)
        for number, error in refused.items():
            outcomes.insert(number, error)
        return outcomes

    def answer_to(self, tag: int) -> bool | None:
        """Return whether a message that was in doubt was accepted; None where there is no answer yet.

        Raises TransportUnavailable, after which this is of no more use, where the broker takes messages again and has
        not answered for `confirm_timeout` seconds.
        """
        answer = self._confirms.answer_to(tag)
        if answer is None:  # it may be here, and not be read yet
            with contextlib.suppress(TimeoutError):
                while True:
                    self.connection.drain_events(timeout=0)
            answer = self._confirms.answer_to(tag)
        patience = self._settings.confirm_timeout
        waited = time.monotonic() - max(self._unblocked_at, self._waits.wrote_at)
        if answer is None and self.blocked is None and waited >= patience:
            self._failed = True
            raise TransportUnavailable(
                f"the broker takes messages again and has not confirmed one within {patience:g} s, so the connection "
                "is given up; whether that message took effect is unknown",
                fate_unknown=True,
            )
        return answer

    @property
    def usable(self) -> bool:
        return not self._failed and bool(self.connection.connected)

    def close(self, finish: Callable[[], None] | None = None) -> None:
        """Do what is left to do, and close in order, as far as the broker answers in a moment."""
        try:
            if self.connection.connected:
                self.hurry(_GOODBYE)
            if finish is not None:
                finish()
            self.connection.release()
        except Exception:
            self.hang_up()

    def hang_up(self) -> None:
        """Drop the connection without a word: it is broken, or another process's."""
        with contextlib.suppress(Exception):
            self.connection.collect(socket_timeout=0.1)

    def _refusal(self, doing: str, message: Outgoing) -> TransportError | None:
        """Declare the queue of a message, and return what the broker has against it."""
        if not (message.declared and self._settings.declare):
            return None
        try:
            self.declare(self._settings.queue(message.queue), doing)
        except TransportError as exc:
            self._failed = self._failed or isinstance(exc, TransportUnavailable)
            return exc
        return None

    def _publish(self, doing: str, messages: Sequence[Outgoing]) -> list[TransportError | None]:
        self._confirms.begin()
        failure: TransportError | None = None
        stopped: str | None = None
        published = 0
        try:
            for message in messages:
                self._confirms.expect(message)
                self._hand_over(message)
                published += 1
                if (stopped := self.blocked) is not None:
                    break
            self._await_confirms()
            if self.amqp and self.blocked is None:
                self._on_block(None)  # also where it was another connection that was blocked
        except TransportError as exc:
            failure = exc
        except Exception as exc:
            ours = translate(exc, _named(doing, messages, published), fate_unknown=True)
            if isinstance(ours, ConfigurationError):
                raise ours from exc
            failure = ours
            failure.__cause__ = exc
        if failure is not None and self.blocked is not None and self.connection.connected:
            stopped = self.blocked  # it will answer later, and the connection is kept for that
        else:
            self._failed = self._failed or failure is not None
        if stopped is not None and not self._failed:
            return [self._outcome_blocked(doing, n, message, published, stopped) for n, message in enumerate(messages)]
        alone = len(messages) == 1
        return [self._outcome(doing, n, message, published, failure, alone) for n, message in enumerate(messages)]

    def _hand_over(self, message: Outgoing) -> None:
        if message.lives is not None and self._settings.is_redis:
            milliseconds = int(message.lives * 1000)
            self._channel.queue_declare(queue=message.queue, arguments={"x-expires": milliseconds})
        self._producer.publish(
            message.body,
            exchange="",
            routing_key=message.queue,
            headers=message.headers,
            content_type=message.content_type,
            content_encoding=message.content_encoding,
            compression=message.compression,
            mandatory=message.declared,
            **message.properties,
        )
        if message.lives is not None:
            getattr(self._channel, "_expires", {}).pop(message.queue, None)  # kombu would keep it for ever

    def _await_confirms(self) -> None:
        if not self.amqp:
            self._confirms.all()
            return
        began = time.monotonic()
        while self._confirms.missing:
            patience = self._settings.confirm_timeout
            if self.blocked is not None and self._lasting:
                patience = min(patience, _BLOCKED_WAIT)
            if (remaining := began + patience - time.monotonic()) <= 0:  # though other events kept coming
                raise TimeoutError
            self.connection.drain_events(timeout=remaining)

    def _outcome(
        self, doing: str, number: int, message: Outgoing, published: int, failure: TransportError | None, alone: bool
    ) -> TransportError | None:
        where = _at(doing, message)
        answered, error = self._answer(number, message, where)
        if answered:
            return error
        in_doubt = getattr(failure, "fate_unknown", False)
        if number > published or (number == published and not in_doubt):
            return _undone(failure, where)
        if alone or in_doubt:
            return failure
        doubtful = TransportUnavailable(f"{where} may have been sent before another one failed", fate_unknown=True)
        doubtful.__cause__ = failure
        return doubtful

    def _outcome_blocked(
        self, doing: str, number: int, message: Outgoing, published: int, reason: str
    ) -> TransportError | None:
        where = _at(doing, message)
        answered, error = self._answer(number, message, where)
        if answered:
            return error
        if number >= published:
            return _blocked(where, reason)
        tag = self._confirms.doubt(number) if self._lasting else 0  # a sender never asks for the answer
        text = f"{where}: the broker takes no messages for now ({reason}), and has not confirmed it yet"
        return InDoubt(f"{text}; whether it took effect is unknown, so it was not tried again", tag)

    def _answer(self, number: int, message: Outgoing, where: str) -> tuple[bool, TransportError | None]:
        """Return whether the broker has answered for a message of the batch, and what it has against it."""
        if (reason := self._confirms.returned.get((message.id, message.queue))) is not None:
            self.connection.declared_entities.clear()  # what was declared has been deleted since
            remedy = (
                "the next message declares it again" if self._settings.declare else "declare it, or set declare=True"
            )
            return True, Unroutable(f"{where} could not be routed ({reason}); no such queue is there: {remedy}")
        if self._confirms.is_nacked(number):
            nacked = Nacked(f"{where} was refused by the broker (nacked), as by a queue that is full; it was not sent")
            nacked.__cause__ = MessageNacked()
            return True, nacked
        return self._confirms.is_acked(number), None

    def _open_channel(self) -> Any:
        channel = self.channel()
        if self.amqp:
            channel.confirm_select()
            self._confirms.listen(channel)
        elif self._settings.is_redis:
            channel.priority_steps = [0]  # one list, first in, first out: kombu gives out the lowest priority first
        return channel

    def _note_block(self, reason: str | None) -> None:
        self.blocked = reason
        if reason is None:
            self._unblocked_at = time.monotonic()
        self._on_block(reason)

    def _note_reopened(self, channel: Any) -> None:
        self._failed = True


def _requeue_first(channel: Any) -> None:
    """Let messages that are requeued on a channel of kombu's Redis come next, whatever their priority.

    kombu keeps a list for each priority. It would append the message to the list of its priority, where all that was
    sent meanwhile with a lower number comes before it.
    """
    requeue = channel._do_restore_message

    def first(payload: Any, exchange: str, routing_key: str, pipe: Any, leftmost: bool = False) -> None:
        steps, channel.priority_steps = channel.priority_steps, [0]
        try:
            requeue(payload, exchange, routing_key, pipe)  # not leftmost: messages are taken from the right
        finally:
            channel.priority_steps = steps

    channel._do_restore_message = first


class _Confirms:
    """The broker's answers, by the number of each publish on its channel, which counts from 1.

    A batch begins anew each time; `returned` is by the message's id and queue. What is doubted outlives its batch.
    """

    def __init__(self) -> None:
        self.returned: dict[tuple[str, str], str] = {}
        self._first = 1
        self._last = 0
        self._missing: set[int] = set()
        self._acked: set[int] = set()
        self._nacked: set[int] = set()
        self._keys: dict[int, tuple[str, str]] = {}
        self._doubted: dict[int, bool | None] = {}

    def begin(self) -> None:
        self._first = self._last + 1
        self._missing, self._acked, self._nacked = set(), set(), set()
        self._keys = {tag: key for tag, key in self._keys.items() if tag in self._doubted}
        self.returned = {}

    def expect(self, message: Outgoing) -> None:
        """Note that a message is published next."""
        self._last += 1
        self._missing.add(self._last)
        self._keys[self._last] = (message.id, message.queue)

    def listen(self, channel: Any) -> None:
        channel.events["basic_ack"].add(lambda tag, multiple: self._note(True, tag, multiple))
        channel.events["basic_nack"].add(lambda tag, multiple: self._note(False, tag, multiple))
        channel.events["basic_return"].add(self._note_return)

    def all(self) -> None:
        self._note(True, self._last, True)

    @property
    def missing(self) -> bool:
        return bool(self._missing)

    def is_acked(self, number: int) -> bool:
        return self._first + number in self._acked

    def is_nacked(self, number: int) -> bool:
        return self._first + number in self._nacked

    def doubt(self, number: int) -> int:
        """Keep the answer to a message of this batch for later; returns by what it can be asked for."""
        tag = self._first + number
        self._doubted[tag] = None
        return tag

    def answer_to(self, tag: int) -> bool | None:
        """Return whether a doubted message was accepted, None where that is not known yet. Can be asked once."""
        answer = self._doubted.get(tag, False)
        if answer is not None:
            self._doubted.pop(tag, None)
        return answer

    def _note(self, accepted: bool, tag: int, multiple: bool) -> None:
        answers = self._acked if accepted else self._nacked
        answered = {n for n in self._missing if n <= tag} if multiple else self._missing & {tag}
        self._missing -= answered
        answers |= answered
        for doubted, answer in list(self._doubted.items()) if self._doubted else ():
            if answer is None and (doubted <= tag if multiple else doubted == tag):
                self._doubted[doubted] = accepted

    def _note_return(self, exc: Any, exchange: str, routing_key: str, message: Any) -> None:
        headers = message.properties.get("application_headers") or {}
        id = str(headers.get("id") or message.properties.get("correlation_id"))
        key = (id, routing_key)
        self.returned[key] = str(exc.reply_text)
        for tag in self._doubted:
            if self._keys.get(tag) == key:
                self._doubted[tag] = False


def _blocked(where: str, reason: str) -> Blocked:
    return Blocked(f"{where}: the broker takes no messages for now ({reason})", effect="nothing was done")


def _undone(failure: TransportError | None, where: str) -> TransportError:
    """Return the error for a message that was never handed over, because an earlier one failed."""
    if failure is None or not getattr(failure, "fate_unknown", False):
        return failure or TransportError(f"{where} was not sent")
    undone = translate(ConnectionError("an earlier message of the batch failed"), where)
    undone.__cause__ = failure
    return undone  # type: ignore[return-value]  # a ConnectionError is never a matter of configuration


def _at(doing: str, message: Outgoing) -> str:
    return f"{doing}: message {message.id} to queue {message.queue!r}"


def _named(doing: str, messages: Sequence[Outgoing], published: int) -> str:
    more = f" and {len(messages) - 1} more" if len(messages) > 1 else ""
    return _at(doing, messages[min(published, len(messages) - 1)]) + more


def connection_of(settings: BrokerSettings, heartbeat: float = 0.0) -> kombu.Connection:
    """Return a connection that is not open yet. Raises ConfigurationError for settings with which none can be made.

    Each of several URLs is looked at, not only the first. The texts quote nothing of an address that cannot be parsed,
    for any part of it may be a password.
    """
    urls = settings.url.split(";")
    for url in urls[1:]:
        _checked(settings, url, heartbeat)
    return _checked(settings, settings.url, heartbeat)


def _checked(settings: BrokerSettings, url: str, heartbeat: float) -> kombu.Connection:
    try:
        connection = kombu.Connection(
            url,
            heartbeat=heartbeat,
            connect_timeout=settings.connect_timeout,
            ssl=dict(settings.ssl) if isinstance(settings.ssl, Mapping) else settings.ssl,  # kombu writes into it
            transport_options=settings.kombus_options,
        )
        if settings.driver == "redis" and importlib.util.find_spec("redis") is None:  # kombu would fail on None
            raise ImportError("redis is not installed: pip install 'kombu[redis]'")
        is_amqp = connection.transport.driver_type == "amqp"  # resolves the driver, which may be missing
    except (KeyError, ImportError) as exc:
        raise ConfigurationError(f"no broker can be reached by this URL: {exc}") from exc
    except TypeError as exc:
        if (option := _UNEXPECTED.search(str(exc))) is None:
            raise _unparsed() from None
        raise ConfigurationError(
            f"the URL has an option that neither we nor kombu know: {option[1]!r}. kombu's transport options are given "
            "as CeleryTransport(url, transport_options={...})"
        ) from None
    except ValueError:
        raise _unparsed() from None
    if settings.driver == _REDIS and find_spec(_REDIS) is None:
        raise ConfigurationError(f"{connection.transport_cls}:// needs a driver: pip install 'kombu[{_REDIS}]'")
    if is_amqp:
        check_platform()
    return connection


def _unparsed() -> ConfigurationError:
    return ConfigurationError(
        "the URL cannot be parsed; expected amqp://user:password@host:5672/vhost, with the / ? # @ ; of a password "
        "written as %2F %3F %23 %40 %3B"
    )
