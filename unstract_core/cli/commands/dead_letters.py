"""`unstract-wire dead`: list, show, replay and purge dead letters."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import click

from unstract_core.cli.context import PROGRAM, CliContext, common, json_option, queue_name
from unstract_core.cli.process_exit import DECLINED
from unstract_core.cli.render.output import age, print_json, print_table, printable, readable_json, utc, write
from unstract_core.cli.render.snapshot import newest_dead_letters
from unstract_core.errors import ConfigurationError
from unstract_core.transport import BatchedDeadLetters, DeadLetter, DeadLetters

T = TypeVar("T")

_PROGRESS = 2.0
"""Seconds between two lines of progress."""


@click.group(no_args_is_help=False)
@common()
def dead() -> None:
    """List, replay or purge dead letters: messages that failed for good."""


@dead.command("list")
@click.option("--queue", type=queue_name, metavar="NAME", help="Only the dead letters of this queue.")
@click.option(
    "--limit",
    type=click.IntRange(1, 1_000_000),
    metavar="N",
    default=100,
    show_default=True,
    help="How many at most.",
)
@json_option
@common()
@click.pass_obj
def list_(cli: CliContext, queue: str | None, limit: int, as_json: bool) -> None:
    """List dead letters, the newest first, without their content."""
    with _dead_letters(cli) as letters:
        listed = newest_dead_letters(letters, queue=queue, limit=limit)
    if as_json:
        print_json([_letter_row(letter) for letter in listed])
        return
    print_table(
        ["id", "queue", "task", ">attempts", "buried at", "reason"],
        [
            [
                letter.id,
                letter.queue,
                letter.task_name or "-",
                str(letter.attempts),
                utc(letter.buried_at, "seconds"),
                letter.reason,
            ]
            for letter in listed
        ],
        empty="no dead letters",
    )
    if len(listed) == limit:
        click.echo(f"the newest {limit}; there may be more (--limit)", err=True)


@dead.command()
@click.argument("letter_id", metavar="ID")
@json_option
@common()
@click.pass_obj
def show(cli: CliContext, letter_id: str, as_json: bool) -> None:
    """Print one dead letter with its content.

    The content is the stored message, and the result if the task had returned one.
    """
    with _dead_letters(cli) as letters:
        (letter,) = _known(letters, [letter_id])
    row = _letter_row(letter)
    content: dict[str, Any] = {"message": letter.message, "result": letter.result}
    if letter.omitted:
        row |= {"omitted": letter.omitted}
    if as_json:
        print_json(row | content)
        return
    lines = [f"{key:12} {printable('-' if value in (None, '') else str(value))}" for key, value in row.items()]
    lines += [f"\n{key}:\n{readable_json(value)}" for key, value in content.items() if value is not None]
    write("\n".join(lines))


@dead.command()
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option("--queue", type=queue_name, metavar="NAME", help="With --all: every dead letter of this queue.")
@click.option("--all", "everything", is_flag=True, help="With --queue: all of them.")
@json_option
@common()
@click.pass_obj
def replay(cli: CliContext, ids: tuple[str, ...], queue: str | None, everything: bool, as_json: bool) -> None:
    """Send dead letters again as new messages, and remove them.

    Give their IDs, or --queue NAME --all for a whole queue. If one of the IDs is unknown, nothing is sent.
    """
    if bool(ids) == bool(queue and everything) or (ids and (queue or everything)):
        raise click.UsageError("Give either IDs, or --queue NAME --all.")
    with _dead_letters(cli) as letters:
        if ids:
            _known(letters, ids)
            replayed = list(letters.replay(ids))
        else:
            replayed = []
            if isinstance(letters, BatchedDeadLetters):
                for batch in _with_progress("replayed", letters.replay_in_batches(queue=queue), len):
                    replayed += batch
            else:
                replayed = list(letters.replay(queue=queue))
    if as_json:
        print_json({"replayed": replayed})
    else:
        write(f"replayed {len(replayed)}" + "".join(f"\n{id}" for id in replayed))


@dead.command()
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option("--queue", type=queue_name, metavar="NAME", help="Every dead letter of this queue.")
@click.option("--all", "everything", is_flag=True, help="Every dead letter of every queue (or of --queue).")
@click.option(
    "--older-than",
    type=click.FloatRange(0, 1e9),
    metavar="SECONDS",
    help="With --queue or --all: only dead letters that are older.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@common()
@click.pass_obj
def purge(
    cli: CliContext,
    ids: tuple[str, ...],
    queue: str | None,
    everything: bool,
    older_than: float | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Remove dead letters for good: by ID, of one queue, or all.

    On a terminal it asks first. Without a terminal it needs --yes. If one of the IDs is unknown, nothing is removed.
    """
    whole = queue is not None or everything
    if bool(ids) == whole:
        raise click.UsageError("Give either IDs, or --queue NAME, or --all.")
    if ids and older_than is not None:
        raise click.UsageError("--older-than works with --queue or --all, not with IDs.")
    with _dead_letters(cli) as letters:
        if ids:
            _known(letters, ids)
        if not yes:
            _confirm(_description(ids, queue, older_than))
        chosen: dict[str, Any] = {"ids": list(ids) or None, "queue": queue, "older_than": older_than or 0.0}
        if isinstance(letters, BatchedDeadLetters):
            purged = sum(_with_progress("purged", letters.purge_in_batches(**chosen), int))
        else:
            purged = letters.purge(**chosen)
    if as_json:
        print_json({"purged": purged})
    else:
        write(f"purged {purged}")


