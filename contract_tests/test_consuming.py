"""What a task's end leads to, over the transport: the consumer's table, row by row.

Each row is asserted as its sender sees it: the reply, the continuation, the status, the dead letter, and what is left.
"""

from __future__ import annotations

import json
import logging
import re
import time
from typing import Any

import attrs
import pytest

from contract_tests.messages import message, then
from contract_tests.requires import needs, not_claimed
from contract_tests.scenario import FAILURES, ODD_RESULTS, Table, tasks
from contract_tests.time_limits import start
from unstract_core import Consumer, Dispatcher, FairnessKey, Reply, ReplyTimeout, TaskFailed, current_delivery


def test_on_success_receives_the_result(table: Table) -> None:
    """on_success gets the result as its first argument beside its kwargs; the status is completed, without a copy."""
    table.send("return", {"n": 1}, task_id="i" + table.queue, **table.callbacks_to(x=2))
    table.consume()
    assert table.seen == [("ok", ({"n": 1},), {"x": 2})]
    assert table.status_is("i" + table.queue, "completed", result=None)
    assert table.empty()
    assert table.buried()


@pytest.mark.parametrize(("kept", "given"), [("result", "on_success"), (None, "on_error"), ("none", "on_error")])
def test_status_payload_decides_whether_status_keeps_result(table: Table, kept: Any, given: str) -> None:
    """The status has the result by the option `status_payload`, and by default where no callback carries it."""
    callback: dict[str, Any] = {given: then("ok", table.callbacks)}
    table.send("return", {"n": 1}, task_id="i" + table.queue, **callback)
    table.consume(status_payload=kept)
    assert table.seen == ([("ok", ({"n": 1},), {})] if given == "on_success" else [])
    assert table.status_is("i" + table.queue, "completed", result=None if kept == "none" else {"n": 1})


def test_returned_failure_option_sets_status_failed(table: Table) -> None:
    """With returned_failure="failed" the status has the error text; on_success gets the whole result as ever."""
    result = {"success": False, "data": {}, "metadata": {}, "error": "no text found"}
    table.send("return", result, task_id="i" + table.queue, **table.callbacks_to())
    table.consume(returned_failure="failed")
    assert table.seen == [("ok", (result,), {})]
    assert table.status_is("i" + table.queue, "failed", error="no text found")
    assert table.empty()


def test_a_forbidden_callback_is_not_sent(table: Table) -> None:
    """The task does not run; on_error, the status and the dead letter say which callback is not allowed."""
    table.send("return", 1, task_id="i" + table.queue, **table.callbacks_to())
    consumer = table.consume(allow_continuations=[f"{table.callbacks}:err"])
    assert table.seen == [("err", ("i" + table.queue,), {})]
    assert consumer.counters["ran"] == 1
    assert table.status_is("i" + table.queue, "failed", error="ContinuationNotAllowed: on_success...")
    assert table.buried("ContinuationNotAllowed")
    assert table.empty()


def test_a_continuation_copies_the_headers_of_its_message(table: Table) -> None:
    """What a message has in `headers`, and nothing else, is in those of its continuation, whichever it is."""
    found: list[tuple[Any, Any]] = []

    def remember(first: Any, **_: Any) -> None:
        delivery = current_delivery()
        assert delivery is not None
        assert delivery.payload is not None
        found.append((first, delivery.payload.headers))

    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "task": "é"}
    for number, headers in enumerate((trace, None)):
        table.send("return", f"r{number}", task_id=f"r{number}{table.queue}", headers=headers, **table.callbacks_to())
        table.send("raise", task_id=f"e{number}{table.queue}", headers=headers, **table.callbacks_to())
    registry = {**tasks, "ok": remember, "err": remember}
    table.kit.drain(Consumer(table.transport, registry, [table.queue, table.callbacks]))
    assert sorted(found, key=str) == sorted(
        [("r0", trace), (f"e0{table.queue}", trace), ("r1", None), (f"e1{table.queue}", None)], key=str
    )


@needs("replies")
def test_a_result_answers_the_awaited_reply(table: Table) -> None:
    """The reply is completed with the result, and the message is done."""
    table.send("return", {"n": 1}, reply_key=table.queue)
    table.consume()
    assert table.kit.answered(table.transport, table.queue) == Reply(table.queue, "completed", result={"n": 1})
    assert table.empty()
    assert table.buried()


def test_an_unawaited_result_is_acknowledged(table: Table) -> None:
    """Run once, acknowledged, nothing chained, nothing buried."""
    table.send("return", 1)
    assert table.consume().counters["ran"] == 1
    assert table.seen == []
    assert table.empty()
    assert table.buried()


