"""Benchmark of throughput while another session holds an old snapshot, so that VACUUM can remove no dead row.

    .venv/bin/python benchmarks/held_snapshot.py --seconds 600

Three databases on one server take turns of `--turn` seconds, so that all run under the same load:

    held     a session is idle in a transaction with an old snapshot.
    free     the same work without such a session, for comparison.
    whole    like held, but claims and searches for expired leases scan the whole index, without lower bounds.

In each database, messages are sent in batches of `--batch`, and one subscription claims and settles them at full speed.
The rate counts only the consumer's own time. The first `--warm-up` turns do not count. The decay compares the last
three turns with the first three. A second decay is relative to `free`, to exclude changes of the machine itself.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.bench import PAYLOAD, server
from transports.postgres import PostgresTransport
from transports.postgres.subscription import PostgresSubscription
from unstract_core import Message, Settlement, TaskPayload, Verdict

CASES = ("held", "free", "whole")
LEASE = 60.0


def scan_whole_index(subscription: PostgresSubscription) -> None:
    """Let every claim, and every scan for expired leases, read the whole index, as without a frontier."""
    claims, expiry = subscription.claims, subscription.requeuer.planner
    claims.record = lambda event: None  # type: ignore[method-assign]
    record = expiry.record
    expiry.record = lambda scan, row: record(attrs.evolve(scan, budget=None), row)  # type: ignore[method-assign]


class Case:
    """A database with a producer and a consumer. `rates` has the messages per second of each turn."""

    def __init__(self, name: str, url: str, batch: int) -> None:
        self.name = name
        self.rates: list[float] = []
        database = f"wire_night_{name}"
        with psycopg.connect(url, autocommit=True) as connection:
            for statement in ("DROP DATABASE IF EXISTS {}", "CREATE DATABASE {}"):
                connection.execute(sql.SQL(statement).format(sql.Identifier(database)))
        self.url = make_conninfo(url, dbname=database)
        self.transport = PostgresTransport(self.url)
        self.transport.migrate()
        self.holder = psycopg.connect(self.url)
        if name != "free":
            self.holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            self.holder.execute("SELECT count(*) FROM unstract.pg_queue_message")
        self.subscription = self.transport.subscribe(["q"], lease=LEASE)
        if name == "whole":
            scan_whole_index(self.subscription)
        payload = TaskPayload(task_name="noop", args=[PAYLOAD], queue="q")
        self.batch = [Message(payload, "q")] * batch
        self.done = 0

    def turn(self, seconds: float) -> None:
        """Work for some seconds."""
        busy, number, deadline = 0.0, 0, time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            self.transport.send(self.batch)
            taken, began = 0, time.perf_counter()
            while taken < len(self.batch):
                deliveries = self.subscription.receive(limit=len(self.batch), wait=0)
                settled = self.subscription.settle([Settlement(one, Verdict.ACK) for one in deliveries])
                if not all(settled):
                    raise SystemExit("a lease was lost: the machine is too slow for this benchmark")
                taken += len(deliveries)
            busy += time.perf_counter() - began
            number += taken
        self.rates.append(number / busy)
        self.done += number

    def dead(self) -> int:
        """Return the number of settled messages whose rows are still in the tables."""
        return self.done if self.name != "free" else 0

    def close(self) -> None:
        self.subscription.close()
        self.transport.close()
        self.holder.close()

    def ends(self, warm_up: int) -> tuple[float, float]:
        """Return the rates of the first three and of the last three turns, without the warm-up."""
        rates = self.rates[min(warm_up, len(self.rates) - 1) :]
        return statistics.mean(rates[:3]), statistics.mean(rates[-3:])


def run(cases: list[Case], *, seconds: float, turn: float) -> None:
    for number in range(max(1, round(seconds / turn))):
        columns = []
        for case in cases:
            case.turn(turn)
            columns.append(f"{case.rates[-1]:>10,.0f}{case.dead():>12,}")
        print(f"{(number + 1) * turn:>7.0f} s" + "".join(columns), flush=True)


@contextlib.contextmanager
def opened(names: list[str], url: str, batch: int) -> Iterator[list[Case]]:
    cases: list[Case] = []
    try:
        cases.extend(Case(name, url, batch) for name in names)
        yield cases
    finally:
        for case in cases:
            case.close()
        with psycopg.connect(url, autocommit=True) as connection:
            for case in cases:
                connection.execute(sql.SQL("DROP DATABASE {}").format(sql.Identifier(f"wire_night_{case.name}")))


def report(cases: list[Case], warm_up: int) -> None:
    ends = {case.name: case.ends(warm_up) for case in cases}
    for name, (first, last) in ends.items():
        print(f"{name:6} {first:>9,.0f} -> {last:>9,.0f} messages/s   decay {1 - last / first:>6.1%}")
    if "free" in ends:
        for name, (first, last) in ends.items():
            if name != "free":
                print(f"{name} beside free: decay {1 - last / ends['free'][1] / (first / ends['free'][0]):.1%}")
    if "held" in ends and "whole" in ends:
        print(f"held / whole, at the end: {ends['held'][1] / ends['whole'][1]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--url", help="URL of a PostgreSQL server on which databases are created and dropped (default: an embedded one)"
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="seconds of work for each case")
    parser.add_argument("--turn", type=float, default=10.0, help="seconds of each turn")
    parser.add_argument("--warm-up", type=int, default=1, help="number of first turns that do not count")
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    with server(options.url) as url, opened(options.cases, url, options.batch) as cases:
        print(f"{'':9}" + "".join(f"{case.name + '/s':>10}{'settled':>12}" for case in cases), flush=True)
        run(cases, seconds=options.seconds, turn=options.turn)
        report(cases, options.warm_up)


if __name__ == "__main__":
    main()
