"""Runs of the kit over harnesses that are bad in some way: each in a subprocess, several at a time."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import attrs
from kit.runs import Ended, run

USAGE = 4
"""The exit code of pytest for what it was called with."""

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
    """A run of the kit: the code of `bad_harness.py`, pytest's arguments, and what must be among what is printed."""

    code: str = ""
    arguments: tuple[str, ...] = ("--transport", "bad_harness:Bad")
    only: str = "test_harness or test_capabilities or test_messages_are_stored or test_settling_and"
    limit: str = "1"
    told: str = ""


def run_case(case: Case, directory: Path) -> Ended:
    directory.mkdir()
    (directory / "bad_harness.py").write_text(HEAD + textwrap.dedent(case.code), encoding="utf-8")
    options = ["--tb=line", f"--kit-time-limit={case.limit}", *(["-k", case.only] if case.only else [])]
    return run([*options, *case.arguments], directory, limit=120)


class Runs:
    """The runs of the cases that are asked for, begun together and run a few at a time: most of them wait."""

    def __init__(self, cases: Mapping[str, Case], directory: Path, wanted: Collection[str]) -> None:
        self._pool = ThreadPoolExecutor(4)
        self._runs: dict[str, Future[Ended]] = {
            name: self._pool.submit(run_case, cases[name], directory / str(number))
            for number, name in enumerate(cases)
            if name in wanted
        }

    def __getitem__(self, name: str) -> Ended:
        ended = self._runs[name].result(timeout=380)
        assert "INTERNALERROR" not in ended.text, ended.text[-3000:]
        return ended

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