@pytest.mark.parametrize("how", FAILURES)
def test_on_error_receives_the_id_and_error_text(table: Table, how: str) -> None:
    """on_error gets the dispatch id first; the error text is the status, and in callback_kwargs; nothing is re-run."""
    table.send(how, task_id="i" + table.queue, **table.callbacks_to(callback_kwargs={"run": 1}))
    consumer = table.consume()
    assert table.seen == [("err", ("i" + table.queue,), {"callback_kwargs": {"run": 1, "error": FAILURES[how]}})]
    assert table.status_is("i" + table.queue, "failed", error=FAILURES[how])
    assert consumer.counters["ran"] == 2
    assert table.empty()
    assert table.buried()


@needs("replies")
@pytest.mark.parametrize("how", FAILURES)
def test_a_failure_answers_the_awaited_reply(table: Table, how: str) -> None:
    """The reply is failed with the real error text; the task is not run again."""
    table.send(how, reply_key=table.queue)
    consumer = table.consume()
    assert table.kit.answered(table.transport, table.queue) == Reply(table.queue, "failed", error=FAILURES[how])
    assert consumer.counters["ran"] == 1
    assert table.empty()
    assert table.buried()


@pytest.mark.parametrize("how", FAILURES)
def test_an_unawaited_failure_is_retried_then_buried(table: Table, how: str) -> None:
    """Without reply and continuations: run again with backoff, buried after max_attempts, status failed."""
    table.send(how, task_id="i" + table.queue)
    assert table.consume(max_attempts=3).counters["ran"] == 3
    assert table.buried(FAILURES[how])
    assert table.status_is("i" + table.queue, "failed", error=FAILURES[how])
    assert table.empty()


def test_retry_later_repeats_until_max_attempts_then_fails(table: Table) -> None:
    """RetryLater is honoured up to max_attempts, then it is a failure like any other."""
    table.send("later", task_id="i" + table.queue, **table.callbacks_to())
    assert table.consume(max_attempts=3).counters["ran"] == 4
    assert [name for name, _, _ in table.seen] == ["err"]
    assert table.status_is("i" + table.queue, "failed", error="RetryLater...")


@needs("replies")
def test_retry_later_answers_its_caller_at_the_end(table: Table) -> None:
    """While it is retried its caller waits; then the reply is failed."""
    table.send("later", reply_key=table.queue)
    assert table.consume(max_attempts=3).counters["ran"] == 3
    assert table.kit.answered(table.transport, table.queue).status == "failed"


@pytest.mark.parametrize("how", ODD_RESULTS)
def test_a_result_outside_the_wire_is_normalised(table: Table, how: str) -> None:
    """The money is spent, so the callback arrives: with the result as lenient normalisation leaves it."""
    table.send(how, **table.callbacks_to())
    consumer = table.consume()
    ((name, (result,), _),) = table.seen
    assert name == "ok"
    assert re.fullmatch(ODD_RESULTS[how], json.dumps(result, sort_keys=True))
    assert consumer.counters["replaced"] == 1


def test_one_warning_lists_every_replaced_result_value(table: Table, caplog: pytest.LogCaptureFixture) -> None:
    """One WARNING for the task lists the path of each replacement and no content; each is counted."""
    table.send("three that do not fit", task_id="w" + table.queue, **table.callbacks_to())
    table.send("return", {"fits": 1})
    with caplog.at_level(logging.INFO):
        consumer = table.consume()
    (record,) = [one for one in caplog.records if vars(one).get("wire.event") == "result_made_to_fit"]
    fields = vars(record)
    assert record.levelno == logging.WARNING
    assert (fields["wire.paths"], fields["wire.count"]) == ("$.ratio, $.pages[1], $.scan", 3)
    assert fields["wire.task_id"] == "w" + table.queue
    assert "secret" not in caplog.text
    assert consumer.counters["replaced"] == 3


def test_an_unknown_task_notifies_sender_and_is_buried(table: Table) -> None:
    """on_error hears that no worker of the queue knows the task; the message is a dead letter; others are run."""
    table.send(task="nobody", task_id="u" + table.queue, **table.callbacks_to(callback_kwargs={}))
    table.send("return", 1, **table.callbacks_to())
    table.consume()
    assert sorted(name for name, _, _ in table.seen) == ["err", "ok"]
    (error,) = [kwargs["callback_kwargs"]["error"] for name, _, kwargs in table.seen if name == "err"]
    assert error.startswith("UnknownTask: ")
    assert table.status_is("u" + table.queue, "failed", error="UnknownTask...")
    assert table.buried("UnknownTask")


