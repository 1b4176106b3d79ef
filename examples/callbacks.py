"""The callback worker's tasks: python -m unstract_core worker --app examples.callbacks:tasks --queue ide_callback

A callback can come twice, if its worker dies between its work and the acknowledgement. These two may: a second save
writes the same file again.
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
    """Save what the executor returned. A returned `success: false` comes here too, as it does through Celery's link."""
    about = callback_kwargs or {}
    status = "completed" if result_dict["success"] else "failed"
    fields = result_dict["data"].get("fields")
    save("ide_prompt_complete", about, status=status, fields=fields, error=result_dict["error"])


@tasks.register("ide_prompt_error")
def ide_prompt_error(failed_task_id: str, callback_kwargs: dict[str, Any] | None = None) -> None:
    """Save why the executor failed: the dispatch puts the real text where the product's callbacks look for it."""
    about = callback_kwargs or {}
    text = about.get("error")
    error = f"task {failed_task_id} failed" if text is None else text
    save("ide_prompt_error", about, status="failed", fields=None, error=error)


def save(task: str, about: dict[str, Any], *, status: str, fields: dict[str, Any] | None, error: str | None) -> None:
    """Write the output, and only then report it: who sees `done` finds the file."""
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
