"""Support of the tests of `celery_tasks`: a stage on which a Consumer runs tasks, and the outcome of a run."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeAlias

import attrs
import pytest
import servers
from celery import Celery
from celery_wire.observed_app import SEEN
from pg_tables import Tables
from queues import queue_name, receive_all

from contract_tests.messages import message, then
from transports.celery import celery_tasks
from transports.memory import MemoryTransport
from transports.postgres import PostgresTransport
from unstract_core import Consumer, Reply, TaskPayload

Awaits: TypeAlias = Literal["callbacks", "reply", "nothing"]


def callback_queue(queue: str) -> str:
    """Return the queue for the callbacks of dispatches to `queue`."""
    return f"{queue}.callbacks"


def declared(run: Callable[..., Any], app: Celery | None = None, **options: Any) -> dict[str, Callable[..., Any]]:
    """Return the registry of an app, a new one by default, with `run` as its bound task `t`."""
    app = app or Celery("declared", broker="memory://", set_as_current=False)
    app.task(run, name="t", bind=True, shared=False, **options)
    return dict(celery_tasks(app))


def nothing() -> None:
    """Do nothing."""


def app_with_a_broker() -> Celery:
    """Return an app with a broker inside this process, and a queue of its own."""
    app = Celery("with-a-broker", broker="memory://", set_as_current=False)
    app.conf.task_default_queue = queue_name()
    return app


def sent(app: Celery) -> list[tuple[dict[str, Any], Any]]:
    """Take the messages out of the app's default queue: headers and body of each."""
    messages = []
    with app.connection_for_read() as connection, connection.SimpleQueue(app.conf.task_default_queue) as queue:
        while queue.qsize():
            message = queue.get(block=False)
            message.ack()
            messages.append((message.headers, message.payload))
    return messages


@attrs.frozen
class Ended:
    """The outcome of one message: its task's notes, its callbacks, its status, and the reason of its dead letter."""

    id: str
    awaits: Awaits
    seen: list[Any]
    callbacks: list[TaskPayload]
    status: Reply | None
    buried: str | None
    ran: int

    @property
    def reported(self) -> tuple[str, Any]:
        """The one outcome that the sender got: "succeeded" and the result, or "failed" and the text."""
        if self.awaits != "callbacks":
            assert self.status is not None
            assert self.callbacks == []
            succeeded = self.status.status == "completed"
            return ("succeeded", self.status.result) if succeeded else ("failed", self.status.error)
        (callback,) = self.callbacks
        if callback.task_name == "succeeded":
            return "succeeded", callback.args[0]
        assert callback.args == [self.id]
        return "failed", callback.kwargs["callback_kwargs"]["error"]  # type: ignore[call-overload, index]


@attrs.frozen
class Stage:
    """A transport for the tests of a module, each with its own queues; `tables` are those of PostgreSQL."""

    transport: Any
    tables: Tables | None = None

    def send(self, name: str, *args: Any, queue: str, awaits: Awaits = "callbacks", **options: Any) -> str:
        """Send a dispatch and return its id; its callbacks go to the queue `callback_queue(queue)`."""
        id = str(uuid.uuid4())
        about: dict[str, Any] = {"callback_kwargs": {"n": 1}}
        match awaits:
            case "callbacks":
                options |= {
                    "on_success": then("succeeded", callback_queue(queue)),
                    "on_error": then("failed", callback_queue(queue), **about),
                }
                options["task_id"] = id
            case "reply":
                options["reply_key"] = id
            case "nothing":
                options.setdefault("task_id", id)
        self.transport.send([message(name, queue, *args, **options)])
        return id

    def consumer(self, tasks: Mapping[str, Callable[..., Any]], queue: str, **settings: Any) -> Consumer:
        return Consumer(self.transport, tasks, [queue], **{"backoff": 0, **settings})

    def run(
        self,
        tasks: Mapping[str, Callable[..., Any]],
        name: str,
        *args: Any,
        awaits: Awaits = "callbacks",
        max_attempts: int = 5,
        **options: Any,
    ) -> Ended:
        """Send a dispatch, run it to its end, and return the outcome."""
        queue = queue_name()
        id = self.send(name, *args, queue=queue, awaits=awaits, **options)
        ran = self.consumer(tasks, queue, max_attempts=max_attempts).drain(timeout=20)
        (state,) = self.transport.queues([queue])
        assert (state.ready, state.in_flight, state.delayed) == (0, 0, 0)
        return self.ended(id, awaits, queue, ran)

    def ended(self, id: str, awaits: Awaits, queue: str, ran: int = 0) -> Ended:
        callbacks = [
            delivery.payload
            for delivery in receive_all(self.transport, callback_queue(queue))
            if delivery.payload is not None
        ]
        letters = self.transport.dead.find(queue=queue)
        reason = letters[0].reason if letters else None
        return Ended(id, awaits, SEEN[id], callbacks, self.transport.reply(id), reason, ran)


@contextlib.contextmanager
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    """Open the stage that a fixture is parametrised with: memory or postgres."""
    if request.param == "memory":
        yield Stage(MemoryTransport())
        return
    url = request.getfixturevalue("embedded_url")
    with servers.fresh_schema(url) as schema, contextlib.closing(PostgresTransport(url, schema)) as transport:
        transport.migrate()
        yield Stage(transport, Tables(url, schema))
