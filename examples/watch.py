"""Read the events of the workers, show them, and keep them for the tally."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from examples.progress import Event, Follower
from examples.screen import Screen
from examples.workers import Workers

_LOOK_SECONDS = 0.02


class Watch:
    """Shows events.

    Attributes:
        documents: The document of each run to show.
        seen: Every event, in order.
    """

    def __init__(self, events: Path, screen: Screen, workers: Workers) -> None:
        self.documents: dict[str, str] = {}
        self.seen: list[Event] = []
        self._follower = Follower(events)
        self._screen = screen
        self._workers = workers

    def catch_up(self) -> None:
        for event in self._follower.new():
            self.seen.append(event)
            self._show(event)

    def until(self, condition: Callable[[], bool], deadline: float) -> bool:
        """Show events until `condition` is true; return False at the deadline or a worker's end."""
        while not condition():
            if time.monotonic() >= deadline or self._workers.ended():
                return False
            time.sleep(_LOOK_SECONDS)
            self.catch_up()
        self.catch_up()
        return True

    def ended(self, run_id: str) -> list[Event]:
        """Return the callbacks of a run."""
        return [event for event in self.seen if event.run_id == run_id and event.stage != "running"]

    def _show(self, event: Event) -> None:
        document = self.documents.get(event.run_id, event.run_id)
        self._screen.stage(event.stage, document, f"{event.task}, pid {event.pid}")
        if event.stage == "done":
            self._screen.fields(event.details["fields"])
        elif event.stage == "failed":
            self._screen.error(event.details["error"])
