"""The output of the demo: one line for each event, in colour on a terminal and plain elsewhere."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unstract_core import ExecutionResult
from unstract_core.transport import QueueState

_STYLES = {
    "dispatched": "cyan",
    "called": "cyan",
    "running": "yellow",
    "done": "green",
    "replied": "green",
    "failed": "red",
}
_FIELD_INDENT = " " * 23
_DOCUMENT_WIDTH = 25
_LOG_LINES = 15


class Screen:
    """Prints lines with the seconds since its creation."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def heading(self, text: str) -> None:
        self._line("")
        self._line(text, "bold")

    def fact(self, name: str, text: str) -> None:
        self._line(f"  {name:<18}{text}")

    def stage(self, stage: str, document: str, remark: str = "") -> None:
        """Show a stage of a document."""
        line = Text(f"  {self.seconds:5.2f} s  ")
        line.append(f"{stage:<12}", _STYLES[stage])
        line.append(f"{document:<{_DOCUMENT_WIDTH}}", "bold" if stage in ("done", "replied", "failed") else "")
        line.append(remark, "dim")
        self._console.print(line, soft_wrap=True)

    def fields(self, fields: Mapping[str, Any]) -> None:
        for line in summary(fields):
            self._indented(line)

    def error(self, error: str | None) -> None:
        self._indented(str(error), "red")

    def answer(self, document: str, result: ExecutionResult) -> None:
        """Show the reply of the blocking caller."""
        self.stage("replied" if result.success else "failed", document, "the caller has its answer")
        if result.success:
            self.fields(result.data["fields"])
        else:
            self.error(result.error)

    def queues(self, queues: Sequence[QueueState]) -> None:
        table = Table(box=None, pad_edge=False, padding=(0, 2))
        table.add_column("  queue")
        for name in ("ready", "in flight", "delayed", "dead"):
            table.add_column(name, justify="right")
        for state in queues:
            counts = (state.ready, state.in_flight, state.delayed, state.dead)
            table.add_row(f"  {state.queue}", *map(str, counts))
        self._console.print(table)

    def files(self, directory: Path) -> None:
        for path in sorted(directory.iterdir()):
            self._line(f"  {path.name}")

    def logs(self, directory: Path) -> None:
        """Show the end of every log in a directory with its name."""
        for log in sorted(directory.glob("*.log")):
            if lines := log.read_text(errors="replace").splitlines()[-_LOG_LINES:]:
                self.heading(f"The end of {log.name}")
                for line in lines:
                    self._line(f"  {line}", "dim")

    def verdict(self, line: str, missing: Sequence[str]) -> None:
        self._line("")
        for problem in missing:
            self._line(f"missing: {problem}", "red")
        self._line(line, "bold red" if missing else "bold green")

    def _indented(self, text: str, style: str = "") -> None:
        """Print below the line of a document, wrapped on a terminal and unwrapped in a file."""
        if self._console.is_terminal:
            text = textwrap.fill(text, self._console.width - len(_FIELD_INDENT))
        self._line(textwrap.indent(text, _FIELD_INDENT), style)

    def _line(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style), soft_wrap=True)


def summary(fields: Mapping[str, Any]) -> list[str]:
    """Return two lines with the fields of a document."""
    if fields["document_type"] == "letter":
        amounts = ", ".join(f"{amount} {fields['currency']}" for amount in fields["amounts"])
        return [
            f"{fields['sender']} to {fields['recipient']}, {fields['date']}",
            f"{fields['subject']}: speaks of {amounts or 'no money'}; signed {fields['signatory']}",
        ]
    due = f", due {fields['due']}" if fields["due"] else ""
    return [
        f"{fields['vendor']}, {fields['document_type']} {fields['number']} of {fields['date']}{due}",
        f"{len(fields['line_items'])} items, {fields['subtotal']} + {fields['tax']} tax ({fields['tax_rate']} %) "
        f"= {fields['total']} {fields['currency']}",
    ]
