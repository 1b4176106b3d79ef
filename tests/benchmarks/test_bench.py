"""The benchmarks run. Their rates depend on the machine and are not asserted."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tools.check_lock import ROOT

RATES = ("send, one by one", "send, 1000 at once", "drain no-op tasks", "drain chains (task + callback)")


@pytest.mark.slow(reason="It runs a whole benchmark, whose figures no guarantee depends on.")
def test_celery_benchmark_prints_every_figure_and_ratio(rabbitmq_url: str) -> None:
    """Each rate of the transport and of Celery is printed with its ratio, and both latencies."""
    ended = run_celerys(rabbitmq_url)
    assert (ended.returncode, ended.stderr) == (0, "")
    version, headings, *lines = ended.stdout.splitlines()
    assert version.startswith("RabbitMQ ")
    assert headings.split() == ["ours", "median", "Celery", "median", "ratio", "Celery's", "is"]
    for name, line in zip(RATES, lines[:-2], strict=True):
        assert re.fullmatch(rf"{re.escape(name)} +([\d,]+ +){{4}}\d+\.\d\d   \S.*", line)
    for whose, line in zip(("ours", "Celery's"), lines[-2:], strict=True):
        assert re.fullmatch(rf"idle chain, {whose} +[\d.]+ ms p50 +[\d.]+ ms p99", line)


def test_celery_benchmark_without_broker_prints_the_reason() -> None:
    """Without a broker, the reason and the remedy are printed, and the exit code is 0."""
    ended = run_celerys("amqp://127.0.0.1:1//")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("Celery: left out, because no RabbitMQ answers at amqp://127.0.0.1:1//; start one")


def run_celerys(url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/celery_bench.py", "--scale", "0.01", "--rounds", "1"],
        cwd=ROOT,
        env={**os.environ, "UNSTRACT_WIRE_TEST_RABBITMQ": url},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.slow(reason="It runs a whole benchmark, whose figures no guarantee depends on.")
def test_the_benchmark_prints_every_figure_with_its_ratio() -> None:
    """At a tiny scale it exits with 0 and no warning; each rate has its best, median and ratio to raw SQL."""
    ended = subprocess.run(
        [sys.executable, "benchmarks/bench.py", "--scale", "0.01", "--rounds", "1"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "XDG_RUNTIME_DIR"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    version, headings, *lines = ended.stdout.splitlines()
    assert version.startswith("PostgreSQL ")
    assert headings.split() == ["ours", "median", "raw", "SQL", "median", "ratio", "raw", "is"]
    for name, line in zip(RATES, lines[: len(RATES)], strict=True):
        assert re.fullmatch(rf"{re.escape(name)} +([\d,]+ +){{4}}\d+\.\d\d   \S.*", line)
    *long, ratios, _ = lines[len(RATES) :]
    assert all(re.fullmatch(r"drain, [\d,]+ analysed, \d proc\. +[\d,]+", line) for line in long)
    assert len(long) == 4
    assert re.fullmatch(r"1,000,000 waiting / 10,000 +\d+\.\d\d .*4 processes / 1: \d+\.\d\d .*", ratios)
    assert re.fullmatch(
        r"idle chain, dispatch to callback +[\d.]+ ms p50 +[\d.]+ ms p99 .* raw single inserts\).*", lines[-1]
    )
