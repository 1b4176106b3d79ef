"""Retries of a Celery task are waiting messages, and happen as often as with Celery's own worker."""

from __future__ import annotations

import datetime
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery.exceptions import Reject
from celery_wire.app_task_support import Awaits, Stage, callback_queue, declared, stage
from celery_wire.observed_app import AWAY, DECLARATIONS, FAILURES, LIMITS, real_runs, task_name
from celery_wire.observed_tasks import tasks
from hypothesis import given
from hypothesis import strategies as st
from queues import queue_name

from contract_tests.kit import wait_until
from unstract_core import Delivery, RetryLater, TaskPayload
from unstract_core.worker.context import delivering

# mypy: disable-error-code="untyped-decorator"


@pytest.fixture(scope="module", params=["memory", "postgres"])
def place(request: pytest.FixtureRequest) -> Iterator[Stage]:
    with stage(request) as opened:
        yield opened


@pytest.fixture(scope="module", params=["postgres"])
def on_postgres(request: pytest.FixtureRequest) -> Iterator[Stage]:
    with stage(request) as opened:
        yield opened


def away(task: Any) -> None:
    raise ConnectionError(f"away for the {task.request.retries}th time")


@given(
    st.sampled_from(sorted(DECLARATIONS)),
    st.sampled_from(LIMITS),
    st.sampled_from(FAILURES),
    st.sampled_from(["callbacks", "reply", "nothing"]),
    st.integers(1, 7),
)
def test_a_task_runs_as_in_celerys_worker(
    place: Stage, declaration: str, limit: int, failures: int, awaits: Awaits, max_attempts: int
) -> None:
    """A task has the runs, handlers and signals of a Celery worker, and its sender gets one answer."""
    name = task_name(declaration, limit)
    if awaits == "nothing":
        max_attempts = 1
    ended = place.run(tasks, name, failures, awaits=awaits, max_attempts=max_attempts)

    def shown(seen: Any, id: str) -> Any:
        return json.loads(json.dumps(seen).replace(id, "<id>"))

    id = f"{name}, {failures}"
    expected = shown(real_runs()[id], id)
    assert shown(ended.seen, ended.id) == expected
    assert ended.ran == sum(event == "run" for event, *_ in expected)
    status, returned = [details[:2] for event, *details in expected if event == "after_return"][-1]
    if awaits != "nothing":
        assert ended.buried is None
        kind, text = ended.reported
        assert (kind, shown(text, ended.id)) == (
            ("succeeded", failures) if status == "SUCCESS" else ("failed", returned)
        )
    elif status == "SUCCESS":
        assert (ended.status, ended.buried) == (None, None)
    else:
        assert ended.buried == (ended.status and ended.status.error)
        assert shown(ended.buried, ended.id) == returned


@pytest.mark.parametrize(("backoff", "jitter"), [(True, True), (10, False)])
def test_the_products_executor_runs_four_times(on_postgres: Stage, backoff: int, jitter: bool) -> None:
    """Its row stays claimed between attempts, with growing delays, and only the last error reaches the sender."""
    place, tables, queue = on_postgres, on_postgres.tables, queue_name()
    assert tables is not None
    options = {"max_retries": 3, "retry_backoff": backoff, "retry_jitter": jitter}
    executor = declared(away, autoretry_for=(ConnectionError, TimeoutError, OSError), **options)
    id = place.send("t", queue=queue)
    consumer = place.consumer(executor, queue)
    row = "SELECT state, read_ct, extract(epoch FROM vt - now()) FROM {messages} WHERE queue_name = %s"
    attempts_seen = []
    while tables.count(queue):
        wait_until(lambda: consumer.drain(timeout=0.2), what="the task to be run")
        for state, attempts, wait in tables.rows(row, queue):
            if jitter and state == "ready":
                continue  # its wait was over, and the drain ended between the claim and the run
            longest = backoff * 2 ** (attempts - 1)
            assert (state, wait <= longest, jitter or wait > longest - 8) == ("claimed", True, True)
            assert tables.count(callback_queue(queue)) == 0
            attempts_seen.append(attempts)
        tables.execute("UPDATE {messages} SET vt = now() WHERE queue_name = %s AND state = 'claimed'", queue)
    assert jitter or attempts_seen == [1, 2, 3]
    ended = place.ended(id, "callbacks", queue)
    assert ended.reported == ("failed", "ConnectionError: away for the 3th time")
    assert (ended.status and ended.status.error, ended.buried) == (ended.reported[1], None)
    del consumer.counters["given_back"]  # a drain may end between the claim and the run
    assert +consumer.counters == {"ran": 4, "retried": 3, "settled": 1}


