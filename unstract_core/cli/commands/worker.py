"""`unstract-wire worker`: the options of a worker, and a worker without a supervisor.

With --processes, or with an option that needs a restart of the worker, this process is the supervisor. Its children run
this same command, each with a consumer.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import cast

import click

from unstract_core.cli.app_import import load_observer, load_tasks
from unstract_core.cli.commands.supervise import supervise
from unstract_core.cli.context import CliContext, common, queue_name
from unstract_core.cli.health_server import Address, ConsumerHealth, serving
from unstract_core.cli.metrics_export import ConsumerMetrics
from unstract_core.cli.process_exit import exiting_in_time
from unstract_core.cli.render.logs import log_to_stderr
from unstract_core.cli.run_consumer import run, sigterm_raises
from unstract_core.cli.supervisor.child import Parent
from unstract_core.cli.supervisor.heartbeat import Heartbeat
from unstract_core.cli.supervisor.recycle_limits import MEGABYTE, RecycleLimits
from unstract_core.errors import ConfigurationError, NotSupported
from unstract_core.outcomes import StatusPayload
from unstract_core.transport import Inspection, ReplyStatus, Transport
from unstract_core.worker.consumer import Consumer

_GRACE = 25.0
"""Kubernetes kills a container 30 s after its SIGTERM, so some seconds remain for exit handlers."""
_SILENT_LEASES, _MIN_SILENCE = 3, 60.0
_SHOWN = 5
"""The number of task names in an error text."""


def _address(text: str) -> Address:
    try:
        return Address.of(text)
    except ValueError as exc:
        raise click.BadParameter(f"{exc}.") from None


class _Worker(click.Command):
    """A command that keeps its arguments, because the children are started with the same ones."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[__name__] = tuple(args)
        return super().parse_args(ctx, args)


