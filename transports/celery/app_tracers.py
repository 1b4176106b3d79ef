"""Instrumentation that wraps `celery.app.trace.build_tracer`, as Sentry's does, sees the tasks that our Consumer runs.

Celery's worker builds a tracer for each task and calls it for each run. Our Consumer runs a task without one, because
the outcome goes elsewhere. Where the builder is wrapped, a run happens inside a tracer that the wrapper has built, for
a stand-in of the task whose run calls us. Where it is not wrapped, nothing of this happens.
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
    """Return whether the builder of tracers in Celery's module `celery.app.trace` is another than Celery's own."""
    builder, own = trace.build_tracer, trace.task_has_custom
    return type(builder) is not type(own) or builder.__code__.co_filename != own.__code__.co_filename


def run_instrumented(trace: Any, task: Any, fields: dict[str, Any], run: Callable[[], Any]) -> Any:
    """Return what `run` returns, or raise what it raises, called inside a tracer of the instrumentation's.

    Args:
        trace: the module `celery.app.trace`.
        task: the Celery task that is run.
        fields: what the task's request is made of.
        run: runs the task, with its handlers and signals.
    """
    outcome = _Outcome(run)
    tracer = _tracer(trace, _StandIn(task, outcome.called))
    # Celery may log the representations of arguments, and the tracer's result: they get none.
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

    def called(self, *args: Any, **kwargs: Any) -> None:
        """Run the task, whose arguments are known here."""
        try:
            self._result = self._run()
        except BaseException as exc:
            self._error = exc
            raise
        finally:
            self.is_there = True

    def get(self) -> Any:
        if not self.is_there:  # a tracer that did not call its task
            self.called()
        if self._error is not None:
            raise self._error
        return self._result


class _StandIn:
    """A task for a tracer: running it is ours, and so is everything that its end would do elsewhere."""

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
    """A tracer's record of a run that did not succeed. Its handlers do nothing: they have been called already."""

    def __init__(self, state: str, retval: Any = None) -> None:
        self.state = state
        self.retval = retval

    def handle_error_state(self, *_: Any, **__: Any) -> None: ...

    handle_reject = handle_ignore = handle_retry = handle_failure = handle_error_state


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing: it has been done, or is done elsewhere."""


_LOADER = SimpleNamespace(on_task_init=_nothing, on_process_cleanup=_nothing)
_STACK = SimpleNamespace(push=_nothing, pop=_nothing)
_APP = SimpleNamespace(
    conf=SimpleNamespace(
        task_acks_late=False, worker_deduplicate_successful_tasks=False, task_inherit_parent_priority=False
    )
)
_SILENT = SimpleNamespace(receivers=())
_SIGNALS = SimpleNamespace(task_prerun=_SILENT, task_postrun=_SILENT, task_success=_SILENT)


class _SilentHere:
    """Stands for a module or an object: the calling thread finds `silent` instead, other threads find what is there."""

    def __init__(self, real: Any, silent: Any) -> None:
        self._real = real
        self._silent = silent
        self._thread = threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        here = self._thread == threading.get_ident()
        return getattr(self._silent if here and hasattr(self._silent, name) else self._real, name)


def _tracer(trace: Any, task: Any) -> Callable[..., Any]:
    """Let the builder build a tracer that sends no signals and makes no task the current one.

    It looks for the receivers of signals, and for the stack of tasks, when it is built. Tracers that other threads
    build meanwhile, as `apply` does, are as usual.
    """
    with _building:
        signals, stack = trace.signals, trace._task_stack
        trace.signals, trace._task_stack = _SilentHere(signals, _SIGNALS), _SilentHere(stack, _STACK)
        try:
            tracer: Callable[..., Any] = trace.build_tracer(
                task.name, task, _LOADER, socket.gethostname(), Info=_Info, app=_APP
            )
        finally:
            trace.signals, trace._task_stack = signals, stack
    return tracer
