"""The documented import path of `Tracing` (unstract_core/observability/tracing.py)."""

from unstract_core.observability.tracing import Tracing

__all__ = ["Tracing"]
