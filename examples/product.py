"""The product's side: the context of an execution, a callback signature, and the view that dispatches.

`Signature` has the attributes of Celery's; with Celery installed, `celery.signature(...)` can replace it.
"""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

import attrs

from unstract_core import ExecutionResult, ExecutorDispatcher

ORGANISATION = "org-demo"


@attrs.frozen
class Queues:
    """The executor's queue, which has its name, and the queue of the callbacks."""

    executor_name: str = "legacy"
    callbacks: str = "ide_callback"

    @property
    def executor(self) -> str:
        return f"celery_executor_{self.executor_name}"

    @property
    def names(self) -> list[str]:
        return [self.executor, self.callbacks]

    @classmethod
    def of_run(cls, run: str) -> Queues:
        """Return the queues of one run, on a broker that others use too."""
        return cls(f"{PRODUCT.executor_name}_{run}", f"{PRODUCT.callbacks}_{run}")


PRODUCT = Queues()


@attrs.frozen(kw_only=True)
class DocumentContext:
    """An execution: its executor, its organisation and its document."""

    executor_name: str = PRODUCT.executor_name
    operation: str = "single_pass_extraction"
    run_id: str
    execution_source: str = "ide"
    organization_id: str | None = ORGANISATION
    executor_params: dict[str, Any]
    request_id: str
    log_events_id: str
    execution_id: str | None = None
    file_execution_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return attrs.asdict(self, recurse=False)


@attrs.frozen
class Signature:
    """The part of a Celery signature that a continuation carries."""

    task: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    options: dict[str, Any]


@attrs.frozen
class Dispatched:
    """A dispatched document: its id, the id of the dispatch, and the run id of its progress events."""

    document: str
    task_id: str
    run_id: str


def signature(task: str, *, kwargs: dict[str, Any], queue: str) -> Signature:
    """Replaces `celery.signature` in this example."""
    return Signature(task, args=(), kwargs=kwargs, options={"queue": queue})


def dispatch_document(executor: ExecutorDispatcher, path: Path, queues: Queues = PRODUCT) -> Dispatched:
    """Dispatch with a callback for either outcome, as the view does before it answers 202; raises on failure."""
    context = context_for(path, queues)
    task_id = str(uuid.uuid4())
    cb_kwargs = {
        "log_events_id": context.log_events_id,
        "request_id": context.request_id,
        "org_id": context.organization_id,
        "user_id": "user-demo",
        "document_id": path.stem,
        "tool_id": "tool-demo",
        "run_id": context.run_id,
        "profile_manager_id": "profile-demo",
        "executor_task_id": task_id,
        "operation": context.operation,
        "prompt_ids": ["all-fields"],
        "is_single_pass": True,
        "dispatch_time": time.time(),
    }
    handle = executor.dispatch_with_callback(
        context,
        on_success=signature("ide_prompt_complete", kwargs={"callback_kwargs": cb_kwargs}, queue=queues.callbacks),
        on_error=signature("ide_prompt_error", kwargs={"callback_kwargs": cb_kwargs}, queue=queues.callbacks),
        task_id=task_id,
    )
    return Dispatched(path.stem, handle.id, context.run_id)


def call_for_document(executor: ExecutorDispatcher, context: DocumentContext, timeout: float) -> ExecutionResult:
    """Dispatch and wait up to `timeout` seconds for the result, as an API deployment does; never raises."""
    fairness = {"org_id": context.organization_id, "workload_type": "api", "pipeline_priority": 8}
    return executor.dispatch(context, timeout=timeout, headers={"x-fairness-key": fairness})


def context_for(path: Path, queues: Queues = PRODUCT) -> DocumentContext:
    return DocumentContext(
        executor_name=queues.executor_name,
        run_id=str(uuid.uuid4()),
        executor_params={"document_id": path.stem, "file_name": path.name, "file_path": str(path)},
        request_id=str(uuid.uuid4()),
        log_events_id=str(uuid.uuid4()),
    )
