"""`unstract-wire queues`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import click

from unstract_core.cli.context import CliContext, common, json_option, queue_name
from unstract_core.cli.render.output import age, print_json, print_table
from unstract_core.cli.render.snapshot import count, depth, queue_row
from unstract_core.transport import Inspection, QueueState


@click.command()
@click.option(
    "--queue", "names", type=queue_name, metavar="NAME", multiple=True, help="Only this queue; may be repeated."
)
@json_option
@common()
@click.pass_obj
def queues(cli: CliContext, names: tuple[str, ...], as_json: bool) -> None:
    """Show the messages in the queues.

    Depth counts all messages: ready, in flight with a worker, and delayed. Oldest is how long the first ready message
    has waited. Dead counts the dead letters. An empty queue is shown only if it is named. Unknown counts messages in a
    state that no worker of this package claims. Numbers with ~ are estimates for a queue that is too long to count.
    """

    def ask(transport: Any) -> Sequence[QueueState]:
        return cast(Inspection, transport).queues(list(names) or None)

    with cli.transport("inspection", asking=ask) as transport:
        states = ask(transport)
    if as_json:
        print_json([queue_row(state) for state in states])
        return
    unknown = any(state.unknown for state in states)
    print_table(
        [
            "queue",
            ">depth",
            ">ready",
            ">in flight",
            ">delayed",
            ">oldest",
            ">dead",
            *([">unknown"] if unknown else []),
        ],
        [
            [
                state.queue,
                count(state, depth(state)),
                count(state, state.ready),
                str(state.in_flight),
                str(state.delayed),
                "-" if state.oldest is None else age(state.oldest),
                str(state.dead),
                *([str(state.unknown)] if unknown else []),
            ]
            for state in states
        ],
        empty="no queue holds anything",
    )
