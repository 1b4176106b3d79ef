"""`python -m unstract_core`, and the entry point of `unstract-wire`: what has to work before click is there."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit. Without click, exit with 2 and one line that says what to install."""
    try:
        from unstract_core import cli
    except ModuleNotFoundError as exc:
        if exc.name != "click":
            raise
        sys.stderr.write(
            "unstract-wire: the command needs click, which is not installed: pip install 'unstract-wire[cli]'\n"
        )
        sys.exit(2)
    cli.main()


if __name__ == "__main__":
    main()
