"""The limits at which a child is replaced: a number of tasks, and a peak of memory."""

from __future__ import annotations

import contextlib
import resource
import sys

import attrs

from unstract_core.errors import ConfigurationError

MEGABYTE = 2**20


@attrs.frozen
class RecycleLimits:
    """When a child is replaced.

    Args:
        max_tasks: The number of tasks; None for no limit.
        max_memory: The peak of memory in bytes; None for no limit.
    """

    max_tasks: int | None = None
    max_memory: int | None = None

    def for_share(self, share: float) -> RecycleLimits:
        """Return these limits with fewer tasks: all of them at a share of 0, half of them at a share of 1."""
        if self.max_tasks is None:
            return self
        return attrs.evolve(self, max_tasks=self.max_tasks - int(self.max_tasks * share / 2))

    def check(self) -> None:
        """Raise ConfigurationError if this process is above the memory limit already: each task would replace it."""
        if self.max_memory is not None and (peak := peak_memory()) > self.max_memory:
            used, limit = peak / MEGABYTE, self.max_memory / MEGABYTE
            raise ConfigurationError(
                f"--max-memory {limit:g}: the worker has taken {used:.0f} MB before its first task; give it more"
            )


def peak_memory() -> int:
    """Return the peak memory of this program in bytes."""
    if sys.platform == "linux":  # where ru_maxrss includes the program that started this one
        with contextlib.suppress(OSError), open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
