"""A Celery prefork worker runs the tasks of this package, sends their callbacks, and answers blocked callers."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import strategies as some
from celery import signature
from celery_wire.support import ALIVE, Pipe
from hypothesis import given, settings

from transports.celery import CeleryTransport
from unstract_core import Dispatcher, FairnessKey, NotSupported, ReplyTimeout, TaskFailed


@pytest.fixture(scope="module")
def dispatcher(rabbitmq_url: str) -> Iterator[Dispatcher]:
    with contextlib.closing(CeleryTransport(rabbitmq_url)) as transport:
        yield Dispatcher(transport)


def test_a_result_is_on_successs_first_argument(
    dispatcher: Dispatcher, worker_queue: str, queue: str, pipe: Pipe
) -> None:
    """The worker sends (result, **kwargs) to the callback's queue, with the dispatch as parent and root."""
    ok = signature("saved", kwargs={"document": "d-1"}, queue=queue)
    err = signature("failed", kwargs={"document": "d-1"}, queue=queue)
    handle = dispatcher.send_with_callback("double", args=[{"é": 1}], queue=worker_queue, on_success=ok, on_error=err)
    callback = pipe.one(queue)
    assert (callback.args, callback.kwargs, callback.headers["task"]) == (
        [[{"é": 1}, {"é": 1}]],
        {"document": "d-1"},
        "saved",
    )
    assert (callback.headers["parent_id"], callback.headers["root_id"]) == (handle.id, handle.id)
    assert pipe.left(queue) == []


def test_a_failed_id_is_the_first_argument(dispatcher: Dispatcher, worker_queue: str, queue: str, pipe: Pipe) -> None:
    """An errback that the worker does not know is sent as (id, **kwargs), and on_success is not sent."""
    ok = signature("saved", queue=queue)
    err = signature("failed", kwargs={"callback_kwargs": {"run_id": "r"}}, queue=queue)
    task_id = str(uuid.uuid4())
    handle = dispatcher.send_with_callback("fail", queue=worker_queue, on_success=ok, on_error=err, task_id=task_id)
    callback = pipe.one(queue)
    assert handle.id == task_id
    assert (callback.headers["task"], callback.args) == ("failed", [task_id])
    assert callback.kwargs == {"callback_kwargs": {"run_id": "r"}}  # Celery does not send the error's text
    assert callback.headers["parent_id"] == task_id
    assert pipe.left(queue) == []


@pytest.mark.parametrize("errback", ["errback_of_the_id", "errback_bound"])
def test_a_known_errback_of_one_argument_is_sent(
    dispatcher: Dispatcher, worker_queue: str, queue: str, pipe: Pipe, errback: str
) -> None:
    """Celery sends an errback with one argument, or a bound one, to the queue that it names."""
    handle = dispatcher.send_with_callback("fail", queue=worker_queue, on_error=signature(errback, queue=queue))
    callback = pipe.one(queue)
    assert (callback.headers["task"], callback.args, callback.kwargs) == (errback, [handle.id], {})


def test_a_known_errback_of_three_arguments_runs_inline(
    dispatcher: Dispatcher, worker_queue: str, make_queue: Callable[[], str], pipe: Pipe
) -> None:
    """Celery calls it in the failing worker with (request, exception, traceback), and sends nothing."""
    seen, never = make_queue(), make_queue()
    err = signature("errback_inline", kwargs={"seen": seen}, queue=never)
    handle = dispatcher.send_with_callback("fail", queue=worker_queue, on_error=err)
    assert pipe.one(seen).json == ["inline", handle.id, "ValueError: bad", "str"]
    assert pipe.left(never) == []


def test_a_known_errback_of_any_arguments_runs_inline(
    dispatcher: Dispatcher, worker_queue: str, make_queue: Callable[[], str], pipe: Pipe
) -> None:
    """With *args it also gets (request, exception, traceback), and the request has the dispatch's id."""
    seen, never = make_queue(), make_queue()
    err = signature("errback_of_any", kwargs={"seen": seen}, queue=never)
    handle = dispatcher.send_with_callback("fail", queue=worker_queue, on_error=err)
    assert pipe.one(seen).json == ["any", 3, "Context", handle.id]
    assert pipe.left(never) == []


@settings(max_examples=30)
@given(args=some.json_arrays, kwargs=some.json_objects)
def test_a_real_task_gets_the_sent_values(
    dispatcher: Dispatcher, worker_queue: str, args: list[Any], kwargs: dict[str, Any]
) -> None:
    """Every value of the wire reaches a task of a Celery worker, and returns in its answer, unchanged."""
    echoed = dispatcher.call("echo", args=args, kwargs=kwargs, queue=worker_queue, timeout=ALIVE)
    assert some.same(echoed, {"args": args, "kwargs": kwargs})


RESULTS = {
    "null": None,
    "text": "é \U0001f600",
    "uuid": "00000000-0000-0000-0000-000000000007",
    "moment": {"at": "2026-01-02T03:04:05.000678+00:00", "day": "2026-01-02"},
    "decimal": ["118.40"],
    "bytes": "/wA=",
    "nan": [None, None],
    "large": {"n": str(2**70)},
    "nul": "a\ufffdb",
}


