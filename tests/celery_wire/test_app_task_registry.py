"""`celery_tasks`: the apps that it accepts and refuses, without a change to the app."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, Task
from celery.exceptions import Retry
from celery_wire.app_task_support import app_with_a_broker, declared, nothing, sent
from celery_wire.observed_app import real_runs
from celery_wire.support import ALIVE, Pipe, celery_app
from consumers import running

from transports.celery import CeleryTransport, celery_tasks
from unstract_core import ConfigurationError, Consumer, Tasks

# mypy: disable-error-code="untyped-decorator, misc"


@pytest.fixture
def broker() -> Celery:
    return app_with_a_broker()


def test_celery_tasks_changes_no_celery_worker() -> None:
    """A Celery worker in a process that called `celery_tasks` has the same handlers, signals and retries."""
    assert real_runs("import celery_wire.observed_tasks") == real_runs()


def test_celery_tasks_changes_no_direct_call(broker: Celery) -> None:
    """Direct calls, `apply` with retries, `delay`, and `retry` outside a worker work as before."""

    @broker.task(name="t", bind=True, shared=False, max_retries=3)
    def fails_twice(task: Any, number: int) -> int:
        if task.request.retries < 2:
            raise task.retry(exc=KeyError(number), countdown=0)
        return number

    def uses() -> list[Any]:
        with pytest.raises(KeyError):
            fails_twice(1)
        with pytest.raises(Retry):
            fails_twice.retry()
        eager = fails_twice.apply(args=[2])
        fails_twice.delay(3)
        signature = fails_twice.signature_from_request(args=[4], countdown=5)
        ((headers, body),) = sent(broker)
        return [eager.state, eager.result, headers["task"], headers["retries"], body[0], dict(signature)]

    before = uses()
    celery_tasks(broker)
    celery_tasks(broker)
    assert uses() == before


# Accepted and refused apps.


class Impostor:
    tasks = ()


NO_APPS: dict[str, Any] = {
    "None": None,
    "an object": object(),
    "our tasks": Tasks(),
    "the class": Celery,
    "no mapping": Impostor(),
    "a name": "celery",
}


@pytest.mark.parametrize("app", NO_APPS.values(), ids=NO_APPS.keys())
def test_other_values_than_apps_are_refused(app: Any) -> None:
    """ConfigurationError names the kind of a value that is no Celery app."""
    with pytest.raises(ConfigurationError, match="takes a Celery app, not"):
        celery_tasks(app)


def test_an_app_without_tasks_is_refused() -> None:
    """An app that has only Celery's own tasks raises ConfigurationError."""
    with pytest.raises(ConfigurationError, match=r"no tasks\. Import"):
        celery_tasks(Celery("empty", set_as_current=False))


class Unbindable(Task):
    abstract = True

    @classmethod
    def on_bound(cls, app: Any) -> None:
        raise AttributeError("of the product's own")


def test_an_error_in_a_task_module_is_raised() -> None:
    """The error of a module in the app's `include` is raised unchanged."""
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        celery_tasks(Celery("broken", include=["no_such_module"], set_as_current=False))

    app = Celery("broken", set_as_current=False)

    app.task(nothing, name="t", shared=False, base=Unbindable)
    with pytest.raises(AttributeError, match="of the product's own"):
        celery_tasks(app)


async def _later() -> None:
    """Be no function that a thread can run."""


class Awaiting(Task):
    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        coroutine = self.run(*args, **kwargs)
        with pytest.raises(StopIteration):
            coroutine.send(None)
        return "awaited"


@pytest.mark.parametrize("options", [{}, {"autoretry_for": (OSError,)}])
def test_an_async_task_is_refused_at_start(options: dict[str, Any]) -> None:
    """An async task raises ConfigurationError, unless its class has a `__call__` that runs it."""
    app = Celery("async", set_as_current=False)
    app.task(_later, name="t", shared=False, **options)
    with pytest.raises(ConfigurationError, match="'t' is an async function"):
        celery_tasks(app)

    app = Celery("async", set_as_current=False)
    app.task(_later, name="t", shared=False, base=Awaiting, **options)
    assert celery_tasks(app)["t"]() == "awaited"


@pytest.mark.parametrize("limit", ["3", [3]])
def test_a_bad_retry_limit_is_refused_at_start(limit: Any) -> None:
    """A `max_retries` that is no number raises ConfigurationError before the first message."""
    with pytest.raises(ConfigurationError, match="max_retries of task 't'"):
        declared(nothing, max_retries=limit)


@pytest.mark.parametrize(
    ("options", "attempts"),
    [
        ({}, 4),
        ({"max_retries": 0}, 1),
        ({"max_retries": -1}, 1),
        ({"max_retries": float("inf")}, 2**31),
        ({"max_retries": None}, 2**31),
        ({"retry_kwargs": {"max_retries": 7}}, 8),
        ({"retry_kwargs": {"max_retries": None}}, 4),
    ],
)
def test_a_task_has_its_declared_deliveries(options: dict[str, Any], attempts: int) -> None:
    """A task has one delivery more than its declared retries, which are three by default."""
    assert declared(nothing, **options)["t"].asked_attempts == attempts  # type: ignore[attr-defined]


