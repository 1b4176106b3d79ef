"""The `unstract-wire` command: create the tables, run a worker, look at the queues, deal with dead letters.

Standard output carries what was asked for: columns, or with --json one JSON document. Standard error carries the
worker's log, notes, and where something cannot be done ONE line that says what is wrong and how to mend it; the exit
code is then 2. A traceback is shown with --debug only. Passwords are masked in everything that is written.

It works on any transport that `load_transport` finds and imports none itself. It needs click, which comes with the
extra [cli]: `__main__` is the entry point that can tell so.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import importlib
import json
import logging
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar, cast
from urllib.parse import quote, unquote

import attrs
import click

from unstract_core import __version__, discovery
from unstract_core.consumer import Consumer
from unstract_core.errors import ConfigurationError, ContractError, NotSupported
from unstract_core.events import emit
from unstract_core.transport import DeadLetter, DeadLetters, Inspection, QueueState, Subscription, Transport
from unstract_core.values import error_text

logger = logging.getLogger(__name__)

PROGRAM = "unstract-wire"
FAILED, DECLINED, INTERRUPTED = 2, 1, 130
_PAGE = 500
_IMPORT_SYSTEM = ("<frozen importlib", str(importlib.__file__), str(discovery.__file__), __file__)
_COUNTERS = ("ran", "settled", "retried", "buried", "lost", "refused", "replaced")

Command = TypeVar("Command", bound=Callable[..., Any])


@attrs.define
class Session:
    """What one run of the command was told on any level: `--url` and `--debug`."""

    url: str = ""
    debug: bool = False

    @contextlib.contextmanager
    def transport(self, capability: str | None = None) -> Iterator[Transport]:
        """Open the transport and close it in the end. Raises ConfigurationError, and NotSupported for a capability."""
        if not self.url:
            raise ConfigurationError(
                "no transport: give --url or set UNSTRACT_WIRE_URL, such as postgresql://user@host/database"
            )
        if "://" not in self.url:
            _make_here_importable()
        with _loading(f"the transport {self.url}"):
            transport = discovery.load_transport(self.url)
        try:
            if capability is not None and not getattr(transport.capabilities, capability):
                raise NotSupported(
                    f"the transport {self.url} cannot do this: it does not claim the capability {capability!r}"
                )
            yield transport
        finally:
            transport.close()

    def mask(self, text: str) -> str:
        """Return `text` without any password: this session's, as a driver may echo it, or one in another URL."""
        if (echoed := _echoes(self.url)) is not None:
            text = echoed.sub("***", text)
        return _KEYWORD.sub(r"\1***", _CREDENTIALS.sub(r"\1:***@", text))


_CREDENTIALS = re.compile(r"(://[^\s:]*):\S*@")
_WHOLE_URL = re.compile(r"(.*?://[^\s:]*):(.*)@(.*)", re.DOTALL)
_KEYWORD = re.compile(r"(?i)(\w*(?:password|passwd|pwd)\s*=\s*)('(?:\\.|[^'\\])*'|[^\s&'\"]+)")
_SHORTEST_PART = 3


@functools.lru_cache(maxsize=8)
def _echoes(url: str) -> re.Pattern[str] | None:
    """Match the passwords of `url` in any text: whole, in parts as a parser may split them, quoted or unquoted.

    A word that the masked URL shows anyway, such as a user's name that is the password too, is left readable.
    """
    shown, passwords = url, []
    if match := _WHOLE_URL.fullmatch(url):
        shown, passwords = f"{match[1]}@{match[3]}", [match[2]]
    passwords += [match[2].strip("'") for match in _KEYWORD.finditer(shown)]
    shown = _KEYWORD.sub("", shown)
    parts = {part for password in passwords for part in re.split("[@/?#:]", password) if len(part) >= _SHORTEST_PART}
    forms = {form for part in parts.union(passwords) for form in (part, unquote(part), quote(part, safe=""))}
    forms |= {repr(form)[1:-1] for form in forms}
    forms -= {"", *re.split(r"\W+", shown)}
    if not forms:
        return None
    return re.compile("|".join(map(_as_a_word, sorted(forms, key=len, reverse=True))))


