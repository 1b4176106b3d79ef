"""The tasks of a Celery app as our Consumer's registry: what a task finds around itself, and what its app is then."""

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
    with stage(request) as found:
        yield found


@pytest.fixture
def broker() -> Celery:
    return app_with_a_broker()


# The request, the handlers and the signals.


@pytest.mark.parametrize("case", SINGLE)
def test_a_task_finds_around_it_what_celerys_own_worker_gives_it(place: Stage, case: str) -> None:
    """Its request, its handlers and their arguments, and Celery's signals, in the same order."""
    name, args, kwargs = SINGLE[case]
    ended = place.run(tasks, name, *args, kwargs=kwargs, fairness=FairnessKey(**FAIRNESS))
    assert json.loads(json.dumps(ended.seen)) == real_runs()[case]


@pytest.mark.parametrize("awaits", ["callbacks", "reply", "nothing"])
def test_the_request_has_the_dispatchs_id_on_every_delivery(place: Stage, awaits: Awaits) -> None:
    """Over a retry, and after a worker that died; `retries` counts the deliveries before this one."""
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


def test_the_request_of_a_message_without_an_id_has_one_all_the_same(place: Stage) -> None:
    """Made of the message's own: the same on every delivery, and another message's is another."""
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


def test_the_request_tells_the_messages_priority_and_fairness(place: Stage) -> None:
    """The priority in `delivery_info`; no headers where there is no fairness."""
    seen: list[Any] = []

    def look(task: Any) -> None:
        seen.append((task.request.headers, task.request.delivery_info["priority"], task.request.parent_id))

    place.run(declared(look), "t", priority=8)
    assert seen == [(None, 8, None)]


def test_the_same_task_on_several_threads_has_a_request_for_each(place: Stage) -> None:
    """Four runs at once, each of which sees its own id and arguments before and after the others have started."""
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
def test_nothing_of_a_run_is_left_on_its_thread(end: BaseException | None) -> None:
    """However it ended: the next task on the thread finds the stacks empty but for itself, and nothing pending."""
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


def test_what_a_handler_raises_changes_nothing(place: Stage, caplog: pytest.LogCaptureFixture) -> None:
    """A task that failed, or asks for a retry, is told of as if its handlers had not raised; each is a WARNING."""

    class Careless(Task):
        abstract = True

        def on_retry(self, *args: Any) -> None:
            raise ValueError("on_retry")

        def on_failure(self, *args: Any) -> None:
            raise ValueError("on_failure")

    def away(task: Any) -> None:
        raise ConnectionError("away")

    ended = place.run(declared(away, base=Careless, **{**AWAY, "max_retries": 1}), "t")
    assert (ended.ran, ended.told) == (2, ("failed", "ConnectionError: away"))
    fields = [(vars(record)["wire.event"], vars(record).get("wire.handler")) for record in caplog.records]
    assert [handler for event, handler in fields if event == "task_handler_raised"] == ["on_retry", "on_failure"]


def test_the_loader_is_told_of_every_task(place: Stage) -> None:
    """`on_task_init` before it and `on_process_cleanup` after it, as a worker's process does."""
    told: list[Any] = []
    app = Celery("loaded", set_as_current=False)
    app.loader.on_task_init = lambda id, task: told.append((id, task.name))
    app.loader.on_process_cleanup = lambda: told.append("cleanup")
    app.task(nothing, name="t", shared=False)
    ended = place.run(celery_tasks(app), "t")
    assert told == [(ended.id, "t"), "cleanup"]


# What a task may ask for besides a retry.


@pytest.mark.parametrize("awaits", ["callbacks", "reply", "nothing"])
def test_an_ignored_message_is_acknowledged_and_that_is_all(place: Stage, awaits: Awaits) -> None:
    """No callback, no reply, no status, no dead letter."""
    ended = place.run(tasks, "ignored", awaits=awaits)
    assert (ended.ran, ended.callbacks, ended.status, ended.buried) == (1, [], None, None)


@pytest.mark.parametrize("awaits", ["callbacks", "reply", "nothing"])
@pytest.mark.parametrize(
    ("name", "text"), [("rejected", "ValueError: not for me"), ("rejected in words", "Reject: not for me")]
)
def test_a_rejected_message_is_buried_and_its_sender_told(place: Stage, name: str, text: str, awaits: Awaits) -> None:
    """At once: it is never run again, whoever waits for it."""
    ended = place.run(tasks, name, awaits=awaits)
    assert (ended.ran, ended.buried) == (1, text)
    assert ended.status is not None
    assert (ended.status.status, ended.status.error) == ("failed", text)
    assert awaits != "callbacks" or ended.told == ("failed", text)


