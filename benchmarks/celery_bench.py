"""Benchmark of the Celery transport beside Celery itself: both on the same RabbitMQ, in the same run.

    make bench                                              after the PostgreSQL part
    .venv/bin/python benchmarks/celery_bench.py --rounds 1

Both wait for the broker's confirm of every message (Celery with `confirm_publish`). Each worker is one process: our
Consumer with one thread, and Celery with `--pool prefork --concurrency 1`. A drain is measured from the start of the
first task to the start of the last one. The two take turns, so that both run under the same load.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kombu

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from benchmarks import celery_app  # noqa: E402 - found beside this file, which is run as a script
from benchmarks.bench import PAYLOAD  # noqa: E402
from transports.celery import CeleryTransport  # noqa: E402
from unstract_core import Consumer, ContinuationSpec, Dispatcher, Message, TaskPayload  # noqa: E402

BROKER = os.environ.get("UNSTRACT_WIRE_TEST_RABBITMQ", "amqp://guest:guest@127.0.0.1:5672//")
MAX_WAIT = 120.0


class Bench:
    """The measurements, on one broker with queues of their own."""

    def __init__(self, url: str, scale: float, scratch: Path) -> None:
        self.url = url
        self.scale = scale
        self.scratch = scratch
        self.transport = CeleryTransport(url)
        self.dispatcher = Dispatcher(self.transport)
        self.app = celery_app.app
        self.app.conf.broker_url = url
        self.queues: list[str] = []

    def count(self, number: int) -> int:
        return max(1, int(number * self.scale))

    def queue(self) -> str:
        self.queues.append(f"bench-{uuid.uuid4().hex[:8]}")
        return self.queues[-1]

    def our_send(self) -> float:
        queue = self.queue()
        return rate(self.count(1000), lambda: self.dispatcher.send("noop", args=[PAYLOAD], queue=queue))

    def celerys_send(self) -> float:
        queue = self.queue()
        return rate(self.count(1000), lambda: self.app.send_task("noop", args=[PAYLOAD], queue=queue))

    def our_bulk(self) -> float:
        queue = self.queue()
        batch = [Message(TaskPayload(task_name="noop", args=[PAYLOAD], queue=queue), queue)] * 1000
        return 1000 * rate(self.count(3), lambda: self.transport.send(batch))

    def celerys_bulk(self) -> float:
        queue = self.queue()

        def send() -> None:
            for _ in range(1000):
                self.app.send_task("noop", args=[PAYLOAD], queue=queue)

        return 1000 * rate(self.count(1), send)

    def our_drain(self) -> float:
        return self.drained(self.count(3000), chained=False, ours=True)

    def celerys_drain(self) -> float:
        return self.drained(self.count(3000), chained=False, ours=False)

    def our_chains(self) -> float:
        return self.drained(self.count(1500), chained=True, ours=True)

    def celerys_chains(self) -> float:
        return self.drained(self.count(1500), chained=True, ours=False)

    def drained(self, number: int, *, chained: bool, ours: bool) -> float:
        """Fill a queue, start a worker, and return the messages (or chains) per second."""
        queue, callbacks = self.queue(), self.queue()
        then = ContinuationSpec(task_name="noop", kwargs={"callback_kwargs": {"run_id": "r"}}, queue=callbacks)
        payload = TaskPayload(task_name="noop", args=[PAYLOAD], queue=queue, on_success=then if chained else None)
        for start in range(0, number, 1000):
            self.transport.send([Message(payload, queue)] * min(1000, number - start))
        runs = 2 * number if chained else number
        with self.worker([queue, callbacks] if chained else [queue], ours=ours, expected=runs) as heard:
            return number / max(heard(), 1e-9)

    def latencies(self, *, ours: bool) -> list[float]:
        """Measure the seconds from dispatch to the start of the callback, with two idle workers."""
        queue, callbacks = self.queue(), self.queue()
        link = self.app.signature("report_start", queue=callbacks)
        with self.worker([queue], ours=ours), self.worker([callbacks], ours=ours) as heard:
            times = []
            for _ in range(self.count(100)):
                time.sleep(0.02)
                started = time.monotonic()
                if ours:
                    self.dispatcher.send_with_callback("noop", args=[PAYLOAD], queue=queue, on_success=link)
                else:
                    self.app.send_task("noop", args=[PAYLOAD], queue=queue, link=link)
                times.append(heard() - started)
            return times

    @contextlib.contextmanager
    def worker(self, queues: list[str], *, ours: bool, expected: int = 0) -> Iterator[Callable[[], float]]:
        """Start a worker process, and yield a function that waits for its next report."""
        pipe = self.scratch / f"pipe-{uuid.uuid4().hex[:8]}"
        os.mkfifo(pipe)
        command = [sys.executable, __file__, "--work", *queues]
        if not ours:
            options = ["--pool", "prefork", "--concurrency", "1", "--without-gossip", "--without-mingle"]
            app = ["--app", "benchmarks.celery_app", "worker", "--queues", ",".join(queues)]
            command = [sys.executable, "-m", "celery", *app, *options, "--hostname", f"{pipe.name}@%h"]
        settings = {"BENCH_BROKER": self.url, "BENCH_PIPE": str(pipe), "BENCH_EXPECTED": str(expected)}
        with (self.scratch / "worker.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **settings},
                stdout=log,
                stderr=log,
            )
        words = os.open(pipe, os.O_RDWR)
        try:
            if not expected:
                self.await_consumers(queues)
            yield lambda: _word(words)
        finally:
            os.close(words)
            process.terminate()
            process.wait(60)

    def await_consumers(self, queues: list[str]) -> None:
        deadline = time.monotonic() + MAX_WAIT
        with kombu.Connection(self.url) as connection:
            for queue in queues:
                while time.monotonic() < deadline:
                    with contextlib.suppress(Exception), connection.channel() as channel:
                        if channel.queue_declare(queue, passive=True).consumer_count:
                            break
                    time.sleep(0.1)
        time.sleep(0.5)

    def close(self) -> None:
        self.transport.close()
        with kombu.Connection(self.url) as connection:
            for queue in self.queues:
                connection.default_channel.queue_delete(queue)
                connection.default_channel.exchange_delete(queue)


def _word(descriptor: int) -> float:
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(descriptor, 1)
    return float(line)


def rate(number: int, step: Callable[[], object]) -> float:
    step()
    started = time.perf_counter()
    for _ in range(number):
        step()
    return number / (time.perf_counter() - started)


def work(queues: list[str]) -> None:
    """Run our worker process."""
    transport = CeleryTransport(os.environ["BENCH_BROKER"])
    Consumer(transport, {"noop": celery_app.noop, "report_start": celery_app.report_start}, queues).run()
    transport.close()


def report(bench: Bench, rounds: int) -> None:
    pairs: list[tuple[str, Callable[[], float], Callable[[], float], str]] = [
        ("send, one by one", bench.our_send, bench.celerys_send, "send_task, confirmed  (goal 1.00)"),
        ("send, 1000 at once", bench.our_bulk, bench.celerys_bulk, "send_task, 1000 times"),
        ("drain no-op tasks", bench.our_drain, bench.celerys_drain, "worker, prefork, 1 process"),
        ("drain chains (task + callback)", bench.our_chains, bench.celerys_chains, "worker, prefork, 1 process"),
    ]
    print(f"{'':32}{'ours':>9}{'median':>9}{'Celery':>9}{'median':>9}{'ratio':>7}   Celery's is")
    for name, ours, celerys, what in pairs:
        our_rates, their_rates = [], []
        for _ in range(rounds):
            their_rates.append(celerys())
            our_rates.append(ours())
        figures = [max(our_rates), statistics.median(our_rates), max(their_rates), statistics.median(their_rates)]
        columns = "".join(f"{figure:>9,.0f}" for figure in figures)
        print(f"{name:32}{columns}{figures[0] / figures[2]:>7.2f}   {what}", flush=True)
    for whose, is_ours in (("ours", True), ("Celery's", False)):
        times = sorted(bench.latencies(ours=is_ours))
        p50, p99 = statistics.median(times), times[int(len(times) * 0.99)]
        print(f"{'idle chain, ' + whose:32}{p50 * 1000:>9.1f} ms p50 {p99 * 1000:.1f} ms p99", flush=True)


def _broker() -> str | None:
    try:
        with kombu.Connection(BROKER, connect_timeout=3) as connection:
            connection.connect()
            return str(connection.connection.server_properties["version"])
    except Exception:  # the driver raises many types of errors without a broker
        return None


def main() -> None:
    parser: Any = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="factor for the number of messages (default: 1.0)")
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    options, _ = parser.parse_known_args()  # bench.py's own options are no concern of this part
    if options.work:
        work(options.work)
        return
    version = _broker()
    if version is None:
        print(
            f"Celery: left out, because no RabbitMQ answers at {BROKER}; start one, or set UNSTRACT_WIRE_TEST_RABBITMQ"
        )
        return
    with tempfile.TemporaryDirectory(prefix="wire-bench-") as scratch:
        bench = Bench(BROKER, options.scale, Path(scratch))
        try:
            print(f"RabbitMQ {version}, every message confirmed; a second, the best and the median of {options.rounds}")
            report(bench, options.rounds)
        finally:
            bench.close()


if __name__ == "__main__":
    main()