def _as_a_word(text: str) -> str:
    before = r"(?<!\w)" if re.match(r"\w", text) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", text) else ""
    return before + re.escape(text) + after


class _Wire(click.Group):
    """The group whose `main` ends in an exit code, with one line on stderr where that is not 0."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        session = Session()
        kwargs |= {"prog_name": PROGRAM, "standalone_mode": False, "obj": session}
        quiet = logging.NullHandler()  # else a driver's warnings would stand beside the one line
        logging.root.addHandler(quiet)
        try:
            code = super().main(*args, **kwargs)
        except click.Abort:
            code = INTERRUPTED
        except click.UsageError as exc:
            command = exc.ctx.command_path if exc.ctx is not None else PROGRAM
            code = _complain(session, f"{exc.format_message()} (see '{command} --help')")
        except click.ClickException as exc:
            code = _complain(session, exc.format_message())
        except ContractError as exc:
            code = _complain(session, str(exc) or type(exc).__name__, exc)
        except Exception as exc:
            hint = "" if session.debug else "; run it again with --debug to see the traceback"
            code = _complain(session, f"unexpected {type(exc).__name__}{_where(exc)}{hint}", exc)
        finally:
            logging.root.removeHandler(quiet)
        sys.exit(code)


def _complain(session: Session, problem: str, exc: BaseException | None = None) -> int:
    with contextlib.suppress(OSError):
        if session.debug and exc is not None:
            click.echo(session.mask("".join(traceback.format_exception(exc))), err=True)
        click.echo(f"{PROGRAM}: {printable(' '.join(session.mask(problem).split()))}", err=True)
    return FAILED


def _remember(context: click.Context, option: click.Parameter, value: Any) -> None:
    if value:
        setattr(context.ensure_object(Session), str(option.name), value)


def _common(*, variables: bool = False) -> Callable[[Command], Command]:
    """Add the options that are understood on every level; what stands further to the right wins."""
    url = click.option(
        "--url",
        metavar="URL",
        envvar="UNSTRACT_WIRE_URL" if variables else None,
        callback=_remember,
        expose_value=False,
        help="The transport: postgresql://user@host/database, or module:factory. Default: $UNSTRACT_WIRE_URL.",
    )
    debug = click.option(
        "--debug",
        is_flag=True,
        envvar="UNSTRACT_WIRE_DEBUG" if variables else None,
        callback=_remember,
        expose_value=False,
        help="Show the traceback of an error. Default: $UNSTRACT_WIRE_DEBUG.",
    )

    def add(command: Command) -> Command:
        return url(debug(command))

    return add


_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document, for scripts.")


@click.group(PROGRAM, cls=_Wire, no_args_is_help=False, context_settings=_SETTINGS)
@click.version_option(__version__, message="%(prog)s %(version)s")
@_common(variables=True)
def main() -> None:
    """Run and look after the task queues of unstract-wire.

    \b
    export UNSTRACT_WIRE_URL=postgresql://user@host/database
    unstract-wire migrate
    unstract-wire worker --app myproject.tasks:tasks --queue celery_executor_legacy
    unstract-wire queues

    The exit code is 0 for success and 2 for an error, which is told in one line on standard error.
    """


@main.command()
@_json_option
@_common()
@click.pass_obj
def migrate(session: Session, as_json: bool) -> None:
    """Create the tables and indexes that are missing, and say which.

    What is there already is left as it is, so it is safe to run at any time, and from two places at once.
    """
    with session.transport() as transport:
        create = getattr(transport, "migrate", None)
        if not callable(create):
            raise NotSupported(f"the transport {session.url} has nothing to migrate; use it as it is")
        created = [str(name) for name in create()]
    if as_json:
        _print_json({"created": created})
    else:
        _print("\n".join(f"created {printable(name)}" for name in created) or "up to date, nothing was created")


@main.command()
@click.option("--app", metavar="MODULE:NAME", required=True, help="The tasks: a Tasks(), or any mapping of functions.")
@click.option("--queue", "queues", metavar="NAME", multiple=True, required=True, help="A queue; may be repeated.")
@click.option(
    "--concurrency", type=click.IntRange(1), metavar="N", default=1, show_default=True, help="Tasks run at once."
)
@click.option(
    "--lease",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long a dead worker's messages wait for another; a living worker renews them.",
)
@click.option(
    "--max-attempts",
    type=click.IntRange(1),
    metavar="N",
    default=5,
    show_default=True,
    help="Deliveries until a message that keeps failing becomes a dead letter.",
)
@click.option(
    "--prefetch",
    type=click.IntRange(1),
    metavar="N",
    help="Messages held at once, running ones too. Default: adaptive.",
)
@click.option(
    "--log-level",
    type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], case_sensitive=False),
    metavar="LEVEL",
    default="INFO",
    show_default=True,
    help="What is logged to standard error: from DEBUG, INFO, WARNING, ERROR or CRITICAL on.",
)
@_common()
@click.pass_obj
def worker(
    session: Session,
    app: str,
    queues: tuple[str, ...],
    concurrency: int,
    lease: float,
    max_attempts: int,
    prefetch: int | None,
    log_level: str,
) -> None:
    """Run the tasks of some queues until SIGTERM or SIGINT.

    The app is imported, the current directory first: --app myproject.tasks:tasks is `tasks` in myproject/tasks.py.
    On the first signal the worker takes nothing new, finishes what runs, settles it and exits with 0. A second one
    makes it leave at once with 128 + the signal's number; its messages run again when their lease is over.
    """
    with _log_to_stderr(session, log_level), _sigterm_leaves():
        tasks = _tasks(app)
        with session.transport() as transport:
            consumer = Consumer(
                transport,
                tasks,
                queues,
                concurrency=concurrency,
                lease=lease,
                max_attempts=max_attempts,
                prefetch=prefetch,
            )
            _run(consumer, session)


def _run(consumer: Consumer, session: Session) -> None:
    code: int | None = None
    started = 0.0

    def announce() -> None:
        nonlocal started
        started = time.monotonic()
        emit(
            logger,
            logging.INFO,
            "worker_started",
            transport=session.mask(session.url),
            queues=",".join(consumer.queues),
            tasks=",".join(sorted(consumer.tasks)),
            concurrency=consumer.concurrency,
            lease=consumer.lease,
            pid=os.getpid(),
        )

    consumer.transport = cast(Transport, _Announced(consumer.transport, announce))
    try:
        consumer.run()
    except SystemExit as second_signal:
        code = int(second_signal.code or 0)
    finally:
        if started:
            counts = {name: consumer.counters[name] for name in _COUNTERS}
            emit(logger, logging.INFO, "worker_stopped", seconds=round(time.monotonic() - started, 3), **counts)
    if code is not None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)  # a thread that a task has started would hold up a normal exit


@attrs.frozen
class _Announced:
    """A transport that tells when it was subscribed to: from then on the worker works."""

    transport: Transport
    announce: Callable[[], None]

    def subscribe(self, queues: Sequence[str], *, lease: float) -> Subscription:
        subscription = self.transport.subscribe(queues, lease=lease)
        self.announce()
        return subscription

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)


@main.command()
@click.option("--queue", "names", metavar="NAME", multiple=True, help="Only this queue; may be repeated.")
@_json_option
@_common()
@click.pass_obj
def queues(session: Session, names: tuple[str, ...], as_json: bool) -> None:
    """Show what stands in the queues.

    Depth is everything in the queue: ready to be taken, in flight with a worker, and delayed. Oldest is how long the
    first of the ready ones has waited; dead is how many were buried. A queue that holds nothing is shown when named.
    """
    with session.transport("inspection") as transport:
        states = cast(Inspection, transport).queues(list(names) or None)
    if as_json:
        _print_json([_queue_row(state) for state in states])
        return
    _print_table(
        ["queue", ">depth", ">ready", ">in flight", ">delayed", ">oldest", ">dead"],
        [
            [
                state.queue,
                str(_depth(state)),
                str(state.ready),
                str(state.in_flight),
                str(state.delayed),
                "-" if state.oldest is None else _age(state.oldest),
                str(state.dead),
            ]
            for state in states
        ],
        empty="no queue holds anything",
    )


def _depth(state: QueueState) -> int:
    return state.ready + state.in_flight + state.delayed


def _queue_row(state: QueueState) -> dict[str, Any]:
    return {
        "queue": state.queue,
        "depth": _depth(state),
        "ready": state.ready,
        "in_flight": state.in_flight,
        "delayed": state.delayed,
        "oldest_seconds": None if state.oldest is None else round(state.oldest, 3),
        "dead": state.dead,
    }


@main.group(no_args_is_help=False)
@_common()
def dead() -> None:
    """Look after dead letters: messages that were given up."""


@dead.command("list")
@click.option("--queue", metavar="NAME", help="Only those of this queue.")
@click.option("--limit", type=click.IntRange(1), metavar="N", default=100, show_default=True, help="How many at most.")
@_json_option
@_common()
@click.pass_obj
def list_(session: Session, queue: str | None, limit: int, as_json: bool) -> None:
    """List dead letters, the newest first, without their content."""
    with _dead_letters(session) as letters:
        found = letters.find(queue=queue, limit=limit)
    if as_json:
        _print_json([_letter_row(letter) for letter in found])
        return
    _print_table(
        ["id", "queue", "task", ">attempts", "buried at", "reason"],
        [
            [
                letter.id,
                letter.queue,
                letter.task_name or "-",
                str(letter.attempts),
                _utc(letter.buried_at, "seconds"),
                letter.reason,
            ]
            for letter in found
        ],
        empty="no dead letters",
    )
    if len(found) == limit:
        click.echo(f"the newest {limit}; there may be more (--limit)", err=True)


@dead.command()
@click.argument("letter_id", metavar="ID")
@_json_option
@_common()
@click.pass_obj
def show(session: Session, letter_id: str, as_json: bool) -> None:
    """Print one dead letter with its content.

    That is the message as it was stored, and the result where the task had one already.
    """
    with _dead_letters(session) as letters:
        (letter,) = _known(letters, [letter_id])
    row = _letter_row(letter)
    content = {"message": letter.message, "result": letter.result}
    if as_json:
        _print_json(row | content)
        return
    lines = [f"{key:12} {printable('-' if value in (None, '') else str(value))}" for key, value in row.items()]
    lines += [f"\n{key}:\n{_readable_json(value)}" for key, value in content.items() if value is not None]
    _print("\n".join(lines))


@dead.command()
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option("--queue", metavar="NAME", help="With --all: every dead letter of this queue.")
@click.option("--all", "everything", is_flag=True, help="With --queue: all that are there now.")
@_json_option
@_common()
@click.pass_obj
def replay(session: Session, ids: tuple[str, ...], queue: str | None, everything: bool, as_json: bool) -> None:
    """Send dead letters again as new messages, and remove them here.

    Name them by ID, or take a whole queue with --queue NAME --all. If one of the IDs is unknown nothing is sent.
    """
    if bool(ids) == bool(queue and everything) or (ids and (queue or everything)):
        raise click.UsageError("Say which: either IDs, or --queue NAME --all.")
    with _dead_letters(session) as letters:
        if ids:
            _known(letters, ids)
            replayed = list(letters.replay(ids))
        else:
            replayed = _replay_all(letters, str(queue))
    if as_json:
        _print_json({"replayed": replayed})
    else:
        _print(f"replayed {len(replayed)}" + "".join(f"\n{id}" for id in replayed))


def _replay_all(letters: DeadLetters, queue: str) -> list[str]:
    """Replay, page by page, what was there at the start: one that is buried again meanwhile is left alone."""
    replayed: list[str] = []
    tried: set[str] = set()
    limit = _PAGE
    until = next((letter.buried_at for letter in letters.find(queue=queue, limit=1)), None)
    while until is not None:
        page = letters.find(queue=queue, limit=limit)
        ids = [letter.id for letter in reversed(page) if letter.buried_at <= until and letter.id not in tried]
        if ids:
            tried.update(ids)
            replayed += letters.replay(ids)
        elif len(page) < limit:
            break
        else:
            limit *= 2
    return replayed


@dead.command()
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option("--queue", metavar="NAME", help="Every dead letter of this queue.")
@click.option("--all", "everything", is_flag=True, help="Every dead letter of every queue (or of --queue).")
@click.option(
    "--older-than", type=click.FloatRange(0), metavar="SECONDS", help="With --queue or --all: only those buried before."
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@_json_option
@_common()
@click.pass_obj
def purge(
    session: Session,
    ids: tuple[str, ...],
    queue: str | None,
    everything: bool,
    older_than: float | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Remove dead letters for good: by ID, of one queue, or all.

    Asks first when run on a terminal; elsewhere it does nothing without --yes. If one of the IDs is unknown nothing is
    removed.
    """
    whole = queue is not None or everything
    if bool(ids) == whole:
        raise click.UsageError("Say which: either IDs, or --queue NAME, or --all.")
    if ids and older_than is not None:
        raise click.UsageError("--older-than goes with --queue or --all, not with IDs.")
    with _dead_letters(session) as letters:
        if ids:
            _known(letters, ids)
        if not yes:
            _confirm(_what_is_purged(ids, queue, older_than))
        purged = letters.purge(ids=list(ids) or None, queue=queue, older_than=older_than or 0.0)
    if as_json:
        _print_json({"purged": purged})
    else:
        _print(f"purged {purged}")


