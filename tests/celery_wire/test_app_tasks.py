"""The tasks of a Celery app in a Consumer: their request, handlers and signals, and their dispatches."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import celery
import pytest
from celery import Celery, Task, current_task
from celery.exceptions import Ignore, Reject, Retry
from celery_wire.app_task_support import Awaits, Stage, app_with_a_broker, declared, nothing, sent, stage
from celery_wire.observed_app import AWAY, FAIRNESS, SINGLE, real_runs
from celery_wire.observed_tasks import tasks
from queues import queue_name, receive_all

from transports.celery import celery_tasks
from transports.memory import MemoryTransport
from unstract_core import FairnessKey

# mypy: disable-error-code="untyped-decorator, misc"


@pytest.fixture(scope="module", params=["memory", "postgres"])
def place(request: pytest.FixtureRequest) -> Iterator[Stage]:
    with stage(request) as opened:
        yield opened


@pytest.fixture
def broker() -> Celery:
    return app_with_a_broker()


# The request, the handlers and the signals.


@pytest.mark.parametrize("case", SINGLE)
def test_a_task_has_celerys_request_and_signals(place: Stage, case: str) -> None:
    """A task has the same request, handlers, arguments and signals as in Celery's worker, in the same order."""
    name, args, kwargs = SINGLE[case]
    ended = place.run(tasks, name, *args, kwargs=kwargs, fairness=FairnessKey(**FAIRNESS))
    assert json.loads(json.dumps(ended.seen)) == real_runs()[case]


@pytest.mark.parametrize("awaits", ["callbacks", "reply", "nothing"])
def test_every_request_has_the_dispatchs_id(place: Stage, awaits: Awaits) -> None:
    """The id is the same over a retry and after a killed worker, and `retries` counts the earlier deliveries."""
    seen: list[Any] = []

    def look(task: Any) -> None:
        request = task.request
        info = request.delivery_info
        seen.append((request.id, request.root_id, request.retries, info["routing_key"], info["redelivered"]))
        if request.retries == 1:
            task.retry(countdown=0)

    queue = queue_name()
    id = place.send("t", queue=queue, awaits=awaits)
    assert len(receive_all(place.transport, queue, lease=0.05)) == 1  # by a worker that never comes back
    assert place.consumer(declared(look), queue).drain(timeout=10) == 2
    assert seen == [(id, id, 1, queue, True), (id, id, 2, queue, True)]


def test_a_request_without_an_id_gets_one(place: Stage) -> None:
    """The id is derived from the message: the same on every delivery, and different for another message."""
    seen: list[str] = []

    def look(task: Any) -> None:
        seen.append(task.request.id)
        if not task.request.retries:
            task.retry(countdown=0)

    for _ in range(2):
        place.run(declared(look), "t", awaits="nothing", task_id=None)
    first, again, second, once_more = seen
    assert (first, second) == (again, once_more)
    assert first != second


def test_the_request_has_priority_and_fairness(place: Stage) -> None:
    """The priority is in `delivery_info`, and fairness in the headers if the message has it."""
    seen: list[Any] = []

    def look(task: Any) -> None:
        seen.append((task.request.headers, task.request.delivery_info["priority"], task.request.parent_id))

    place.run(declared(look), "t", priority=8)
    assert seen == [(None, 8, None)]


def test_each_thread_has_its_own_request(place: Stage) -> None:
    """Four runs at the same time each have their own id and arguments throughout."""
    at_once = threading.Barrier(4, timeout=20)
    seen: list[bool] = []

    def look(task: Any, number: int) -> None:
        before = (task.request.id, list(task.request.args), current_task.request.id)
        at_once.wait()
        after = (task.request.id, list(task.request.args), current_task.request.id)
        at_once.wait()
        seen.append(before == after and before[1] == [number] and before[0] == before[2])

    queue = queue_name()
    ids = {place.send("t", number, queue=queue) for number in range(8)}
    place.consumer(declared(look), queue, concurrency=4, prefetch=8).drain(timeout=20)
    assert (seen, len(ids)) == ([True] * 8, 8)


