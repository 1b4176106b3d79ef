"""Replies: the first one wins; callers can wait for it and consume it; it expires."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any

import pytest
from hypothesis import given

from contract_tests.checking import CheckedTransport
from contract_tests.kit import SOON, Kit, timed, wait_until
from contract_tests.messages import make_settlement, message
from contract_tests.profiles import examples
from contract_tests.requires import requires
from contract_tests.strategies import json_values
from contract_tests.time_limits import start, together
from unstract_core import Reply, Verdict
from unstract_core.values import normalise


@requires("replies")
def test_a_result_arrives_as_it_was_written(kit: Kit) -> None:
    """A completed reply returns its result unchanged, for every JSON value of the wire, null and {} included."""
    with kit.open() as transport:

        @examples(20)
        @given(result=json_values)
        def property_(result: Any) -> None:
            key = kit.queue()
            kit.answer(transport, Reply(key, "completed", result=result))
            found = kit.answered(transport, key)
            assert (found.status, found.result, found.error) == ("completed", normalise(result), "")

        property_()


@requires("replies")
def test_an_error_text_arrives_as_it_was_written(kit: Kit, transport: CheckedTransport) -> None:
    """A failed reply returns its error text unchanged, with quotes, newlines and thousands of characters."""
    for error in ("ValueError: why", "KeyError: 'x'", 'E: \U0001f4dd "quoted" 100%\n\ttwo lines', "E: " + "x" * 3900):
        key = kit.queue()
        kit.answer(transport, Reply(key, "failed", error=error))
        found = kit.answered(transport, key)
        assert (found.status, found.result, found.error) == ("failed", None, error)


@requires("replies")
def test_a_missing_reply_returns_none_at_once(kit: Kit, transport: CheckedTransport) -> None:
    """Without a timeout, `reply` returns None at once if there is no reply yet."""
    kit.ask(transport, key := kit.queue())
    with timed() as elapsed:
        assert transport.reply(key) is None
        assert elapsed() < 5


@requires("replies", "status")
def test_an_unknown_key_returns_none_at_once(kit: Kit, transport: CheckedTransport) -> None:
    """Without a timeout, `reply` returns None at once for a key that was never sent."""
    with timed() as elapsed:
        assert transport.reply(kit.queue()) is None
        assert elapsed() < 5


@requires("replies")
def test_a_timeout_ends_the_wait(kit: Kit, transport: CheckedTransport) -> None:
    """`reply` returns None when its timeout is over, and not before."""
    kit.ask(transport, key := kit.queue())
    with timed() as elapsed:
        assert transport.reply(key, timeout=0.3) is None
        assert 0.25 < elapsed() < SOON


@requires("replies")
def test_a_written_reply_wakes_its_waiting_caller(kit: Kit, transport: CheckedTransport) -> None:
    """`reply` returns as soon as the reply is written, long before its timeout."""
    key, queue = kit.queue(), kit.queue()
    transport.send([message("t", queue, reply_key=key)])
    waiting = start(lambda: transport.reply(key, timeout=40))
    time.sleep(0.2)
    subscription = transport.subscribe([queue], lease=60)
    with timed() as elapsed:
        subscription.settle([make_settlement(kit.take_one(subscription), Verdict.ACK, reply=Reply(key, "completed"))])
        assert waiting(40) == Reply(key, "completed")
        assert elapsed() < 15
    subscription.close()


@requires("replies")
def test_the_first_reply_wins(kit: Kit, transport: CheckedTransport) -> None:
    """A key is answered once: later replies change nothing."""
    key, last = kit.queue(), kit.queue()
    kit.answer(transport, Reply(key, "failed", error="first"), Reply(key, "completed", result="second"))
    kit.answer(transport, Reply(last, "completed"))
    assert kit.answered(transport, last) == Reply(last, "completed")
    found = kit.answered(transport, key)
    assert (found.status, found.error, found.result) == ("failed", "first", None)


@requires("replies")
def test_consuming_a_reply_keeps_only_its_status(kit: Kit, transport: CheckedTransport) -> None:
    """`consume` returns the reply and clears its result and error; later writes to the key have no effect."""
    key, failed, last = kit.queue(), kit.queue(), kit.queue()
    kit.answer(transport, Reply(key, "completed", result={"secret": 1}), Reply(failed, "failed", error="E: x"))
    assert kit.answered(transport, failed) == Reply(failed, "failed", error="E: x")
    consumed = transport.reply(key, timeout=kit.max_wait, consume=True)
    assert consumed is not None
    assert consumed.result == {"secret": 1}
    consumed = transport.reply(failed, consume=True)
    assert consumed is not None
    assert consumed.error == "E: x"
    kit.answer(transport, Reply(key, "completed", result="again"), Reply(last, "completed"))
    assert kit.answered(transport, last) == Reply(last, "completed")
    assert transport.reply(key) == Reply(key, "completed", result=None)
    assert transport.reply(failed, consume=True) == Reply(failed, "failed", error="")


@requires("replies")
def test_only_one_of_many_readers_consumes_a_reply(kit: Kit, transport: CheckedTransport) -> None:
    """Of concurrent readers with `consume`, one gets the result and the others get only its status."""
    key = kit.queue()
    kit.answer(transport, Reply(key, "completed", result="secret"))
    kit.answered(transport, key)
    found = together(*[lambda: transport.reply(key, timeout=10, consume=True)] * 6)
    assert sorted(str(one and one.result) for one in found) == ["None"] * 5 + ["secret"]


@requires("replies", "status")
def test_a_reply_expires_after_its_ttl(kit: Kit, transport: CheckedTransport) -> None:
    """A reply is kept for its ttl; after that the key can be answered again."""
    key, kept = kit.queue(), kit.queue()
    kit.answer(transport, Reply(kept, "completed", result=1, ttl=60), Reply(key, "completed", result=1, ttl=0.5))
    wait_until(lambda: transport.reply(key) is None, timeout=20, what="the end of a reply's time to live")
    assert kit.answered(transport, kept).result == 1
    kit.answer(transport, Reply(key, "completed", result=2))
    assert kit.answered(transport, key).result == 2


@requires("replies")
def test_every_waiting_caller_is_answered(kit: Kit, transport: CheckedTransport) -> None:
    """Any number of threads may wait, for different keys and for the same key."""
    keys = [kit.queue() for _ in range(8)]
    kit.ask(transport, *keys)
    ready = threading.Barrier(17)

    def wait(key: str) -> Any:
        ready.wait(20)
        return transport.reply(key, timeout=30)

    waiting = [start(partial(wait, key)) for key in [*keys, *keys]]
    ready.wait(20)
    kit.answer(transport, *(Reply(key, "completed", result=key) for key in keys))
    found: list[Any] = [one(40) for one in waiting]
    assert [one and one.result for one in found] == [*keys, *keys]


@requires("replies")
@pytest.mark.parametrize("status", ["completed", "failed"])
def test_a_burial_may_write_a_reply(kit: Kit, transport: CheckedTransport, queue: str, status: Any) -> None:
    """A settlement with BURY may write a reply to the waiting caller."""
    key = kit.queue()
    transport.send([message("t", queue, reply_key=key)])
    subscription = transport.subscribe([queue], lease=60)
    reply = Reply(key, status, error="E: why" if status == "failed" else "")
    settlement = make_settlement(kit.take_one(subscription), Verdict.BURY, reply=reply, reason="E: why")
    assert list(subscription.settle([settlement])) == [True]
    assert kit.answered(transport, key) == reply
    subscription.close()


@requires("replies")
def test_similar_keys_have_separate_replies(kit: Kit, transport: CheckedTransport) -> None:
    """Keys that differ only in case, length or their last character have separate replies."""
    key = kit.queue("-" + "x" * 80)
    keys = [key, key.upper(), key + "y", key + ".", key[:60]]
    kit.answer(transport, *(Reply(one, "completed", result=one) for one in keys))
    assert [kit.answered(transport, one).result for one in keys] == keys


@requires("replies")
def test_a_waiting_caller_may_consume(kit: Kit, transport: CheckedTransport) -> None:
    """A caller that waits with `consume` reads the result once; then only the status is left."""
    kit.ask(transport, key := kit.queue())
    waiting = start(lambda: transport.reply(key, timeout=40, consume=True))
    time.sleep(0.2)
    kit.answer(transport, Reply(key, "completed", result="secret"))
    assert waiting(40) == Reply(key, "completed", result="secret")
    assert transport.reply(key) == Reply(key, "completed")


@requires("replies")
def test_only_one_waiting_caller_consumes_a_reply(kit: Kit, transport: CheckedTransport) -> None:
    """Of several callers that wait with `consume` and are woken together, exactly one reads the result."""
    for _ in range(5):
        kit.ask(transport, key := kit.queue())
        read = partial(transport.reply, key, timeout=40, consume=True)
        waiting = [start(read) for _ in range(4)]
        time.sleep(0.1)
        kit.answer(transport, Reply(key, "completed", result="secret"))
        found: list[Any] = [one(40) for one in waiting]
        assert sorted(str(one and one.result) for one in found) == ["None"] * 3 + ["secret"]


@requires("replies", "status")
def test_nothing_extends_the_ttl_of_a_reply(kit: Kit, transport: CheckedTransport) -> None:
    """Neither consuming a reply nor a later reply that loses extends its ttl."""
    key = kit.queue()
    kit.answer(transport, Reply(key, "completed", result=1, ttl=6.0))
    transport.reply(key, consume=True)
    kit.answer(transport, Reply(key, "completed", result=2, ttl=3600.0))
    found = transport.reply(key)
    assert found is None or (found.status, found.result) == ("completed", None)
    wait_until(lambda: transport.reply(key) is None, timeout=30, what="the end of a reply's time to live")
