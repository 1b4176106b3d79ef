"""The tasks of celery_bench.py, for a Celery worker and for our Consumer.

`noop` measures the seconds between the starts of its first and last run, of BENCH_EXPECTED runs, and writes them to the
FIFO BENCH_PIPE. `report_start` writes the time at which it began. CLOCK_MONOTONIC is the same for all processes.
"""

from __future__ import annotations

import os
import time

from celery import Celery

app = Celery("bench", broker=os.environ.get("BENCH_BROKER", "memory://"))
app.conf.update(
    broker_transport_options={"confirm_publish": True},
    task_ignore_result=True,
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
)

_runs = 0
_first = 0.0


def say(seconds: float) -> None:
    with open(os.environ["BENCH_PIPE"], "w") as pipe:
        pipe.write(f"{seconds}\n")


def noop(*args: object, **kwargs: object) -> None:
    global _runs, _first
    now = time.monotonic()
    _runs += 1
    if _runs == 1:
        _first = now
    if _runs == int(os.environ.get("BENCH_EXPECTED", 0)):
        say(now - _first)


def report_start(*args: object, **kwargs: object) -> None:
    say(time.monotonic())


app.task(name="noop")(noop)
app.task(name="report_start")(report_start)
