"""A thread that records when the machine suspended its process, and that ends the process with its parent."""

from __future__ import annotations

import os
import threading
import time

from chaos.journal import Journal

BEAT = 0.1


def start(journal: Journal, longest: float) -> None:
    """Write `stalled`, with the seconds, each time the process did not run for more than `longest` seconds."""
    threading.Thread(target=_beat, args=(journal, longest, os.getppid()), name="pulse", daemon=True).start()


def _beat(journal: Journal, longest: float, parent: int) -> None:
    before = time.monotonic()
    while os.getppid() == parent:
        time.sleep(BEAT)
        now = time.monotonic()
        if now - before > longest:
            journal.write("stalled", detail=f"{now - before:.3f}")
        before = now
    os._exit(1)  # the controller, which would stop this process, is gone
