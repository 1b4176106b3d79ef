"""Check that the committed schema of the wire equals the generated one; `--write` updates it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from unstract_core import schema

PATH = Path(schema.__file__).parent / schema.FILE


def written() -> str:
    """Return the text of the generated schema."""
    return json.dumps(schema.task_payload_schema(), indent=2) + "\n"


def main(arguments: list[str], path: Path = PATH) -> int:
    if arguments not in ([], ["--write"]):
        print("usage: check_schema.py [--write]", file=sys.stderr)
        return 2
    expected = written()
    if arguments:
        path.write_text(expected, encoding="utf-8")
    in_step = path.is_file() and path.read_text(encoding="utf-8") == expected
    remedy = (
        "differs from the generated schema; run `make schema`, and see docs/wire.md for the changes that are allowed"
    )
    print(f"{path.name}: {'in step with the types' if in_step else remedy}")
    return 0 if in_step else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