@pytest.mark.parametrize(
    "end", [None, ValueError("x"), SystemExit(3), Retry("again"), Ignore(), Reject("no"), KeyboardInterrupt()], ids=repr
)
def test_a_run_leaves_nothing_on_its_thread(end: BaseException | None) -> None:
    """After each kind of end the next task on the thread has empty stacks and no pending retry."""
    seen: list[Any] = []

    def run(task: Any, first: bool) -> None:
        seen.append((len(task.request_stack), [one.name for one in celery._state._task_stack.stack]))
        if first and end is not None:
            raise end

    place, queue = Stage(MemoryTransport()), queue_name()
    for first in (True, False):
        place.send("t", first, queue=queue)
    place.consumer(declared(run, max_retries=0), queue, max_attempts=1).drain(timeout=10)
    assert seen == [(1, ["t"])] * 2
    assert current_task._get_current_object() is None


def test_a_raising_handler_changes_no_outcome(place: Stage, caplog: pytest.LogCaptureFixture) -> None:
    """The outcome of a task is the same if its handlers raise, and each error is logged as a WARNING."""

    class Careless(Task):
        abstract = True

        def on_retry(self, *args: Any) -> None:
            raise ValueError("on_retry")

        def on_failure(self, *args: Any) -> None:
            raise ValueError("on_failure")

    def away(task: Any) -> None:
        raise ConnectionError("away")

    ended = place.run(declared(away, base=Careless, **{**AWAY, "max_retries": 1}), "t")
    assert (ended.ran, ended.reported) == (2, ("failed", "ConnectionError: away"))
    fields = [(vars(record)["wire.event"], vars(record).get("wire.handler")) for record in caplog.records]
    assert [handler for event, handler in fields if event == "task_handler_raised"] == ["on_retry", "on_failure"]


def test_the_loader_is_called_for_each_task(place: Stage) -> None:
    """`on_task_init` is called before each task and `on_process_cleanup` after it, as in a worker."""
    calls: list[Any] = []
    app = Celery("loaded", set_as_current=False)
    app.loader.on_task_init = lambda id, task: calls.append((id, task.name))
    app.loader.on_process_cleanup = lambda: calls.append("cleanup")
    app.task(nothing, name="t", shared=False)
    ended = place.run(celery_tasks(app), "t")
    assert calls == [(ended.id, "t"), "cleanup"]


# Other requests of a task than a retry.


@pytest.mark.parametrize("awaits", ["callbacks", "reply", "nothing"])
def test_an_ignored_message_is_only_acknowledged(place: Stage, awaits: Awaits) -> None:
    """After Ignore there is no callback, reply, status or dead letter."""
    ended = place.run(tasks, "ignored", awaits=awaits)
    assert (ended.ran, ended.callbacks, ended.status, ended.buried) == (1, [], None, None)


@pytest.mark.parametrize("awaits", ["callbacks", "reply", "nothing"])
@pytest.mark.parametrize(
    ("name", "text"), [("rejected", "ValueError: not for me"), ("rejected in words", "Reject: not for me")]
)
def test_a_rejected_message_is_dead_lettered(place: Stage, name: str, text: str, awaits: Awaits) -> None:
    """After Reject a message is dead-lettered at once, and its sender receives the failure."""
    ended = place.run(tasks, name, awaits=awaits)
    assert (ended.ran, ended.buried) == (1, text)
    assert ended.status is not None
    assert (ended.status.status, ended.status.error) == ("failed", text)
    assert awaits != "callbacks" or ended.reported == ("failed", text)


def test_wrong_arguments_fail_with_type_error(place: Stage) -> None:
    """Arguments that the task does not take fail with the task's own TypeError, as in Celery."""
    kind, text = place.run(tasks, "takes nothing", 1).reported
    assert kind == "failed"
    assert text.startswith("TypeError: done() takes 1 positional argument but 2 were given")


def replacing(task: Any, name: str) -> Any:
    return task.replace(task.app.signature(name, args=[1]))


