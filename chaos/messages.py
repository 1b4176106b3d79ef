"""Shared by all processes: the queues, the tasks, the fields of a dispatch, and the command-line options."""

from __future__ import annotations

import argparse
from pathlib import Path

from unstract_core import Delivery

EXECUTOR_QUEUE, CALLBACK_QUEUE = "chaos_executor", "chaos_callbacks"
TASK, ON_SUCCESS, ON_ERROR = "work", "on_success", "on_error"

LEASE = 2.5
"""Seconds. Short, so that messages of killed workers are redelivered soon; longer than stalls of a busy machine."""

MAX_ATTEMPTS = 50
"""Deliveries. High, so that no message is dead-lettered because faults hit it often."""


def dispatch_of(delivery: Delivery) -> str:
    """Return the id of the dispatch that a message, or a callback, belongs to."""
    payload = delivery.payload
    return str(payload.kwargs.get("dispatch", "")) if payload is not None else ""


def options(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every process has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--name", required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--directory", type=Path, required=True)
    return parser
