"""Journals and breakpoints of a chaos run."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from chaos import breakpoints
from chaos.journal import SUFFIX, Journal, Journals, Line
from contract_tests.kit import wait_until

WRITER = """
import sys, pathlib
from chaos.journal import Journal
journal = Journal(pathlib.Path(sys.argv[1]), "writer")
for number in range(10**9):
    journal.write("wrote", str(number), "x" * 100)
    print(number, flush=True)
"""


def test_a_killed_process_loses_no_written_line(tmp_path: Path) -> None:
    """After SIGKILL at any moment, every reported line is complete and in order."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        reported = [int(writer.stdout.readline()) for _ in range(500)]
        writer.send_signal(signal.SIGKILL)
        reported += [int(line) for line in writer.stdout if line.endswith("\n")]
    lines = list(Journals(tmp_path).read_new())
    assert [line.dispatch for line in lines] == [str(number) for number in range(len(lines))]
    assert len(lines) > reported[-1]


def test_each_line_is_read_once(tmp_path: Path) -> None:
    """New lines are read once, for every process, including those that start later."""
    first, journals = Journal(tmp_path, "one"), Journals(tmp_path)
    first.write_all("claimed", ["a", "b"])
    assert [(line.process, line.event, line.dispatch) for line in journals.read_new()] == [
        ("one", "claimed", "a"),
        ("one", "claimed", "b"),
    ]
    assert list(journals.read_new()) == []
    first.write("settled", "a", "yes")
    Journal(tmp_path, "two").write("ready")
    found = list(journals.read_new())
    assert [(line.process, line.event, line.detail) for line in found] == [
        ("one", "settled", "yes"),
        ("two", "ready", ""),
    ]


def test_an_unfinished_line_is_read_later(tmp_path: Path) -> None:
    """A line is read once, after its end was written."""
    path, journals = tmp_path / f"one{SUFFIX}", Journals(tmp_path)
    path.write_text("1.5\tclaimed\ta")
    assert list(journals.read_new()) == []
    with path.open("a") as file:
        file.write("\t\n2.5\tclaimed")
    assert list(journals.read_new()) == [Line(1.5, "one", "claimed", "a")]


def test_a_process_waits_at_a_requested_breakpoint(tmp_path: Path) -> None:
    """A process stops at the requested phase only, not without a dispatch, and continues after its release."""
    program = (
        "import pathlib, sys; from chaos.breakpoints import Breakpoints; from chaos.journal import Journal;"
        " directory = pathlib.Path(sys.argv[1]); journal = Journal(directory, 'one');"
        " breakpoints = Breakpoints(directory, 'one', journal);"
        " breakpoints.reach('claimed', ['a']); breakpoints.reach('settled', []); journal.write('passed');"
        " breakpoints.reach('settled', ['b']); journal.write('went on')"
    )
    breakpoints.request(tmp_path, "one", "settled")
    seen: list[str] = []
    journals = Journals(tmp_path)

    def read() -> list[str]:
        seen.extend(line.event for line in journals.read_new())
        return seen

    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) as process:
        try:
            wait_until(lambda: "stopped" in read(), what="the process to stop")
            assert seen == ["passed", "stopped"]
            assert process.poll() is None
            breakpoints.release(tmp_path, "one")
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert read() == ["passed", "stopped", "went on"]
