"""Check that tables and indexes do not grow while a million tasks pass through them.

    .venv/bin/python benchmarks/table_sizes.py      on an embedded server, in a few minutes.
                     --url postgresql://..          on another server, in a schema of its own, which is dropped.

One subscription claims and settles the tasks. Every tenth task has a follow-up, which is settled, too. Sizes in kB are
printed after each tenth of the tasks. The first `--warm-up` parts give autovacuum time to adapt. Afterwards no size may
exceed `--slack` times its earlier maximum; otherwise the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.bench import PAYLOAD, server
from transports.postgres import PostgresTransport
from unstract_core import Message, Settlement, TaskPayload, Verdict

PARTS = 10
BATCH = 500
SMALL = 64
"""Size in kB below which a few more pages do not count as growth."""
SIZES = """
    SELECT c.relname, pg_relation_size(c.oid) / 1024 FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.nspname = %s AND c.relkind IN ('r', 'i') AND c.relname ~ '^pg_(queue_message|task_result)'
    ORDER BY c.relname
"""


def work(transport: PostgresTransport, tasks: int) -> None:
    """Send, claim and settle some tasks. A tenth of them have a follow-up."""
    payload = TaskPayload(task_name="noop", args=[PAYLOAD], queue="q")
    subscription = transport.subscribe(["q", "callbacks"], lease=60.0)
    sent = done = 0
    while done < tasks:
        transport.send([Message(payload, "q")] * min(BATCH, tasks - sent))
        sent += min(BATCH, tasks - sent)
        while deliveries := subscription.receive(limit=BATCH, wait=0):
            batch = []
            for one in deliveries:
                callback = one.queue == "q" and int(one.id) % 10 == 0
                batch.append(
                    Settlement(one, Verdict.ACK, follow_up=Message(payload, "callbacks") if callback else None)
                )
            if not all(subscription.settle(batch)):
                raise SystemExit("a lease was lost: the machine is too slow for this benchmark")
            done += sum(one.queue == "q" for one in deliveries)
    subscription.close()


def growth(history: list[dict[str, int]], warm_up: int, slack: float) -> list[str]:
    """Return a line for each table or index that is too large after the warm-up."""
    grown = []
    for name in history[0]:
        most = max(sizes[name] for sizes in history[:warm_up])
        after = max((sizes[name] for sizes in history[warm_up:]), default=0)
        if after > max(SMALL, most * slack):
            grown.append(f"{name} was {most} kB at most and is {after} kB")
    return grown


def run(
    connection: psycopg.Connection[Any], schema: str, transport: PostgresTransport, tasks: int
) -> list[dict[str, int]]:
    history: list[dict[str, int]] = []
    started = time.monotonic()
    for part in range(1, PARTS + 1):
        work(transport, tasks // PARTS)
        history.append({name: int(size) for name, size in connection.execute(SIZES, (schema,)).fetchall()})
        if part == 1:
            print(f"{'tasks':>10}{'s':>6}" + "".join(f"{name.removeprefix('pg_'):>25}" for name in history[0]))
        columns = "".join(f"{size:>25,}" for size in history[-1].values())
        print(f"{part * (tasks // PARTS):>10,}{time.monotonic() - started:>6.0f}{columns}", flush=True)
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", help="URL of a PostgreSQL server (default: an embedded one)")
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--warm-up", type=int, default=4, help="number of first tenths that do not count")
    parser.add_argument("--slack", type=float, default=2.0)
    options = parser.parse_args()
    schema = f"wire_sizes_{uuid.uuid4().hex[:8]}"
    with server(options.url) as url, psycopg.connect(url, autocommit=True) as connection:
        transport = PostgresTransport(url, schema)
        try:
            transport.migrate()
            grown = growth(run(connection, schema, transport, options.tasks), options.warm_up, options.slack)
        finally:
            transport.close()
            connection.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(schema)))
    print("\n".join(grown) or "flat")
    sys.exit(bool(grown))


if __name__ == "__main__":
    main()
