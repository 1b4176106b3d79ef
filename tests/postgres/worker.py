"""A worker process for the tests that kill one: `python -m postgres.worker URL SCHEMA LEASE QUEUE...`."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence

from transports.postgres import PostgresTransport
from transports.postgres.subscription import PostgresSubscription
from unstract_core import Consumer, Tasks

tasks = Tasks()


def say(*words: object) -> None:
    print(*words, flush=True)


@tasks.register("hold")
def hold(*args: object) -> str:
    """Run until a line is written to standard input."""
    say("holding", *args)
    sys.stdin.readline()
    say("let go", *args)
    return "held"


@tasks.register("sleep")
def sleep(seconds: float) -> str:
    say("sleeping")
    time.sleep(seconds)
    say("slept")
    return "slept"


@tasks.register("report")
def report(*args: object) -> None:
    say("report", *args)


class Announcing(PostgresTransport):
    """Says when it is subscribed."""

    def subscribe(self, queues: Sequence[str], *, lease: float) -> PostgresSubscription:
        subscription = super().subscribe(queues, lease=lease)
        say("ready")
        return subscription


def main(url: str, schema: str, lease: str, *queues: str) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    Consumer(Announcing(url, schema), tasks, queues, lease=float(lease)).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
