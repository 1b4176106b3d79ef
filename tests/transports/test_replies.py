"""What `reply` promises: the first answer wins, is waited for, can be consumed, and ends."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from harness import Harness, answer, timed
from hypothesis import given, settings
from strategies import json_values

from unstract_core import Reply


def test_a_result_arrives_as_it_was_written(harness: Harness) -> None:
    """A completed reply carries its result, equal for every JSON value of the domain; null and {} are results too."""
    with harness.transport() as transport:

        @settings(max_examples=20)
        @given(result=json_values)
        def property_(result: Any) -> None:
            key = harness.queue()
            answer(transport, Reply(key, "completed", result=result))
            found = transport.reply(key)
            assert (found.key, found.status, found.result, found.error) == (key, "completed", result, "")

        property_()


def test_no_reply_is_none_at_once(transport: Any, harness: Harness) -> None:
    """Without a timeout `reply` does not wait."""
    with timed() as elapsed:
        assert transport.reply(harness.queue()) is None
        assert elapsed() < 2


def test_a_timeout_ends_the_wait(transport: Any, harness: Harness) -> None:
    """`reply` returns None when its time is up, and not before."""
    with timed() as elapsed:
        assert transport.reply(harness.queue(), timeout=0.3) is None
        assert 0.25 < elapsed() < 5


def test_the_first_reply_wins(transport: Any, harness: Harness) -> None:
    """A key is answered once: later replies change nothing."""
    key = harness.queue()
    answer(transport, Reply(key, "failed", error="first"), Reply(key, "completed", result="second"))
    found = transport.reply(key)
    assert (found.status, found.error, found.result) == ("failed", "first", None)


def test_a_consumed_reply_keeps_its_status_alone(transport: Any, harness: Harness) -> None:
    """`consume` returns the reply and clears its result and error; the key stays answered, and later writes lose."""
    key, failed = harness.queue(), harness.queue()
    answer(transport, Reply(key, "completed", result={"secret": 1}), Reply(failed, "failed", error="E: x"))
    assert transport.reply(key, consume=True).result == {"secret": 1}
    assert transport.reply(failed, consume=True).error == "E: x"
    answer(transport, Reply(key, "completed", result="again"))
    assert transport.reply(key) == Reply(key, "completed", result=None)
    left = transport.reply(failed, consume=True)
    assert (left.status, left.error) == ("failed", "")


def test_a_reply_ends_with_its_time_to_live(transport: Any, harness: Harness) -> None:
    """An expired reply is no reply."""
    key = harness.queue()
    answer(transport, Reply(key, "completed", result=1))
    harness.forget(transport, key)
    assert transport.reply(key) is None


def test_waiting_callers_are_all_answered(transport: Any, harness: Harness) -> None:
    """Any number of threads may wait, for different keys and for the same one."""
    keys = [harness.queue() for _ in range(12)]
    ready = threading.Barrier(25)

    def wait(key: str) -> Any:
        ready.wait()
        return transport.reply(key, timeout=20)

    with ThreadPoolExecutor(24) as pool:
        waiting = [pool.submit(wait, key) for key in [*keys, *keys]]
        ready.wait()
        answer(transport, *(Reply(key, "completed", result=key) for key in keys))
        assert [future.result().result for future in waiting] == [*keys, *keys]
