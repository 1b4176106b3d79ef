"""The documented import path of `Metrics` and `QueueCollector` (unstract_core/observability/metrics.py)."""

from unstract_core.observability.metrics import (
    Metrics,
    QueueCollector,
    exposition,
    forget_process,
    multiprocess_registry,
)

__all__ = ["Metrics", "QueueCollector", "exposition", "forget_process", "multiprocess_registry"]
