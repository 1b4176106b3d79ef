"""Three sides for one dispatch with one interface: the actions of a test, and the results that it can see.

On every side the executor is the same Celery app (ab_product.py), and the call is one of the product's three methods.
The test reads the callbacks' queue itself unless callback workers run.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, Self

import attrs
from celery import Celery
from celery_wire import ab_product
from celery_wire.support import Pipe, celery_app, real_worker
from consumers import running
from kombu.serialization import loads
from pg_tables import Tables
from queues import queue_name

from transports.celery import CeleryAppDispatcher, CeleryTransport, celery_tasks
from transports.postgres import PostgresTransport
from unstract_core import (
    Consumer,
    Dispatcher,
    ExecutorDispatcher,
    FairnessKey,
    Settlement,
    Transport,
    Verdict,
)
from unstract_core.producer.executor import QUEUE_PREFIX
from unstract_core.producer.routing import Side as Methods

MAX_ATTEMPTS = 2
TASK = "execute_extraction"


@attrs.frozen
class Fired:
    """A callback's message, as its worker reads it."""

    task: str
    args: list[Any]
    kwargs: dict[str, Any]
    fairness: dict[str, Any] | None = None
    id: str | None = attrs.field(default=None, eq=False)


@attrs.frozen
class Injected:
    """A message that no dispatcher would send: to `task`, with these kwargs, and so many deliveries behind it."""

    task: str = TASK
    kwargs: dict[str, Any] | str = attrs.field(factory=dict)
    delivered: int = 0


class Side(Protocol):
    """`executor` is the executor_name whose queue the side's worker serves; `callbacks` the callback workers' queue."""

    name: str
    executor: str
    callbacks: str

    @property
    def queue(self) -> str: ...
    @property
    def methods(self) -> Methods: ...

    def beside(self) -> Self:
        """Return the same side with an executor that no worker serves yet."""

    def fired(self, queue: str) -> list[Fired]:
        """Take the callbacks' messages that are in a queue now."""

    def inject(self, injected: Injected, args: list[Any], id: str, links: Mapping[str, Any], *, answer: bool) -> None:
        """Put a message into the executor's queue; `links` are on_success and on_error, each a wire continuation."""

    def answer(self, id: str) -> str | None:
        """Return the error text in the answer to an injected message."""

    def waiting(self) -> int:
        """Return how many messages are in the executor's queue."""

    def buried(self) -> list[str]:
        """Take the executor's dead letters, and return why each was buried."""


@attrs.define(slots=False)
class _Executor:
    """The names of a side's queues."""

    executor: str = attrs.field(factory=queue_name, kw_only=True)
    callbacks: str = attrs.field(factory=queue_name, kw_only=True)

    @property
    def queue(self) -> str:
        return QUEUE_PREFIX + self.executor

    def beside(self) -> Self:
        return attrs.evolve(self, executor=queue_name())


@attrs.define(slots=False)
class _Ours(_Executor):
    """Our consumer over a transport of ours."""

    transport: Any

    @property
    def methods(self) -> Methods:
        return ExecutorDispatcher(Dispatcher(self.transport))

    def answer(self, id: str) -> str | None:
        reply = self.transport.reply(id, timeout=0)
        return None if reply is None else reply.error

    def buried(self) -> list[str]:
        letters = self.transport.dead.find(queue=self.queue)
        self.transport.dead.purge(ids=[letter.id for letter in letters])
        return [letter.reason for letter in letters]


@attrs.define(slots=False)
class OnPostgres(_Ours):
    """Postgres and our consumer."""

    tables: Tables
    name: str = "Postgres"

    def fired(self, queue: str) -> list[Fired]:
        with contextlib.closing(self.transport.subscribe([queue], lease=60)) as subscription:
            taken = subscription.receive(limit=100, wait=0)
            subscription.settle([Settlement(delivery, Verdict.ACK) for delivery in taken])
        return [
            Fired(one.task_name, one.args, one.kwargs, _fields(one.fairness), one.task_id)
            for one in (delivery.payload for delivery in taken)
            if one is not None
        ]

    def inject(self, injected: Injected, args: list[Any], id: str, links: Mapping[str, Any], *, answer: bool) -> None:
        known = {"reply_key": id} if answer else {"task_id": id}
        wire = {
            "task_name": injected.task,
            "args": args,
            "kwargs": injected.kwargs,
            "queue": self.queue,
            "fairness": None,
        }
        self.tables.inject(self.queue, json.dumps({**wire, **known, **links}), read_ct=injected.delivered)

    def waiting(self) -> int:
        return self.tables.count(self.queue)


