"""A worker with children: the supervisor of `unstract-wire worker`, with its metrics and its health server."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from unstract_core.cli.context import CliContext
from unstract_core.cli.health_server import Address, serving
from unstract_core.cli.metrics_export import ChildrenMetrics
from unstract_core.cli.supervisor.supervisor import Supervisor


def supervise(
    cli: CliContext,
    arguments: Sequence[str],
    queues: Sequence[str],
    processes: int,
    grace: float,
    silence_limit: float,
    http: Address | None,
) -> int:
    """Run this same command in child processes, and return the exit code.

    The children get the URL in an environment variable, so that it is not visible in their arguments.

    Args:
        cli: The context of the command.
        arguments: The arguments of the worker command.
        queues: The queues of the worker, for the metrics.
        processes: The number of slots; each has one active child.
        grace: Seconds that the children have to finish after the first signal.
        silence_limit: Seconds without a report after which a child is logged as silent.
        http: The address of the health server; None for no server.
    """
    environment = {**os.environ, "UNSTRACT_WIRE_URL": cli.url}
    if cli.debug:
        environment["UNSTRACT_WIRE_DEBUG"] = "1"
    with contextlib.ExitStack() as stack:
        children_metrics = None
        if http is not None:
            children_metrics = stack.enter_context(ChildrenMetrics(cli, queues))
            environment |= children_metrics.environment
        supervisor = Supervisor(
            [*_program(arguments), "worker", *arguments],
            environment,
            processes=processes,
            grace=grace,
            silence_limit=silence_limit,
            on_exit=(lambda pid: None) if children_metrics is None else children_metrics.forget,
        )
        if http is not None and children_metrics is not None:
            stack.enter_context(serving(http, supervisor.health, children_metrics.exposition))
        return supervisor.run()


def _program(arguments: Sequence[str]) -> list[str]:
    """Return the start of the command line of this process, so that a child gets the same import path."""
    count = len(sys.argv) - 1
    if sys.argv[0] != "-c" and count > len(arguments) and sys.argv[-len(arguments) :] == [*arguments]:
        return [sys.executable, *sys.orig_argv[1 : len(sys.orig_argv) - count]]
    here_first = not sys.flags.safe_path and sys.path[0] in ("", os.getcwd())
    return [sys.executable, *([] if here_first else ["-P"]), "-m", "unstract_core"]
