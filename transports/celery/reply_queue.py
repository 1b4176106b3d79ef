"""The reply queue of a process: one queue and one connection, served by one thread.

The queue exists before the first message that asks for an answer is sent. After a lost connection it exists for another
hour, so that answers that arrive meanwhile are received later. Answers for which no caller waits are dropped.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid

import attrs
import kombu

from transports.celery.broker import Broker
from transports.celery.broker_settings import BrokerSettings
from transports.celery.compression import keep_compressed
from transports.celery.errors import mapped
from transports.celery.publishers import leave_to_parent
from transports.celery.results import read_answer
from unstract_core.errors import ContractError, NotSupported, TransportClosed, TransportUnavailable
from unstract_core.transport import REPLY_TTL, Reply

_TICK = 0.5
"""The longest time in seconds between two checks whether the queue was closed; also the first pause after an error."""
_POLL_INTERVAL = 0.02
"""The time in seconds between two polls of a broker without a socket to wait on."""
_MAX_PAUSE = 2.0
"""The longest pause in seconds after an error."""
_CLEAN_UP_AT = 1000
"""The number of expected replies from which on expired ones are removed."""


@attrs.define
class _AwaitedReply:
    #: When it expires, on the monotonic clock.
    until: float
    reply: Reply | None = None


class ReplyQueue:
    """Receives the answers of a process; thread-safe.

    Args:
        settings: The settings of the broker.
    """

    def __init__(self, settings: BrokerSettings) -> None:
        self._settings = settings
        self._closed = False
        self._pid = 0
        self._changed = threading.Condition()
        self._address = ""
        self._awaited: dict[str, _AwaitedReply] = {}
        self._clean_up_at = _CLEAN_UP_AT
        self._thread: threading.Thread | None = None
        self._broker: Broker | None = None
        self._listening = False
        self._problem: ContractError | None = None
        self._begin()

    @property
    def address(self) -> str:
        """The name of the reply queue; a forked process has another one."""
        self._reset_after_fork()
        return self._address

    def expect(self, keys: list[str]) -> None:
        """Expect answers under `keys`; called before the messages that ask for them are sent.

        Raises:
            TransportUnavailable: The queue has no consumer within `connect_timeout` and `confirm_timeout`.
        """
        self._reset_after_fork()
        deadline = time.monotonic() + self._settings.connect_timeout + self._settings.confirm_timeout
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="unstract-wire-replies", daemon=True)
                self._thread.start()
            known = self._problem
            self._changed.notify_all()  # ends a pause of the thread
            while not self._listening:
                self._check_open()
                if self._problem is not None and self._problem is not known:
                    raise self._problem
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    raise TransportUnavailable(
                        "listen for replies: the broker did not answer", effect="nothing was sent"
                    )
            now = time.monotonic()
            if len(self._awaited) >= self._clean_up_at:  # not at every call, because there may be many
                self._awaited = {key: awaited for key, awaited in self._awaited.items() if awaited.until > now}
                self._clean_up_at = max(_CLEAN_UP_AT, 2 * len(self._awaited))
            for key in keys:
                self._awaited.setdefault(key, _AwaitedReply(now)).until = (
                    now + REPLY_TTL
                )  # keeps a reply that has arrived

    def reply(self, key: str, *, timeout: float, consume: bool) -> Reply | None:
        """Return the answer under a key; None if it has not arrived in time.

        Args:
            key: The reply key of a message that this process has sent.
            timeout: The time in seconds to wait.
            consume: Whether later calls return the status only.

        Raises:
            NotSupported: This process expects no answer under that key.
        """
        self._reset_after_fork()
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                self._check_open()
                awaited = self._awaited.get(key)
                if awaited is None or awaited.until <= time.monotonic():
                    raise NotSupported(
                        "a broker keeps no status: reply() works for one hour, in the process that sent the message "
                        "with a reply_key. Ask your Celery app's result backend, or dispatch over PostgreSQL"
                    )
                remaining = deadline - time.monotonic()
                if awaited.reply is not None:
                    reply = awaited.reply
                    if consume:
                        awaited.reply = attrs.evolve(reply, result=None, error="")
                    return reply
                if remaining <= 0:
                    return None
                self._changed.wait(min(remaining, threading.TIMEOUT_MAX))

    def close(self) -> None:
        self._reset_after_fork()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=5 * _TICK)

    def _begin(self) -> None:
        """Start again in a forked process, which cannot use any state of its parent, not even the lock."""
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._address = str(uuid.uuid4())
        self._awaited = {}
        self._clean_up_at = _CLEAN_UP_AT
        self._thread = None
        self._broker = None
        self._listening = False
        self._problem = None

    def _reset_after_fork(self) -> None:
        if self._pid != os.getpid():
            if self._broker is not None:
                leave_to_parent(self._broker)
            self._begin()

    def _check_open(self) -> None:
        if self._closed:
            raise TransportClosed("the transport was closed")

    def _serve(self) -> None:
        pause = _TICK
        while not self._closed:
            try:
                self._listen()
                pause = _TICK
            except ContractError as exc:
                with self._changed:
                    self._problem = exc
                    self._listening = False
                    self._changed.notify_all()
                self._wait(pause)
                pause = min(_MAX_PAUSE, pause * 2)
        with self._changed:
            self._changed.notify_all()

    def _wait(self, seconds: float) -> None:
        with self._changed:
            if not self._closed:
                self._changed.wait(seconds)

    def _listen(self) -> None:
        """Receive answers until the connection breaks or the queue is closed."""
        operation = "listen for replies"
        broker = self._broker = Broker(self._settings, heartbeat=self._settings.heartbeat)
        queue = kombu.Queue(self._address, routing_key=self._address, durable=True, expires=REPLY_TTL)
        try:
            broker.declare(queue, operation)
            with mapped(operation):
                channel = keep_compressed(broker.connection.channel())
                consumer = kombu.Consumer(channel, [queue], on_message=self._receive, no_ack=True, auto_declare=False)
                consumer.consume()
                with self._changed:
                    self._listening, self._problem = True, None
                    self._changed.notify_all()
                while not self._closed:
                    with contextlib.suppress(TimeoutError):
                        broker.connection.drain_events(timeout=_TICK if broker.amqp else _POLL_INTERVAL)
                    broker.keep_alive()
                queue(channel).delete()
            broker.close()
        finally:
            self._broker = None
            broker.abort()

    def _receive(self, message: kombu.Message) -> None:
        key = message.properties.get("correlation_id")
        reply = read_answer(message, key) if isinstance(key, str) else None
        with self._changed:
            awaited = self._awaited.get(key) if isinstance(key, str) else None
            if awaited is not None and awaited.reply is None and reply is not None:
                awaited.reply = reply
                self._changed.notify_all()
