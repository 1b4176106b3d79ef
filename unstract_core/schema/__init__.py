"""The JSON Schema (2020-12) of a message, for teams that write or read messages with their own code.

`committed_schema` reads the released file beside this module. `task_payload_schema` generates the schema from the
types; `make check` compares the two. `compare` lists the readers that a change between two schemas breaks.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any, cast

from unstract_core.schema.generator import task_payload_schema

__all__ = ["FILE", "committed_schema", "task_payload_schema"]

FILE = "task_payload.v1.json"


def committed_schema() -> dict[str, Any]:
    """Return the schema of this release."""
    text = resources.files(__name__).joinpath(FILE).read_text(encoding="utf-8")
    return cast("dict[str, Any]", json.loads(text))
