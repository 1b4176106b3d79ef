"""Out: a real Celery prefork worker runs what we send, fires its callbacks, and answers our blocked callers."""

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


def test_a_result_is_the_first_argument_of_on_success(
    dispatcher: Dispatcher, worker_queue: str, queue: str, pipe: Pipe
) -> None:
    """The worker publishes (result, **kwargs) to the callback's queue, its parent and root the dispatch."""
    ok = signature("saved", kwargs={"document": "d-1"}, queue=queue)
    err = signature("failed", kwargs={"document": "d-1"}, queue=queue)
    handle = dispatcher.send_with_callback("double", args=[{"é": 1}], queue=worker_queue, on_success=ok, on_error=err)
    found = pipe.one(queue)
    assert (found.args, found.kwargs, found.headers["task"]) == ([[{"é": 1}, {"é": 1}]], {"document": "d-1"}, "saved")
    assert (found.headers["parent_id"], found.headers["root_id"]) == (handle.id, handle.id)
    assert pipe.left(queue) == []


def test_the_id_of_a_failed_dispatch_is_the_first_argument_of_on_error(
    dispatcher: Dispatcher, worker_queue: str, queue: str, pipe: Pipe
) -> None:
    """An errback that the worker does not know is sent (id, **kwargs), and on_success is not."""
    ok = signature("saved", queue=queue)
    err = signature("failed", kwargs={"callback_kwargs": {"run_id": "r"}}, queue=queue)
    task_id = str(uuid.uuid4())
    handle = dispatcher.send_with_callback("fail", queue=worker_queue, on_success=ok, on_error=err, task_id=task_id)
    found = pipe.one(queue)
    assert handle.id == task_id
    assert (found.headers["task"], found.args) == ("failed", [task_id])
    assert found.kwargs == {"callback_kwargs": {"run_id": "r"}}  # Celery tells nobody the error's text
    assert found.headers["parent_id"] == task_id
    assert pipe.left(queue) == []


@pytest.mark.parametrize("errback", ["errback_of_the_id", "errback_bound"])
def test_an_errback_that_the_worker_knows_and_that_takes_the_id_is_sent(
    dispatcher: Dispatcher, worker_queue: str, queue: str, pipe: Pipe, errback: str
) -> None:
    """Registered on the worker with one argument, or bound: Celery sends it to the queue that it names."""
    handle = dispatcher.send_with_callback("fail", queue=worker_queue, on_error=signature(errback, queue=queue))
    found = pipe.one(queue)
    assert (found.headers["task"], found.args, found.kwargs) == (errback, [handle.id], {})


def test_an_errback_that_the_worker_knows_and_that_takes_more_is_run_inline(
    dispatcher: Dispatcher, worker_queue: str, make_queue: Callable[[], str], pipe: Pipe
) -> None:
    """Celery calls it in the failing worker with (request, exception, traceback), and sends nothing."""
    seen, never = make_queue(), make_queue()
    err = signature("errback_inline", kwargs={"seen": seen}, queue=never)
    handle = dispatcher.send_with_callback("fail", queue=worker_queue, on_error=err)
    assert pipe.one(seen).json == ["inline", handle.id, "ValueError: bad", "str"]
    assert pipe.left(never) == []


def test_an_errback_that_the_worker_knows_and_that_takes_any_is_run_inline(
    dispatcher: Dispatcher, worker_queue: str, make_queue: Callable[[], str], pipe: Pipe
) -> None:
    """With *args it gets (request, exception, traceback) too, and the request knows the dispatch's id."""
    seen, never = make_queue(), make_queue()
    err = signature("errback_of_any", kwargs={"seen": seen}, queue=never)
    handle = dispatcher.send_with_callback("fail", queue=worker_queue, on_error=err)
    assert pipe.one(seen).json == ["any", 3, "Context", handle.id]
    assert pipe.left(never) == []


@settings(max_examples=30)
@given(args=some.json_arrays, kwargs=some.json_objects)
def test_what_is_sent_is_what_the_task_gets(
    dispatcher: Dispatcher, worker_queue: str, args: list[Any], kwargs: dict[str, Any]
) -> None:
    """Every value of the domain reaches a real task, and comes back in its answer, as it was."""
    found = dispatcher.call("echo", args=args, kwargs=kwargs, queue=worker_queue, timeout=ALIVE)
    assert some.same(found, {"args": args, "kwargs": kwargs})


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
def test_a_result_of_any_kind_is_made_to_fit(dispatcher: Dispatcher, worker_queue: str, name: str) -> None:
    """What Celery writes as an envelope, or as no JSON at all, reaches a caller as the named rules say."""
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
def test_a_failure_reaches_a_blocked_caller_as_type_and_text(
    dispatcher: Dispatcher, worker_queue: str, name: str
) -> None:
    """TaskFailed says what the worker's exception would have said; its class is not imported."""
    with pytest.raises(TaskFailed) as caught:
        dispatcher.call("fail", args=[name], queue=worker_queue, timeout=ALIVE)
    assert str(caught.value) == FAILURES[name]


