"""The examples match the product's code: the same context, the same signatures, the same message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import celery

from examples import product
from transports.memory import MemoryTransport
from unstract_core import Dispatcher, ExecutorDispatcher, signature_to_continuation, to_wire

PATH = Path("documents/invoice.txt")
CONTEXT_KEYS = [
    *("executor_name", "operation", "run_id", "execution_source", "organization_id", "executor_params"),
    *("request_id", "log_events_id", "execution_id", "file_execution_id"),
]
CALLBACK_KEYS = {
    *("log_events_id", "request_id", "org_id", "user_id", "document_id", "tool_id", "run_id", "profile_manager_id"),
    *("executor_task_id", "operation", "prompt_ids", "is_single_pass", "dispatch_time"),
}


def message_sent(transport: MemoryTransport) -> dict[str, Any]:
    """Receive the only message that was dispatched."""
    subscription = transport.subscribe([product.PRODUCT.executor], lease=60)
    (delivery,) = subscription.receive(limit=2, wait=0)
    assert delivery.payload is not None
    return to_wire(delivery.payload)


def test_dispatch_equals_that_of_the_product() -> None:
    """Queue, task, context, and both callbacks with the same kwargs and the dispatch id are the product's."""
    transport = MemoryTransport()
    one = product.dispatch_document(ExecutorDispatcher(Dispatcher(transport)), PATH)
    wire = message_sent(transport)
    (context,) = wire["args"]
    assert (wire["task_name"], wire["queue"]) == ("execute_extraction", "celery_executor_legacy")
    assert list(context) == CONTEXT_KEYS
    assert wire["task_id"] == one.task_id
    assert wire["on_success"]["kwargs"] == wire["on_error"]["kwargs"]
    assert wire["on_success"]["kwargs"]["callback_kwargs"].keys() == CALLBACK_KEYS
    assert wire["on_success"]["kwargs"]["callback_kwargs"]["executor_task_id"] == one.task_id
    assert [wire[end]["task_name"] for end in ("on_success", "on_error")] == ["ide_prompt_complete", "ide_prompt_error"]
    assert {wire[end]["queue"] for end in ("on_success", "on_error")} == {"ide_callback"}


def test_celery_signature_gives_the_same_continuation() -> None:
    """The example's stand-in and `celery.signature` become the same continuation."""
    asked: dict[str, Any] = {"kwargs": {"callback_kwargs": {"run_id": "1"}}, "queue": "ide_callback"}
    ours = signature_to_continuation(product.signature("ide_prompt_complete", **asked))
    theirs = signature_to_continuation(celery.signature("ide_prompt_complete", **asked))
    assert ours == theirs


def test_blocking_call_carries_fairness_and_never_raises() -> None:
    """Without a worker the caller gets a failure, and the message has the organisation and the priority."""
    transport = MemoryTransport()
    context = product.context_for(PATH)
    result = product.call_for_document(ExecutorDispatcher(Dispatcher(transport)), context, timeout=0.01)
    assert not result.success
    assert "no reply from task 'execute_extraction'" in str(result.error)
    expected = {"org_id": "org-demo", "workload_type": "api", "pipeline_priority": 8}
    assert message_sent(transport)["fairness"] == expected