def test_a_retry_outlives_its_worker(on_postgres: Stage) -> None:
    """The message waits in the table, and a worker of the command line runs it when it is due, under the same id."""
    place, tables, queue = on_postgres, on_postgres.tables, queue_name()
    assert tables is not None
    id = place.send("again in a second", queue=queue)
    started = time.monotonic()
    wait_until(lambda: place.consumer(tasks, queue).drain(timeout=0.1) == 1, what="the first run")
    command = [sys.executable, "-m", "unstract_core", "worker", "--app", "celery_wire.observed_tasks:tasks"]
    url = f"{tables.url}?schema={tables.schema}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([*command, "--queue", queue, "--url", url], env=environment) as worker:
        try:
            wait_until(lambda: tables.count(callback_queue(queue)) == 1, timeout=60, what="the callback")
            assert time.monotonic() - started >= 1
        finally:
            worker.send_signal(signal.SIGTERM)
    assert worker.returncode == 0
    assert place.ended(id, "callbacks", queue).reported == ("succeeded", {"id": id, "retries": 1, "pid": worker.pid})


def test_a_task_without_limit_is_retried_until_success(place: Stage) -> None:
    """`max_retries=None` has no limit, regardless of `max_attempts`."""

    def thirteenth(task: Any) -> int:
        if task.request.retries < 12:
            raise ConnectionError
        return int(task.request.retries)

    ended = place.run(declared(thirteenth, **AWAY, max_retries=None), "t", max_attempts=2)
    assert ended.reported == ("succeeded", 12)


def retry_with_exc(task: Any) -> None:
    try:
        away(task)
    except ConnectionError as exc:
        raise task.retry(exc=exc, countdown=0, max_retries=50) from exc


def retry_without_exc(task: Any) -> None:
    try:
        away(task)
    except ConnectionError:
        task.retry(countdown=0, max_retries=50)


def retry_without_throw(task: Any) -> str:
    try:
        away(task)
    except ConnectionError:
        task.retry(countdown=0, max_retries=50, throw=False)
    return "asked"


def reject_again(task: Any) -> None:
    try:
        away(task)
    except ConnectionError as exc:
        raise Reject(exc, requeue=True) from exc


