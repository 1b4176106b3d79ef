"""`unstract-wire migrate`."""

from __future__ import annotations

import click

from unstract_core.cli.context import CliContext, common, json_option
from unstract_core.cli.render.output import print_json, printable, write
from unstract_core.errors import NotSupported


@click.command()
@click.option("--sql", "as_sql", is_flag=True, help="Print plain SQL for a migration of your own, and change nothing.")
@click.option(
    "--lock-timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Wait so long for a lock on a table (5).",
)
@click.option(
    "--create-tables/--no-create-tables",
    default=None,
    help="Create the tables that the product's migrations create too; by default unless Django migrates this schema.",
)
@json_option
@common()
@click.pass_obj
def migrate(
    cli: CliContext, as_json: bool, as_sql: bool, lock_timeout: float | None, create_tables: bool | None
) -> None:
    """Create the tables and indexes that are missing, and say which.

    What is there already is left as it is, so it is safe to run at any time, and from two places at once.
    """
    given = {"lock_timeout": lock_timeout, "create_tables": create_tables}
    options = {name: value for name, value in given.items() if value is not None}
    if as_sql and (as_json or lock_timeout is not None):
        raise click.UsageError("--sql prints SQL: it goes with --create-tables and --no-create-tables alone.")
    with cli.transport() as transport:
        wanted = "migration_sql" if as_sql else "migrate"
        create = getattr(transport, wanted, None)
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
