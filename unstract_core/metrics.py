"""The documented import path of the metrics; the code is in `unstract_core.observability.metrics`."""

from unstract_core.observability.metrics import (
    Metrics,
    QueueCollector,
    exposition,
    forget_process,
    multiprocess_registry,
)

__all__ = ["Metrics", "QueueCollector", "exposition", "forget_process", "multiprocess_registry"]
