"""Support of the tests of a broker's dead letters: making some, and reading queues without the transport."""

from __future__ import annotations

import contextlib
import datetime
import json
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import kombu
from amqp.exceptions import NotFound
from celery_wire.support import ALIVE, Pipe

from contract_tests.checking import CheckedTransport
from contract_tests.harness import load_harness
from contract_tests.kit import Kit, wait_until
from contract_tests.messages import message
from transports.celery import CeleryTransport
from unstract_core import Delivery, Settlement, Verdict
from unstract_core.values.limits import JSONValue

Put: TypeAlias = tuple[bytes | str, dict[str, Any] | None, str]
"""A message to put: its body, headers and content type."""
JSON = "application/json"
AnyTransport: TypeAlias = CeleryTransport | CheckedTransport


@contextlib.contextmanager
def kit_over(url: str) -> Iterator[Kit]:
    """Yield the kit over a broker; its queues are deleted afterwards."""
    with load_harness(url) as harness:
        kit = Kit(harness)
        try:
            yield kit
        finally:
            kit.clean()


def bury(transport: AnyTransport, queue: str, *args: Any, reason: str = "r", result: JSONValue = None) -> list[str]:
    """Send a task for each argument and bury them in order; return the ids of the dead letters in that order."""
    transport.send([message("t", queue, arg) for arg in args])
    bury_next(transport, queue, len(args), reason=reason, result=result)
    return [letter.id for letter in reversed(transport.dead.find(queue=queue, limit=len(args)))]


def bury_next(
    transport: AnyTransport, queue: str, number: int, *, reason: str = "r", result: JSONValue = None
) -> list[Delivery]:
    """Bury the next messages of a queue, which must arrive in time; return them."""
    buried: list[Delivery] = []
    with contextlib.closing(transport.subscribe([queue], lease=60)) as subscription:
        while len(buried) < number:
            (held,) = subscription.receive(limit=1, wait=ALIVE)
            assert list(subscription.settle([Settlement(held, Verdict.BURY, reason=reason, result=result)])) == [True]
            buried.append(held)
    return buried


def arguments(transport: AnyTransport, queue: str) -> list[Any]:
    """Return the first argument of each letter of a queue, the oldest first."""
    wires: list[Any] = [letter.message for letter in reversed(transport.dead.find(queue=queue, limit=10_000))]
    return [wire["args"][0] for wire in wires]


def standing(url: str, queue: str) -> list[Any]:
    """Take all messages out of a queue through kombu; none if it does not exist."""
    with kombu.Connection(url) as connection, contextlib.suppress(NotFound):
        get = kombu.Queue(queue).bind(connection.channel()).get
        return list(iter(lambda: get(no_ack=True), None))
    return []


def to_publish(url: str) -> kombu.Connection:
    """Return a connection that waits for the broker's confirm of each message."""
    return kombu.Connection(url, transport_options={"confirm_publish": True})


def put_letters(pipe: Pipe, queue: str, *letters: Put) -> None:
    """Put messages into the dead letter queue of `queue`, and wait until they have arrived."""
    for body, headers, content_type in letters:
        pipe.put(f"{queue}.dead", body, headers, content_type=content_type)
    wait_until(lambda: pipe.count(f"{queue}.dead") >= len(letters), timeout=ALIVE, what="the letters to come")


def numbered(*numbers: int) -> Iterator[Put]:
    """Yield a dead letter for each number, which is its argument and its place in the order of burial."""
    for number in numbers:
        yield json.dumps([[number], {}, {}]), letter_headers(number), JSON


def letter_id(queue: str, number: int) -> str:
    """Return the id of the letter with these headers in a queue."""
    return f"{queue}/{uuid.UUID(int=number)}"


def letter_headers(number: int = 0, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the headers of a dead letter of the task `t`; a smaller number means an earlier burial."""
    buried_at = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=1000 - number)
    return {
        "task": "t",
        "id": f"task-{number}",
        "retries": 2,
        "x-dead-id": str(uuid.UUID(int=number)),
        "x-dead-reason": "because",
        "x-dead-attempts": 3,
        "x-dead-at": buried_at.isoformat(),
        **(more or {}),
    }
