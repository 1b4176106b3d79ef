"""A Celery client that sends a message of each shape. capture_celery.py runs it under each version of Celery.

    python celery_client.py URL QUEUE

It prints one JSON object: the versions, and the name and description of each message, in the order of sending. Ids are
derived from the name, so that every run sends the same ones. It needs Celery, kombu and PyYAML, and no module of this
project.
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import hashlib
import json
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import Any

_named: list[str] = ["?"]


def _next_id() -> uuid.UUID:
    """Return an id derived from the name of the next message and the number of its ids so far."""
    _named.append(_named[-1])
    text = f"{_named[-1]}/{len(_named)}"
    return uuid.UUID(bytes=hashlib.sha256(text.encode()).digest()[:16], version=4)


def _name(message: str) -> None:
    _named[:] = [message]


uuid.uuid4 = _next_id  # before Celery binds it

import celery  # noqa: E402
import celery.exceptions  # noqa: E402
import kombu  # noqa: E402

TASK_ID = "6f0c8a52-5b5e-4bd1-a5a5-0a4f2c4c9b11"
CALLBACKS = "ide_callback"
STEPS = "steps"
CONTEXT = {"executor_name": "legacy", "operation": "ide_index", "run_id": "r-1"}
KEPT = {"callback_kwargs": {"document_id": "d-1", "executor_task_id": TASK_ID}}
FAIRNESS = {"org_id": "org_7", "workload_type": "non_api", "pipeline_priority": 5}
MOMENT = datetime.datetime(2020, 1, 2, 3, 4, 5, 678, tzinfo=datetime.UTC)
KINDS = [
    None,
    True,
    False,
    0,
    -1,
    2**63 - 1,
    -(2**63),
    0.1,
    -1e-7,
    5e-324,
    9.007199254740991e15,
    "",
    'é ß 漢 🙂 \\ " \n',
]

Sent = Iterator[tuple[str, str]]
"""The name and description of a message, before it is sent."""
_shapes: list[Callable[[celery.Celery, str], Sent]] = []


def _shape(function: Callable[[celery.Celery, str], Sent]) -> Callable[[celery.Celery, str], Sent]:
    _shapes.append(function)
    return function


def ok(**options: Any) -> Any:
    return celery.signature("ide_index_complete", **{"kwargs": KEPT, "queue": CALLBACKS, **options})


def bad(**options: Any) -> Any:
    return celery.signature("ide_index_error", **{"kwargs": KEPT, "queue": CALLBACKS, **options})


@_shape
def plain(app: celery.Celery, queue: str) -> Sent:
    yield "plain", "A task without arguments."
    app.send_task("execute_extraction", queue=queue)
    yield "task-id", "A task under an id that its sender has given."
    app.send_task("execute_extraction", args=[CONTEXT], queue=queue, task_id="the-task")
    yield "fairness", "A task with the product's fairness key among its headers."
    app.send_task("execute_extraction", [CONTEXT], queue=queue, headers={"x-fairness-key": FAIRNESS})
    yield "priority", "A task with a priority."
    app.send_task("execute_extraction", [CONTEXT], queue=queue, priority=9)
    yield "ignore-result", "A task whose result its sender ignores."
    app.send_task("execute_extraction", [CONTEXT], queue=queue, ignore_result=True)
    yield "lineage", "A task with a shadow name, sent by another task of a line."
    app.send_task("execute_extraction", [CONTEXT], queue=queue, shadow="extraction of d-1", root_id="r", parent_id="p")
    with contextlib.closing(celery.Celery("none", broker=app.conf.broker_url, set_as_current=False)) as without:
        yield "no-backend", "A task of an app without a result backend."
        without.send_task("execute_extraction", [CONTEXT], queue=queue)


@_shape
def values(app: celery.Celery, queue: str) -> Sent:
    nested = {"list": [[[]], [{}]], "dict": {"a": {"b": [1, {"c": None}]}}, "": "no name", "ключ": KINDS}
    yield "values", "Arguments of every JSON kind that the wire carries."
    app.send_task("execute_extraction", args=[*KINDS, KINDS, nested], kwargs={"k": nested, "n": None}, queue=queue)
    typed = [uuid.UUID(TASK_ID), MOMENT, MOMENT.date(), MOMENT.time(), decimal.Decimal("1.50"), (1, 2), {7: "seven"}]
    yield "values-of-python", "Arguments for which kombu has an envelope, or another JSON kind."
    app.send_task("execute_extraction", args=typed, queue=queue)
    for name, value in {
        "nan": float("nan"),
        "beyond-64-bits": 2**64,
        "nul": "a\0b",
        "surrogate": "\ud800",
        "bytes": b"b",
    }.items():
        yield f"values-{name}", "An argument that Celery sends and no other transport could carry."
        app.send_task("execute_extraction", args=[value], queue=queue)


@_shape
def links(app: celery.Celery, queue: str) -> Sent:
    def send(**options: Any) -> None:
        app.send_task("execute_extraction", args=[CONTEXT], queue=queue, **options)

    yield "link", "A task with a callback for its result."
    send(link=ok())
    yield "link-error", "A task with a callback for its failure."
    send(link_error=bad())
    yield "product", "The product's dispatch with callbacks, as its views make it."
    send(link=ok(), link_error=bad(), task_id=TASK_ID, headers={"x-fairness-key": FAIRNESS})
    yield "several-links", "A task with several callbacks for each outcome."
    send(link=[ok(), celery.signature("count", args=["one"], queue="counts")], link_error=[bad(), bad(queue="alarms")])
    yield "immutable-links", "A task whose callbacks get their own arguments alone."
    send(link=ok(immutable=True, args=["alone"]), link_error=bad(immutable=True))
    yield "links-with-arguments", "A task whose callbacks have positional arguments of their own."
    send(link=ok(args=["stored", 7]), link_error=bad(args=["stored", 7]))
    yield "link-without-queue", "A callback that names no queue, which goes to Celery's default one."
    send(link=celery.signature("ide_index_complete", kwargs=KEPT))
    yield "link-of-a-link", "A callback with an id and a callback of its own."
    send(link=ok(link=celery.signature("count", queue="counts"), task_id="the-callback", countdown=0))
    yield "link-with-options", "A callback with options that cannot be honoured."
    send(link=ok(priority=3, expires=9))
    yield "link-to-a-group", "A callback that is a group."
    send(link=celery.group(ok(), ok()), link_error=bad())
    yield "link-to-a-chain", "A callback that is a chain."
    send(link=celery.chain(ok(), ok()), link_error=bad())


@_shape
def times(app: celery.Celery, queue: str) -> Sent:
    yield "countdown", "A task that is to wait before it is run; its moment is replaced by one that has passed."
    app.send_task("execute_extraction", [CONTEXT], queue=queue, countdown=30)
    yield "eta", "A task with the moment before which it is not to be run."
    app.send_task("execute_extraction", [CONTEXT], queue=queue, eta=MOMENT)
    zone = datetime.timezone(datetime.timedelta(hours=-7))
    yield "eta-elsewhere", "A task with such a moment on the clock of another zone."
    app.send_task("execute_extraction", [CONTEXT], queue=queue, eta=MOMENT.astimezone(zone))
    yield "expires", "A task that is not to be run an hour later; its moment is replaced by one far away."
    app.send_task("execute_extraction", [CONTEXT], queue=queue, expires=3600)
    yield "expired", "A task that has expired, and whose failure has a callback."
    app.send_task(
        "execute_extraction", [CONTEXT], queue=queue, headers={"expires": MOMENT.isoformat()}, link_error=bad()
    )
    yield "time-limits", "A task with time limits."
    app.send_task("execute_extraction", [CONTEXT], queue=queue, time_limit=9, soft_time_limit=5, link_error=bad())


@_shape
def retries(app: celery.Celery, queue: str) -> Sent:
    yield "retries", "A task with one try behind it."
    app.send_task("execute_extraction", [CONTEXT], queue=queue, retries=1, link=ok(), link_error=bad())

    @app.task(name="execute_extraction", bind=True, shared=False, max_retries=3)  # type: ignore[untyped-decorator]
    def execute_extraction(self: Any, *args: Any) -> None:
        raise NotImplementedError

    yield "retry", "A task that has asked its worker to be run again, as the worker sends it anew."
    tried = str(uuid.uuid4())
    request = {"id": tried, "args": [CONTEXT], "kwargs": {}, "retries": 0, "called_directly": False}
    delivery = {"delivery_info": {"exchange": "", "routing_key": queue, "priority": 0}, "root_id": tried}
    sent = {"callbacks": [dict(ok())], "errbacks": [dict(bad())], "correlation_id": tried, "reply_to": app.thread_oid}
    execute_extraction.push_request(**request, **delivery, **sent)
    with contextlib.suppress(celery.exceptions.Retry):
        execute_extraction.retry(exc=ValueError("again"), countdown=30)
    execute_extraction.pop_request()


@_shape
def canvas(app: celery.Celery, queue: str) -> Sent:
    def step(number: int, of: str = STEPS, **options: Any) -> Any:
        return app.signature("step", args=[number], queue=of, **options)

    yield "chain-option", "A task that is sent with the rest of a chain."
    app.send_task("step", args=[1], queue=queue, chain=[step(3), step(2)])
    yield "chord-option", "A task that is sent as one of a chord's."
    app.send_task("step", args=[1], queue=queue, chord=step(2))
    yield "group-option", "A task that is sent as one of a group's."
    app.send_task("step", args=[1], queue=queue, group_id="the-group", group_index=0)
    yield "chain", "The first task of a chain."
    celery.chain(step(1, queue), step(2), step(3)).apply_async(link_error=bad())
    yield "group-1", "The first task of a group."
    yield "group-2", "The second task of a group."
    celery.group(step(1, queue), step(2, queue, immutable=True)).apply_async()
    counting = celery.Celery("counting", broker=app.conf.broker_url, backend="cache+memory://", set_as_current=False)
    yield "chord-1", "The first task of a chord's header."
    yield "chord-2", "The second task of a chord's header."
    with contextlib.closing(counting):
        header = [counting.signature("step", args=[number], queue=queue) for number in (1, 2)]
        celery.chord(header, counting.signature("gather", queue=STEPS), app=counting).apply_async()


@_shape
def encodings(app: celery.Celery, queue: str) -> Sent:
    for name in ("zlib", "bzip2"):
        yield f"compressed-{name}", f"A task whose body is compressed with {name}."
        app.send_task("execute_extraction", [CONTEXT], queue=queue, compression=name)
    for name in ("yaml", "pickle"):
        yield name, f"A task whose body is {name}, which is not read."
        app.send_task("execute_extraction", [CONTEXT], queue=queue, serializer=name)
    with contextlib.closing(
        celery.Celery("old", broker=app.conf.broker_url, backend="rpc://", set_as_current=False)
    ) as old:
        old.conf.task_protocol = 1
        yield "protocol-1", "A task of Celery's message protocol 1, which is not read."
        old.send_task("execute_extraction", [CONTEXT], queue=queue, link=ok(), link_error=bad())


def main(url: str, queue: str) -> None:
    app = celery.Celery("product", broker=url, backend="rpc://", set_as_current=False)
    with contextlib.closing(app):
        sent = []
        for shape in _shapes:
            for name, about in shape(app, queue):
                _name(name)
                sent.append((name, about))
        report = {
            "celery": celery.__version__,
            "kombu": kombu.__version__,
            "sent": sent,
        }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
