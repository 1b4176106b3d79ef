"""The wire as JSON Schema 2020-12: for teams that write or read messages with code of their own.

`committed_schema` is the file beside this module, as it is packed and released; `task_payload_schema` generates it
anew from the types, and a check holds the two together. `compare` tells what a change between two of them breaks.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any, cast

from unstract_core.schema.generator import task_payload_schema

__all__ = ["FILE", "committed_schema", "task_payload_schema"]

FILE = "task_payload.v1.json"


def committed_schema() -> dict[str, Any]:
    """Read the schema of this release."""
    text = resources.files(__name__).joinpath(FILE).read_text(encoding="utf-8")
    return cast("dict[str, Any]", json.loads(text))
