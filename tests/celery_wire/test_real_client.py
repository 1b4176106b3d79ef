"""In: our Consumer runs what a real Celery client sent, answers its AsyncResult, and refuses aloud what it cannot."""

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
    """`send_task(...).get()` returns what our task returned, for every value of the domain."""
    found = product.send_task("echo", args=args, kwargs=kwargs, queue=served).get(timeout=ALIVE)
    assert some.same(found, {"args": args, "kwargs": kwargs})


@pytest.mark.parametrize("name", ERRORS)
def test_a_real_client_gets_the_failure_as_an_exception_of_its_class(product: Celery, served: str, name: str) -> None:
    """A builtin is raised as itself, and a class of ours as one of the same name; the text is its argument."""
    expected = ERRORS[name]()
    result = product.send_task("fail", args=[name], queue=served)
    with pytest.raises(Exception, match=f"^{re.escape(str(expected))}$") as caught:
        result.get(timeout=ALIVE)
    assert type(caught.value).__name__ == name
    assert (type(caught.value) is type(expected)) == (name != "ProductError")


def test_a_task_that_is_not_registered_is_celerys_not_registered(
    product: Celery, served: str, queue: str, pipe: Pipe
) -> None:
    """NotRegistered from `get`, as of a real worker; and the errback is sent, which a real worker does not."""
    errback = signature("e", queue=queue)
    result = product.send_task("no_such_task", queue=served, link_error=errback)
    with pytest.raises(NotRegistered, match="no_such_task"):
        result.get(timeout=ALIVE)
    assert pipe.one(queue).args == [result.id]
    assert pipe.buried(served, result.id).headers["x-dead-reason"].startswith("UnknownTask: no task 'no_such_task'")


def test_a_client_that_ignores_the_result_is_not_answered(product: Celery, served: str, pipe: Pipe) -> None:
    """With ignore_result a failure is retried and buried as one that nobody waits for."""
    sent = product.send_task("fail", queue=served, ignore_result=True, retries=4)
    dead = pipe.buried(served, sent.id)
    assert (dead.headers["x-dead-reason"], dead.headers["x-dead-attempts"]) == ("ValueError: bad", 5)


@pytest.mark.parametrize("links", [{}, {"link": "saved", "link_error": "failed"}], ids=["alone", "with callbacks"])
def test_an_expired_task_is_not_run_and_is_revoked(
    product: Celery, served: str, queue: str, pipe: Pipe, links: dict[str, str]
) -> None:
    """TaskRevokedError from `get`, as of a real worker; its errback is sent, which a real worker does not."""
    signatures = {name: signature(task, queue=queue) for name, task in links.items()}
    # as a header alone: with expires= RabbitMQ would drop it before anyone sees it
    result = product.send_task("echo", queue=served, headers={"expires": PAST}, **signatures)
    with pytest.raises(TaskRevokedError, match="expired"):
        result.get(timeout=ALIVE)
    assert result.state == "REVOKED"
    if links:
        found = pipe.one(queue)
        assert (found.headers["task"], found.args) == ("failed", [result.id])
    assert "Expired: the message expired at 2020" in pipe.buried(served, result.id).headers["x-dead-reason"]


def test_a_task_that_expires_while_it_waits_behind_others_is_not_run(
    product: Celery, make_celery: Callable[..., CeleryTransport], queue: str, make_queue: Callable[[], str], pipe: Pipe
) -> None:
    """It was in time when it was received, and its thread was free too late: told as expired, and never started."""
    ran: list[str] = []
    tasks = Tasks()

    @tasks.register("take")
    def take(name: str, seconds: float) -> str:
        ran.append(name)
        time.sleep(seconds)
        return name

    told = make_queue()
    product.send_task("take", args=["long", 2.0], queue=queue)
    late = product.send_task(
        "take", args=["late", 0], queue=queue, headers={"expires": in_seconds(1)}, link_error=signature("e", queue=told)
    )
    last = product.send_task("take", args=["last", 0], queue=queue)
    with running(Consumer(make_celery(), tasks, [queue], prefetch=5)):
        assert last.get(timeout=ALIVE) == "last"
        assert pipe.one(told).args == [late.id]
    assert ran == ["long", "last"]
    assert "expired" in pipe.buried(queue, late.id).headers["x-dead-reason"]


@pytest.mark.parametrize(("header", "in_time"), [("eta", True), ("expires", False)])
def test_a_moment_without_a_zone_is_utc(bench: Bench, header: str, in_time: bool) -> None:
    """As Celery reads it: an eta that has just come is no reason to wait, and what has just expired is not run."""
    moment = in_seconds(-1).removesuffix("+00:00")
    bench.put(json.dumps([[header], {}, {}]), {"task": "note", "id": str(uuid.uuid4()), header: moment})
    bench.the_next_one_runs()
    assert (header in bench.ran) == in_time


