"""The memory transport under the conformance kit: the sample of a harness."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from contract_tests.harness import Harness
from transports.memory.transport import MemoryTransport
from unstract_core.payload import TaskPayload
from unstract_core.transport import Message


class MemoryHarness(Harness):
    """Opens memory transports for the kit."""

    name = "memory"
    capabilities = MemoryTransport.capabilities
    shared = False

    def transport(self) -> contextlib.closing[MemoryTransport]:
        return contextlib.closing(MemoryTransport())

    def inject(self, transport: MemoryTransport, queue: str, text: str) -> None:
        with transport._store.using():
            transport._store.add(Message(TaskPayload(task_name="injected", queue=queue), queue), text)
            transport._store.changed.notify_all()

    def expire(self, transport: MemoryTransport, queue: str) -> None:
        with transport._store.using():
            for row in transport._store.rows.values():
                if row.queue == queue and row.state != "ready":
                    row.due = 0.0
            transport._store.changed.notify_all()

    def reissue(self, transport: MemoryTransport, id: str, as_id: str) -> bool:
        store = transport._store
        with store.using():
            store.rows.pop(int(as_id), None)
            row = store.rows.pop(int(id))
            row.id = int(as_id)
            store.rows[row.id] = row
            store.postpone(row, 0)
        return True

    def stored(self, transport: MemoryTransport, queue: str) -> Sequence[str]:
        with transport._store.using():
            return [row.text for row in transport._store.rows.values() if row.queue == queue]


def harness(url: str = "memory://") -> MemoryHarness:
    """Return the harness of `--transport memory`."""
    return MemoryHarness()
