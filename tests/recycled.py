"""An app that notes each import, and waits until as many children import it as the test requires."""

from __future__ import annotations

import os
from pathlib import Path

from supervised import DIRECTORY, note, noted
from supervised import tasks as tasks

from contract_tests.kit import wait_until

_directory = Path(os.environ[DIRECTORY])
_together = int(os.environ.get("RECYCLED_TOGETHER", "1"))

note(_directory, "importing")
wait_until(lambda: len(noted(_directory, "importing")) >= _together, timeout=60, what="others to import as well")
