"""The Celery side of flip_the_flag.py: an app like a product's, with its executor's task.

    celery --app examples.flip_app worker --queues ...

The callback tasks are not registered here, because a Celery worker runs an errback that it knows in its own process.
The task is not shared with the other apps of the process, as Celery's tasks are by default.
"""

from __future__ import annotations

from typing import Any

from celery import Celery

from examples.broker import broker_url

app = Celery("flip", broker=broker_url(), backend="rpc://")
app.conf.update(worker_hijack_root_logger=False, broker_connection_retry_on_startup=True)


@app.task(name="execute_extraction", shared=False)  # type: ignore[untyped-decorator]  # Celery has no types
def execute_extraction(context: dict[str, Any]) -> dict[str, Any]:
    """Return an execution result, or raise, as the context asks."""
    params = context["executor_params"]
    if params["broken"]:
        raise ValueError(f"document {params['document_id']} does not add up")
    return {"success": True, "data": {"document_id": params["document_id"]}, "metadata": {}, "error": None}
