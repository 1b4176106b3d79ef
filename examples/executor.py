"""The executor worker's task: python -m unstract_core worker --app examples.executor:tasks --queue ..."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from examples.extraction import extract
from examples.progress import report
from unstract_core import Tasks

MODEL_SECONDS = 0.3
"""How long a small document keeps us waiting; a model would take far longer."""

tasks = Tasks()


@tasks.register("execute_extraction")
def execute_extraction(context: dict[str, Any]) -> dict[str, Any]:
    """Return an execution result with the fields of a document; an error reaches `on_error`.

    The fields are an attrs object with Decimals and dates. Normalisation converts them, so that the callback gets plain
    JSON with every amount as exact text.
    """
    params = context["executor_params"]
    report("running", context["run_id"], "execute_extraction")
    started = time.monotonic()
    text = Path(params["file_path"]).read_text(encoding="utf-8")
    time.sleep(MODEL_SECONDS)
    fields = extract(text)
    metadata = {"file_name": params["file_name"], "seconds": round(time.monotonic() - started, 3)}
    return {"success": True, "data": {"fields": fields}, "metadata": metadata, "error": None}
