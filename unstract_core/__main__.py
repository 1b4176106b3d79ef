"""The entry point of `unstract-wire` and of `python -m unstract_core`; it works where click is not installed."""

from __future__ import annotations

import atexit
import sys


def main() -> None:
    """Run the command line and exit. Without click, print one line that says what to install, and exit with 2."""
    atexit.register(_exit_without_cleanup)  # registered first, so that it runs last
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


def _exit_without_cleanup() -> None:
    """Exit a worker that has stopped without the interpreter's own clean-up, which takes seconds on a busy machine."""
    process_exit = sys.modules.get("unstract_core.cli.process_exit")
    if process_exit is not None and process_exit.exit_code is not None:
        process_exit.exit_now(process_exit.exit_code)


if __name__ == "__main__":
    main()
