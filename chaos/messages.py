"""What the processes agree on: queues, tasks, the members of a dispatch, and the options that they are started with."""

from __future__ import annotations

import argparse
from pathlib import Path

from unstract_core import Delivery

EXECUTOR_QUEUE, CALLBACK_QUEUE = "chaos_executor", "chaos_callbacks"
TASK, ON_SUCCESS, ON_ERROR = "work", "on_success", "on_error"

LEASE = 2.5
"""Seconds: short, so that the work of the dead comes back soon, and longer than a busy machine stands still."""

MAX_ATTEMPTS = 50
"""Deliveries: nothing here is given up because it was hit often."""


def dispatch_of(delivery: Delivery) -> str:
    """Return the id of the dispatch that a message, or a callback, belongs to."""
    payload = delivery.payload
    return str(payload.kwargs.get("dispatch", "")) if payload is not None else ""


def options(description: str) -> argparse.ArgumentParser:
    """A parser of the options that every process has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--name", required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--directory", type=Path, required=True)
    return parser
