"""The live view of `unstract-wire top`: it takes snapshots on a thread, draws them, and reads the keyboard."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from select import select
from typing import TYPE_CHECKING, NoReturn

import click

from unstract_core.cli.render import snapshot as snapshots
from unstract_core.cli.render.output import printable, utc
from unstract_core.cli.render.snapshot import Rows, Snapshot
from unstract_core.errors import ConfigurationError, TransportUnavailable
from unstract_core.transport import Transport

if TYPE_CHECKING:
    from rich.console import ConsoleDimensions, RenderableType

_KEY_TIMEOUT = 0.25
_ANSWER_TIMEOUT = 2.0
_SHORTEST_NAME = 8


class LiveView:
    """Takes a snapshot at each interval, on a separate thread, so that keys work while the transport is unavailable.

    Attributes:
        snapshot: The newest snapshot.
        problem: The reason why the transport is unavailable; "" while it is available.
        failure: The error that ended the thread; None for none.
    """

    def __init__(self, transport: Transport, names: Sequence[str], interval: float, first: Snapshot) -> None:
        self._transport = transport
        self._names = names
        self._interval = interval
        self._asked_at: tuple[datetime.datetime, float] | None = None
        self._away_since: datetime.datetime | None = None
        self._ended = threading.Event()
        self.snapshot = first
        self.problem = ""
        self.failure: Exception | None = None

    def run(self) -> None:
        """Take snapshots until `end` is called. Runs on the view's own thread."""
        while not self._ended.wait(self._interval):
            asked_at = datetime.datetime.now(datetime.UTC)
            self._asked_at = asked_at, time.monotonic()
            try:
                self.snapshot = snapshots.take_snapshot(self._transport, self._names, self.snapshot)
                self._away_since, self.problem = None, ""
            except TransportUnavailable as exc:
                self._away_since, self.problem = self._away_since or asked_at, str(exc)
            except Exception as exc:  # the main thread raises it
                self.failure = exc
                return
            self._asked_at = None

    def end(self) -> None:
        """Take no more snapshots."""
        self._ended.set()

    @property
    def away_since(self) -> datetime.datetime | None:
        """When the transport became unavailable, or when a query began that has no answer after 2 s; None otherwise."""
        asked = self._asked_at
        if self._away_since is None and asked is not None:
            asked_at, moment = asked
            return asked_at if time.monotonic() - moment > _ANSWER_TIMEOUT else None
        return self._away_since


