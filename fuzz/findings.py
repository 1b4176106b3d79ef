"""Findings: each is written to a file before the fuzzer ends with its traceback."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

KEPT = Path(os.environ.get("FUZZ_FINDINGS", ".fuzz/findings"))


def keep(target: str, text: str) -> None:
    """Write one finding; equal texts are one file."""
    KEPT.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    (KEPT / f"{target}-{name}.json").write_text(text, encoding="utf-8", errors="surrogatepass")
