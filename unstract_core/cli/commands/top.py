"""`unstract-wire top`: queues, workers and the newest failures, once or as a live view."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, cast

import click

from unstract_core.cli.context import CliContext, common, json_option, queue_name
from unstract_core.cli.render import snapshot as snapshots
from unstract_core.cli.render.live_view import LiveView, show
from unstract_core.cli.render.output import print_json, print_table
from unstract_core.cli.render.snapshot import Rows, Snapshot
from unstract_core.transport import Inspection


@click.command()
@click.option(
    "--queue", "names", type=queue_name, metavar="NAME", multiple=True, help="Only this queue; may be repeated."
)
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    metavar="SECONDS",
    default=2.0,
    show_default=True,
    help="Seconds between two updates.",
)
@click.option("--once", is_flag=True, help="Print everything once, as without a terminal.")
@json_option
@common()
@click.pass_obj
def top(cli: CliContext, names: tuple[str, ...], interval: float, once: bool, as_json: bool) -> None:
    """Watch queues, workers and the newest failures.

    On a terminal it runs until q or Ctrl-C. Without a terminal, and with --once or --json, it prints everything once.
    Message contents and error texts are not shown. While the transport is unavailable, it says so and tries again.
    """

    def ask(transport: Any) -> object:
        return cast(Inspection, transport).queues([])

    with cli.transport("inspection", asking=ask) as transport:
        first = snapshots.take_snapshot(transport, names, None)
        if as_json:
            print_json(snapshots.document(first))
        elif once or sys.stdout is None or not sys.stdout.isatty():
            _print(first)
        else:
            show(LiveView(transport, names, interval, first), cli.url, interval, cli.mask)


def _print(snapshot: Snapshot) -> None:
    _table(snapshots.QUEUES, snapshots.queue_rows(snapshot), empty="no queue holds anything")
    if note := snapshots.note_on_workers(snapshot):
        click.echo(note, err=True)
    if snapshot.workers:
        click.echo()
        _table(snapshots.WORKERS, snapshots.worker_rows(snapshot), empty="")
    if snapshot.letters:
        click.echo()
    _table(snapshots.FAILURES, snapshots.failure_rows(snapshot), empty="no dead letters")


def _table(headings: Sequence[str], rows: Rows, *, empty: str) -> None:
    print_table([heading.lstrip("<") for heading in headings], rows, empty=empty)
