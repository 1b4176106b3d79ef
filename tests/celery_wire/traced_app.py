"""The app of a Celery worker whose task returns the context of a trace in its request."""

from __future__ import annotations

import importlib
from typing import Any

app: Any = importlib.import_module("worker_app").app  # by the name under which the worker's process finds it

NAMES = ("traceparent", "tracestate", "baggage")


@app.task(name="trace", bind=True)  # type: ignore[untyped-decorator]  # Celery has no types
def trace(self: Any) -> dict[str, Any]:
    return {name: (self.request.headers or {}).get(name) for name in NAMES}
