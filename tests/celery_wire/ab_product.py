"""The product of the A/B tests, as two Celery apps: one has the executor, the other the callbacks.

Real Celery workers run them (`celery -A ab_product:executor worker`), and so do our consumers, through `celery_tasks`.
The callbacks are not registered on the executor's app, as docs/celery.md advises.
"""

from __future__ import annotations

import datetime
import json
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery import Celery
from celery.exceptions import Ignore, Reject

# mypy: disable-error-code="untyped-decorator"

BROKER, BACKEND = os.environ.get("WIRE_TEST_BROKER"), os.environ.get("WIRE_TEST_BACKEND")

executor = Celery("executor", broker=BROKER, backend=BACKEND, set_as_current=False)
callbacks = Celery("callbacks", broker=BROKER, backend=BACKEND, set_as_current=False)
for app in (executor, callbacks):
    app.conf.update(
        broker_connection_retry_on_startup=True,
        worker_enable_remote_control=False,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
    )

VALUES: dict[str, Any] = {
    "NaN": float("nan"),
    "a UUID": uuid.UUID(int=7),
    "a moment": datetime.datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=datetime.UTC),
    "a tuple": (1, 2),
    "a set": {3},
    "an int of 70 bits": 2**70,
    "a NUL": "a\x00b",
    "bytes": b"\xff\x00",
}


def succeed(task: Any, params: dict[str, Any]) -> dict[str, Any]:
    return {"success": True, "data": {"document_id": params["document_id"]}, "metadata": {"pages": 2}, "error": None}


def do_not_succeed(task: Any, params: dict[str, Any]) -> dict[str, Any]:
    return {"success": False, "data": {}, "metadata": {}, "error": "the document is empty"}


def give(task: Any, params: dict[str, Any]) -> dict[str, Any]:
    return {"success": True, "data": {"value": VALUES[params["value"]]}, "metadata": {}, "error": None}


def raise_one(task: Any, params: dict[str, Any]) -> None:
    raise ValueError("it does not add up")


def be_away_once(task: Any, params: dict[str, Any]) -> dict[str, Any]:
    if not task.request.retries:
        raise ConnectionError("away")
    return succeed(task, params)


def be_away(task: Any, params: dict[str, Any]) -> None:
    raise ConnectionError(f"away, after {task.request.retries} retries")


def ask_once(task: Any, params: dict[str, Any]) -> None:
    raise task.retry(exc=KeyError("model"), countdown=0, max_retries=1)


def be_ignored(task: Any, params: dict[str, Any]) -> None:
    raise Ignore


def be_rejected(task: Any, params: dict[str, Any]) -> None:
    raise Reject("not for me", requeue=False)


def leave(task: Any, params: dict[str, Any]) -> None:
    raise SystemExit(3)


def wait_for_word(task: Any, params: dict[str, Any]) -> dict[str, Any]:
    """Run until the test says so, by a file."""
    deadline = time.monotonic() + 60
    while not Path(params["word"]).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return succeed(task, params)


DEEDS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    deed.__name__: deed
    for deed in (
        succeed,
        do_not_succeed,
        give,
        raise_one,
        be_away_once,
        be_away,
        ask_once,
        be_ignored,
        be_rejected,
        leave,
        wait_for_word,
    )
}


@executor.task(
    name="execute_extraction",
    shared=False,  # or every app that is finalised in this process would have it
    bind=True,
    autoretry_for=(ConnectionError, TimeoutError, OSError),
    max_retries=3,
    default_retry_delay=0,
)
def execute_extraction(self: Any, context: dict[str, Any]) -> Any:
    """Do what the context says, and note each run in the file that it names."""
    params = context["executor_params"]
    with Path(params["runs"]).open("a") as runs:
        runs.write("run\n")
    return DEEDS[params["deed"]](self, params)


def push(task_id: str, about: dict[str, Any], status: str, **fields: Any) -> None:
    """Push an event to the user who waits in a room; here a file."""
    event = {"task_id": task_id, "operation": about.get("operation"), "tool_id": about["tool_id"], "status": status}
    with Path(about["log_events_id"]).open("a") as room:
        room.write(json.dumps({**event, **fields}) + "\n")


def complete(result_dict: dict[str, Any], callback_kwargs: dict[str, Any] | None = None) -> None:
    """Push the event of a result, which may be the executor's own failure."""
    about = callback_kwargs or {}
    if result_dict["success"]:
        push(about["executor_task_id"], about, "completed", result=result_dict["data"])
    else:
        push(about["executor_task_id"], about, "failed", error=result_dict["error"])


def fail(failed_task_id: str, callback_kwargs: dict[str, Any] | None = None) -> None:
    """Push the event of an error, with the given text or else that of the result backend."""
    about = callback_kwargs or {}
    text = about.get("error")
    if text is None:
        text = str(callbacks.AsyncResult(failed_task_id).result)
    push(failed_task_id, about, "failed", error=text)


FLOWS = {
    "index a document": ("ide_index", "ide_index_complete", "ide_index_error"),
    "run a prompt": ("answer_prompt", "ide_prompt_complete", "ide_prompt_error"),
    "run many prompts": ("answer_prompt", "ide_prompt_complete", "ide_prompt_error"),
    "single pass": ("single_pass_extraction", "ide_prompt_complete", "ide_prompt_error"),
    "look up": ("extract", "extraction_complete", "extraction_error"),
}
"""The product's call sites: the operation, and the callbacks for either end."""

for _, on_success, on_error in FLOWS.values():
    callbacks.task(complete, name=on_success, shared=False)
    callbacks.task(fail, name=on_error, shared=False)
