"""What goes to standard output: columns, or one JSON document; nothing in it can steer a terminal."""

from __future__ import annotations

import datetime
import errno
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import click


def printable(text: str) -> str:
    """Escape line ends and control characters: what a payload says must not steer somebody's terminal or log."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
    )


def readable_json(value: Any) -> str:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return "\n".join(map(printable, text.split("\n")))


def print_json(value: Any) -> None:
    write(json.dumps(value, indent=2))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str) -> None:
    """Print columns, those whose heading starts with ">" to the right; on a terminal fitted to its width."""
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
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError:
        return _aligned(names, right, rows)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name, to_right in zip(names, right, strict=True):
        table.add_column(name, justify="right" if to_right else "left", no_wrap=name != names[-1])
    for row in rows:
        table.add_row(*(Text(cell, no_wrap=True, overflow="ellipsis") for cell in row))
    console = Console()
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")


def write(text: str) -> None:
    try:
        click.echo(text)
    except OSError as exc:
        if exc.errno == errno.EPIPE:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the exit would fail on the rest, again
        raise click.ClickException(f"the output cannot be written: {exc.strerror}") from exc


def utc(moment: datetime.datetime, precision: str = "microseconds") -> str:
    return moment.astimezone(datetime.UTC).isoformat(timespec=precision).replace("+00:00", "Z")


def age(seconds: float) -> str:
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02}h"