@needs("replies")
def test_an_unknown_task_answers_its_caller(table: Table) -> None:
    """A blocked caller does not wait for a task that nobody has."""
    table.send(task="nobody", reply_key=table.queue)
    table.consume()
    assert table.kit.answered(table.transport, table.queue).error.startswith("UnknownTask: ")
    assert table.buried("UnknownTask")


@pytest.mark.parametrize(("how", "callback"), [("return", "ok"), ("raise", "err")])
def test_a_row_without_queue_runs_and_continues(table: Table, how: str, callback: str) -> None:
    """A row whose queue, kwargs and callback kwargs are null is run, and its callback is sent to its own queue."""
    told = {
        key: {"task_name": name, "kwargs": None, "queue": table.callbacks}
        for key, name in (("on_success", "ok"), ("on_error", "err"))
    }
    row = {"task_name": "behave", "args": [how, 1], "kwargs": None, "queue": None, "task_id": f"r{table.queue}", **told}
    table.kit.inject(table.transport, table.queue, json.dumps(row))
    table.kit.drain(Consumer(table.transport, tasks, [table.queue]))
    (delivery,) = table.kit.remaining(table.transport, table.callbacks, count=1)
    assert delivery.payload is not None
    assert (delivery.payload.task_name, delivery.payload.queue) == (callback, table.callbacks)
    assert delivery.payload.args == ([1] if how == "return" else [f"r{table.queue}"])


def test_a_malformed_message_notifies_sender_and_is_buried(table: Table) -> None:
    """Who can be made out in an unreadable message is told; it is a dead letter, and its neighbours are run."""
    queue = table.queue
    told = {"task_name": "err", "kwargs": {}, "queue": table.callbacks}
    broken = {"task_name": "behave", "args": 7, "kwargs": {}, "queue": queue, "task_id": f"m{queue}", "on_error": told}
    table.kit.inject(table.transport, queue, json.dumps(broken))
    table.kit.inject(table.transport, queue, "[1, 2]")
    table.send("return", 1, **table.callbacks_to())
    table.consume()
    assert sorted((name, args) for name, args, _ in table.seen) == [("err", (f"m{queue}",)), ("ok", (1,))]
    assert table.status_is(f"m{queue}", "failed", error="MalformedPayload...")
    assert table.buried("MalformedPayload", "MalformedPayload")
    assert table.empty()


@needs("replies")
def test_a_malformed_message_answers_its_caller(table: Table) -> None:
    """The reply says what could not be read, and where."""
    table.kit.inject(
        table.transport, table.queue, json.dumps({"task_name": "behave", "kwargs": "x", "reply_key": table.queue})
    )
    table.consume()
    assert "$.kwargs" in table.kit.answered(table.transport, table.queue).error
    assert table.buried("MalformedPayload")


@needs("counts_crashes")
@pytest.mark.parametrize("awaited", ["continuations", "reply", "nothing"])
def test_a_message_beyond_max_attempts_is_buried_unrun(table: Table, awaited: str) -> None:
    """After max_attempts deliveries without a settlement the sender is told, and the message is buried unrun."""
    kit, queue = table.kit, table.queue
    if awaited == "reply" and not kit.capabilities.replies:
        not_claimed("replies")
    match awaited:
        case "continuations":
            table.send("return", 1, task_id="k" + queue, **table.callbacks_to())
        case "reply":
            table.send("return", 1, reply_key="k" + queue)
        case _:
            table.send("return", 1, task_id="k" + queue)
    for _ in range(3):
        subscription = table.transport.subscribe([queue], lease=60)
        kit.take_one(subscription)
        subscription.close()
        kit.expire(table.transport, queue)
    consumer = table.consume(max_attempts=3)
    assert [name for name, _, _ in table.seen] == (["err"] if awaited == "continuations" else [])
    assert consumer.counters["ran"] == len(table.seen)
    assert table.buried("TooManyAttempts")
    if awaited == "reply":
        assert kit.answered(table.transport, "k" + queue).error.startswith("TooManyAttempts")
    else:
        assert table.status_is("k" + queue, "failed", error="TooManyAttempts...")


@pytest.mark.parametrize(("how", "given"), [("return", "on_error"), ("raise", "on_success")])
def test_an_outcome_without_callback_records_status_only(table: Table, how: str, given: str) -> None:
    """With only one of on_success and on_error, the other outcome is acknowledged with its status, and not re-run."""
    callback: dict[str, Any] = {given: then("ok", table.callbacks)}
    table.send(how, task_id="s" + table.queue, **callback)
    consumer = table.consume()
    assert table.seen == []
    assert consumer.counters["ran"] == 1
    if how == "return":
        assert table.status_is("s" + table.queue, "completed")
    else:
        assert table.status_is("s" + table.queue, "failed", error=FAILURES[how])
    assert table.empty()


