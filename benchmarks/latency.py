"""Benchmark of a worker that drains no-op tasks over a transport with network latency.

    make bench                                       runs it last, on an embedded server.
    python -m benchmarks.latency --url postgresql://...

Over the memory transport, the latency is added to each receive and settlement. Over PostgreSQL, a proxy delays each
request. The last line is the upper bound: the largest batch divided by the time of one receive and one settlement.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, cast

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from benchmarks.bench import server
from transports.memory import MemoryTransport
from transports.postgres import PostgresTransport
from unstract_core import Consumer, Delivery, Message, Settlement, Subscription, TaskPayload, Transport

LATENCIES = (0.0, 0.010, 0.030, 0.060)
MESSAGES = 20_000


class FarTransport:
    """A transport that adds `latency` seconds to each receive and settlement."""

    def __init__(self, transport: Transport, latency: float) -> None:
        self._transport = transport
        self._latency = latency
        self.largest_batch = 0

    def subscribe(self, queues: Sequence[str], *, lease: float) -> Subscription:
        return FarSubscription(self, self._transport.subscribe(queues, lease=lease), self._latency)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class FarSubscription:
    """Adds the latency, and records the largest batch."""

    def __init__(self, far: FarTransport, subscription: Subscription, latency: float) -> None:
        self._far = far
        self._subscription = subscription
        self._latency = latency

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        if limit:
            time.sleep(self._latency)
        deliveries = self._subscription.receive(limit=limit, wait=wait)
        self._far.largest_batch = max(self._far.largest_batch, len(deliveries))
        return deliveries

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        time.sleep(self._latency)
        return self._subscription.settle(settlements)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._subscription, name)


class Side(asyncio.Protocol):
    """One end of a proxied connection. It forwards received bytes to the other end after `latency` seconds."""

    def __init__(self, latency: float) -> None:
        self._latency = latency
        self.other: Side | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        asyncio.get_running_loop().call_later(self._latency, self._pass_on, data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()

    def _pass_on(self, data: bytes) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.write(data)


class Client(Side):
    """The client's end. It connects to the server before it reads anything."""

    def __init__(self, latency: float, host: str, port: int) -> None:
        super().__init__(latency)
        self._host, self._port = host, port

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        cast(asyncio.Transport, transport).pause_reading()
        self._connecting = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        server, loop = Side(0.0), asyncio.get_running_loop()
        server.other, self.other = self, server
        if self._host.startswith("/"):
            await loop.create_unix_connection(lambda: server, f"{self._host}/.s.PGSQL.{self._port}")
        else:
            await loop.create_connection(lambda: server, self._host, self._port)
        if self.transport is not None:
            self.transport.resume_reading()


@contextlib.contextmanager
def slow_proxy(host: str, port: int, latency: float) -> Iterator[int]:
    """Serve a port that forwards requests after `latency` seconds, and answers at once."""
    loop = asyncio.new_event_loop()
    listening = loop.run_until_complete(loop.create_server(lambda: Client(latency, host, port), "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield int(listening.sockets[0].getsockname()[1])
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def drain(transport: Transport, latency: float) -> FarTransport:
    """Drain the queue, and print the rate."""
    far = FarTransport(transport, latency)
    consumer = Consumer(far, {"noop": lambda: None}, ["q"])
    started = time.perf_counter()
    ran = consumer.drain()
    rate = ran / (time.perf_counter() - started)
    if ran != MESSAGES:
        raise SystemExit(f"expected {MESSAGES} runs, saw {ran}")
    print(f"{rate:>10,.0f}", end="", flush=True)
    return far


def send(transport: Transport) -> None:
    for _ in range(MESSAGES // 1000):
        transport.send([Message(TaskPayload(task_name="noop", queue="q"), "q")] * 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", help="URL of a PostgreSQL server (default: an embedded one)")
    options, _ = parser.parse_known_args()  # `make bench` hands the options of the others on, too
    print(f"drain of {MESSAGES:,} no-op tasks: tasks a second, by the latency of each receive and settlement")
    print(f"{'':22}" + "".join(f"{f'+{latency * 1000:.0f} ms':>10}" for latency in LATENCIES))
    print(f"{'memory':22}", end="")
    largest = []
    for latency in LATENCIES:
        memory = MemoryTransport()
        send(memory)
        largest.append(drain(memory, latency).largest_batch)
    print()
    schema = f"wire_latency_{uuid.uuid4().hex[:8]}"
    print(f"{'PostgreSQL, by a proxy':22}", end="")
    with server(options.url) as url:
        parts = conninfo_to_dict(url)
        near = PostgresTransport(url, schema)
        near.migrate()
        for latency in LATENCIES:
            send(near)
            with slow_proxy(str(parts.get("host")), int(str(parts.get("port") or 5432)), latency) as port:
                through = PostgresTransport(make_conninfo(url, host="127.0.0.1", port=port), schema)
                drain(through, 0.0)
                through.close()
        near.close()
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(schema)))
    print()
    bounds = [batch / (2 * latency) if latency else None for batch, latency in zip(largest, LATENCIES, strict=True)]
    print(f"{'batch / round trip':22}" + "".join(f"{'' if bound is None else f'{bound:,.0f}':>10}" for bound in bounds))


if __name__ == "__main__":
    main()
