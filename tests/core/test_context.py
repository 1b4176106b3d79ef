"""`current_delivery`: the delivery of the running task."""

from __future__ import annotations

import threading

import pytest
from queues import queue_name

from contract_tests.messages import message
from transports.memory import MemoryTransport
from unstract_core import Consumer, Delivery, RetryLater, Tasks, current_delivery


def test_current_delivery_is_visible_only_to_its_task() -> None:
    """A task sees its id, attempt and payload on each attempt; before, after and in other threads it is None."""
    transport, queue, tasks = MemoryTransport(), queue_name(), Tasks()
    seen: list[tuple[Delivery | None, Delivery | None]] = []

    @tasks.register("look")
    def look() -> None:
        elsewhere: list[Delivery | None] = []
        thread = threading.Thread(target=lambda: elsewhere.append(current_delivery()))
        thread.start()
        thread.join()
        seen.append((current_delivery(), elsewhere[0]))
        if len(seen) == 1:
            raise RetryLater(delay=0)

    transport.send([message("look", queue, task_id="t-1")])
    assert Consumer(transport, tasks, [queue]).drain(timeout=5) == 2
    (first, nobody), (second, _) = seen
    assert first is not None
    assert second is not None
    assert (first.attempt, second.attempt, first.id) == (1, 2, second.id)
    assert first.payload is not None
    assert first.payload.task_id == "t-1"
    assert nobody is current_delivery() is None


@pytest.mark.parametrize("end", [ValueError, SystemExit])
def test_current_delivery_ends_with_its_task(end: type[BaseException]) -> None:
    """However a task ends, the next task on its thread sees its own delivery."""
    transport, queue, tasks = MemoryTransport(), queue_name(), Tasks()
    seen: list[str | None] = []

    @tasks.register("look")
    def look(name: str) -> None:
        delivery = current_delivery()
        seen.append(delivery.payload.task_id if delivery is not None and delivery.payload is not None else None)
        if name == "first":
            raise end

    transport.send([message("look", queue, name, task_id=name) for name in ("first", "second")])
    Consumer(transport, tasks, [queue], max_attempts=1).drain(timeout=5)
    assert seen == ["first", "second"]
