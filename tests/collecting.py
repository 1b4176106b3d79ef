"""A pytest plugin that writes the collected tests to the file that COLLECTED names, as JSON, and runs none."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path

import pytest

from tools.check_lock import ROOT


def pytest_collection_finish(session: pytest.Session) -> None:
    found = []
    for item in session.items:
        assert isinstance(item, pytest.Function)
        marker = item.get_closest_marker("slow")
        found.append(
            {
                "name": item.function.__name__,
                "file": str(Path(inspect.getfile(item.function)).relative_to(ROOT)),
                "collected_in": item.nodeid.partition("::")[0],
                "slow": None if marker is None else marker.kwargs,
            }
        )
    Path(os.environ["COLLECTED"]).write_text(json.dumps(found), encoding="utf-8")
