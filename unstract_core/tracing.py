"""The documented import path of the tracing observer; the code is in `unstract_core.observability.tracing`."""

from unstract_core.observability.tracing import Tracing

__all__ = ["Tracing"]
