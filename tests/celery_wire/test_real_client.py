"""A Consumer runs the tasks of a Celery client, answers its AsyncResult, and refuses unsupported options."""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import strategies as some
from celery import Celery, chain, group, signature
from celery.exceptions import NotRegistered, TaskRevokedError
from celery_wire.support import ALIVE, Bench, Pipe, celery_app
from consumers import running
from hypothesis import given, settings
from queues import queue_name

from transports.celery import CeleryTransport
from unstract_core import Consumer, RetryLater, Tasks, current_delivery

PAST = "2020-01-01T00:00:00+00:00"
tasks = Tasks()


class ProductError(Exception):
    """An exception of the product's own."""


ERRORS: dict[str, Callable[[], Exception]] = {
    "ValueError": lambda: ValueError("bad"),
    "TimeoutError": lambda: TimeoutError("too slow"),
    "ZeroDivisionError": lambda: ZeroDivisionError("division by zero"),
    "RuntimeError": lambda: RuntimeError(""),
    "ProductError": lambda: ProductError("it does not: add up"),
}


@tasks.register("echo")
def echo(*args: Any, **kwargs: Any) -> Any:
    return {"args": list(args), "kwargs": kwargs}


@tasks.register("fail")
def fail(name: str = "ValueError") -> None:
    raise ERRORS[name]()


@tasks.register("attempt")
def attempt(at_least: int = 1) -> dict[str, Any]:
    delivery = current_delivery()
    assert delivery is not None
    if delivery.attempt < at_least:
        raise RetryLater(0.1)
    return {"attempt": delivery.attempt, "id": delivery.id, "at": time.time()}


@pytest.fixture(scope="module")
def served(rabbitmq_url: str, pipe: Pipe) -> Iterator[str]:
    """The queue of a consumer of ours."""
    queue = pipe.declare(queue_name())
    with contextlib.closing(CeleryTransport(rabbitmq_url)) as transport, running(Consumer(transport, tasks, [queue])):
        yield queue


@settings(max_examples=30)
@given(args=some.json_arrays, kwargs=some.json_objects)
def test_a_real_client_gets_the_result(product: Celery, served: str, args: list[Any], kwargs: dict[str, Any]) -> None:
    """`send_task(...).get()` returns the result of our task, for every value of the wire."""
    echoed = product.send_task("echo", args=args, kwargs=kwargs, queue=served).get(timeout=ALIVE)
    assert some.same(echoed, {"args": args, "kwargs": kwargs})


@pytest.mark.parametrize("name", ERRORS)
def test_a_real_client_gets_the_exceptions_class(product: Celery, served: str, name: str) -> None:
    """A builtin exception is raised as itself, another one under the same name, with the text as its argument."""
    expected = ERRORS[name]()
    result = product.send_task("fail", args=[name], queue=served)
    with pytest.raises(Exception, match=f"^{re.escape(str(expected))}$") as caught:
        result.get(timeout=ALIVE)
    assert type(caught.value).__name__ == name
    assert (type(caught.value) is type(expected)) == (name != "ProductError")


def test_an_unknown_task_raises_not_registered(product: Celery, served: str, queue: str, pipe: Pipe) -> None:
    """`get` raises NotRegistered, as with a Celery worker, and the errback is sent, which Celery omits."""
    errback = signature("e", queue=queue)
    result = product.send_task("no_such_task", queue=served, link_error=errback)
    with pytest.raises(NotRegistered, match="no_such_task"):
        result.get(timeout=ALIVE)
    assert pipe.one(queue).args == [result.id]
    assert pipe.buried(served, result.id).headers["x-dead-reason"].startswith("UnknownTask: no task 'no_such_task'")


def test_an_ignored_result_is_not_answered(product: Celery, served: str, pipe: Pipe) -> None:
    """With ignore_result a failure is retried and dead-lettered like a task without a caller."""
    sent = product.send_task("fail", queue=served, ignore_result=True, retries=4)
    dead = pipe.buried(served, sent.id)
    assert (dead.headers["x-dead-reason"], dead.headers["x-dead-attempts"]) == ("ValueError: bad", 5)