@pytest.mark.parametrize("name", RESULTS)
def test_any_result_is_normalised(dispatcher: Dispatcher, worker_queue: str, name: str) -> None:
    """A result with envelopes of kombu, or beyond JSON, reaches a caller by the named rules."""
    assert some.same(dispatcher.call("give", args=[name], queue=worker_queue, timeout=ALIVE), RESULTS[name])


FAILURES = {
    "one argument": "ValueError: bad",
    "no argument": "ValueError",
    "many arguments": "ValueError: ('bad', 7)",
    "key": "KeyError: 'missing'",
    "os": "FileNotFoundError: [Errno 2] No such file or directory",  # its file is not among its arguments
    "product": "ProductError: it does not add up",
    "timeout": "TimeoutError: too slow",
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_reaches_a_caller_as_text(dispatcher: Dispatcher, worker_queue: str, name: str) -> None:
    """TaskFailed has the text of the worker's exception, whose class is not imported."""
    with pytest.raises(TaskFailed) as caught:
        dispatcher.call("fail", args=[name], queue=worker_queue, timeout=ALIVE)
    assert str(caught.value) == FAILURES[name]


def test_an_unpicklable_exception_keeps_its_name(dispatcher: Dispatcher, worker_queue: str) -> None:
    """A caller gets the type and text of an exception that Celery has wrapped."""
    with pytest.raises(TaskFailed, match=r"^UnpicklableError: no way$"):
        dispatcher.call("fail", args=["unpicklable"], queue=worker_queue, timeout=ALIVE)


def test_an_exception_argument_beyond_json_arrives(dispatcher: Dispatcher, worker_queue: str) -> None:
    """A caller gets a failure whose exception has arguments that JSON does not have."""
    with pytest.raises(TaskFailed, match=r"^ValueError: .*00000000-0000-0000-0000-000000000007"):
        dispatcher.call("fail", args=["object"], queue=worker_queue, timeout=ALIVE)


def test_wrong_arguments_fail_the_caller(dispatcher: Dispatcher, worker_queue: str) -> None:
    """A task that does not take its arguments fails like a task that raised."""
    with pytest.raises(TaskFailed, match=r"^TypeError: double\(\) takes 1 positional argument"):
        dispatcher.call("double", args=[1, 2], queue=worker_queue, timeout=ALIVE)


def test_an_unknown_task_fails_its_caller(dispatcher: Dispatcher, worker_queue: str) -> None:
    """A Celery worker answers NotRegistered over rpc://."""
    with pytest.raises(TaskFailed, match=r"^NotRegistered: no_such_task$"):
        dispatcher.call("no_such_task", queue=worker_queue, timeout=ALIVE)


def test_celery_sends_no_errback_of_unknown_tasks(
    dispatcher: Dispatcher, worker_queue: str, queue: str, pipe: Pipe
) -> None:
    """A Celery worker rejects an unknown task without its errback, which this package's worker sends."""
    handle = dispatcher.send_with_callback("no_such_task", queue=worker_queue, on_error=signature("e", queue=queue))
    dispatcher.call("echo", queue=worker_queue, timeout=ALIVE)  # which the worker has read after that one
    assert pipe.left(queue) == []
    with pytest.raises(NotSupported):
        dispatcher.status(handle.id)


def test_a_worker_without_backend_is_a_timeout(dispatcher: Dispatcher, mute_queue: str) -> None:
    """The task runs without an answer, and the timeout's text names the possibly missing backend."""
    with pytest.raises(ReplyTimeout, match="a Celery worker with a result backend"):
        dispatcher.call("double", args=[1], queue=mute_queue, timeout=2)


def test_a_worker_without_backend_sends_callbacks(
    dispatcher: Dispatcher, mute_queue: str, queue: str, pipe: Pipe
) -> None:
    """on_success and on_error arrive without a result backend."""
    dispatcher.send_with_callback("double", args=[1], queue=mute_queue, on_success=signature("saved", queue=queue))
    assert pipe.one(queue).args == [[1, 1]]
    handle = dispatcher.send_with_callback("fail", queue=mute_queue, on_error=signature("failed", queue=queue))
    assert pipe.one(queue).args == [handle.id]


def test_a_delayed_task_runs_on_time(dispatcher: Dispatcher, worker_queue: str) -> None:
    """A delay is Celery's eta: the task runs at that time, and not before it."""
    started = time.time()
    request: Any = dispatcher.call("who", queue=worker_queue, timeout=ALIVE, delay=1.5)
    assert request["at"] - started >= 1.5


def test_a_real_task_has_ids_and_fairness(dispatcher: Dispatcher, worker_queue: str) -> None:
    """request.id is the dispatch's, root_id the task's own, and fairness is in the product's header."""
    fairness = FairnessKey(org_id="acme", workload_type="api", pipeline_priority=7)
    request: Any = dispatcher.call("who", queue=worker_queue, timeout=ALIVE, fairness=fairness)
    assert request["id"] == request["root_id"] == request["correlation_id"]
    assert request["retries"] == 0
    assert request["fairness"] == {"org_id": "acme", "workload_type": "api", "pipeline_priority": 7}
