"""Standard output of the commands: columns or one JSON document, without control characters."""

from __future__ import annotations

import datetime
import errno
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

_INDENT = " " * 4
_SHORTEST_TEXT = 40


def printable(text: str) -> str:
    """Escape line ends and control characters, so that payload content cannot control a terminal or forge log lines."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
    )


TRACE = "  | "
"""The start of each line of a traceback, which therefore never looks like a line of the log."""


def marked_traceback(traceback: str) -> str:
    """Return a traceback whose lines cannot control a terminal, and start with `TRACE`."""
    return "\n".join(TRACE + printable(line) for line in traceback.rstrip("\n").split("\n"))


def readable_json(value: Any) -> str:
    """Return indented JSON with its non-ASCII letters, for a person to read."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return "\n".join(map(printable, text.split("\n")))


def print_json(value: Any) -> None:
    """Print one JSON document."""
    write(json.dumps(value, indent=2))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str) -> None:
    """Print a table. On a terminal, a row that is too wide continues on the next line, indented.

    Only the last column is ever cut, on a terminal and if it is text, so that ids and names can be copied.

    Args:
        headings: The headings; ">" at the start aligns the column to the right.
        rows: The cells of each row.
        empty: The note on standard error if there are no rows.
    """
    if not rows:
        click.echo(empty, err=True)
        return
    rows = [[printable(cell) for cell in row] for row in rows]
    names = [heading.lstrip(">").upper() for heading in headings]
    right = [heading.startswith(">") for heading in headings]
    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    write(_fitted(names, right, rows) if on_terminal else _aligned(names, right, rows))


def _aligned(names: Sequence[str], right: Sequence[bool], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    lines = []
    for row in (names, *rows):
        cells = zip(row, widths, right, strict=True)
        lines.append("  ".join(f"{cell:{'>' if to_right else '<'}{width}}" for cell, width, to_right in cells).rstrip())
    return "\n".join(lines)


def _fitted(names: Sequence[str], right: Sequence[bool], rows: Sequence[Sequence[str]]) -> str:
    try:
        from rich.cells import cell_len
        from rich.console import Console
        from rich.text import Text
    except ModuleNotFoundError:
        return _aligned(names, right, rows)
    console = Console()
    widths = [max(map(cell_len, column)) for column in zip(names, *rows, strict=True)]
    last_is_text = not right[-1]
    last = min(widths[-1], _SHORTEST_TEXT) if last_is_text else widths[-1]
    lines = _spread([*widths[:-1], last], console.width)
    with console.capture() as capture:
        for row in (names, *rows):
            spaces = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
            cells = [s + cell if to_right else cell + s for cell, s, to_right in zip(row, spaces, right, strict=True)]
            for columns in lines:
                text = "  ".join(cells[column] for column in columns).rstrip()
                line = Text(text if columns is lines[0] else _INDENT + text, "bold" if row is names else "")
                if columns is lines[-1] and last_is_text:
                    line.truncate(console.width, overflow="ellipsis")
                console.print(line, soft_wrap=True)
    return capture.get().rstrip("\n")


def _spread(widths: Sequence[int], available: int) -> list[list[int]]:
    """Return the column numbers of each line that a row takes at this available width."""
    lines, used = [[0]], widths[0]
    for column, width in enumerate(widths[1:], start=1):
        if used + 2 + width > available:
            lines.append([])
            used = len(_INDENT) - 2
        lines[-1].append(column)
        used += 2 + width
    return lines


def write(text: str) -> None:
    """Print text. Raises ClickException if standard output cannot be written, but not if its reader has closed it."""
    try:
        click.echo(text)
    except OSError as exc:
        if exc.errno == errno.EPIPE:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not fail again
        raise click.ClickException(f"the output cannot be written: {exc.strerror}") from exc


def utc(moment: datetime.datetime, precision: str = "microseconds") -> str:
    """Return a time in UTC as ISO 8601, such as 2026-01-02T03:04:05Z."""
    return moment.astimezone(datetime.UTC).isoformat(timespec=precision).replace("+00:00", "Z")


def age(seconds: float) -> str:
    """Return a duration in its two largest units, such as 3m 05s."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02}h"
