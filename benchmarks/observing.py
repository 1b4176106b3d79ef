"""Benchmark of observers: throughput with each observer, as a ratio to the throughput without one.

    python benchmarks/observing.py                            on the embedded PostgreSQL.
    python benchmarks/observing.py --url postgresql://...     on another server, in a schema of its own.

The observers take turns within a round. One ratio compares the best rounds, the other one the medians.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import attrs
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import NoOpTracerProvider
from prometheus_client import CollectorRegistry
from psycopg import sql

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.bench import PAYLOAD, Bench, chain, noop, server
from unstract_core import Consumer, Dispatcher, Message, Observer, TaskPayload
from unstract_core.observability.metrics import Metrics
from unstract_core.observability.tracing import Tracing


class Nowhere(SpanExporter):
    def export(self, spans: Sequence[object]) -> SpanExportResult:
        return SpanExportResult.SUCCESS


def tracing() -> Sequence[Observer]:
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(Nowhere()))
    return [Tracing(provider)]


OBSERVERS: dict[str, Callable[[], Sequence[Observer]]] = {
    "no observer": list,
    "an Observer": lambda: [Observer()],
    "Metrics": lambda: [Metrics(CollectorRegistry())],
    "Tracing, no SDK": lambda: [Tracing(NoOpTracerProvider())],
    "Tracing": tracing,
}


@attrs.frozen
class Cost:
    """Operations per second, and the microseconds of processor time of each, which depend less on a busy machine."""

    rate: float
    processor: float


@contextlib.contextmanager
def measured(number: int, costs: list[Cost]) -> Iterator[None]:
    started, processor = time.perf_counter(), time.process_time()
    yield
    used = time.process_time() - processor
    costs.append(Cost(number / (time.perf_counter() - started), used / number * 1e6))


def send(bench: Bench, observers: Sequence[Observer], costs: list[Cost]) -> None:
    dispatcher = Dispatcher(bench.transport, observers=observers)
    dispatcher.send("noop", args=[PAYLOAD], queue="q")
    number = bench.count(1000)
    with measured(number, costs):
        for _ in range(number):
            dispatcher.send("noop", args=[PAYLOAD], queue="q")


def run(bench: Bench, observers: Sequence[Observer], costs: list[Cost]) -> None:
    drain(bench, observers, [bench.payload] * bench.count(20_000), ["q"], costs)


def run_chains(bench: Bench, observers: Sequence[Observer], costs: list[Cost]) -> None:
    drain(bench, observers, [chain() for _ in range(bench.count(10_000))], ["q", "callbacks"], costs)


def drain(
    bench: Bench, observers: Sequence[Observer], payloads: Sequence[TaskPayload], queues: list[str], costs: list[Cost]
) -> None:
    for start in range(0, len(payloads), 1000):
        bench.transport.send([Message(payload, "q") for payload in payloads[start : start + 1000]])
    consumer = Consumer(bench.transport, {"noop": noop}, queues, observers=observers)
    with measured(len(payloads), costs):
        ran = consumer.drain()
    if ran != len(payloads) * len(queues):
        raise SystemExit(f"expected {len(payloads) * len(queues)} runs, saw {ran}")


def report(bench: Bench, rounds: int) -> None:
    print(f"{'':32}{'a second':>10}{'ratio':>8}{'of medians':>12}{'processor':>14}{'ratio':>8}")
    for name, measure in (
        ("send, one by one", send),
        ("drain no-op tasks", run),
        ("drain chains (task + callback)", run_chains),
    ):
        costs: dict[str, list[Cost]] = {who: [] for who in OBSERVERS}
        for _ in range(rounds):
            for who, observers in OBSERVERS.items():
                bench.empty()
                measure(bench, observers(), costs[who])
        print(name)
        (best, median, least), *_ = (figures(found) for found in costs.values())
        for who, found in costs.items():
            rate, middle, processor = figures(found)
            ratios = f"{rate / best:>8.2f}{middle / median:>12.2f}{processor:>11.0f} us{least / processor:>8.2f}"
            print(f"  with {who:25}{rate:>10,.0f}{ratios}", flush=True)


def figures(costs: Sequence[Cost]) -> tuple[float, float, float]:
    """Return the best rate, the median rate and the least processor time."""
    rates = [cost.rate for cost in costs]
    return max(rates), statistics.median(rates), min(cost.processor for cost in costs)


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
            report(bench, options.rounds)
        finally:
            bench.transport.close()
            bench.raw.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(schema)))
            bench.raw.close()


if __name__ == "__main__":
    main()
