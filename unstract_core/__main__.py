"""`python -m unstract_core`, and the entry point of `unstract-wire`: what has to work before click is there."""

from __future__ import annotations

import atexit
import sys


def main() -> None:
    """Run the command line and exit. Without click, exit with 2 and one line that says what to install."""
    atexit.register(_leave_at_once)  # registered first, so that it runs after every exit handler of the application
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


def _leave_at_once() -> None:
    """End a worker that has stopped, without the interpreter's own clean-up: on a busy machine that takes seconds."""
    process_exit = sys.modules.get("unstract_core.cli.process_exit")
    if process_exit is not None and process_exit.exit_code is not None:
        process_exit.leave(process_exit.exit_code)


if __name__ == "__main__":
    main()