@pytest.mark.parametrize("links", [{}, {"link": "saved", "link_error": "failed"}], ids=["alone", "with callbacks"])
def test_an_expired_task_is_revoked(
    product: Celery, served: str, queue: str, pipe: Pipe, links: dict[str, str]
) -> None:
    """`get` raises TaskRevokedError, as with a Celery worker, and the errback is sent, which Celery omits."""
    signatures = {name: signature(task, queue=queue) for name, task in links.items()}
    # as a header alone: with expires= RabbitMQ would drop it before anyone sees it
    result = product.send_task("echo", queue=served, headers={"expires": PAST}, **signatures)
    with pytest.raises(TaskRevokedError, match="expired"):
        result.get(timeout=ALIVE)
    assert result.state == "REVOKED"
    if links:
        errback = pipe.one(queue)
        assert (errback.headers["task"], errback.args) == ("failed", [result.id])
    assert "Expired: the message expired at 2020" in pipe.buried(served, result.id).headers["x-dead-reason"]


def test_a_task_that_expires_here_is_not_run(
    product: Celery, make_celery: Callable[..., CeleryTransport], queue: str, make_queue: Callable[[], str], pipe: Pipe
) -> None:
    """A task that expires while it waits for a thread fails as expired, and is not started."""
    ran: list[str] = []
    tasks = Tasks()

    @tasks.register("take")
    def take(name: str, seconds: float) -> str:
        ran.append(name)
        time.sleep(seconds)
        return name

    errback_queue = make_queue()
    product.send_task("take", args=["long", 2.0], queue=queue)
    late = product.send_task(
        "take",
        args=["late", 0],
        queue=queue,
        headers={"expires": in_seconds(1)},
        link_error=signature("e", queue=errback_queue),
    )
    last = product.send_task("take", args=["last", 0], queue=queue)
    with running(Consumer(make_celery(), tasks, [queue], prefetch=5)):
        assert last.get(timeout=ALIVE) == "last"
        assert pipe.one(errback_queue).args == [late.id]
    assert ran == ["long", "last"]
    assert "expired" in pipe.buried(queue, late.id).headers["x-dead-reason"]


@pytest.mark.parametrize(("header", "in_time"), [("eta", True), ("expires", False)])
def test_a_time_without_zone_is_utc(bench: Bench, header: str, in_time: bool) -> None:
    """An eta or an expiry without a time zone counts as UTC, as in Celery."""
    moment = in_seconds(-1).removesuffix("+00:00")
    bench.put(json.dumps([[header], {}, {}]), {"task": "note", "id": str(uuid.uuid4()), header: moment})
    bench.the_next_one_runs()
    assert (header in bench.ran) == in_time


@pytest.mark.parametrize(("sent", "received"), [(0, 5), (1, 1), (10, 10), (11, 10), (255, 10)])
def test_a_priority_is_capped_at_ten(
    make_celery: Callable[..., CeleryTransport], queue: str, pipe: Pipe, sent: int, received: int
) -> None:
    """A priority beyond ten is the highest one, and a missing one is the middle."""
    pipe.put(queue, "[[], {}, {}]", {"task": "t", "id": "i"}, priority=sent)
    with contextlib.closing(make_celery().subscribe([queue], lease=60)) as subscription:
        (delivery,) = subscription.receive(limit=1, wait=ALIVE)
        assert delivery.priority == received


def in_seconds(seconds: float) -> str:
    return (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)).isoformat()


def test_an_unexpired_task_runs(product: Celery, served: str) -> None:
    """A task whose `expires` is in the future runs."""
    assert product.send_task("attempt", queue=served, expires=60).get(timeout=ALIVE)["attempt"] == 1


def test_a_task_waits_for_its_eta(product: Celery, served: str) -> None:
    """A task with an eta is run at that time, and not before it."""
    started = time.time()
    result = product.send_task("attempt", queue=served, countdown=1.5)
    assert product.send_task("echo", queue=served).get(timeout=ALIVE)  # others are run meanwhile
    assert result.get(timeout=ALIVE)["at"] - started >= 1.5


def test_an_eta_of_another_zone_counts(product: Celery, served: str) -> None:
    """An eta in another time zone means the same moment."""
    zone = datetime.timezone(datetime.timedelta(hours=-7))
    started = time.time()
    eta = datetime.datetime.fromtimestamp(started + 1, zone)
    assert product.send_task("attempt", queue=served, eta=eta).get(timeout=ALIVE)["at"] >= started + 1


def test_earlier_retries_count(product: Celery, served: str) -> None:
    """A message with `retries` is delivered with the attempt after them, under its own id."""
    result = product.send_task("attempt", queue=served, retries=3)
    answer = result.get(timeout=ALIVE)
    assert (answer["attempt"], answer["id"]) == (4, result.id)