def _what_is_purged(ids: Sequence[str], queue: str | None, older_than: float | None) -> str:
    if ids:
        return f"{len(set(ids))} dead letter{'s' if len(set(ids)) > 1 else ''}"
    where = "of ALL queues" if queue is None else f"of queue {queue!r}"
    return f"every dead letter {where}" + ("" if older_than is None else f" buried more than {_age(older_than)} ago")


def _confirm(what: str) -> None:
    if sys.stdin is None or not sys.stdin.isatty():
        raise click.UsageError(f"This removes {what} for good; there is no terminal to ask on: add --yes.")
    if not click.confirm(printable(f"Remove {what} for good?"), err=True):
        click.echo(f"{PROGRAM}: nothing was removed", err=True)
        raise click.exceptions.Exit(DECLINED)


@contextlib.contextmanager
def _dead_letters(session: Session) -> Iterator[DeadLetters]:
    with session.transport("dead_letters") as transport:
        yield cast(Any, transport).dead


def _known(letters: DeadLetters, ids: Sequence[str]) -> Sequence[DeadLetter]:
    found = letters.get(ids)
    unknown = sorted(set(ids).difference(letter.id for letter in found))
    if unknown:
        raise ConfigurationError(f"no dead letter {', '.join(unknown)} (see '{PROGRAM} dead list')")
    return found


