"""Helpers of the tests of PostgreSQL: functions on threads, worker processes, and a clock that can be moved."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from psycopg.conninfo import make_conninfo

from contract_tests.time_limits import start
from transports.postgres import PostgresTransport

LONG_POLL = 150.0
"""A poll interval (seconds) with which polling delivers nothing in the time of a test."""

on_one_server = pytest.mark.parametrize("postgres_url", ["embedded"], indirect=True)
"""For tests that take long, or that would disturb others on a shared server: only the embedded server."""

second_server = pytest.mark.slow(
    variant="tests/postgres, on the machine's own server",
    reason="The same tests run on the embedded server in `make test`; the two differ in their major version only.",
)
"""For the parameter that stands for the machine's own server."""

AT_ONCE = 4.0
"""Seconds within which a notified message must have run, also on a busy machine. An idle consumer begins a new
`receive` every five seconds and would then find the message without a notification."""


def application() -> str:
    return f"wire-{uuid.uuid4().hex[:12]}"


def named(url: str, name: str) -> str:
    """Return a conninfo whose connections carry an application name."""
    return make_conninfo(url, application_name=name)


class ShiftedClock:
    """The machine's monotonic clock, which a test can move forward by `ahead` seconds."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


@contextlib.contextmanager
def transport_on(url: str, schema: str, **options: Any) -> Iterator[PostgresTransport]:
    transport = PostgresTransport(url, schema, **options)
    try:
        yield transport
    finally:
        transport.close()


@contextlib.contextmanager
def in_background(*functions: Callable[[], object], timeout: float = 60.0) -> Iterator[None]:
    """Run functions on threads of their own; at the end, wait for them and raise their errors."""
    begun = [start(function) for function in functions]
    yield
    for ended in begun:
        ended(timeout)


class Worker:
    """A worker process with the tasks of worker.py. `lines` is the output of its tasks, `log` that of its logger."""

    def __init__(self, url: str, schema: str, *queues: str, lease: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "postgres.worker", url, schema, str(lease), *queues],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self.pid = self._process.pid
        self.log: list[str] = []
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._readers = [
            threading.Thread(target=self._read, args=(self._process.stdout, self._lines.put), daemon=True),
            threading.Thread(target=self._read, args=(self._process.stderr, self.log.append), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def says(self, timeout: float = 20.0) -> str:
        """Return the next line that the worker prints; fail when none comes within `timeout` seconds."""
        try:
            return self._lines.get(timeout=timeout)
        except queue.Empty:
            raise AssertionError(f"the worker said nothing for {timeout} s; its log: {self.log}") from None

    def has_said(self) -> bool:
        return not self._lines.empty()

    def tell(self, line: str) -> None:
        """Write a line to the worker's standard input, which ends a task of the kind `hold`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(10)
        for reader in self._readers:
            reader.join(10)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def wait(self) -> int:
        """Wait for its end and return its exit status."""
        return self._process.wait(20)

    def _read(self, stream: Any, add: Callable[[str], None]) -> None:
        for line in stream:
            add(line.rstrip("\n"))


@contextlib.contextmanager
def worker(url: str, schema: str, *queues: str, lease: float) -> Iterator[Worker]:
    """Start a worker process and wait until it is subscribed; end it at the end of the block."""
    process = Worker(url, schema, *queues, lease=lease)
    try:
        assert process.says() == "ready"
        yield process
    finally:
        process.kill()
