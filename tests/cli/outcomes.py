"""The exit code and the output of a command, and the form of an error."""

from __future__ import annotations

import attrs
from click.testing import Result


@attrs.frozen
class Ended:
    """The exit code and the output of a process."""

    code: int
    out: str
    err: str


def the_one_line(result: Result | Ended) -> str:
    """Return the error line of the command. Fails unless it is the only output, and the exit code is 2."""
    ended = result if isinstance(result, Ended) else Ended(result.exit_code, result.stdout, result.stderr)
    assert ended.code == 2
    assert ended.out == ""
    (line,) = ended.err.splitlines()
    assert line.startswith("unstract-wire: ")
    return line.removeprefix("unstract-wire: ")
