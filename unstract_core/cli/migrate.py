"""`unstract-wire migrate`."""

from __future__ import annotations

import click

from unstract_core.cli.output import print_json, printable, write
from unstract_core.cli.session import Session, common, json_option
from unstract_core.errors import NotSupported


@click.command()
@json_option
@common()
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
        print_json({"created": created})
    else:
        write("\n".join(f"created {printable(name)}" for name in created) or "up to date, nothing was created")
