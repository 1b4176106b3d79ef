"""`unstract-wire migrate`."""

from __future__ import annotations

import click

from unstract_core.cli.context import CliContext, common, json_option
from unstract_core.cli.render.output import print_json, printable, write
from unstract_core.errors import NotSupported


@click.command()
@click.option("--sql", "as_sql", is_flag=True, help="Print plain SQL for your own migration, and change nothing.")
@click.option(
    "--lock-timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Seconds to wait for a lock on a table (5).",
)
@click.option(
    "--create-tables/--no-create-tables",
    default=None,
    help="Create the tables that the product's migrations also create. Default: unless Django migrates this schema.",
)
@json_option
@common()
@click.pass_obj
def migrate(
    cli: CliContext, as_json: bool, as_sql: bool, lock_timeout: float | None, create_tables: bool | None
) -> None:
    """Create missing tables and indexes, and list them.

    Existing tables and indexes stay as they are, so the command is safe at any time, and from two places at once.
    """
    given = {"lock_timeout": lock_timeout, "create_tables": create_tables}
    options = {name: value for name, value in given.items() if value is not None}
    if as_sql and (as_json or lock_timeout is not None):
        raise click.UsageError("--sql only prints SQL: use it without --json and --lock-timeout.")
    with cli.transport() as transport:
        method = "migration_sql" if as_sql else "migrate"
        create = getattr(transport, method, None)
        if not callable(create):
            raise NotSupported(f"the transport {cli.url} has nothing to migrate; use it as it is")
        if as_sql:
            write(create(**options))
            return
        created = [str(name) for name in create(**options)]
    if as_json:
        print_json({"created": created})
    else:
        write("\n".join(f"created {printable(name)}" for name in created) or "up to date, nothing was created")
