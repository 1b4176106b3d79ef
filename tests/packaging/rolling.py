"""One side of a rolling deploy, run by the Python of an environment that has one release of the package.

    rolling.py consume URL QUEUE...          runs tasks until SIGTERM, and prints each run
    rolling.py dispatch URL NAME             dispatches in every way, waits for the outcomes, and prints them
    rolling.py flood URL NAME FIRST LAST     sends numbered tasks, plain and with callbacks, once every side is there

It uses only the package's public interface, because older and newer releases run it.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from unstract_core import (
    Consumer,
    Dispatcher,
    FairnessKey,
    Reply,
    TaskFailed,
    Tasks,
    current_delivery,
    load_transport,
)

tasks = Tasks()
_printing = threading.Lock()


def say(**what: Any) -> None:
    with _printing:
        print(json.dumps(what), flush=True)


def noted(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Print the running task with its arguments, and return its attempt."""
    delivery = current_delivery()
    assert delivery is not None
    assert delivery.payload is not None
    fairness = delivery.payload.fairness
    say(
        task=delivery.payload.task_name,
        args=args,
        kwargs=kwargs,
        queue=delivery.queue,
        attempt=delivery.attempt,
        org_id=delivery.org_id,
        priority=delivery.priority,
        task_id=delivery.payload.task_id,
        fairness=fairness and [fairness.org_id, fairness.workload_type, fairness.pipeline_priority],
    )
    return delivery.attempt


@tasks.register("returns")
def returns(*args: Any, **kwargs: Any) -> Any:
    noted(args, kwargs)
    return {"total": "118.40", "pages": [1, 2.5, None, True], "für": args}


@tasks.register("raises")
def raises(*args: Any, **kwargs: Any) -> None:
    noted(args, kwargs)
    raise ValueError("it does not add up: 1.184,00 €")


@tasks.register("recovers")
def recovers(*args: Any, **kwargs: Any) -> None:
    if noted(args, kwargs) == 1:
        raise ConnectionError("away")


@tasks.register("takes a moment")
def takes_a_moment(*args: Any, **kwargs: Any) -> Any:
    noted(args, kwargs)
    time.sleep(0.01)
    return args[0]


@tasks.register("done")
@tasks.register("failed")
def called_back(*args: Any, **kwargs: Any) -> None:
    noted(args, kwargs)


def consume(url: str, *queues: str) -> None:
    Consumer(load_transport(url), tasks, queues, concurrency=2, lease=10, max_attempts=2, backoff=0.05).run()


def dispatch(url: str, name: str) -> None:
    """Dispatch every kind of task to the queue `name`, with callbacks to `name`-callbacks."""
    dispatcher = Dispatcher(load_transport(url))
    for task in ("returns", "raises", "not registered"):
        dispatcher.send_with_callback(
            task,
            args=[{"document": "d-1"}],
            kwargs={"n": 2**53},
            queue=name,
            task_id=f"{name}/{task}",
            fairness=FairnessKey(org_id="acme", workload_type="api", pipeline_priority=8),
            on_success=callback("done", f"{name}-callbacks"),
            on_error=callback("failed", f"{name}-callbacks"),
        )
    sent = {
        task: dispatcher.send(task, args=["plain"], queue=name, org_id="acme").id for task in ("recovers", "raises")
    }
    say(
        ids={f"plain {task}": id for task, id in sent.items()},
        returned=outcome(lambda: dispatcher.call("returns", args=["blocking"], queue=name, timeout=60)),
        raised=outcome(lambda: dispatcher.call("raises", queue=name, timeout=60)),
        unknown=outcome(lambda: dispatcher.call("not registered", queue=name, timeout=60)),
        statuses={
            id: wait_for(dispatcher, id)
            for id in (f"{name}/returns", f"{name}/raises", f"{name}/not registered", sent["raises"])
        },
        never_sent=dispatcher.status(f"{name}/never sent"),
    )


def flood(url: str, name: str, first: str, last: str) -> None:
    """Send one task for each number, every third with callbacks, after a consumer on each side has replied."""
    dispatcher = Dispatcher(load_transport(url))
    for side in ("old", "new"):
        dispatcher.call("returns", queue=f"{name}-{side}", timeout=60)
    for number in range(int(first), int(last)):
        calls = {kind: callback(kind, name) for kind in ("done", "failed")} if number % 3 == 0 else {}
        dispatcher.send_with_callback(
            "takes a moment", args=[number], queue=name, on_success=calls.get("done"), on_error=calls.get("failed")
        )


def callback(task: str, queue: str) -> dict[str, Any]:
    """Return a signature as Celery serialises it."""
    return {"task": task, "args": [], "kwargs": {"callback_kwargs": {"user": "u-1"}}, "options": {"queue": queue}}


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except TaskFailed as exc:
        return f"TaskFailed: {exc}"


def wait_for(dispatcher: Dispatcher, id: str) -> Any:
    deadline = time.monotonic() + 60
    status: Reply | None = None
    while (status := dispatcher.status(id)) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return status and [status.status, status.result, status.error]


COMMANDS: dict[str, Callable[..., None]] = {"consume": consume, "dispatch": dispatch, "flood": flood}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*sys.argv[2:])