def test_a_retried_task_answers_its_client(product: Celery, served: str) -> None:
    """The message of the next attempt has the id and the reply queue of the first."""
    result = product.send_task("attempt", args=[3], queue=served)
    answer = result.get(timeout=ALIVE)
    assert (answer["attempt"], answer["id"]) == (3, result.id)


def test_too_many_retries_fail(product: Celery, served: str, pipe: Pipe) -> None:
    """A message with too many retries is dead-lettered, and its sender gets the failure."""
    result = product.send_task("attempt", queue=served, retries=99)
    with pytest.raises(Exception, match="delivered 100 times and never settled") as caught:
        result.get(timeout=ALIVE)
    assert type(caught.value).__name__ == "TooManyAttempts"
    assert pipe.buried(served, result.id).headers["x-dead-attempts"] == 100


def test_a_compressed_message_is_read(product: Celery, served: str) -> None:
    """A message that a client sends with `compression="zlib"` runs."""
    value = "x" * 10_000
    answer = product.send_task("echo", args=[value], queue=served, compression="zlib").get(timeout=ALIVE)
    assert answer["args"] == [value]


def test_a_protocol_1_message_is_refused(rabbitmq_url: str, served: str, queue: str, pipe: Pipe) -> None:
    """A message of Celery's protocol 1 is refused with the remedy, and its errbacks are sent."""
    with contextlib.closing(celery_app(rabbitmq_url, task_protocol=1)) as old:
        result = old.send_task("echo", queue=served, link_error=signature("e", queue=queue))
        with pytest.raises(Exception, match="protocol version 1; set task_protocol = 2"):
            result.get(timeout=ALIVE)
    assert pipe.one(queue).args == [result.id]
    assert "protocol version 1; set task_protocol = 2" in pipe.buried(served, result.id).headers["x-dead-reason"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "time limits": ({"time_limit": 9, "soft_time_limit": 5}, "the task has time limits (9, 5), and a thread cannot be"),
    "chain": ({"chain": [signature("echo", queue="q")]}, "the task is part of a chain, which is not continued here"),
    "chord": ({"chord": signature("echo", queue="q")}, "the task is part of a chord, which is not continued here"),
    "group of links": ({"link": group(signature("a"), signature("b"))}, "a link that is a group is not fired here"),
    "chain as a link": ({"link": signature("a") | signature("b")}, "a link that is a chain is not fired here"),
    "option of a link": ({"link": signature("a", priority=3, expires=9)}, "expires, priority cannot be honoured"),
    "pickle": ({"serializer": "pickle"}, "nothing is ever unpickled: set task_serializer = 'json' at its sender"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_options_are_refused(product: Celery, served: str, queue: str, pipe: Pipe, case: str) -> None:
    """The message is dead-lettered with the reason, its client's `get` raises, and its errback is sent."""
    options, reason = REFUSED[case]
    result = product.send_task("echo", queue=served, link_error=signature("e", queue=queue), **options)
    with pytest.raises(Exception, match=re.escape(reason)) as caught:
        result.get(timeout=ALIVE)
    assert type(caught.value).__name__ == "MalformedPayload"
    dead = pipe.buried(served, result.id)
    assert reason in dead.headers["x-dead-reason"]
    if case != "pickle":  # where the errbacks are in the pickle too
        assert pipe.one(queue).args == [result.id]


def test_every_task_of_a_refused_chain_fails(product: Celery, served: str, pipe: Pipe) -> None:
    """A client that waits for the last task of a refused chain gets the failure."""
    steps = [product.signature("echo", args=[n], immutable=True, queue=served) for n in range(3)]
    last = chain(*steps).apply_async()
    for result in (last, last.parent, last.parent.parent):
        with pytest.raises(Exception, match="part of a chain, which is not continued here"):
            result.get(timeout=ALIVE)
    assert "part of a chain" in pipe.buried(served, last.parent.parent.id).headers["x-dead-reason"]


def test_ignored_time_limits_let_a_task_run(rabbitmq_url: str, product: Celery, pipe: Pipe, queue: str) -> None:
    """`ignore_time_limits=True` runs a task with time limits, and does not enforce them."""
    transport = CeleryTransport(rabbitmq_url, ignore_time_limits=True)
    with contextlib.closing(transport), running(Consumer(transport, tasks, [queue])):
        assert product.send_task("echo", queue=queue, time_limit=9).get(timeout=ALIVE)