@pytest.mark.parametrize(("sent", "received"), [(0, 5), (1, 1), (10, 10), (11, 10), (255, 10)])
def test_a_priority_is_one_of_ten(
    make_celery: Callable[..., CeleryTransport], queue: str, pipe: Pipe, sent: int, received: int
) -> None:
    """Brokers know 255 of them; what is beyond ours is the highest, and none is the middle."""
    pipe.put(queue, "[[], {}, {}]", {"task": "t", "id": "i"}, priority=sent)
    with contextlib.closing(make_celery().subscribe([queue], lease=60)) as subscription:
        (delivery,) = subscription.receive(limit=1, wait=ALIVE)
        assert delivery.priority == received


def in_seconds(seconds: float) -> str:
    return (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)).isoformat()


def test_a_task_that_has_not_expired_is_run(product: Celery, served: str) -> None:
    """`expires` in the future changes nothing."""
    assert product.send_task("attempt", queue=served, expires=60).get(timeout=ALIVE)["attempt"] == 1


def test_a_countdown_is_honoured(product: Celery, served: str) -> None:
    """A task with an eta is not run before it, and is run then."""
    started = time.time()
    result = product.send_task("attempt", queue=served, countdown=1.5)
    assert product.send_task("echo", queue=served).get(timeout=ALIVE)  # others are run meanwhile
    assert result.get(timeout=ALIVE)["at"] - started >= 1.5


def test_an_eta_in_another_zone_is_honoured(product: Celery, served: str) -> None:
    """The moment counts, wherever its clock hangs."""
    zone = datetime.timezone(datetime.timedelta(hours=-7))
    started = time.time()
    eta = datetime.datetime.fromtimestamp(started + 1, zone)
    assert product.send_task("attempt", queue=served, eta=eta).get(timeout=ALIVE)["at"] >= started + 1


def test_retries_before_this_delivery_count(product: Celery, served: str) -> None:
    """A message with `retries` behind it is delivered as the attempt after them, under its own id."""
    result = product.send_task("attempt", queue=served, retries=3)
    found = result.get(timeout=ALIVE)
    assert (found["attempt"], found["id"]) == (4, result.id)


def test_a_task_that_asks_to_be_run_again_answers_in_the_end(product: Celery, served: str) -> None:
    """The copy that is published for the next attempt has the id, and the address, of the first."""
    result = product.send_task("attempt", args=[3], queue=served)
    found = result.get(timeout=ALIVE)
    assert (found["attempt"], found["id"]) == (3, result.id)


def test_too_many_retries_are_refused(product: Celery, served: str, pipe: Pipe) -> None:
    """A message that was tried too often is buried, and its sender told."""
    result = product.send_task("attempt", queue=served, retries=99)
    with pytest.raises(Exception, match="delivered 100 times and never settled") as caught:
        result.get(timeout=ALIVE)
    assert type(caught.value).__name__ == "TooManyAttempts"
    assert pipe.buried(served, result.id).headers["x-dead-attempts"] == 100


def test_a_compressed_message_is_read(product: Celery, served: str) -> None:
    """A client may compress: `compression="zlib"` is undone by kombu."""
    value = "x" * 10_000
    found = product.send_task("echo", args=[value], queue=served, compression="zlib").get(timeout=ALIVE)
    assert found["args"] == [value]


def test_a_protocol_1_client_is_told_what_to_change(rabbitmq_url: str, served: str, queue: str, pipe: Pipe) -> None:
    """Celery's older messages are refused with the remedy, and their errbacks sent."""
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


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_honoured_is_refused_aloud(
    product: Celery, served: str, queue: str, pipe: Pipe, what: str
) -> None:
    """It is not run: buried with the reason, and the client's `get` raises it. Its errback, where legible, is sent."""
    options, reason = REFUSED[what]
    result = product.send_task("echo", queue=served, link_error=signature("e", queue=queue), **options)
    with pytest.raises(Exception, match=re.escape(reason)) as caught:
        result.get(timeout=ALIVE)
    assert type(caught.value).__name__ == "MalformedPayload"
    dead = pipe.buried(served, result.id)
    assert reason in dead.headers["x-dead-reason"]
    if what != "pickle":  # where the errbacks are in the pickle too
        assert pipe.one(queue).args == [result.id]


def test_every_task_of_a_refused_chain_fails(product: Celery, served: str, pipe: Pipe) -> None:
    """Who waits for the end of a chain that is refused at its start hears of it, as of one that failed."""
    steps = [product.signature("echo", args=[n], immutable=True, queue=served) for n in range(3)]
    last = chain(*steps).apply_async()
    for result in (last, last.parent, last.parent.parent):
        with pytest.raises(Exception, match="part of a chain, which is not continued here"):
            result.get(timeout=ALIVE)
    assert "part of a chain" in pipe.buried(served, last.parent.parent.id).headers["x-dead-reason"]


def test_time_limits_are_accepted_where_the_operator_says_so(
    rabbitmq_url: str, product: Celery, pipe: Pipe, queue: str
) -> None:
    """`ignore_time_limits=True` runs the task, and nothing enforces its limits."""
    transport = CeleryTransport(rabbitmq_url, ignore_time_limits=True)
    with contextlib.closing(transport), running(Consumer(transport, tasks, [queue])):
        assert product.send_task("echo", queue=queue, time_limit=9).get(timeout=ALIVE)