@pytest.mark.parametrize("awaits", ["callbacks", "reply"])
def test_an_awaited_task_cannot_be_replaced(place: Stage, awaits: Awaits, broker: Celery) -> None:
    """A task with a caller or callbacks that replaces itself fails with NotSupported, and nothing is sent."""
    ended = place.run(declared(replacing, broker), "t", "other", awaits=awaits)
    assert ended.reported[0] == "failed"
    assert ended.reported[1].startswith("NotSupported: task 't' replaces itself")
    assert sent(broker) == []


def test_a_task_is_replaced_through_the_apps_broker(place: Stage, broker: Celery) -> None:
    """A task without a caller is replaced by a task with its id, as in Celery, and its message is acknowledged."""
    ended = place.run(declared(replacing, broker), "t", "other", awaits="nothing")
    assert (ended.ran, ended.status, ended.buried) == (1, None, None)
    ((headers, _),) = sent(broker)
    assert (headers["task"], headers["id"], headers["root_id"]) == ("other", ended.id, ended.id)


def test_add_to_chord_raises_celerys_error(place: Stage) -> None:
    """`add_to_chord` outside a chord raises Celery's own ValueError."""

    def add(task: Any) -> None:
        task.add_to_chord(task.si())

    ended = place.run(declared(add), "t")
    assert ended.reported == ("failed", "ValueError: Current task is not member of any chord")


def delay(other: Any) -> Any:
    return other.delay(1)


def chain(other: Any) -> Any:
    return celery.chain(other.si(1), other.si(2)).apply_async().parent


def group(other: Any) -> Any:
    return celery.group([other.si(1)]).apply_async().results[0]


@pytest.mark.parametrize("dispatch", [delay, chain, group])
def test_a_tasks_dispatches_use_the_apps_broker(place: Stage, broker: Celery, dispatch: Callable[[Any], Any]) -> None:
    """A task's own dispatches go through the app's broker, with the running task as parent and root."""
    broker.task(nothing, name="other", shared=False, typing=False)

    def parent(task: Any) -> str:
        return str(dispatch(task.app.tasks["other"]).id)

    ended = place.run(declared(parent, broker), "t")
    ((headers, body),) = sent(broker)
    assert (headers["task"], headers["id"], body[0]) == ("other", ended.reported[1], [1])
    assert (headers["parent_id"], headers["root_id"]) == (ended.id, ended.id)
    assert len(body[2]["chain"] or []) == (dispatch is chain)


def test_celerys_result_backend_is_not_written(place: Stage) -> None:
    """The Consumer writes nothing to Celery's result backend."""
    app = Celery("with-results", backend="cache+memory://", set_as_current=False)

    def progress(task: Any, write: bool) -> str:
        if write:
            task.update_state(state="PROGRESS", meta={"page": 1})
        return "done"

    tasks = declared(progress, app)
    states = [app.AsyncResult(place.run(tasks, "t", write).id).state for write in (True, False)]
    assert states == ["PROGRESS", "PENDING"]


def test_a_task_calls_another_as_a_function(place: Stage) -> None:
    """A task that is called directly, by `apply` or from the registry has no message, and its retry is Celery's."""
    app = Celery("nested", set_as_current=False)
    seen: list[Any] = []

    @app.task(name="inner", bind=True, shared=False, max_retries=2)
    def inner(task: Any, fail: bool) -> str:
        seen.append((task.request.id is None, task.request.is_eager, task.request.retries))
        if fail and task.request.retries < 2:
            raise task.retry(exc=KeyError("inner"), countdown=0)
        return "inner"

    def outer(task: Any) -> Any:
        with pytest.raises(KeyError):
            inner(True)
        result = [inner(False), inner.apply(args=[True]).get(), tasks["inner"](False)]
        assert task.request.id == current_task.request.id
        return result

    tasks = declared(outer, app)
    ended = place.run(tasks, "t")
    assert (ended.ran, ended.reported) == (1, ("succeeded", ["inner"] * 3))
    direct, eager = (True, False, 0), [(False, True, retries) for retries in range(3)]
    assert seen == [direct, direct, *eager, direct]