@attrs.define(slots=False)
class _OnRabbitMQ(_Executor):
    """The common part of the two sides on RabbitMQ."""

    pipe: Pipe

    def fired(self, queue: str) -> list[Fired]:
        callbacks = []
        for raw in self.pipe.left(queue):
            args, kwargs, _ = loads(raw.body, "application/json", "utf-8", accept=["application/json"])
            fairness = raw.headers.get("x-fairness-key")
            callbacks.append(Fired(raw.headers["task"], args, kwargs, fairness, raw.headers["id"]))
        return callbacks

    def inject(self, injected: Injected, args: list[Any], id: str, links: Mapping[str, Any], *, answer: bool) -> None:
        embed = {
            theirs: [_signature(links[ours])] if ours in links else None
            for theirs, ours in (("callbacks", "on_success"), ("errbacks", "on_error"))
        }
        body = [args, injected.kwargs, {**embed, "chain": None, "chord": None}]
        headers = {"lang": "py", "task": injected.task, "id": id, "retries": injected.delivered}
        address = {"correlation_id": id, "reply_to": self.address(id) if answer else ""}
        self.pipe.put(self.queue, json.dumps(body), headers, **address)

    def address(self, id: str) -> str:
        """Where an answer under this id is awaited."""
        return ""

    def waiting(self) -> int:
        return self.pipe.count(self.queue)


@attrs.define(slots=False)
class OnRabbitMQ(_OnRabbitMQ, _Ours):
    """RabbitMQ and our consumer."""

    name: str = "RabbitMQ"

    def address(self, id: str) -> str:
        self.transport._reply_queue.expect([id])
        return str(self.transport._reply_queue.address)


@attrs.define(slots=False)
class OnCelery(_OnRabbitMQ):
    """RabbitMQ and a real Celery worker, through the product's own app."""

    app: Celery
    name: str = "Celery"

    @property
    def methods(self) -> Methods:
        return CeleryAppDispatcher(self.app)

    def answer(self, id: str) -> str | None:
        reply = self.methods.status(id)
        return None if reply is None else reply.error

    def buried(self) -> list[str]:
        return [raw.headers["x-dead-reason"] for raw in self.pipe.left(f"{self.queue}.dead")]


@contextlib.contextmanager
def three_sides(postgres: PostgresTransport, tables: Tables, broker: str, backend: str) -> Iterator[dict[str, Side]]:
    """Yield the sides by name, each with an executor worker and a callback worker at work."""
    with contextlib.ExitStack() as cleanup:
        pipe = cleanup.enter_context(contextlib.closing(Pipe(broker)))
        transport = cleanup.enter_context(contextlib.closing(CeleryTransport(broker)))
        app = celery_app(broker, backend=backend)
        cleanup.callback(app.close)
        for product in (ab_product.executor, ab_product.callbacks):
            product.conf.update(broker_url=broker, result_backend=backend)
        ours: list[OnPostgres | OnRabbitMQ] = [
            OnPostgres(transport=postgres, tables=tables),
            OnRabbitMQ(transport=transport, pipe=pipe),
        ]
        celery = OnCelery(app=app, pipe=pipe)
        for side in (*ours, celery):
            pipe.declare(side.queue)
            pipe.declare(side.callbacks)
        for one in ours:
            for tasks, queue in (
                (celery_tasks(ab_product.executor), one.queue),
                (celery_tasks(ab_product.callbacks), one.callbacks),
            ):
                cleanup.enter_context(running(consumer_of(one.transport, tasks, queue)))
        for tasks_of, queue in (("executor", celery.queue), ("callbacks", celery.callbacks)):
            cleanup.enter_context(real_worker(broker, [queue], app=f"ab_product:{tasks_of}", backend=backend))
        yield {"Postgres": ours[0], "RabbitMQ": ours[1], "Celery": celery}


def consumer_of(transport: Transport, tasks: Mapping[str, Any], queue: str) -> Consumer:
    """Return a consumer as all of ours are here."""
    options: dict[str, Any] = {"max_attempts": MAX_ATTEMPTS, "backoff": 0.05, "backoff_max": 0.05}
    return Consumer(transport, tasks, [queue], status_payload="result", **options)  # as a result backend keeps it


def continuation(task: str, kwargs: dict[str, Any], queue: str) -> dict[str, Any]:
    return {"task_name": task, "kwargs": kwargs, "queue": queue}


def _fields(fairness: FairnessKey | None) -> dict[str, Any] | None:
    return None if fairness is None else attrs.asdict(fairness)


def fresh_id() -> str:
    return str(uuid.uuid4())


def _signature(link: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "task": link["task_name"],
        "args": [],
        "kwargs": link["kwargs"],
        "options": {"queue": link["queue"]},
        "subtask_type": None,
        "immutable": False,
    }
