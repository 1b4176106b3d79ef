"""Consumers on threads of this process, for a queue that other processes cannot reach."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from examples.processes import STOP_SECONDS, uninterrupted
from examples.workers import Worker
from unstract_core import Consumer, Transport, load_transport
from unstract_core.discovery import import_object


class ConsumerThread:
    """A running consumer of one queue, on a daemon thread."""

    def __init__(
        self, transport: Transport, tasks: Mapping[str, Callable[..., Any]], queue: str, *, concurrency: int
    ) -> None:
        self._consumer = Consumer(transport, tasks, [queue], concurrency=concurrency)
        self._returned = False
        self._thread = threading.Thread(target=self._run, name=f"consumer of {queue}", daemon=True)
        self._thread.start()

    @property
    def exit_code(self) -> int | None:
        """Return None while it runs, then 0, or 1 if it raised."""
        return None if self._thread.is_alive() else int(not self._returned)

    def stop(self) -> int:
        """Let it finish its tasks, and return its exit code; 1 if it takes too long."""
        self._consumer.stop()
        self._thread.join(STOP_SECONDS)
        return 1 if self.exit_code is None else self.exit_code

    def _run(self) -> None:
        self._consumer.run()
        self._returned = True


class WorkerThreads:
    """The workers of one demo in its own process, which gets their `environment`."""

    def __init__(self, url: str, environment: Mapping[str, str]) -> None:
        os.environ.update(environment)
        self._url = url
        self._threads: dict[str, tuple[ConsumerThread, Transport]] = {}

    def start(self, worker: Worker) -> str:
        tasks = import_object(worker.app, "the worker's tasks")
        with uninterrupted():
            transport = load_transport(self._url)
            consumer = ConsumerThread(transport, tasks, worker.queue, concurrency=worker.threads)
            self._threads[worker.name] = (consumer, transport)
        return "threads of this process"

    def ended(self) -> dict[str, int]:
        codes = {name: consumer.exit_code for name, (consumer, _) in self._threads.items()}
        return {name: code for name, code in codes.items() if code is not None}

    def stop(self) -> dict[str, int]:
        exits = {name: consumer.stop() for name, (consumer, _) in self._threads.items()}
        for _, transport in self._threads.values():
            transport.close()
        return exits
