"""A Celery app whose tasks note what happens to them.

`real_runs` lets a real Celery worker run them, in a process of its own, and returns its notes; a test lets our Consumer
run the same code, and compares.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery import Celery, Task, current_task, signals
from celery.contrib.testing.worker import start_worker
from celery.exceptions import Ignore, Reject

# mypy: disable-error-code="untyped-decorator, misc"

HERE = Path(__file__).parent
FAIRNESS: dict[str, Any] = {"org_id": "org-1", "workload_type": "api", "pipeline_priority": 7}
QUEUE = "observed"
LIMITS = range(5)
FAILURES = range(6)

app = Celery("observed", broker="memory://observed", set_as_current=False)
app.conf.update(task_default_queue=QUEUE, broker_transport_options={"polling_interval": 0.02})

SEEN: defaultdict[str, list[Any]] = defaultdict(list)
"""The notes by task id."""


def note(task_id: str, event: str, *details: Any) -> None:
    SEEN[task_id].append([event, *details])


def text_of(exc: object) -> str:
    return f"{type(exc).__name__}: {exc}"


class Observed(Task):
    """Notes what its handlers are called with."""

    abstract = True

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        note(task_id, "before_start", type(args).__name__, args, kwargs)

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        note(task_id, "on_success", retval, args, kwargs)

    def on_retry(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        note(task_id, "on_retry", text_of(exc), args, kwargs, einfo.type.__name__)

    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        note(task_id, "on_failure", text_of(exc), args, kwargs, einfo.type.__name__)

    def after_return(self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        note(task_id, "after_return", status, text_of(retval), args, kwargs, einfo)


class Calling(Observed):
    """Has a `__call__` of its own, around the one that it inherits."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        note(self.request.id, "__call__", args, kwargs)
        return super().__call__(*args, **kwargs)


class Careless(Observed):
    """Its handlers raise."""

    abstract = True

    def on_success(self, *args: Any) -> None:
        super().on_success(*args)
        raise ValueError("on_success")

    def after_return(self, *args: Any) -> None:
        super().after_return(*args)
        raise ValueError("after_return")


class Unready(Observed):
    abstract = True

    def before_start(self, *args: Any) -> None:
        super().before_start(*args)
        raise ValueError("not ready")


def _printed(field: Any) -> Any:
    return text_of(field) if isinstance(field, BaseException) else getattr(field, "name", type(field).__name__)


def _heard(signal: str) -> Callable[..., None]:
    """Return a receiver that notes a signal and its fields, the runtime and the stack apart."""

    def receive(sender: Any, **fields: Any) -> None:
        if isinstance(sender, Observed):
            fields.pop("signal")
            fields = {
                name: field if name in ("args", "kwargs", "state") else _printed(field)
                for name, field in fields.items()
            }
            note(sender.request.id, signal, dict(sorted(fields.items())))

    return receive


for _name in ("task_prerun", "task_postrun", "task_success", "task_failure", "task_retry"):
    getattr(signals, _name).connect(_heard(_name), weak=False)


def work(task: Any, failures: int) -> int:
    """Fail in the first `failures` runs, and return how many retries there were."""
    retries = int(task.request.retries)
    note(task.request.id, "run", retries)
    if retries < failures:
        raise ConnectionError(f"away for the {retries}th time")
    return retries


def by_hand(task: Any, failures: int) -> int:
    try:
        return work(task, failures)
    except ConnectionError as exc:
        raise task.retry(exc=exc, countdown=0) from exc


def by_hand_without_exc(task: Any, failures: int) -> int:
    try:
        return work(task, failures)
    except ConnectionError:
        task.retry(countdown=0)
    raise AssertionError


def by_hand_and_returns(task: Any, failures: int) -> Any:
    try:
        return work(task, failures)
    except ConnectionError as exc:
        task.retry(exc=exc, countdown=0, throw=False)
        return "asked"


def by_hand_and_raises(task: Any, failures: int) -> int:
    try:
        return work(task, failures)
    except ConnectionError as exc:
        task.retry(exc=exc, countdown=0, throw=False)
        raise


def by_hand_up_to(limit: int) -> Callable[..., int]:
    def by_hand_at_the_call(task: Any, failures: int) -> int:
        try:
            return work(task, failures)
        except ConnectionError as exc:
            raise task.retry(exc=exc, countdown=0, max_retries=limit) from exc

    return by_hand_at_the_call


def declare(name: str, run: Callable[..., Any], base: type = Observed, **options: Any) -> Any:
    """Declare a task of this app alone: a shared one would be on every app of the process."""
    return app.task(run, name=name, bind=True, base=base, shared=False, **options)


