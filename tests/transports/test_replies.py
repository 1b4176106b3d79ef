"""What `reply` promises: the first answer wins, is waited for, can be consumed, and ends."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from harness import Harness, answer, ask, timed
from hypothesis import given, settings
from strategies import json_values

from unstract_core import NotSupported, Reply

pytestmark = pytest.mark.needs("replies")


def test_a_result_arrives_as_it_was_written(harness: Harness) -> None:
    """A completed reply carries its result, equal for every JSON value of the domain; null and {} are results too."""
    with harness.transport() as transport:

        @settings(max_examples=20)
        @given(result=json_values)
        def property_(result: Any) -> None:
            key = harness.queue()
            answer(transport, Reply(key, "completed", result=result))
            found = harness.answered(transport, key)
            assert found is not None
            assert (found.key, found.status, found.result, found.error) == (key, "completed", result, "")

        property_()


def test_no_reply_is_none_at_once(transport: Any, harness: Harness) -> None:
    """Without a timeout `reply` does not wait."""
    ask(transport, key := harness.queue())
    with timed() as elapsed:
        assert transport.reply(key) is None
        assert elapsed() < 2


@pytest.mark.needs("status")
def test_no_status_is_none_at_once(transport: Any, harness: Harness) -> None:
    """Nor under a key that was never sent."""
    with timed() as elapsed:
        assert transport.reply(harness.queue()) is None
        assert elapsed() < 2


def test_a_timeout_ends_the_wait(transport: Any, harness: Harness) -> None:
    """`reply` returns None when its time is up, and not before."""
    ask(transport, key := harness.queue())
    with timed() as elapsed:
        assert transport.reply(key, timeout=0.3) is None
        assert 0.25 < elapsed() < 5


def test_the_first_reply_wins(transport: Any, harness: Harness) -> None:
    """A key is answered once: later replies change nothing."""
    key, last = harness.queue(), harness.queue()
    answer(transport, Reply(key, "failed", error="first"), Reply(key, "completed", result="second"))
    answer(transport, Reply(last, "completed"))
    assert harness.answered(transport, last) == Reply(last, "completed")
    found = transport.reply(key)
    assert (found.status, found.error, found.result) == ("failed", "first", None)


def test_a_consumed_reply_keeps_its_status_alone(transport: Any, harness: Harness) -> None:
    """`consume` returns the reply and clears its result and error; the key stays answered, and later writes lose."""
    key, failed, last = harness.queue(), harness.queue(), harness.queue()
    answer(transport, Reply(key, "completed", result={"secret": 1}), Reply(failed, "failed", error="E: x"))
    assert harness.answered(transport, failed) == Reply(failed, "failed", error="E: x")
    assert transport.reply(key, consume=True).result == {"secret": 1}
    assert transport.reply(failed, consume=True).error == "E: x"
    answer(transport, Reply(key, "completed", result="again"), Reply(last, "completed"))
    assert harness.answered(transport, last) == Reply(last, "completed")
    assert transport.reply(key) == Reply(key, "completed", result=None)
    left = transport.reply(failed, consume=True)
    assert (left.status, left.error) == ("failed", "")


def test_a_reply_ends_with_its_time_to_live(transport: Any, harness: Harness) -> None:
    """An expired reply is no reply; where there is no status, nothing is known of its key any more."""
    key = harness.queue()
    answer(transport, Reply(key, "completed", result=1))
    assert harness.answered(transport, key) == Reply(key, "completed", result=1)
    harness.forget(transport, key)
    if transport.capabilities.status:
        assert transport.reply(key) is None
    else:
        with pytest.raises(NotSupported):
            transport.reply(key)


def test_waiting_callers_are_all_answered(transport: Any, harness: Harness) -> None:
    """Any number of threads may wait, for different keys and for the same one."""
    keys = [harness.queue() for _ in range(12)]
    ask(transport, *keys)
    ready = threading.Barrier(25)

    def wait(key: str) -> Any:
        ready.wait()
        return transport.reply(key, timeout=20)

    with ThreadPoolExecutor(24) as pool:
        waiting = [pool.submit(wait, key) for key in [*keys, *keys]]
        ready.wait()
        answer(transport, *(Reply(key, "completed", result=key) for key in keys))
        assert [future.result().result for future in waiting] == [*keys, *keys]
