"""The metrics of a worker for /metrics (extra [metrics]).

A worker without a supervisor counts in memory. With a supervisor, each child counts into files in a directory that the
supervisor has created. The supervisor reads all files, and adds the state of the queues. prometheus_client reads its
environment when it is imported, so this module imports it late.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, cast

import attrs

from unstract_core.cli.context import CliContext
from unstract_core.errors import ConfigurationError, ContractError
from unstract_core.observability.log_events import emit
from unstract_core.observability.observer import Observer
from unstract_core.transport import Transport

logger = logging.getLogger("unstract_wire.supervisor")

_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
_REMEDY = "set TMPDIR to a writable directory with free space"

Exposition = Callable[[], tuple[bytes, str]]


@attrs.frozen
class ConsumerMetrics:
    """The metrics of the consumer in this process.

    Attributes:
        observers: The observers that count; empty without the extra.
        exposition: Returns the body of /metrics. Raises ConfigurationError without the extra.
    """

    observers: Sequence[Observer]
    exposition: Exposition

    @classmethod
    def of(
        cls, tasks: Mapping[str, object], transport: Transport, queues: Sequence[str], *, shared: bool
    ) -> ConsumerMetrics:
        """Return the metrics of a consumer.

        Args:
            tasks: The registered tasks, whose names may be labels.
            transport: The transport, which reports the state of the queues.
            queues: The queues of the consumer.
            shared: Whether the supervisor reads the metrics, and adds the state of the queues itself.
        """
        try:
            from unstract_core.observability import metrics
        except ConfigurationError as exc:
            return cls([], lambda missing=exc: _raise(missing))  # type: ignore[misc]  # no type for such a lambda
        registry = cast(Any, metrics).CollectorRegistry()  # the application may use the default registry
        if not shared and transport.capabilities.inspection:
            registry.register(metrics.QueueCollector(transport, queues))
        try:
            observers = [metrics.Metrics(registry, frozenset(tasks))]
        except OSError as exc:
            _warn(exc)
            observers = []
        return cls(observers, lambda: metrics.exposition(registry))


class ChildrenMetrics:
    """The metrics of all children and the state of their queues. A context manager that removes its directory."""

    def __init__(self, cli: CliContext, queues: Sequence[str]) -> None:
        self._cli = cli
        self._queues = list(dict.fromkeys(queues))
        self._stack = contextlib.ExitStack()
        self._opening = threading.Lock()
        self._exposition: Exposition | None = None
        self._directory = ""

    def __enter__(self) -> Self:
        try:
            self._directory = self._stack.enter_context(
                tempfile.TemporaryDirectory(prefix="unstract-wire-metrics-", ignore_cleanup_errors=True)
            )
        except OSError as exc:
            _warn(exc)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def environment(self) -> Mapping[str, str]:
        """The environment variables that make the children count into this directory."""
        return {_DIRECTORY: self._directory} if self._directory else {}

    def forget(self, pid: int) -> None:
        """Remove the gauges of a child that has exited, and keep its counters."""
        if not self._directory:
            return
        with contextlib.suppress(ConfigurationError):  # without the extra there are no metrics
            from unstract_core.observability import metrics

            metrics.forget_process(pid, self._directory)

    def exposition(self) -> tuple[bytes, str]:
        """Return the body of /metrics and its content type.

        Raises:
            ConfigurationError: The extra is missing, there is no directory, or the transport cannot be loaded.
        """
        if not self._directory:
            raise ConfigurationError(f"the metrics of several processes cannot be collected: {_REMEDY}")
        with self._opening:
            self._exposition = self._exposition or self._opened()
        return self._exposition()

    def _opened(self) -> Exposition:
        from unstract_core.observability import metrics

        registry = metrics.multiprocess_registry(self._directory)
        try:
            transport = self._stack.enter_context(self._cli.transport())
        except ContractError as exc:
            raise ConfigurationError(self._cli.mask(str(exc))) from None
        if transport.capabilities.inspection:
            registry.register(metrics.QueueCollector(transport, self._queues))
        return lambda: metrics.exposition(registry)


def _warn(exc: OSError) -> None:
    emit(logger, logging.WARNING, "metrics_not_gathered", error_type=type(exc).__name__, remedy=_REMEDY)


def _raise(problem: Exception) -> tuple[bytes, str]:
    raise problem