def test_wrong_arguments_are_a_failure_that_is_told(place: Stage) -> None:
    """Nothing checks them when they are sent, as Celery does; the task's own TypeError is told."""
    what, text = place.run(tasks, "takes nothing", 1).told
    assert what == "failed"
    assert text.startswith("TypeError: done() takes 1 positional argument but 2 were given")


def replacing(task: Any, name: str) -> Any:
    return task.replace(task.app.signature(name, args=[1]))


@pytest.mark.parametrize("awaits", ["callbacks", "reply"])
def test_a_task_that_somebody_waits_for_cannot_be_replaced(place: Stage, awaits: Awaits, broker: Celery) -> None:
    """Nobody would ever hear of the other's end: the task fails with NotSupported, and nothing is sent."""
    ended = place.run(declared(replacing, broker), "t", "other", awaits=awaits)
    assert ended.told[0] == "failed"
    assert ended.told[1].startswith("NotSupported: task 't' replaces itself")
    assert sent(broker) == []


def test_a_task_that_nobody_waits_for_is_replaced_over_the_apps_broker(place: Stage, broker: Celery) -> None:
    """The other has its id, as with Celery, and the message is acknowledged."""
    ended = place.run(declared(replacing, broker), "t", "other", awaits="nothing")
    assert (ended.ran, ended.status, ended.buried) == (1, None, None)
    ((headers, _),) = sent(broker)
    assert (headers["task"], headers["id"], headers["root_id"]) == ("other", ended.id, ended.id)


def test_there_is_no_chord_to_add_to(place: Stage) -> None:
    """Celery's own ValueError is told."""

    def add(task: Any) -> None:
        task.add_to_chord(task.si())

    ended = place.run(declared(add), "t")
    assert ended.told == ("failed", "ValueError: Current task is not member of any chord")


def delay(other: Any) -> Any:
    return other.delay(1)


def chain(other: Any) -> Any:
    return celery.chain(other.si(1), other.si(2)).apply_async().parent


def group(other: Any) -> Any:
    return celery.group([other.si(1)]).apply_async().results[0]


@pytest.mark.parametrize("dispatch", [delay, chain, group])
def test_what_a_task_dispatches_goes_through_the_apps_broker(
    place: Stage, broker: Celery, dispatch: Callable[[Any], Any]
) -> None:
    """As ever; the running task is its parent and root."""
    broker.task(nothing, name="other", shared=False, typing=False)

    def parent(task: Any) -> str:
        return str(dispatch(task.app.tasks["other"]).id)

    ended = place.run(declared(parent, broker), "t")
    ((headers, body),) = sent(broker)
    assert (headers["task"], headers["id"], body[0]) == ("other", ended.told[1], [1])
    assert (headers["parent_id"], headers["root_id"]) == (ended.id, ended.id)
    assert len(body[2]["chain"] or []) == (dispatch is chain)


def test_celerys_result_backend_is_not_written(place: Stage) -> None:
    """But by the task itself."""
    app = Celery("with-results", backend="cache+memory://", set_as_current=False)

    def progress(task: Any, write: bool) -> str:
        if write:
            task.update_state(state="PROGRESS", meta={"page": 1})
        return "done"

    found = declared(progress, app)
    states = [app.AsyncResult(place.run(found, "t", write).id).state for write in (True, False)]
    assert states == ["PROGRESS", "PENDING"]


def test_a_task_that_calls_another_calls_it_as_a_function(place: Stage) -> None:
    """Directly, by `apply`, or out of the registry: the other has no message, and its retry is not ours."""
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
        result = [inner(False), inner.apply(args=[True]).get(), found["inner"](False)]
        assert task.request.id == current_task.request.id
        return result

    found = declared(outer, app)
    ended = place.run(found, "t")
    assert (ended.ran, ended.told) == (1, ("succeeded", ["inner"] * 3))
    direct, eager = (True, False, 0), [(False, True, retries) for retries in range(3)]
    assert seen == [direct, direct, *eager, direct]