AWAY: dict[str, Any] = {"autoretry_for": (ConnectionError,), "default_retry_delay": 0}
DECLARATIONS: dict[str, Callable[[str, int], Any]] = {
    "plain": lambda name, limit: declare(name, work, max_retries=limit),
    "automatic": lambda name, limit: declare(name, work, max_retries=limit, **AWAY),
    "automatic, limited in retry_kwargs": lambda name, limit: declare(
        name, work, autoretry_for=(OSError,), retry_kwargs={"max_retries": limit, "countdown": 0}
    ),
    "automatic, for other errors": lambda name, limit: declare(
        name, work, max_retries=limit, autoretry_for=(KeyError,)
    ),
    "automatic, this one excluded": lambda name, limit: declare(
        name, work, max_retries=limit, autoretry_for=(OSError,), dont_autoretry_for=(ConnectionError,)
    ),
    "automatic, with a __call__": lambda name, limit: declare(name, work, Calling, max_retries=limit, **AWAY),
    "by hand": lambda name, limit: declare(name, by_hand, max_retries=limit),
    "by hand, with a __call__": lambda name, limit: declare(name, by_hand, Calling, max_retries=limit),
    "by hand, without exc": lambda name, limit: declare(name, by_hand_without_exc, max_retries=limit),
    "by hand, and returns": lambda name, limit: declare(name, by_hand_and_returns, max_retries=limit),
    "by hand, and raises": lambda name, limit: declare(name, by_hand_and_raises, max_retries=limit),
    "by hand, limited at the call": lambda name, limit: declare(name, by_hand_up_to(limit), max_retries=10),
}
"""How a task may declare that it is retried, each made with a name and a limit."""


def task_name(declaration: str, limit: int) -> str:
    return f"{declaration}, {limit}"


for _declaration, _declare in DECLARATIONS.items():
    for _limit in LIMITS:
        _declare(task_name(_declaration, _limit), _limit)


def look(task: Any, *args: Any, **kwargs: Any) -> str:
    """Note the request, and that it is this task's own."""
    request = task.request
    same = {"id": request.id, "root_id": request.root_id, "correlation_id": request.correlation_id}
    note(request.id, "ids", {name: value == request.id for name, value in same.items()})
    names = "called_directly is_eager retries headers task args kwargs parent_id group chord chain eta expires"
    names += " callbacks errbacks children replaced_task_nesting"
    note(request.id, "request", {name: getattr(request, name) for name in names.split()})
    note(request.id, "delivery_info", {name: request.delivery_info[name] for name in ("exchange", "redelivered")})
    note(request.id, "current", current_task.name, current_task.request.id == request.id, app.current_task.name)
    return "seen"


def done(task: Any) -> str:
    return "done"


def again_in_a_second(task: Any) -> dict[str, Any]:
    if not task.request.retries:
        raise task.retry(countdown=1)
    return {"id": task.request.id, "retries": task.request.retries, "pid": os.getpid()}


def ignored(task: Any) -> None:
    raise Ignore


def rejected(task: Any) -> None:
    raise Reject(ValueError("not for me"))


def rejected_in_words(task: Any) -> None:
    raise Reject("not for me")


for _name, _run, _base in (
    ("look", look, Observed),
    ("look, with a __call__", look, Calling),
    ("again in a second", again_in_a_second, Observed),
    ("ignored", ignored, Observed),
    ("rejected", rejected, Observed),
    ("rejected in words", rejected_in_words, Observed),
    ("careless", done, Careless),
    ("unready", done, Unready),
    ("takes nothing", done, Observed),
):
    declare(_name, _run, _base, typing=False)

SINGLE: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "look": ("look", ["d-1", [2]], {"page": {"n": 1}}),
    "look, with a __call__": ("look, with a __call__", ["d-1"], {"page": 1}),
    "ignored": ("ignored", [], {}),
    "rejected": ("rejected", [], {}),
    "rejected in words": ("rejected in words", [], {}),
    "careless handlers": ("careless", [], {}),
    "before_start raises": ("unready", [], {}),
    "wrong arguments": ("takes nothing", [1], {"page": 2}),
}
"""One run each: task name, args, kwargs."""


QUIET = 2.0
"""Seconds without a note after which everything has run: on a busy machine a retry takes a while to begin."""


def main() -> None:
    """Let a real worker run everything, print its notes as JSON, and leave at once."""
    calls = dict(SINGLE)
    for declaration in DECLARATIONS:
        for limit in LIMITS:
            for failures in FAILURES:
                name = task_name(declaration, limit)
                calls[f"{name}, {failures}"] = (name, [failures], {})
    for task_id, (name, args, kwargs) in calls.items():
        app.tasks[name].apply_async(args, kwargs, task_id=task_id, headers={"x-fairness-key": FAIRNESS})
    with start_worker(app, perform_ping_check=False, loglevel="CRITICAL"):
        before, quiet_since = -1, time.monotonic()
        while time.monotonic() - quiet_since < QUIET or len(SEEN) < len(calls):
            if (now := sum(map(len, list(SEEN.values())))) != before:
                before, quiet_since = now, time.monotonic()
            time.sleep(0.1)
        print(json.dumps(SEEN), flush=True)
        os._exit(0)  # stopping a worker takes seconds


@functools.cache
def real_runs(first: str = "") -> dict[str, list[Any]]:
    """Return what a real worker's tasks noted: of each `SINGLE`, and of "<task name>, <failures>".

    `first` is what the worker's process does before anything else.
    """
    program = f"from celery_wire import observed_app; {first or 'pass'}; observed_app.main()"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (HERE.parents[1], HERE.parent)))}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    report: dict[str, list[Any]] = json.loads(ended.stdout.splitlines()[-1])
    return report