def _with_progress(done: str, batches: Iterable[T], size: Callable[[T], int]) -> Iterator[T]:
    """Yield the batches, and print the progress on standard error: every 2 s, and if an error ends it."""
    total, next_at = 0, time.monotonic() + _PROGRESS
    try:
        for batch in batches:
            total += size(batch)
            yield batch
            if time.monotonic() >= next_at:
                click.echo(f"{PROGRAM}: {done} {total} so far", err=True)
                next_at = time.monotonic() + _PROGRESS
    except BaseException:
        if total:
            click.echo(f"{PROGRAM}: {done} {total} before this ended", err=True)
        raise


def _description(ids: Sequence[str], queue: str | None, older_than: float | None) -> str:
    if ids:
        return f"{len(set(ids))} dead letter{'s' if len(set(ids)) > 1 else ''}"
    where = "of ALL queues" if queue is None else f"of queue {queue!r}"
    return f"every dead letter {where}" + ("" if older_than is None else f" older than {age(older_than)}")


def _confirm(description: str) -> None:
    if sys.stdin is None or not sys.stdin.isatty():
        raise click.UsageError(f"This removes {description} for good. There is no terminal to ask on: add --yes.")
    if not click.confirm(printable(f"Remove {description} for good?"), err=True):
        click.echo(f"{PROGRAM}: nothing was removed", err=True)
        raise click.exceptions.Exit(DECLINED)


@contextlib.contextmanager
def _dead_letters(cli: CliContext) -> Iterator[DeadLetters]:
    with cli.transport("dead_letters") as transport:
        yield cast(Any, transport).dead


def _known(letters: DeadLetters, ids: Sequence[str]) -> Sequence[DeadLetter]:
    """Return the dead letters with these ids. Raises ConfigurationError if one is unknown."""
    known = letters.get(ids)
    unknown = sorted(set(ids).difference(letter.id for letter in known))
    if unknown:
        noun = "dead letter" if len(unknown) == 1 else "dead letters"
        raise ConfigurationError(f"no {noun} {', '.join(unknown)} (see '{PROGRAM} dead list')")
    return known


def _letter_row(letter: DeadLetter) -> dict[str, Any]:
    return {
        "id": letter.id,
        "queue": letter.queue,
        "task_name": letter.task_name,
        "reason": letter.reason,
        "attempts": letter.attempts,
        "org_id": letter.org_id,
        "priority": letter.priority,
        "enqueued_at": utc(letter.enqueued_at),
        "buried_at": utc(letter.buried_at),
    }
