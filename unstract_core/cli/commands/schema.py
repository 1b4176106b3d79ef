"""`unstract-wire schema`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, BinaryIO

import click

from unstract_core.cli.context import CliContext, common, json_option
from unstract_core.cli.render.output import print_json, printable, write
from unstract_core.codec import refuse_constant
from unstract_core.errors import ConfigurationError
from unstract_core.schema import committed_schema
from unstract_core.schema.changes import Change
from unstract_core.schema.compare import compare

BREAKS = 1


@click.command()
@click.option(
    "--check-against",
    "old",
    type=click.File("rb"),
    metavar="OLD",
    help="Compare with this older schema, a file or - for standard input. The exit code is 1 if anything breaks.",
)
@json_option
@common()
@click.pass_obj
def schema(cli: CliContext, old: BinaryIO | None, as_json: bool) -> None:
    """Print the JSON Schema of a task, or compare it with an older one.

    With --check-against it prints each change with its place, and the side that it breaks: old readers of new rows, or
    new readers of old rows. Compatible changes are printed too.
    """
    if old is None:
        print_json(committed_schema())
        return
    changes = _changes(old)
    if as_json:
        print_json({"compatible": not _breaking(changes), "changes": [_row(change) for change in changes]})
    else:
        write("\n".join(printable(str(change)) for change in changes) or "nothing has changed")
    if _breaking(changes):
        raise click.exceptions.Exit(BREAKS)


def _changes(file: BinaryIO) -> Sequence[Change]:
    try:
        return compare(json.loads(file.read(), parse_constant=refuse_constant), committed_schema())
    except OSError as exc:
        problem = f"cannot be read: {exc.strerror}"
    except ConfigurationError as exc:
        problem = f"is not a JSON Schema that can be compared: {exc}"
    except RecursionError:
        problem = "is nested too deep to be read"
    except ValueError as exc:
        problem = f"is not JSON: {exc}"
    name = getattr(file, "name", "<stdin>")
    raise ConfigurationError(f"{'standard input' if name == '<stdin>' else name} {problem}")


def _breaking(changes: Sequence[Change]) -> bool:
    return any(change.breaks for change in changes)


def _row(change: Change) -> dict[str, Any]:
    return {"path": change.path, "breaks": list(change.breaks), "change": change.what, "remedy": change.remedy}
