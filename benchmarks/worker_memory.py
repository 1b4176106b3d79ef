"""Check that the memory of a worker is flat over 200,000 tasks, with a sample after every 10,000.

    .venv/bin/python benchmarks/worker_memory.py                              an embedded PostgreSQL.
    .venv/bin/python benchmarks/worker_memory.py --url postgresql://...       another server, in a schema of its own.

The check runs over the memory transport and over PostgreSQL. The process also sends its tasks, in batches, to include
the memory of a producer. Every tenth task has a callback, and every hundredth raises RetryLater. The growth of the
resident memory is the median of the last three samples minus the median of the first three after the warm-up. The exit
code is 1 if it exceeds both 5 % and the bound.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import attrs
import psycopg
from psycopg import sql

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from benchmarks.bench import PAYLOAD, server  # noqa: E402 - found beside this file, which is run as a script
from transports.memory import MemoryTransport  # noqa: E402
from transports.postgres import PostgresTransport  # noqa: E402
from unstract_core import (  # noqa: E402
    Consumer,
    ContinuationSpec,
    Message,
    RetryLater,
    TaskPayload,
    Transport,
    current_delivery,
)

BATCH = 500
MIB = 1024 * 1024
MAX_WAIT = 120.0


@attrs.frozen
class Plan:
    """The number of tasks, the number of tasks between samples, and the bytes that each task leaks on purpose."""

    tasks: int
    every: int
    leak: int


def resident() -> int:
    """Return the resident memory of this process, in bytes."""
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    ps = ["/bin/ps", "-o", "rss=", "-p", str(os.getpid())]
    return int(subprocess.run(ps, capture_output=True, text=True, check=True).stdout) * 1024


def batch() -> list[Message]:
    then = ContinuationSpec(task_name="noop", kwargs={}, queue="q")
    kinds = [
        TaskPayload(task_name="noop", args=[PAYLOAD], queue="q"),
        TaskPayload(task_name="noop", args=[PAYLOAD], queue="q", on_success=then),
        TaskPayload(task_name="again", args=[PAYLOAD], queue="q"),
    ]
    return [Message(kinds[2 if n % 100 == 1 else 1 if n % 10 == 0 else 0], "q") for n in range(BATCH)]


def work(url: str | None, schema: str, plan: Plan, pipe: Connection) -> None:
    """Run a worker process, which sends samples: the number of tasks run, and its memory."""
    transport: Transport = MemoryTransport() if url is None else PostgresTransport(url, schema)
    kept: list[bytes] = []

    def noop(*args: object) -> None:
        if plan.leak:
            kept.append(os.urandom(plan.leak))

    def again(*args: object) -> None:
        delivery = current_delivery()
        if delivery is not None and delivery.attempt == 1:
            raise RetryLater(0.0)

    consumer = Consumer(transport, {"noop": noop, "again": again}, ["q"])
    ran = consumer.counters

    def feed() -> None:
        sent, looked_at = 0, 0
        while ran["ran"] < plan.tasks:
            transport.send(batch())
            sent += BATCH + BATCH // 10  # what is sent, and its callbacks
            deadline = time.monotonic() + MAX_WAIT
            while ran["settled"] < sent:
                if time.monotonic() > deadline:
                    raise SystemExit(f"only {ran['settled']} of {sent} messages were settled")
                time.sleep(0.001)
            if ran["ran"] - looked_at >= plan.every:
                looked_at = ran["ran"]
                pipe.send((looked_at, resident()))
        consumer.stop()

    threading.Thread(target=feed, daemon=True).start()
    consumer.run()
    transport.close()
    pipe.close()


def samples(url: str | None, schema: str, plan: Plan) -> Iterator[tuple[int, int]]:
    spawn = multiprocessing.get_context("spawn")
    mine, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=work, args=(url, schema, plan, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        with contextlib.suppress(EOFError):
            while True:
                if not mine.poll(MAX_WAIT):
                    raise SystemExit("the worker process has stopped working")
                yield mine.recv()
        process.join(MAX_WAIT)
        if process.exitcode != 0:
            raise SystemExit(f"the worker process has ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def is_flat(name: str, found: Iterator[tuple[int, int]], warm_up: int, bound: int) -> bool:
    """Print the samples and their growth; return whether the growth is within the bounds."""
    counted: list[int] = []
    for tasks, size in found:
        counted += [size] if tasks >= warm_up else []
        print(f"{name:12}{tasks:>9,} tasks{size / MIB:>9.1f} MiB{'' if tasks >= warm_up else '  warm-up'}", flush=True)
    if len(counted) < 6:
        raise SystemExit(f"{len(counted)} samples after the warm-up are too few: at least six are needed")
    first, last = statistics.median(counted[:3]), statistics.median(counted[-3:])
    flat = last - first <= bound
    print(
        f"{name:12}grows by {(last - first) / MIB:.1f} MiB, from {first / MIB:.1f} to {last / MIB:.1f}:"
        f" {'flat' if flat else 'NOT FLAT'}, for {bound / MIB:.1f} MiB are allowed",
        flush=True,
    )
    return flat


@contextlib.contextmanager
def fresh_schema(url: str) -> Iterator[str]:
    schema = f"wire_memory_{uuid.uuid4().hex[:8]}"
    with contextlib.closing(PostgresTransport(url, schema)) as transport:
        transport.migrate()
    try:
        yield schema
    finally:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(schema)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", help="URL of a PostgreSQL server (default: an embedded one)")
    parser.add_argument("--tasks", type=int, default=200_000)
    parser.add_argument("--every", type=int, default=10_000, help="tasks between two samples")
    parser.add_argument("--warm-up", type=int, default=20_000, help="tasks before the first sample that counts")
    parser.add_argument("--bound", type=float, default=2.0, help="MiB that the memory may grow by")
    parser.add_argument("--leak", type=int, default=0, help="bytes that each task leaks, to test that a leak is found")
    options = parser.parse_args()
    plan, bound = Plan(options.tasks, options.every, options.leak), int(options.bound * MIB)
    flat = [is_flat("memory", samples(None, "", plan), options.warm_up, bound)]
    with server(options.url) as url, fresh_schema(url) as schema:
        flat.append(is_flat("postgresql", samples(url, schema, plan), options.warm_up, bound))
    sys.exit(0 if all(flat) else 1)


if __name__ == "__main__":
    main()
