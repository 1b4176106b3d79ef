"""What the tests of Celery's wire share: a look behind the transport, real Celery apps, and real workers."""

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
"""Seconds after which something that ought to happen has not: the machine may be busy."""
AT_ONCE = 4.5
"""Seconds within which something is told, also on a busy machine, that no connect_timeout has ended."""


@attrs.frozen
class Raw:
    """A message as it stands on the broker: nothing is read of it but the bytes."""

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
    """Receive so many messages, over as many connections as that takes."""
    found: list[Delivery] = []
    deadline = time.monotonic() + ALIVE
    while len(found) < limit:
        assert time.monotonic() < deadline, f"only {len(found)} of {limit} messages came"
        with contextlib.suppress(TransportUnavailable):
            found += subscription.receive(limit=limit - len(found), wait=0.2)
    return found


class Pipe:
    """A connection of the test's own: it puts bytes into queues and takes them out, and no transport knows of it."""

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
        """Publish bytes with these headers and properties, whatever they are."""
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
        """Publish with this property frame, flags and all, which no client may be able to read."""
        message = amqp.Message(body)
        message._serialize_properties = lambda: properties
        self._channel.basic_publish(message, exchange="", routing_key=queue)

    def take(self, queue: str, number: int = 1, *, timeout: float = ALIVE) -> list[Raw]:
        """Take `number` messages out; fails when they have not come within `timeout` seconds."""
        found: list[Raw] = []
        deadline = time.monotonic() + timeout
        while len(found) < number:
            if (message := self._get(queue)) is not None:
                found.append(message)
            elif time.monotonic() > deadline:
                raise AssertionError(f"not within {timeout} s: message {len(found) + 1} of {number} in {queue}")
            else:
                time.sleep(0.02)
        return found

    def one(self, queue: str, *, timeout: float = ALIVE) -> Raw:
        (found,) = self.take(queue, timeout=timeout)
        return found

    def left(self, queue: str) -> list[Raw]:
        """Take out whatever stands in a queue now; nothing where there is no such queue."""
        return list(iter(lambda: self._get(queue), None))

    def buried(self, queue: str, task_id: str | None = None) -> Raw:
        """Take out the next dead letter of a queue, or the next of this task."""
        while True:
            found = self.one(f"{queue}.dead")
            if task_id in (None, found.headers.get("id"), found.properties.get("correlation_id")):
                return found

    def _get(self, queue: str) -> Raw | None:
        try:
            message = self._channel.basic_get(queue, no_ack=True)
        except NotFound:  # which closes the channel, and py-amqp opens it anew
            return None
        return None if message is None else _raw(message)

    def consumers(self, queue: str) -> int:
        found: int = self._channel.queue_declare(queue, passive=True).consumer_count
        return found

    def count(self, queue: str) -> int:
        """Return how many messages wait in a queue; those that a consumer holds are not among them."""
        found: int = self._channel.queue_declare(queue, passive=True).message_count
        return found

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
    """A consumer of ours at work, and the ways in and out.

    Its one task is `note`; what that got stands in `ran`. `told` is a queue for callbacks and answers.
    """

    pipe: Pipe
    queue: str
    told: str
    ran: list[Any]

    def put(self, body: bytes | str, headers: dict[str, Any] | None, **properties: Any) -> None:
        self.pipe.put(self.queue, body, headers, **properties)

    def the_next_one_runs(self) -> None:
        """Send a good message behind the others, and wait until it has been run."""
        mark = str(uuid.uuid4())
        self.put(json.dumps([[mark], {}, {}]), {"task": "note", "id": mark})
        wait_until(lambda: mark in self.ran, timeout=ALIVE, what="the next message to be run")

    def reason(self) -> str:
        """Take out the one dead letter there is, and return why it was buried."""
        found = self.pipe.buried(self.queue)
        assert self.pipe.left(f"{self.queue}.dead") == []
        return str(found.headers["x-dead-reason"])


def celery_app(url: str, *, backend: str | None = "rpc://", **conf: Any) -> Celery:
    """Return a real Celery app, as a product has one."""
    app = Celery("product", broker=url, backend=backend, set_as_current=False)
    app.conf.update(broker_connection_retry_on_startup=True, **conf)
    return app


def callbacks(queue: str) -> str:
    """Return where the callbacks go of what was sent to a queue."""
    return f"{queue}-cb"


def delete_queues(url: str, names: Iterable[str]) -> None:
    """Delete the queues of these names and of all that are named after them, with their exchanges."""
    with kombu.Connection(url) as connection, connection.channel() as channel:
        for name in names:
            for one in (name, callbacks(name), default_queue(name), QUEUE_PREFIX + name):
                for queue in (one, f"{one}.dead"):
                    channel.queue_delete(queue, nowait=True)
                    channel.exchange_delete(queue, nowait=True)
        channel.basic_qos(0, 0, False)  # whose answer tells that all of it is done


def default_queue(queue: str) -> str:
    """Return where the real worker of a queue sends what names no queue."""
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
