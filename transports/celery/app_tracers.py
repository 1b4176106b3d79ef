"""Running tasks inside the instrumentation that wraps `celery.app.trace.build_tracer`, such as Sentry's.

Celery's worker builds a tracer for each task and calls it for each run. The Consumer runs a task without a tracer,
because the outcome is settled elsewhere. If the builder is wrapped, the Consumer runs the task inside a tracer of the
wrapper, built for a stand-in of the task. If it is not wrapped, this module does nothing.
"""

from __future__ import annotations

import importlib
import socket
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

_building = threading.Lock()


def is_instrumented(trace: Any) -> bool:
    """Whether the builder of tracers in Celery's module `celery.app.trace` is replaced."""
    builder, own = trace.build_tracer, trace.task_has_custom
    return type(builder) is not type(own) or builder.__code__.co_filename != own.__code__.co_filename


def run_instrumented(trace: Any, task: Any, fields: dict[str, Any], run: Callable[[], Any]) -> Any:
    """Call `run` inside a tracer of the instrumentation; return its result, or raise its error.

    Args:
        trace: The module `celery.app.trace`.
        task: The Celery task.
        fields: The fields of the task's request.
        run: Runs the task, with its handlers and signals.
    """
    outcome = _Outcome(run)
    tracer = _tracer(trace, _StandIn(task, outcome.call))
    # Celery may log the representations of arguments and result, so they are replaced.
    request = {**fields, "argsrepr": "...", "kwargsrepr": "..."}
    try:
        tracer(fields["id"], fields["args"], fields["kwargs"], request)
    except BaseException:
        if not outcome.is_there:
            raise
    return outcome.get()


class _Outcome:
    """The result or error of a run, which a tracer does not return."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run = run
        self._result: Any = None
        self._error: BaseException | None = None
        self.is_there = False

    def call(self, *args: Any, **kwargs: Any) -> None:
        """Run the task; the arguments of the tracer are not needed."""
        try:
            self._result = self._run()
        except BaseException as exc:
            self._error = exc
            raise
        finally:
            self.is_there = True

    def get(self) -> Any:
        if not self.is_there:  # the tracer did not call its task
            self.call()
        if self._error is not None:
            raise self._error
        return self._result


class _StandIn:
    """A task for a tracer, without the backend and the retries of the real task."""

    acks_late = track_started = store_eager_result = False
    ignore_result = True

    def __init__(self, task: Any, run: Callable[..., None]) -> None:
        self._task = task
        self.run = run
        self.backend = SimpleNamespace(mark_as_done=_nothing, process_cleanup=_nothing, persistent=False)
        self.request_stack = importlib.import_module("celery.utils.threads").LocalStack()

    @property
    def request(self) -> Any:
        return self.request_stack.top or self._task.request

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)


class _Info:
    """A tracer's record of a run that did not succeed. Its handlers do nothing: the run has called them."""

    def __init__(self, state: str, retval: Any = None) -> None:
        self.state = state
        self.retval = retval

    def handle_error_state(self, *_: Any, **__: Any) -> None: ...

    handle_reject = handle_ignore = handle_retry = handle_failure = handle_error_state


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing: the run or the settlement does it."""


_LOADER = SimpleNamespace(on_task_init=_nothing, on_process_cleanup=_nothing)
_STACK = SimpleNamespace(push=_nothing, pop=_nothing)
_APP = SimpleNamespace(
    conf=SimpleNamespace(
        task_acks_late=False, worker_deduplicate_successful_tasks=False, task_inherit_parent_priority=False
    )
)
_SILENT = SimpleNamespace(receivers=())
_SIGNALS = SimpleNamespace(task_prerun=_SILENT, task_postrun=_SILENT, task_success=_SILENT)


class _ReplacedInThread:
    """A proxy of a module or object: the calling thread reads attributes of `silent`, other threads the real ones."""

    def __init__(self, real: Any, silent: Any) -> None:
        self._real = real
        self._silent = silent
        self._thread = threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        here = self._thread == threading.get_ident()
        return getattr(self._silent if here and hasattr(self._silent, name) else self._real, name)


def _tracer(trace: Any, task: Any) -> Callable[..., Any]:
    """Build a tracer that sends no signals and does not change the current task.

    A tracer reads the receivers of signals and the stack of tasks when it is built. Tracers that other threads build
    meanwhile, as in `apply`, are not affected.
    """
    with _building:
        signals, stack = trace.signals, trace._task_stack
        trace.signals, trace._task_stack = _ReplacedInThread(signals, _SIGNALS), _ReplacedInThread(stack, _STACK)
        try:
            tracer: Callable[..., Any] = trace.build_tracer(
                task.name, task, _LOADER, socket.gethostname(), Info=_Info, app=_APP
            )
        finally:
            trace.signals, trace._task_stack = signals, stack
    return tracer