@pytest.mark.parametrize("run", [retry_with_exc, retry_without_exc, retry_without_throw, reject_again])
@pytest.mark.parametrize(("max_attempts", "runs"), [(2, 4), (6, 6)])
def test_retries_beyond_the_limit_end_with_the_error(
    place: Stage, run: Callable[..., Any], max_attempts: int, runs: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A retry beyond `max_retries` and `max_attempts` fails with the task's error, and a WARNING has the same text."""
    caplog.set_level(logging.INFO)
    ended = place.run(declared(run), "t", max_attempts=max_attempts)
    assert ended.ran == runs
    assert ended.reported == ("failed", f"ConnectionError: away for the {runs - 1}th time")
    logged = [vars(record).get("wire.event") for record in caplog.records]
    assert [event for event in logged if event in ("task_retry_asked", "task_raised")] == [
        *["task_retry_asked"] * (runs - 1),
        "task_raised",
    ]


def test_a_caught_retry_still_happens(place: Stage) -> None:
    """A retry whose exception the task has caught happens, as in Celery, and the callback waits for the last run."""

    def careless(task: Any) -> str:
        try:
            if not task.request.retries:
                task.retry(countdown=0)
        except Exception:  # which Celery's Retry is
            return "caught"
        return "done"

    ended = place.run(declared(careless), "t")
    assert (ended.ran, ended.reported) == (2, ("succeeded", "done"))


@pytest.mark.parametrize("end", [SystemExit(3), Reject("no"), KeyError("k")])
def test_a_retry_without_throw_always_happens(place: Stage, end: BaseException) -> None:
    """A retry with `throw=False` happens after a return and after an error, and the sender gets no answer before."""

    def ends(task: Any) -> str:
        if not task.request.retries:
            task.retry(countdown=0, throw=False)
            raise end
        return "done"

    ended = place.run(declared(ends), "t")
    assert (ended.ran, ended.reported) == (2, ("succeeded", "done"))


def test_a_raised_task_without_a_caller_is_retried(place: Stage) -> None:
    """A task without callbacks or caller has `max_attempts` deliveries, which Celery's worker would not give it."""
    ended = place.run(declared(away, **AWAY, max_retries=1), "t", awaits="nothing", max_attempts=3)
    assert (ended.ran, ended.buried) == (3, "ConnectionError: away for the 2th time")


@pytest.mark.parametrize(
    "options",
    [
        {"max_retries": 0},
        {"max_retries": -1},
        {"max_retries": 0, **AWAY},
        {"autoretry_for": (OSError,), "retry_kwargs": {"max_retries": 0}},
    ],
)
@pytest.mark.parametrize("awaits", ["nothing", "callbacks", "reply"])
def test_a_task_without_retries_runs_once(place: Stage, options: dict[str, Any], awaits: Awaits) -> None:
    """A task with `max_retries=0` is never run again because it raised."""

    def asks(task: Any) -> None:
        task.retry(exc=ConnectionError("away for the 0th time"), countdown=0)

    for run in (away, asks):
        if run is not away and options.get("retry_kwargs"):
            continue  # a task that calls retry by itself has the limit of the task, not that of autoretry
        ended = place.run(declared(run, **options), "t", awaits=awaits, max_attempts=5)
        assert ended.ran == 1
        if awaits == "nothing":
            assert ended.buried == "ConnectionError: away for the 0th time"
        else:
            assert ended.reported == ("failed", "ConnectionError: away for the 0th time")


def asked(run: Callable[..., Any], **options: Any) -> float | None:
    """Let a task ask for a retry, and return in how many seconds it is to happen."""
    payload = TaskPayload(task_name="t", args=[], kwargs={}, queue="q")
    task = declared(run, **options)["t"]
    with delivering(Delivery("1", "q", 1, payload, "{}")), pytest.raises(RetryLater) as caught:
        task()
    return caught.value.delay


def asking(**how: Any) -> Callable[..., Any]:
    def ask(task: Any) -> None:
        task.retry(**how)

    return ask


@given(st.floats(-10, 1e6) | st.integers(-10, 10**6))
def test_a_retry_waits_for_its_countdown(countdown: float) -> None:
    """The countdown of a retry is its delay in seconds, and a negative one is 0."""
    assert asked(asking(countdown=countdown)) == pytest.approx(max(0.0, countdown), abs=1e-5)


def test_a_retry_waits_for_the_tasks_default() -> None:
    """A retry without a countdown waits for the task's default delay, and for no time if that is None."""
    assert asked(asking()) == 180
    assert asked(asking(), default_retry_delay=7) == 7
    assert asked(asking(), default_retry_delay=None) == 0


def test_a_retry_delay_is_capped() -> None:
    """A retry's delay beyond a transport's longest is cut to that."""
    assert asked(asking(countdown=100 * 365 * 86400)) == 10 * 365 * 86400


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "America/Lima"])
def test_a_retrys_eta_is_read_as_in_celery(zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An eta of a retry is a datetime or a text, and UTC without a time zone."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        eta = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=300)
        tokyo = eta.astimezone(datetime.timezone(datetime.timedelta(hours=9)))
        for given_eta in (eta, tokyo, eta.replace(tzinfo=None), tokyo.isoformat()):
            assert asked(asking(eta=given_eta)) == pytest.approx(300, abs=2)
        assert asked(asking(eta=eta, countdown=20)) == 20
        assert asked(asking(eta=eta - datetime.timedelta(hours=1))) == 0
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("how", "text"),
    [({"countdown": "soon"}, "TypeError"), ({"countdown": 1e300}, "OverflowError"), ({"eta": "soon"}, "ValueError")],
)
def test_a_bad_retry_delay_fails_the_task(place: Stage, how: dict[str, Any], text: str) -> None:
    """A retry with a delay that is no number fails the task with that reason."""
    ended = place.run(declared(asking(**how)), "t")
    assert ended.ran == 1
    assert ended.reported[1].startswith(text)
    assert ended.buried == ended.reported[1]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "args": ({"args": ["d-2", {"page": 1}]}, "other arguments"),
    "kwargs": ({"kwargs": {"page": 3}}, "other arguments"),
    "another queue": ({"queue": "elsewhere"}, "queue"),
    "another priority": ({"priority": 9}, "priority"),
    "an expiry": ({"expires": 10}, "expires"),
    "a link": ({"link": []}, "link"),
    "headers": ({"headers": {"x": 1}}, "headers"),
    "a time limit": ({"time_limit": 10}, "time_limit"),
}