def test_unenforced_task_limits_are_logged_at_start(caplog: pytest.LogCaptureFixture) -> None:
    """One WARNING names the tasks with time or rate limits, and there is none for an app without such tasks."""
    app = Celery("limited", set_as_current=False)
    limits: dict[str, Any] = {"a": {"time_limit": 5}, "b": {"soft_time_limit": 5}, "c": {"rate_limit": "1/s"}, "d": {}}
    for name, options in limits.items():
        app.task(nothing, name=name, shared=False, **options)
    celery_tasks(app)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.getMessage() == 'wire.task_limits_not_enforced tasks="a, b, c" count=3'
    caplog.clear()
    declared(nothing)
    assert caplog.records == []


def test_unenforced_app_limits_are_logged_at_start(caplog: pytest.LogCaptureFixture) -> None:
    """The WARNING names the app's own limits with their values, besides the tasks with other limits."""
    app = Celery("limited", set_as_current=False)
    app.conf.update(task_time_limit=3600, task_soft_time_limit=3300)
    app.task(nothing, name="a", shared=False, time_limit=5)
    app.task(nothing, name="b", shared=False)
    celery_tasks(app)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    expected = 'tasks=a count=1 of_the_app="task_time_limit=3600, task_soft_time_limit=3300"'
    assert record.getMessage() == f"wire.task_limits_not_enforced {expected}"


DJANGO = """
import os, sys, types
sys.modules["shop"] = types.ModuleType("shop", "An app of the project's own.")
shop = sys.modules["shop"]
shop.__path__ = []
settings = types.ModuleType("shop.settings")
settings.INSTALLED_APPS = []
settings.DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": sys.argv[1]}}
sys.modules["shop.settings"] = settings
os.environ["DJANGO_SETTINGS_MODULE"] = "shop.settings"

from celery import Celery, shared_task
app = Celery("shop")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks(["shop"])
shop.tasks = sys.modules["shop.tasks"] = types.ModuleType("shop.tasks")
from django.db import connection

@shared_task(name="look")
def look():
    open_before = connection.connection is not None
    connection.ensure_connection()
    return open_before

from celery import current_app
from contract_tests.messages import message, then
from queues import receive_all
from transports.celery import celery_tasks
from transports.memory import MemoryTransport
from unstract_core import Consumer
transport = MemoryTransport()
transport.send([message("look", "q", on_success=then("done", "callbacks")) for _ in range(2)])
Consumer(transport, celery_tasks(current_app), ["q"]).drain(timeout=10)
print([delivery.payload.args for delivery in receive_all(transport, "callbacks")])
"""


def test_django_tasks_run_with_fresh_connections(tmp_path: Path) -> None:
    """Tasks of `autodiscover_tasks` run, and database connections are closed around each, as in Celery's worker."""
    program = f"import sys; sys.path[:0] = {sys.path!r}\n{DJANGO}"
    command = [sys.executable, "-c", program, str(tmp_path / "shop.sqlite3")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (0, "[[False], [False]]\n"), ended.stderr[-3000:]


def total(numbers: list[int]) -> int:
    return sum(numbers)


OWN: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "map": (lambda add: add.map([[1, 2], [3]]), [3, 3]),
    "starmap": (lambda add: add.starmap([[[1, 2]], [[3]]]), [3, 3]),
    "backend_cleanup": (lambda add: add.app.signature("celery.backend_cleanup"), None),
    "accumulate": (lambda add: add.app.signature("celery.accumulate", args=[1, 2]), [1, 2]),
}


@pytest.mark.parametrize("case", OWN)
def test_celerys_own_tasks_run(
    rabbitmq_url: str, transport: CeleryTransport, queue: str, pipe: Pipe, case: str
) -> None:
    """`celery.map`, `celery.backend_cleanup` and others that a Celery client sends run on the Consumer."""
    make, expected = OWN[case]
    with contextlib.closing(celery_app(rabbitmq_url)) as app:
        add = app.task(total, name="add", shared=False)
        with running(Consumer(transport, celery_tasks(app), [queue])):
            result = make(add).apply_async(queue=queue)
            assert result.get(timeout=ALIVE) == expected
        pipe.delete(app.thread_oid)


def test_chunks_run_as_tasks(rabbitmq_url: str, transport: CeleryTransport, queue: str, pipe: Pipe) -> None:
    """Each chunk of a Celery client runs on the Consumer as a message of its own."""
    with contextlib.closing(celery_app(rabbitmq_url)) as app:
        add = app.task(total, name="add", shared=False)
        with running(Consumer(transport, celery_tasks(app), [queue])):
            result = add.chunks([[[1, 2]], [[3]], [[4, 5]]], 2).apply_async(queue=queue)
            results = [one.get(timeout=ALIVE) for one in result.parent or result]
        assert results == [[3, 3], [9]]
        pipe.delete(app.thread_oid)
