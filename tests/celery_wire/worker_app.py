"""The app of the Celery worker in the tests: tasks that return how they were called."""

from __future__ import annotations

import datetime
import decimal
import json
import os
import time
import uuid
from typing import Any

import kombu
from celery import Celery

# mypy: disable-error-code="untyped-decorator"

app = Celery("worker_app", broker=os.environ["WIRE_TEST_BROKER"], backend=os.environ["WIRE_TEST_BACKEND"] or None)
app.conf.update(
    broker_connection_retry_on_startup=True,
    worker_enable_remote_control=False,
    worker_prefetch_multiplier=1,
    worker_hijack_root_logger=False,
    task_default_queue=os.environ["WIRE_TEST_DEFAULT_QUEUE"],
)

MOMENT = datetime.datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=datetime.UTC)
RESULTS: dict[str, Any] = {
    "null": None,
    "text": "é \U0001f600",
    "uuid": uuid.UUID(int=7),
    "moment": {"at": MOMENT, "day": MOMENT.date()},
    "decimal": [decimal.Decimal("118.40")],
    "bytes": b"\xff\x00",
    "nan": [float("nan"), float("inf")],
    "large": {"n": 2**70},
    "nul": "a\x00b",
}


class ProductError(Exception):
    """An exception of the product's own."""


class UnpicklableError(Exception):
    """One that cannot be made again from its args."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.lock = open(os.devnull)  # noqa: SIM115 - it is there because it cannot be pickled


ERRORS: dict[str, Any] = {
    "one argument": lambda: ValueError("bad"),
    "no argument": lambda: ValueError(),
    "many arguments": lambda: ValueError("bad", 7),
    "key": lambda: KeyError("missing"),
    "os": lambda: FileNotFoundError(2, "No such file or directory", "x.pdf"),
    "product": lambda: ProductError("it does not add up"),
    "unpicklable": lambda: UnpicklableError(7, "no way"),
    "timeout": lambda: TimeoutError("too slow"),
    "object": lambda: ValueError({"a": uuid.UUID(int=7)}),
}


def observe(queue: str, *seen: Any) -> None:
    """Tell a test what was seen."""
    with kombu.Connection(os.environ["WIRE_TEST_BROKER"]) as connection, connection.channel() as channel:
        message = channel.prepare_message(json.dumps(seen).encode(), content_type="application/json")
        channel.basic_publish(message, exchange="", routing_key=queue)


@app.task(name="double")
def double(value: Any) -> Any:
    return [value, value]


@app.task(name="echo")
def echo(*args: Any, **kwargs: Any) -> Any:
    return {"args": list(args), "kwargs": kwargs}


@app.task(name="give")
def give(name: str) -> Any:
    return RESULTS[name]


@app.task(name="fail")
def fail(name: str = "one argument") -> None:
    raise ERRORS[name]()


@app.task(name="who", bind=True)
def who(self: Any) -> dict[str, Any]:
    request = self.request
    return {
        "id": request.id,
        "correlation_id": request.correlation_id,
        "retries": request.retries,
        "root_id": request.root_id,
        "fairness": (request.headers or {}).get("x-fairness-key"),
        "at": time.time(),
    }


@app.task(name="errback_of_the_id")
def errback_of_the_id(task_id: str) -> None:
    """Registered, of one argument: Celery sends it."""


@app.task(name="errback_bound", bind=True)
def errback_bound(self: Any, task_id: str, extra: Any = None) -> None:
    """Registered and bound: Celery sends it."""


@app.task(name="errback_inline")
def errback_inline(request: Any, exc: BaseException, traceback: Any, seen: str) -> None:
    observe(seen, "inline", request.id, f"{type(exc).__name__}: {exc}", type(traceback).__name__)


@app.task(name="errback_of_any")
def errback_of_any(*args: Any, seen: str) -> None:
    observe(seen, "any", len(args), type(args[0]).__name__, getattr(args[0], "id", None))
