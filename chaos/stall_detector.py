"""A thread beside the work that notes when the machine has not let its process run, and leaves with its parent."""

from __future__ import annotations

import os
import threading
import time

from chaos.journal import Journal

BEAT = 0.1


def start(journal: Journal, longest: float) -> None:
    """Write `late`, with the seconds, whenever the process has stood still for longer than `longest` seconds."""
    threading.Thread(target=_beat, args=(journal, longest, os.getppid()), name="pulse", daemon=True).start()


def _beat(journal: Journal, longest: float, parent: int) -> None:
    before = time.monotonic()
    while os.getppid() == parent:
        time.sleep(BEAT)
        now = time.monotonic()
        if now - before > longest:
            journal.write("stalled", detail=f"{now - before:.3f}")
        before = now
    os._exit(1)  # nobody would ever stop it
