"""The functions that run in a process with a wrong clock. Each takes the URL and the schema first."""

from __future__ import annotations

from typing import Any

from consumers import running
from postgres.support import transport_on
from queues import answer

from contract_tests.messages import message, then
from unstract_core import Consumer, Dispatcher, Reply, RetryLater


def send(url: str, schema: str, queue: str, delay: float) -> None:
    with transport_on(url, schema) as transport:
        transport.send([message("fine", queue, delay=delay, on_success=then("done", queue + "-cb"), task_id=queue)])


def drain(url: str, schema: str, queue: str, timeout: float) -> int:
    """Work on a queue until it is empty or the time is up, and return the number of tasks that ran."""

    def again(delay: float) -> None:
        raise RetryLater(delay)

    with transport_on(url, schema) as transport:
        return Consumer(transport, {"fine": lambda: "fine", "again": again}, [queue]).drain(timeout=timeout)


def give_reply(url: str, schema: str, key: str, ttl: float) -> None:
    with transport_on(url, schema) as transport:
        answer(transport, Reply(key, "completed", result="here", ttl=ttl))


def read_reply(url: str, schema: str, key: str) -> Any:
    with transport_on(url, schema) as transport:
        reply = transport.reply(key, timeout=0.1)
        return reply and reply.result


def call(url: str, schema: str, queue: str) -> Any:
    """Call a task, with a worker in the same process, and return its result."""
    with (
        transport_on(url, schema) as transport,
        running(Consumer(transport, {"fine": lambda: "fine"}, [queue])),
    ):
        return Dispatcher(transport).call("fine", queue=queue, timeout=60)


def age(url: str, schema: str, queue: str) -> float | None:
    with transport_on(url, schema) as transport:
        (state,) = transport.queues([queue])
        return state.oldest


def purge(url: str, schema: str, queue: str, older_than: float) -> int:
    with transport_on(url, schema) as transport:
        return transport.dead.purge(queue=queue, older_than=older_than)
