"""Chaos, counted: processes that dispatch with callbacks while everything around them breaks, and a ledger at the end.

`python -m chaos` runs it (see __main__.py); docs/chaos.md says what is done, what is counted, and what is allowed.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if (_tests := str(ROOT / "tests")) not in sys.path:  # private servers and brokers, and the proxy, lie there
    sys.path.insert(0, _tests)
