"""examples/flip_the_flag.py: it runs, and its tally reports lost, doubled and mixed-up work."""

from __future__ import annotations

import os
import subprocess
import sys

import kombu
import pytest

from examples.flip_the_flag import Flag, FlipRecord
from tools.check_lock import ROOT


def run(url: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {name: value for name, value in os.environ.items() if not name.startswith("UNSTRACT_WIRE")}
    return subprocess.run(
        [sys.executable, "-m", "examples.flip_the_flag", *options],
        cwd=ROOT,
        env={**settings, "UNSTRACT_WIRE_BROKER": url, **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_flag_flipped_under_load_loses_nothing(rabbitmq_url: str) -> None:
    """Over RabbitMQ with a Celery worker and PostgreSQL, each dispatch has exactly one callback."""
    ended = run(rabbitmq_url, "--between", "25", "--deadline", "90")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "10 flips" in ended.stdout
    assert ended.stdout.endswith("every dispatch has exactly one callback, none lost: complete\n")


def test_flip_without_a_broker_is_one_line(rabbitmq_url: str) -> None:
    """One line, exit code 2, and no process is left."""
    ended = run("amqp://guest:guest@127.0.0.1:1//")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("flip_the_flag: ")
    assert len(ended.stderr.splitlines()) == 1
    with kombu.Connection(rabbitmq_url) as connection:
        connection.connect()


@pytest.mark.parametrize(
    ("callbacks", "wrong"),
    [
        ([("a", "on", "complete"), ("b", "off", "error")], []),
        ([("a", "on", "complete")], ["b: no error on off"]),
        ([("a", "on", "complete"), ("b", "off", "error"), ("b", "off", "error")], ["b: error on off too often"]),
        ([("a", "off", "complete"), ("b", "off", "error")], ["a: complete on off too often", "a: no complete on on"]),
        (
            [("a", "on", "mixed up"), ("b", "off", "error")],
            ["a: mixed up on on too often", "a: no complete on on"],
        ),
    ],
    ids=["complete", "lost", "doubled", "on the other side", "mixed up"],
)
def test_flip_tally_reports_every_fault(callbacks: list[tuple[str, str, str]], wrong: list[str]) -> None:
    """Lost, doubled, misrouted and changed work is reported in one line each."""
    record = FlipRecord(sent={"a": ("on", False), "b": ("off", True)}, callbacks=callbacks)
    assert record.wrong() == wrong


def test_flag_gate_records_its_answers() -> None:
    """The gate answers with the current flag, and the tally knows the side of each dispatch."""

    class Context:
        run_id = "r"

    flag = Flag()
    assert flag(Context()) is False
    flag.flip()
    assert flag(Context()) is True
    assert flag.answers == {"r": True}