@click.command(cls=_Worker)
@click.option("--app", metavar="MODULE:NAME", required=True, help="The tasks: a Tasks(), or any mapping of functions.")
@click.option(
    "--queue", "queues", type=queue_name, metavar="NAME", multiple=True, required=True, help="A queue; may be repeated."
)
@click.option(
    "--concurrency", type=click.IntRange(1), metavar="N", default=1, show_default=True, help="Tasks run at once."
)
@click.option(
    "--lease",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long the messages of a dead worker wait for another worker. A living worker renews its leases.",
)
@click.option(
    "--max-attempts",
    type=click.IntRange(1),
    metavar="N",
    default=5,
    show_default=True,
    help="Deliveries after which a message that keeps failing becomes a dead letter.",
)
@click.option(
    "--prefetch",
    type=click.IntRange(1),
    metavar="N",
    help="Messages in flight at once, running tasks included. Default: adaptive.",
)
@click.option(
    "--processes",
    type=click.IntRange(1, 1000),
    metavar="P",
    help="Run P supervised child processes, each with its own --concurrency. Default: this process alone.",
)
@click.option(
    "--grace",
    type=click.FloatRange(0, 1e6),
    metavar="SECONDS",
    help=f"How long the children have to finish after the first signal; then they are killed. Default: {_GRACE:g}.",
)
@click.option("--max-tasks", type=click.IntRange(1), metavar="N", help="Replace a child after N tasks. Default: never.")
@click.option(
    "--max-memory",
    type=click.IntRange(1),
    metavar="MB",
    help="Replace a child whose peak memory is above MB megabytes after a task. Default: never.",
)
@click.option(
    "--task-deadline",
    type=click.FloatRange(0, 1e8, min_open=True),
    metavar="SECONDS",
    help="Fail a task that runs longer, report the failure to its sender, and replace the child. Default: never.",
)
@click.option(
    "--never-rerun", is_flag=True, help="Start each task at most once. If its worker is lost, the sender gets an error."
)
@click.option(
    "--status-payload",
    type=click.Choice(["none", "result"]),
    metavar="WHAT",
    help="Content of the status of a success: none or result. Default: none if on_success carries the result.",
)
@click.option(
    "--returned-failure",
    type=click.Choice(["completed", "failed"]),
    metavar="STATUS",
    default="completed",
    show_default=True,
    help='The status of a task that returned "success": false: completed or failed. on_success is sent either way.',
)
@click.option(
    "--allow-continuation",
    "allow_continuations",
    metavar="QUEUE[:TASK]",
    multiple=True,
    help="An allowed callback; may be repeated. Messages with other callbacks are rejected. Default: all are allowed.",
)
@click.option("--strict", is_flag=True, help="Do not start if a queue holds tasks, and --app has none of them.")
@click.option(
    "--observer",
    "observers",
    metavar="MODULE:FACTORY",
    multiple=True,
    help="A class or factory that makes an Observer of runs and settlements; may be repeated.",
)
@click.option(
    "--log-errors",
    is_flag=True,
    help="Also log the messages of exceptions that tasks raise. They may quote payload content.",
)
@click.option(
    "--http",
    type=_address,
    metavar="[HOST:]PORT",
    help="Serve /healthz and /metrics. Default host: 127.0.0.1; use 0.0.0.0:PORT for the probes of a cluster.",
)
@click.option(
    "--log-level",
    type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], case_sensitive=False),
    metavar="LEVEL",
    default="INFO",
    show_default=True,
    help="The lowest level that is logged to standard error: DEBUG, INFO, WARNING, ERROR or CRITICAL.",
)
@common()
@click.pass_context
def worker(
    context: click.Context,
    app: str,
    queues: tuple[str, ...],
    concurrency: int,
    lease: float,
    max_attempts: int,
    prefetch: int | None,
    processes: int | None,
    grace: float | None,
    max_tasks: int | None,
    max_memory: int | None,
    task_deadline: float | None,
    never_rerun: bool,
    status_payload: StatusPayload | None,
    returned_failure: ReplyStatus,
    allow_continuations: tuple[str, ...],
    strict: bool,
    observers: tuple[str, ...],
    log_errors: bool,
    http: Address | None,
    log_level: str,
) -> None:
    """Run the tasks of some queues until SIGTERM or SIGINT.

    --app myproject.tasks:tasks is `tasks` in myproject/tasks.py; the current directory comes first on the import path.
    On the first signal the worker claims no more messages, finishes and settles its running tasks, and exits with 0.
    On a second signal it exits at once with 128 + the signal's number. Its messages run again when their leases expire.

    With --processes this process only starts, restarts and stops child processes. It exits with 0, with 137 if some
    did not finish in time and were killed, or with 1 if some died meanwhile. --grace, --max-tasks, --max-memory and
    --task-deadline imply --processes 1.
    """
    cli: CliContext = context.obj
    silence_limit = max(_MIN_SILENCE, _SILENT_LEASES * lease)
    parent = Parent.of_this_process()
    cli.silent = parent is not None and parent.role.silent
    supervised = any(option is not None for option in (processes, grace, max_tasks, max_memory, task_deadline))
    grace = _GRACE if grace is None else grace
    log = functools.partial(log_to_stderr, log_level, cli.mask)
    with log(), sigterm_raises() as received, contextlib.ExitStack() as stack:
        if parent is None and supervised:
            code = supervise(cli, context.meta[__name__], queues, processes or 1, grace, silence_limit, http)
            cli.at_once = True
            raise click.exceptions.Exit(code)
        if parent is not None:
            parent.watch(grace)
            stack.enter_context(exiting_in_time(parent.is_replaced, grace, log))
        tasks = load_tasks(app)
        transport = stack.enter_context(cli.transport())
        if strict and (parent is None or parent.first):
            _check_waiting_tasks(transport, queues, tasks)
        all_observers = [load_observer(spec) for spec in observers]
        heartbeat = None
        if parent is not None:
            heartbeat = Heartbeat(
                parent, RecycleLimits(max_tasks, None if max_memory is None else max_memory * MEGABYTE)
            )
            all_observers.append(heartbeat)
        if http is not None:
            own_metrics = ConsumerMetrics.of(tasks, transport, queues, shared=parent is not None)
            all_observers += own_metrics.observers
            if parent is None:
                consumer_health = ConsumerHealth(silence_limit)
                all_observers.append(consumer_health)
                stack.enter_context(serving(http, consumer_health.health, own_metrics.exposition))
        consumer = Consumer(
            transport,
            tasks,
            queues,
            concurrency=concurrency,
            lease=lease,
            max_attempts=max_attempts,
            prefetch=prefetch,
            task_deadline=task_deadline,
            never_rerun=never_rerun,
            observers=all_observers,
            log_errors=log_errors,
            status_payload=status_payload,
            returned_failure=returned_failure,
            allow_continuations=allow_continuations or None,
        )
        if heartbeat is not None:
            heartbeat.attach(consumer)
        run(consumer, cli, parent, received)
    cli.at_once = True


def _check_waiting_tasks(transport: Transport, queues: Sequence[str], tasks: Mapping[str, object]) -> None:
    """Raise ConfigurationError if a queue has tasks and none is registered: --queue or --app is probably wrong."""
    if not (transport.capabilities.inspection and hasattr(transport, "waiting_tasks")):
        raise NotSupported(
            "--strict needs a transport that lists waiting tasks, and this one does not: start without --strict"
        )
    for queue in dict.fromkeys(queues):
        waiting = cast(Inspection, transport).waiting_tasks(queue)
        if waiting and not waiting.keys() & tasks.keys():
            raise ConfigurationError(
                f"--strict: none of the tasks that wait in queue {queue!r} ({_few(waiting)}) is one of this worker's"
                f" ({_few(tasks)}): check --queue and --app"
            )


def _few(names: Mapping[str, object]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(sorted(names)[:_SHOWN]) + more