def _letter_row(letter: DeadLetter) -> dict[str, Any]:
    return {
        "id": letter.id,
        "queue": letter.queue,
        "task_name": letter.task_name,
        "reason": letter.reason,
        "attempts": letter.attempts,
        "org_id": letter.org_id,
        "priority": letter.priority,
        "enqueued_at": _utc(letter.enqueued_at),
        "buried_at": _utc(letter.buried_at),
    }


def _tasks(app: str) -> Mapping[str, Callable[..., Any]]:
    module, _, name = app.partition(":")
    if not module or not name:
        raise ConfigurationError(f"--app takes module:name, such as myproject.tasks:tasks, not {app!r}")
    _make_here_importable()
    with _loading(f"--app {app}"):
        found = discovery.import_object(app, "--app")
    if not isinstance(found, Mapping):
        raise ConfigurationError(
            f"--app {app} is a {type(found).__name__}; it must be a Tasks(), or a mapping of task names to functions"
        )
    if odd := [name for name in found if not isinstance(name, str) or not name]:
        raise ConfigurationError(f"--app {app} has a task whose name is not a string: {odd[0]!r}")
    return found


def _make_here_importable() -> None:
    with contextlib.suppress(FileNotFoundError):
        if (here := os.getcwd()) not in sys.path:
            sys.path.insert(0, here)