def test_an_exception_that_cannot_be_pickled_is_told_by_its_name(dispatcher: Dispatcher, worker_queue: str) -> None:
    """Celery wraps it; a caller hears of the exception and not of the wrapper."""
    with pytest.raises(TaskFailed, match=r"^UnpicklableError: no way$"):
        dispatcher.call("fail", args=["unpicklable"], queue=worker_queue, timeout=ALIVE)


def test_an_argument_of_an_exception_that_json_has_no_word_for_is_told(
    dispatcher: Dispatcher, worker_queue: str
) -> None:
    """Whatever an exception was given, its caller hears of it."""
    with pytest.raises(TaskFailed, match=r"^ValueError: .*00000000-0000-0000-0000-000000000007"):
        dispatcher.call("fail", args=["object"], queue=worker_queue, timeout=ALIVE)


def test_wrong_arguments_are_a_failure(dispatcher: Dispatcher, worker_queue: str) -> None:
    """A task that does not take what was sent fails as one that raised."""
    with pytest.raises(TaskFailed, match=r"^TypeError: double\(\) takes 1 positional argument"):
        dispatcher.call("double", args=[1, 2], queue=worker_queue, timeout=ALIVE)


def test_a_task_that_the_worker_does_not_know_fails_its_caller(dispatcher: Dispatcher, worker_queue: str) -> None:
    """Celery answers NotRegistered over rpc://."""
    with pytest.raises(TaskFailed, match=r"^NotRegistered: no_such_task$"):
        dispatcher.call("no_such_task", queue=worker_queue, timeout=ALIVE)


def test_the_errback_of_a_task_that_the_worker_does_not_know_is_never_sent(
    dispatcher: Dispatcher, worker_queue: str, queue: str, pipe: Pipe
) -> None:
    """Celery's own loss, which ours does not share: it rejects the message and fires nothing (docs/celery.md)."""
    handle = dispatcher.send_with_callback("no_such_task", queue=worker_queue, on_error=signature("e", queue=queue))
    dispatcher.call("echo", queue=worker_queue, timeout=ALIVE)  # which the worker has read after that one
    assert pipe.left(queue) == []
    with pytest.raises(NotSupported):
        dispatcher.status(handle.id)


def test_a_worker_without_a_result_backend_is_a_timeout_that_says_so(dispatcher: Dispatcher, mute_queue: str) -> None:
    """The task runs and nobody answers: the deadline ends the wait, and the text names what may be missing."""
    with pytest.raises(ReplyTimeout, match="a Celery worker with a result backend"):
        dispatcher.call("double", args=[1], queue=mute_queue, timeout=2)


def test_a_worker_without_a_result_backend_fires_callbacks_all_the_same(
    dispatcher: Dispatcher, mute_queue: str, queue: str, pipe: Pipe
) -> None:
    """Callbacks need no result backend: on_success and on_error arrive."""
    dispatcher.send_with_callback("double", args=[1], queue=mute_queue, on_success=signature("saved", queue=queue))
    assert pipe.one(queue).args == [[1, 1]]
    handle = dispatcher.send_with_callback("fail", queue=mute_queue, on_error=signature("failed", queue=queue))
    assert pipe.one(queue).args == [handle.id]


def test_a_delayed_task_is_run_when_its_time_has_come(dispatcher: Dispatcher, worker_queue: str) -> None:
    """The delay travels as Celery's eta: not before it, and not much after."""
    started = time.time()
    found: Any = dispatcher.call("who", queue=worker_queue, timeout=ALIVE, delay=1.5)
    assert found["at"] - started >= 1.5


def test_a_task_knows_its_ids_and_its_fairness(dispatcher: Dispatcher, worker_queue: str) -> None:
    """request.id is the dispatch's, root_id is its own, and fairness is where the product looks for it."""
    fairness = FairnessKey(org_id="acme", workload_type="api", pipeline_priority=7)
    found: Any = dispatcher.call("who", queue=worker_queue, timeout=ALIVE, fairness=fairness)
    assert found["id"] == found["root_id"] == found["correlation_id"]
    assert found["retries"] == 0
    assert found["fairness"] == {"org_id": "acme", "workload_type": "api", "pipeline_priority": 7}
