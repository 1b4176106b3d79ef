"""The callback worker's tasks: python -m unstract_core worker --app examples.callbacks:tasks --queue ide_callback

A callback runs twice if its worker dies between its work and the acknowledgement. These tasks are idempotent: a second
run writes the same file again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from examples.outputs import save_output
from examples.progress import Stage, report
from unstract_core import Tasks

OUTPUT_VARIABLE = "UNSTRACT_DEMO_OUTPUT"

tasks = Tasks()


@tasks.register("ide_prompt_complete")
def ide_prompt_complete(result_dict: dict[str, Any], callback_kwargs: dict[str, Any] | None = None) -> None:
    """Save the executor's result; a returned `success: false` is a result too, as with Celery's link."""
    about = callback_kwargs or {}
    status = "completed" if result_dict["success"] else "failed"
    fields = result_dict["data"].get("fields")
    save("ide_prompt_complete", about, status=status, fields=fields, error=result_dict["error"])


@tasks.register("ide_prompt_error")
def ide_prompt_error(failed_task_id: str, callback_kwargs: dict[str, Any] | None = None) -> None:
    """Save the error of the executor from the argument in which the product's callbacks expect it."""
    about = callback_kwargs or {}
    text = about.get("error")
    error = f"task {failed_task_id} failed" if text is None else text
    save("ide_prompt_error", about, status="failed", fields=None, error=error)


def save(task: str, about: dict[str, Any], *, status: str, fields: dict[str, Any] | None, error: str | None) -> None:
    """Write the output before it is reported, so that a reader of `done` finds the file."""
    output = {
        "document_id": about["document_id"],
        "task_id": about["executor_task_id"],
        "run_id": about["run_id"],
        "operation": about["operation"],
        "status": status,
        "fields": fields,
        "error": error,
    }
    path = save_output(Path(os.environ[OUTPUT_VARIABLE]), output)
    stage: Stage = "done" if status == "completed" else "failed"
    report(stage, about["run_id"], task, fields=fields, error=error, saved=str(path))
