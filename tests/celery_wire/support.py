"""Support of the tests of Celery's wire: the messages on the broker, Celery apps, and Celery workers."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import amqp
import attrs
import kombu
from amqp.exceptions import NotFound
from celery import Celery

from contract_tests.kit import wait_until
from unstract_core import Delivery, TransportUnavailable
from unstract_core.producer.executor import QUEUE_PREFIX

HERE = Path(__file__).parent
ALIVE = 60.0
"""The time in seconds after which an expected event is missing, on a busy machine too."""
AT_ONCE = 4.5
"""The time in seconds for an error that no connect_timeout has ended, on a busy machine too."""


@attrs.frozen
class Raw:
    """The bytes, headers and properties of a message on the broker."""

    body: bytes
    headers: dict[str, Any]
    properties: dict[str, Any]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def args(self) -> Any:
        return self.json[0]

    @property
    def kwargs(self) -> Any:
        return self.json[1]

    @property
    def embed(self) -> Any:
        return self.json[2]


def received(subscription: Any, limit: int = 1) -> list[Delivery]:
    """Receive so many messages, over any number of connections."""
    deliveries: list[Delivery] = []
    deadline = time.monotonic() + ALIVE
    while len(deliveries) < limit:
        assert time.monotonic() < deadline, f"only {len(deliveries)} of {limit} messages came"
        with contextlib.suppress(TransportUnavailable):
            deliveries += subscription.receive(limit=limit - len(deliveries), wait=0.2)
    return deliveries


class Pipe:
    """A connection of the test, which puts bytes into queues and takes them out without a transport."""

    def __init__(self, url: str) -> None:
        self._connection = kombu.Connection(url)
        self._channel = self._connection.channel()
        self._made: set[str] = set()

    def declare(self, queue: str, **arguments: Any) -> str:
        """Declare a queue as Celery does; it is deleted when the pipe is closed."""
        self._made.add(queue)
        kombu.Queue(queue, kombu.Exchange(queue), queue, queue_arguments=arguments or None).bind(
            self._channel
        ).declare()
        return queue

    def put(
        self,
        queue: str,
        body: bytes | str,
        headers: dict[str, Any] | None = None,
        *,
        content_type: str | None = "application/json",
        content_encoding: str | None = "utf-8",
        **properties: Any,
    ) -> None:
        """Publish any bytes with these headers and properties."""
        message = self._channel.prepare_message(
            body.encode() if isinstance(body, str) else body,
            content_type=content_type,
            content_encoding=content_encoding,
            headers=headers,
            priority=properties.pop("priority", None),
            properties={"delivery_mode": 2, **properties},
        )
        self._channel.basic_publish(message, exchange="", routing_key=queue)

    def put_frame(self, queue: str, body: bytes, properties: bytes) -> None:
        """Publish with this property frame, which a client may not be able to read."""
        message = amqp.Message(body)
        message._serialize_properties = lambda: properties
        self._channel.basic_publish(message, exchange="", routing_key=queue)

    def take(self, queue: str, number: int = 1, *, timeout: float = ALIVE) -> list[Raw]:
        """Take `number` messages out; fails when they have not come within `timeout` seconds."""
        messages: list[Raw] = []
        deadline = time.monotonic() + timeout
        while len(messages) < number:
            if (message := self._get(queue)) is not None:
                messages.append(message)
            elif time.monotonic() > deadline:
                raise AssertionError(f"not within {timeout} s: message {len(messages) + 1} of {number} in {queue}")
            else:
                time.sleep(0.02)
        return messages

    def one(self, queue: str, *, timeout: float = ALIVE) -> Raw:
        (message,) = self.take(queue, timeout=timeout)
        return message

    def left(self, queue: str) -> list[Raw]:
        """Take all messages out of a queue; none if it does not exist."""
        return list(iter(lambda: self._get(queue), None))

    def buried(self, queue: str, task_id: str | None = None) -> Raw:
        """Take out the next dead letter of a queue, or the next of this task."""
        while True:
            letter = self.one(f"{queue}.dead")
            if task_id in (None, letter.headers.get("id"), letter.properties.get("correlation_id")):
                return letter

    def _get(self, queue: str) -> Raw | None:
        try:
            message = self._channel.basic_get(queue, no_ack=True)
        except NotFound:  # it closes the channel, and py-amqp opens it again
            return None
        return None if message is None else _raw(message)

    def consumers(self, queue: str) -> int:
        number: int = self._channel.queue_declare(queue, passive=True).consumer_count
        return number

    def count(self, queue: str) -> int:
        """Return how many messages of a queue are ready."""
        number: int = self._channel.queue_declare(queue, passive=True).message_count
        return number

    def close(self) -> None:
        for queue in self._made:
            self.delete(queue)
        self._connection.release()

    def delete(self, queue: str) -> None:
        """Delete a queue, the exchange of its name, and those of its dead letters."""
        for name in (queue, f"{queue}.dead"):
            self._channel.queue_delete(name)
            self._channel.exchange_delete(name)


def _raw(message: Any) -> Raw:
    body = message.body
    properties = dict(message.properties)
    headers = properties.pop("application_headers", None) or {}
    return Raw(body.encode() if isinstance(body, str) else bytes(body), dict(headers), properties)


@attrs.frozen
class Bench:
    """A running Consumer with one task, `note`, and its queues.

    Attributes:
        outcome_queue: The queue for callbacks and answers.
        ran: The arguments of the task's runs.
    """

    pipe: Pipe
    queue: str
    outcome_queue: str
    ran: list[Any]

    def put(self, body: bytes | str, headers: dict[str, Any] | None, **properties: Any) -> None:
        self.pipe.put(self.queue, body, headers, **properties)

    def the_next_one_runs(self) -> None:
        """Send a good message behind the others, and wait until it has been run."""
        mark = str(uuid.uuid4())
        self.put(json.dumps([[mark], {}, {}]), {"task": "note", "id": mark})
        wait_until(lambda: mark in self.ran, timeout=ALIVE, what="the next message to be run")

    def reason(self) -> str:
        """Take out the only dead letter, and return its reason."""
        letter = self.pipe.buried(self.queue)
        assert self.pipe.left(f"{self.queue}.dead") == []
        return str(letter.headers["x-dead-reason"])


def celery_app(url: str, *, backend: str | None = "rpc://", **conf: Any) -> Celery:
    """Return a real Celery app, as a product has one."""
    app = Celery("product", broker=url, backend=backend, set_as_current=False)
    app.conf.update(broker_connection_retry_on_startup=True, **conf)
    return app


def callbacks(queue: str) -> str:
    """Return the queue for the callbacks of messages to a queue."""
    return f"{queue}-cb"


def delete_queues(url: str, names: Iterable[str]) -> None:
    """Delete the queues of these names and of all that are named after them, with their exchanges."""
    with kombu.Connection(url) as connection, connection.channel() as channel:
        for name in names:
            for one in (name, callbacks(name), default_queue(name), QUEUE_PREFIX + name):
                for queue in (one, f"{one}.dead"):
                    channel.queue_delete(queue, nowait=True)
                    channel.exchange_delete(queue, nowait=True)
        channel.basic_qos(0, 0, False)  # the broker answers when all of it is done


def default_queue(queue: str) -> str:
    """Return the queue to which the Celery worker of a queue sends messages that name none."""
    return f"{queue}.default"


@contextlib.contextmanager
def real_worker(
    url: str,
    queues: Sequence[str],
    *,
    app: str = "worker_app",
    backend: str | None = "rpc://",
    through: str | None = None,
) -> Iterator[None]:
    """Run a real Celery prefork worker, of the tasks in worker_app.py or another app, for these queues.

    It reaches the broker by the URL `through`, if there is one.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE),
        "WIRE_TEST_BROKER": through or url,
        "WIRE_TEST_BACKEND": backend or "",
        "WIRE_TEST_DEFAULT_QUEUE": default_queue(queues[0]),
        "C_FORCE_ROOT": "1",
    }
    quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat", "-l", "WARNING")
    command = [sys.executable, "-m", "celery", "-A", app, "worker", "-P", "prefork", "-c", "1", *quiet]
    with tempfile.TemporaryFile() as log, contextlib.closing(Pipe(url)) as pipe:
        process = subprocess.Popen(
            [*command, "-Q", ",".join(queues)], cwd=HERE, env=environment, stdout=log, stderr=subprocess.STDOUT
        )

        pipe.declare(default_queue(queues[0]))

        def listens() -> bool:
            if process.poll() is not None:
                log.seek(0)
                raise AssertionError(f"the worker has ended: {log.read().decode()[-2000:]}")
            return all(pipe.consumers(pipe.declare(queue)) for queue in queues)

        try:
            wait_until(listens, timeout=60, what="a real worker to listen")
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=ALIVE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
