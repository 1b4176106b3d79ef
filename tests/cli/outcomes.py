"""How a run of the command ended, and what every error has to look like."""

from __future__ import annotations

import attrs
from click.testing import Result


@attrs.frozen
class Ended:
    """What a process left: its exit code, and what it wrote."""

    code: int
    out: str
    err: str


def the_one_line(result: Result | Ended) -> str:
    """Return the error that the command ended with; fail unless it is one line, alone, with exit code 2."""
    ended = result if isinstance(result, Ended) else Ended(result.exit_code, result.stdout, result.stderr)
    assert ended.code == 2
    assert ended.out == ""
    (line,) = ended.err.splitlines()
    assert line.startswith("unstract-wire: ")
    return line.removeprefix("unstract-wire: ")
