"""Chaos testing: processes dispatch with callbacks while faults are injected; a ledger then accounts for each dispatch.

`python -m chaos` runs it (see __main__.py). docs/chaos.md describes the faults, the counts and the allowed anomalies.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if (_tests := str(ROOT / "tests")) not in sys.path:  # the helpers for private servers, brokers and proxies are there
    sys.path.insert(0, _tests)