@needs("fencing")
@pytest.mark.parametrize("awaited", ["continuations", "reply", "nothing"])
@pytest.mark.parametrize("how", ["return", "raise"])
def test_a_consumer_that_lost_its_lease_writes_nothing(
    table: Table, how: str, awaited: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A task that ended after another had taken its message: no reply, no continuation, no burial; one WARNING."""
    kit, queue = table.kit, table.queue
    if awaited == "reply" and not kit.capabilities.replies:
        not_claimed("replies")
    kept = table.transport.subscribe([queue], lease=60)

    def steal(*args: object) -> object:
        kit.expire(table.transport, queue)
        assert kept.receive(limit=1, wait=10)
        return tasks["behave"](*args)

    options = table.callbacks_to() if awaited == "continuations" else {}
    options |= {"reply_key": "l" + queue} if awaited == "reply" else {"task_id": "l" + queue}
    table.transport.send([message("steal", queue, how, **options)])
    consumer = Consumer(table.transport, {**tasks, "steal": steal}, [queue, table.callbacks], max_attempts=1)
    with caplog.at_level(logging.WARNING):
        ended = start(consumer.run)
        until = time.monotonic() + 20
        while not consumer.counters["lost"] and time.monotonic() < until:
            time.sleep(0.01)
        consumer.stop()
        ended(20)
    assert consumer.counters["lost"] == 1
    assert len([one for one in caplog.records if vars(one).get("wire.event") == "lease_lost"]) == 1
    if kit.capabilities.replies:
        assert table.transport.reply("l" + queue) is None or not kit.capabilities.status
    assert table.buried()
    kept.close()
    assert [one.queue for one in kit.remaining(table.transport, queue, table.callbacks, count=1)] == [queue]


@needs("replies")
def test_call_returns_the_result_or_raises(table: Table) -> None:
    """`call` returns the result, raises TaskFailed with the task's text, and ReplyTimeout when nobody works."""
    dispatcher = Dispatcher(table.transport)
    with pytest.raises(ReplyTimeout, match=table.queue):
        dispatcher.call("behave", args=["return", 1], queue=table.queue, timeout=0.1)
    with table.kit.running(table.transport, tasks, table.queue):
        assert dispatcher.call("behave", args=["return", 5], queue=table.queue, timeout=40) == 5
        with pytest.raises(TaskFailed, match="ValueError: the real reason"):
            dispatcher.call("behave", args=["raise"], queue=table.queue, timeout=40)


def test_a_callback_inherits_organisation_fairness_and_priority(table: Table) -> None:
    """A continuation is sent for the same owner, with the same urgency, under an id derived from the parent's."""
    fairness = FairnessKey("org-7", "api", 8)
    sent = message("behave", table.queue, "return", 1, org_id="org-7", priority=8, fairness=fairness, task_id="p")
    sent = attrs.evolve(sent, payload=attrs.evolve(sent.payload, **table.callbacks_to()))
    table.transport.send([sent])
    table.kit.drain(Consumer(table.transport, tasks, [table.queue]))
    (delivery,) = table.kit.remaining(table.transport, table.callbacks, count=1)
    assert delivery.payload is not None
    assert (delivery.org_id, delivery.payload.fairness) == ("org-7", fairness)
    assert delivery.payload.task_id not in (None, "p")
    if table.kit.capabilities.priority:
        assert delivery.priority == 8


def test_a_callback_has_the_same_id_every_time(table: Table) -> None:
    """A callback can tell that it has been called before: its task_id depends on its parent's alone."""
    for _ in range(2):
        table.send("return", 1, task_id="same" + table.queue, **table.callbacks_to())
    table.kit.drain(Consumer(table.transport, tasks, [table.queue]))
    found = table.kit.remaining(table.transport, table.callbacks, count=2)
    assert len(found) == 2
    assert len({one.payload.task_id for one in found if one.payload}) == 1


def test_on_success_receives_a_returned_failure(table: Table) -> None:
    """A task that returns {"success": false} has returned: on_success gets it."""
    table.send("return", {"success": False, "error": "no text"}, **table.callbacks_to())
    table.consume()
    assert table.seen == [("ok", ({"success": False, "error": "no text"},), {})]


def test_callback_kwargs_arrive_unchanged(table: Table) -> None:
    """A continuation's kwargs are those of the dispatch, whatever its task did."""
    kwargs = {"callback_kwargs": {"ids": [1, 2], "deep": {"x": None, "é": "\U0001f4dd"}, "error": None}, "n": 1.5}
    table.send("return", 1, **table.callbacks_to(**kwargs))
    table.consume()
    assert table.seen == [("ok", (1,), kwargs)]
