"""The saved outputs: one complete JSON file for each document."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def save_output(directory: Path, output: dict[str, Any]) -> Path:
    """Write `<document_id>.json` under another name first, so that a reader never sees a partial file."""
    path = directory / f"{output['document_id']}.json"
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(output, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return path


def load_output(directory: Path, document: str) -> dict[str, Any] | None:
    """Return the saved output of a document; None if there is none."""
    try:
        text = (directory / f"{document}.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    output: dict[str, Any] = json.loads(text)
    return output
