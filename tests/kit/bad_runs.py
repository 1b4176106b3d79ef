"""Runs of the kit over faulty harnesses, each in a subprocess, several at a time."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import attrs
from kit.runs import FinishedRun, run

USAGE = 4
"""pytest's exit code for a usage error."""

HEAD = """
import contextlib, sqlite3, subprocess, threading, time
from kit.planting import Composed, ComposedHarness
from transports.memory import MemoryTransport
from transports.memory.subscription import MemorySubscription
from transports.memory.transport import MemoryDeadLetters

class Bad(ComposedHarness):
    def __init__(self, name="bad"):
        super().__init__(name)

def hang(*given, **options):
    threading.Event().wait()

def planted(kind, name, member):
    part = type(kind.__name__, (kind,), {name: member})
    if issubclass(kind, Composed):
        return part
    where = "subscription_type" if issubclass(kind, MemorySubscription) else "letters_type"
    return type("Planted", (Composed,), {where: part})

"""


@attrs.frozen(kw_only=True)
class Case:
    """A run of the kit.

    Attributes:
        code: The code of `bad_harness.py`, after `HEAD`.
        arguments: The arguments of pytest.
        only: The tests to select with `-k`; "" for all.
        limit: The time limit of a test, in seconds.
        expected: Text that must be in the output.
    """

    code: str = ""
    arguments: tuple[str, ...] = ("--transport", "bad_harness:Bad")
    only: str = "test_harness or test_capabilities or test_messages_are_stored or test_settling_and"
    limit: str = "1"
    expected: str = ""


def run_case(case: Case, directory: Path) -> FinishedRun:
    directory.mkdir()
    (directory / "bad_harness.py").write_text(HEAD + textwrap.dedent(case.code), encoding="utf-8")
    options = ["--tb=line", f"--kit-time-limit={case.limit}", *(["-k", case.only] if case.only else [])]
    return run([*options, *case.arguments], directory, limit=120)


class Runs:
    """The runs of the wanted cases, four at a time: most of them wait for time limits."""

    def __init__(self, cases: Mapping[str, Case], directory: Path, wanted: Collection[str]) -> None:
        self._pool = ThreadPoolExecutor(4)
        self._runs: dict[str, Future[FinishedRun]] = {
            name: self._pool.submit(run_case, cases[name], directory / str(number))
            for number, name in enumerate(cases)
            if name in wanted
        }

    def __getitem__(self, name: str) -> FinishedRun:
        ended = self._runs[name].result(timeout=380)
        assert "INTERNALERROR" not in ended.text, ended.text[-3000:]
        return ended

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
