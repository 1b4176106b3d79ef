"""Traces across processes: a dispatch, its executor and its callback worker make one trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from postgres.support import on_one_server

from transports.postgres import PostgresTransport

pytestmark = on_one_server


def run(*arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "postgres.tracing_process", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=True,
        timeout=120,
    )


def test_dispatch_and_callback_are_one_trace(
    postgres: PostgresTransport, postgres_url: str, schema: str, queue: str, tmp_path: Path
) -> None:
    """Producer, executor and callback worker, each with its own exporter, make one tree of spans."""
    callbacks = f"{queue}-cb"
    for process in ([queue, callbacks], [queue], [callbacks]):
        run(postgres_url, schema, str(tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"), *process)
    written = [
        [json.loads(line) for line in path.read_text().splitlines()] for path in sorted(tmp_path.glob("*.jsonl"))
    ]
    assert [[span["name"] for span in spans] for spans in written] == [
        [f"send {queue}", "request"],
        ["run extract", f"settle {queue}"],
        ["run saved", f"settle {callbacks}"],
    ]
    spans: list[dict[str, Any]] = [span for process in written for span in process]
    names = {span["id"]: span["name"] for span in spans}
    assert {span["name"]: names.get(span["parent"], span["parent"]) for span in spans} == {
        "request": None,
        f"send {queue}": "request",
        "run extract": f"send {queue}",
        f"settle {queue}": "run extract",
        "run saved": "run extract",
        f"settle {callbacks}": "run saved",
    }
    assert len({span["trace"] for span in spans}) == 1
    assert {span["conversation"] for span in spans if span["name"] in (f"send {queue}", "run extract")} == {"d-1"}
