"""Consumers that run beside a test."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from contract_tests.kit import wait_until
from unstract_core import Consumer

_LONGEST = 60.0
"""Seconds within which a stopped consumer must end."""


@contextlib.contextmanager
def running(*consumers: Consumer, ends: bool = False) -> Iterator[list[threading.Thread]]:
    """Run consumers on their own threads until the block ends, and raise the first error of one of them.

    The block begins when each consumer has subscribed, because a consumer exits if its transport is unavailable then.

    Args:
        consumers: The consumers to run.
        ends: Whether a consumer may end before the block does.
    """
    problems: list[BaseException] = []

    def run(consumer: Consumer) -> None:
        try:
            consumer.run()
        except BaseException as exc:  # raised below, on the thread of the test
            problems.append(exc)

    def alive() -> bool:
        return all(thread.is_alive() for thread in threads)

    def subscribed() -> bool:
        return all(consumer._running is not None for consumer in consumers)

    threads = [threading.Thread(target=run, args=[consumer], name="consumer", daemon=True) for consumer in consumers]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: subscribed() or not alive(), what="the consumers to subscribe")
        if alive():
            yield threads
        assert ends or problems or alive(), "a consumer has ended before the block"
    except BaseException as exc:
        for problem in problems:
            exc.add_note(f"a consumer of this test has raised: {problem!r}")
        raise
    finally:
        for consumer in consumers:
            consumer.stop()
        for thread in threads:
            thread.join(_LONGEST)
    if problems:
        raise problems[0]
    assert not any(thread.is_alive() for thread in threads), "a stopped consumer has not ended"