@contextlib.contextmanager
def _loading(what: str) -> Iterator[None]:
    """Raise whatever somebody's module or factory raises as a ConfigurationError that says where it happened."""
    try:
        yield
    except _Left:
        raise
    except ConfigurationError as exc:
        if not isinstance(exc.__cause__, ImportError) or "://" in what:
            raise
        where = _where(exc.__cause__, without=_IMPORT_SYSTEM)
        where = where or "; modules are looked for in the current directory and on PYTHONPATH"
        raise ConfigurationError(f"{exc}{where}") from exc.__cause__
    except ContractError:
        raise
    except (Exception, SystemExit) as exc:
        where = _where(exc, without=_IMPORT_SYSTEM)
        raise ConfigurationError(f"{what} cannot be loaded: {error_text(exc)}{where}") from exc


def _where(exc: BaseException, *, without: tuple[str, ...] = ()) -> str:
    """Return " (file:line)" of where it was raised, the files `without` aside."""
    frames = [frame for frame in traceback.extract_tb(exc.__traceback__) if not frame.filename.startswith(without)]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


class _Left(SystemExit):
    """SIGTERM came while nothing was held yet, or any more."""


@contextlib.contextmanager
def _sigterm_leaves() -> Iterator[None]:
    """Let SIGTERM end the process before the consumer minds it: as process 1 of a container it would be ignored."""

    def leave(number: int, frame: object) -> NoReturn:
        raise _Left(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _log_to_stderr(session: Session, level: str) -> Iterator[None]:
    handler = logging.StreamHandler()
    handler.setFormatter(_LogLine(session))
    previous = logging.root.level
    logging.root.addHandler(handler)
    logging.root.setLevel(level.upper())
    try:
        yield
    finally:
        logging.root.setLevel(previous)
        logging.root.removeHandler(handler)


class _LogLine(logging.Formatter):
    """One line a record (a traceback follows on lines of its own): UTC time, level, logger, message."""

    def __init__(self, session: Session) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")
        self._session = session

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 - logging's name
        return _utc(datetime.datetime.fromtimestamp(record.created, datetime.UTC), "milliseconds")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        record.message = printable(record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        return self._session.mask(super().format(record))


def printable(text: str) -> str:
    """Escape line ends and control characters: what a payload says must not steer somebody's terminal or log."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
    )


def _readable_json(value: Any) -> str:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return "\n".join(map(printable, text.split("\n")))


def _print_json(value: Any) -> None:
    _print(json.dumps(value, indent=2))


def _print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str) -> None:
    """Print columns, those whose heading starts with ">" to the right; on a terminal fitted to its width."""
    if not rows:
        click.echo(empty, err=True)
        return
    rows = [[printable(cell) for cell in row] for row in rows]
    names = [heading.lstrip(">").upper() for heading in headings]
    right = [heading.startswith(">") for heading in headings]
    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    _print(_fitted(names, right, rows) if on_terminal else _aligned(names, right, rows))


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


def _print(text: str) -> None:
    try:
        click.echo(text)
    except OSError as exc:
        if exc.errno == errno.EPIPE:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the exit would fail on the rest, again
        raise click.ClickException(f"the output cannot be written: {exc.strerror}") from exc


def _utc(moment: datetime.datetime, precision: str = "microseconds") -> str:
    return moment.astimezone(datetime.UTC).isoformat(timespec=precision).replace("+00:00", "Z")


def _age(seconds: float) -> str:
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02}h"
