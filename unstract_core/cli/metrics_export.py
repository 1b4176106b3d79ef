"""What a worker tells of its work on /metrics, where the extra [metrics] is installed; without it, what to install.

A worker alone counts in its own memory. Of a supervised one each child counts into files of a directory that its parent
has made, and the parent reads them all together, beside the state of the queues, which it asks itself. The library
reads its environment when it is imported, and so it is imported late.
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
_REMEDY = "give it a directory with room, and that can be written to, by TMPDIR"

Exposition = Callable[[], tuple[bytes, str]]


@attrs.frozen
class ConsumerMetrics:
    """The metrics of one consumer, in this process."""

    observers: Sequence[Observer]
    exposition: Exposition
    """Raises ConfigurationError without the extra."""

    @classmethod
    def of(
        cls, tasks: Mapping[str, object], transport: Transport, queues: Sequence[str], *, shared: bool
    ) -> ConsumerMetrics:
        """Count in a registry that is read here or, if `shared`, in files that the parent reads."""
        try:
            from unstract_core.observability import metrics
        except ConfigurationError as exc:
            return cls([], lambda missing=exc: _raise(missing))  # type: ignore[misc]  # no type for such a lambda
        registry = cast(Any, metrics).CollectorRegistry()  # one of its own: the app may count in the default one
        if not shared and transport.capabilities.inspection:
            registry.register(metrics.QueueCollector(transport, queues))
        try:
            observers = [metrics.Metrics(registry, frozenset(tasks))]
        except OSError as exc:
            _tell(exc)
            observers = []
        return cls(observers, lambda: metrics.exposition(registry))


class ChildrenMetrics:
    """The metrics of all children, and the state of their queues. A context manager: its directory is gone after it."""

    def __init__(self, cli: CliContext, queues: Sequence[str]) -> None:
        self._session = cli
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
            _tell(exc)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def environment(self) -> Mapping[str, str]:
        """What children are told, so that they count where this reads."""
        return {_DIRECTORY: self._directory} if self._directory else {}

    def forget(self, pid: int) -> None:
        """Leave out what a child that has ended said of its present; what it has counted stays."""
        if not self._directory:
            return
        with contextlib.suppress(ConfigurationError):  # without the extra there is nothing to forget
            from unstract_core.observability import metrics

            metrics.forget_process(pid, self._directory)

    def exposition(self) -> tuple[bytes, str]:
        """Raises ConfigurationError without the extra or a directory, and where the transport cannot be loaded."""
        if not self._directory:
            raise ConfigurationError(f"the metrics of several processes cannot be gathered: {_REMEDY}")
        with self._opening:
            self._exposition = self._exposition or self._opened()
        return self._exposition()

    def _opened(self) -> Exposition:
        from unstract_core.observability import metrics

        registry = metrics.multiprocess_registry(self._directory)
        try:
            transport = self._stack.enter_context(self._session.transport())
        except ContractError as exc:
            raise ConfigurationError(self._session.mask(str(exc))) from None
        if transport.capabilities.inspection:
            registry.register(metrics.QueueCollector(transport, self._queues))
        return lambda: metrics.exposition(registry)


def _tell(exc: OSError) -> None:
    emit(logger, logging.WARNING, "metrics_not_gathered", error_type=type(exc).__name__, remedy=_REMEDY)


def _raise(problem: Exception) -> tuple[bytes, str]:
    raise problem