def show(view: LiveView, url: str, interval: float, mask: Callable[[str], str]) -> None:
    """Draw the view on the terminal until q is pressed.

    Args:
        view: The view, whose thread is started and ended here.
        url: The transport's URL for the title.
        interval: Seconds between two snapshots, for the title.
        mask: Returns a text with its passwords masked.

    Raises:
        ConfigurationError: rich is not installed.
        KeyboardInterrupt: The process received SIGINT.
        Exit: The process received SIGTERM or SIGHUP.
    """
    try:
        from rich.console import Console
        from rich.live import Live
    except ModuleNotFoundError:
        remedy = "pip install 'unstract-wire[cli]', or use --once"
        raise ConfigurationError(f"the live view needs rich, which is not installed: {remedy}") from None
    console = Console()
    thread = threading.Thread(target=view.run, name="unstract-wire-top", daemon=True)
    with contextlib.ExitStack() as stack:
        stack.callback(view.end)
        received = stack.enter_context(_received(signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        pressed = stack.enter_context(_keys())
        live = stack.enter_context(Live(console=console, screen=True, auto_refresh=False))
        thread.start()
        while view.failure is None:
            if received:
                _end_by(received[0])
            live.update(_screen(view, mask(url), interval, mask, console.size), refresh=True)
            if pressed(_KEY_TIMEOUT) in {"q", "Q"}:
                return
    raise view.failure


def _screen(
    view: LiveView, url: str, interval: float, mask: Callable[[str], str], size: ConsoleDimensions
) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    snapshot = view.snapshot
    title = f"{printable(url)}  {utc(snapshot.at, 'seconds')}  every {interval:g} s, q to quit"
    parts: list[RenderableType] = [Text(title, "dim", no_wrap=True, overflow="ellipsis")]
    if (since := view.away_since) is not None:
        problem = printable(mask(view.problem or "no answer"))
        outage = f"unavailable since {utc(since, 'seconds')}: {problem}"
        parts.append(Text(outage, "bold red", no_wrap=True, overflow="ellipsis"))
    failures = snapshots.failure_rows(snapshot)[: max(1, size.height // 5)]
    workers = snapshots.worker_rows(snapshot)
    room = max(2, size.height - len(parts) - len(failures) - 7)
    of_workers = min(len(workers), max(1, room // 2, room - len(snapshot.queues)))
    parts += _section(
        snapshots.QUEUES,
        _fullest(snapshots.queue_rows(snapshot), room - of_workers),
        "no queue holds anything",
    )
    parts += _section(snapshots.WORKERS, _first(workers, of_workers), snapshots.note_on_workers(snapshot))
    if workers and (note := snapshots.note_on_workers(snapshot)):
        parts.append(Text(note, "dim", no_wrap=True, overflow="ellipsis"))
    parts += _section(snapshots.FAILURES, failures, "no dead letters")
    return Group(*parts)


def _fullest(rows: Rows, room: int) -> Rows:
    """Return the rows that fit; if not all fit, those of the deepest queues."""
    return _first(rows if len(rows) <= room else sorted(rows, key=lambda row: -int(row[1])), room)


def _first(rows: Rows, room: int) -> Rows:
    if len(rows) <= room:
        return rows
    return [*rows[: max(0, room - 1)], [f"and {len(rows) - max(0, room - 1)} more", *[""] * (len(rows[0]) - 1)]]


def _section(headings: Sequence[str], rows: Rows, empty: str) -> list[RenderableType]:
    """Return a table that fits the terminal. Names are cut if necessary; numbers and times are not."""
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return [Text(""), Text(empty, "dim")]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading, cells in zip(headings, zip(*rows, strict=True), strict=True):
        is_name = heading.startswith("<")
        widest = max(cell_len(printable(cell)) for cell in (heading.strip("<>"), *cells))
        table.add_column(
            heading.strip("<>").upper(),
            justify="right" if heading.startswith(">") else "left",
            no_wrap=not is_name,
            min_width=min(widest, _SHORTEST_NAME) if is_name else None,
        )
    for row in rows:
        table.add_row(*(Text(printable(cell), no_wrap=True, overflow="ellipsis") for cell in row))
    return [Text(""), table]


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Yield a function that waits some seconds for a key and returns it, or "". Without a keyboard it only waits."""
    if sys.stdin is None or not sys.stdin.isatty():
        yield _only_wait
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)

    def pressed(seconds: float) -> str:
        ready, _, _ = select([keyboard], [], [], seconds)
        if not ready:
            return ""
        return os.read(keyboard, 1).decode("ascii", "replace") or "q"  # end of input: the terminal is closed

    try:
        tty.setcbreak(keyboard)
        yield pressed
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _only_wait(seconds: float) -> str:
    time.sleep(seconds)
    return ""


@contextlib.contextmanager
def _received(*signals: signal.Signals) -> Iterator[Sequence[int]]:
    """Yield a list to which each of these signals is appended. From the second on, a signal also raises at once.

    The first one must not raise: Python discards an exception that is raised while an object is finalized.
    """
    received: list[int] = []

    def note(number: int, _: object) -> None:
        received.append(number)
        if len(received) > 1:
            _end_by(number)

    before = {number: signal.signal(number, note) for number in signals}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_by(number: int) -> NoReturn:
    """End the command by an exception, so that each `finally` restores the terminal."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise click.exceptions.Exit(128 + number)