@pytest.mark.parametrize("how", REFUSED)
@pytest.mark.parametrize("catching", [False, True])
def test_a_retry_of_another_message_is_refused(place: Stage, how: str, catching: bool) -> None:
    """A retry with other arguments or options fails with NotSupported, which reaches the sender."""

    def ask(task: Any, *args: Any, **kwargs: Any) -> str:
        try:
            task.retry(countdown=0, **REFUSED[how][0])
        except Exception:
            if not catching:
                raise
        return "done"

    ended = place.run(
        declared(ask, autoretry_for=(Exception,), default_retry_delay=0), "t", "d-1", {"page": 1}, kwargs={"page": 2}
    )
    kind, text = ended.reported
    assert (ended.ran, kind) == (1, "failed")
    assert text.startswith("NotSupported: task 't' asks for a retry with ")
    assert REFUSED[how][1] in text


def test_a_retry_with_changed_arguments_is_refused(place: Stage) -> None:
    """A retry with an argument that the task has changed in place is refused: the redelivery would not have it."""

    def count(task: Any, context: dict[str, Any]) -> None:
        context["tries"] += 1
        raise task.retry(args=[context], countdown=0)

    kind, text = place.run(declared(count), "t", {"tries": 0}).reported
    assert (kind, text[:13]) == ("failed", "NotSupported:")


def test_a_retry_with_the_same_values_happens(place: Stage) -> None:
    """A retry that names the same arguments, queue and priority is the same message."""

    def repeat(task: Any, context: dict[str, Any], *, page: int) -> Any:
        request = task.request
        if request.retries:
            return [context, page]
        raise task.retry(
            args=request.args,
            kwargs={"page": page},
            countdown=0,
            queue=request.delivery_info["routing_key"],
            priority=request.delivery_info["priority"],
        )

    ended = place.run(declared(repeat), "t", {"a": [1.5, None]}, kwargs={"page": 2})
    assert (ended.ran, ended.reported) == (2, ("succeeded", [{"a": [1.5, None]}, 2]))


def test_each_run_gets_the_sent_arguments(place: Stage) -> None:
    """A retry without arguments runs with those that were sent, also if the task has changed them."""

    def take(task: Any, context: dict[str, Any]) -> Any:
        document = context.pop("document")
        if task.request.retries:
            return document
        raise ConnectionError

    assert place.run(declared(take, **AWAY), "t", {"document": "d-1"}).reported == ("succeeded", "d-1")
