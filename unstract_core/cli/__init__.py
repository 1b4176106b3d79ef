"""The `unstract-wire` command: create the tables, run workers, list queues and dead letters, and diagnose problems.

Standard output has the result: columns, or one JSON document with --json. Standard error has the worker's log and
notes. An error is one line on standard error with the problem and the remedy, and the exit code is 2. The traceback is
shown with --debug only. Passwords are masked in all output.

The command works with any transport that `load_transport` finds, and imports no transport itself. It needs click, from
the extra [cli]; without click, the entry point in `__main__` names the extra to install.
"""

from __future__ import annotations

import click

from unstract_core import __version__
from unstract_core.cli.commands import dead_letters, doctor, migrate, queues, schema, top, worker
from unstract_core.cli.context import PROGRAM, CliGroup, common


@click.group(
    PROGRAM,
    cls=CliGroup,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, message="%(prog)s %(version)s")
@common(variables=True)
def main() -> None:
    """Run workers, and operate the task queues of unstract-wire.

    \b
    export UNSTRACT_WIRE_URL=postgresql://user@host/database
    unstract-wire migrate
    unstract-wire worker --app myproject.tasks:tasks --queue celery_executor_legacy
    unstract-wire queues

    \b
    Exit codes:
      0        success
      1        an incompatible schema change, a declined purge, an error found by doctor, a dead child, or a closed pipe
      2        an error, described in one line on standard error
      130      interrupted by Ctrl-C
      128 + N  a worker stopped at once, or top stopped, by signal number N
    """


for command in (
    migrate.migrate,
    worker.worker,
    queues.queues,
    dead_letters.dead,
    top.top,
    doctor.doctor,
    schema.schema,
):
    main.add_command(command)
