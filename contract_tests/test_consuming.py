"""Outcomes of tasks: reply, continuation, status and dead letter for each way in which a task ends."""

from __future__ import annotations

import json
import logging
import re
import time
from typing import Any

import attrs
import pytest

from contract_tests.messages import message, then
from contract_tests.requires import requires, skip_not_claimed
from contract_tests.scenario import FAILURES, ODD_RESULTS, Scenario, tasks
from contract_tests.time_limits import start
from unstract_core import Consumer, Dispatcher, FairnessKey, Reply, ReplyTimeout, TaskFailed, current_delivery


def test_on_success_receives_the_result(scenario: Scenario) -> None:
    """on_success gets the result as first argument beside its kwargs; the status is completed, without the result."""
    scenario.send("return", {"n": 1}, task_id="i" + scenario.queue, **scenario.callbacks_to(x=2))
    scenario.consume()
    assert scenario.seen == [("ok", ({"n": 1},), {"x": 2})]
    assert scenario.status_is("i" + scenario.queue, "completed", result=None)
    assert scenario.empty()
    assert scenario.buried()


@pytest.mark.parametrize(("kept", "given"), [("result", "on_success"), (None, "on_error"), ("none", "on_error")])
def test_status_payload_decides_whether_status_keeps_result(scenario: Scenario, kept: Any, given: str) -> None:
    """`status_payload` decides if the status keeps the result; by default only if no callback gets the result."""
    callback: dict[str, Any] = {given: then("ok", scenario.callbacks)}
    scenario.send("return", {"n": 1}, task_id="i" + scenario.queue, **callback)
    scenario.consume(status_payload=kept)
    assert scenario.seen == ([("ok", ({"n": 1},), {})] if given == "on_success" else [])
    assert scenario.status_is("i" + scenario.queue, "completed", result=None if kept == "none" else {"n": 1})


def test_returned_failure_option_sets_status_failed(scenario: Scenario) -> None:
    """With returned_failure="failed", the status has the error text; on_success still gets the whole result."""
    result = {"success": False, "data": {}, "metadata": {}, "error": "no text found"}
    scenario.send("return", result, task_id="i" + scenario.queue, **scenario.callbacks_to())
    scenario.consume(returned_failure="failed")
    assert scenario.seen == [("ok", (result,), {})]
    assert scenario.status_is("i" + scenario.queue, "failed", error="no text found")
    assert scenario.empty()


def test_a_forbidden_callback_is_not_sent(scenario: Scenario) -> None:
    """The task does not run; on_error, the status and the dead letter name the forbidden callback."""
    scenario.send("return", 1, task_id="i" + scenario.queue, **scenario.callbacks_to())
    consumer = scenario.consume(allow_continuations=[f"{scenario.callbacks}:err"])
    assert scenario.seen == [("err", ("i" + scenario.queue,), {})]
    assert consumer.counters["ran"] == 1
    assert scenario.status_is("i" + scenario.queue, "failed", error="ContinuationNotAllowed: on_success...")
    assert scenario.buried("ContinuationNotAllowed")
    assert scenario.empty()


def test_a_continuation_copies_the_headers_of_its_message(scenario: Scenario) -> None:
    """A continuation has exactly the `headers` of its message, for on_success and on_error alike."""
    found: list[tuple[Any, Any]] = []

    def remember(first: Any, **_: Any) -> None:
        delivery = current_delivery()
        assert delivery is not None
        assert delivery.payload is not None
        found.append((first, delivery.payload.headers))

    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "task": "é"}
    for number, headers in enumerate((trace, None)):
        scenario.send(
            "return", f"r{number}", task_id=f"r{number}{scenario.queue}", headers=headers, **scenario.callbacks_to()
        )
        scenario.send("raise", task_id=f"e{number}{scenario.queue}", headers=headers, **scenario.callbacks_to())
    registry = {**tasks, "ok": remember, "err": remember}
    scenario.kit.drain(Consumer(scenario.transport, registry, [scenario.queue, scenario.callbacks]))
    assert sorted(found, key=str) == sorted(
        [("r0", trace), (f"e0{scenario.queue}", trace), ("r1", None), (f"e1{scenario.queue}", None)], key=str
    )


@requires("replies")
def test_a_result_answers_the_awaited_reply(scenario: Scenario) -> None:
    """The reply is completed with the result, and the message is acknowledged."""
    scenario.send("return", {"n": 1}, reply_key=scenario.queue)
    scenario.consume()
    assert scenario.kit.answered(scenario.transport, scenario.queue) == Reply(
        scenario.queue, "completed", result={"n": 1}
    )
    assert scenario.empty()
    assert scenario.buried()


def test_an_unawaited_result_is_acknowledged(scenario: Scenario) -> None:
    """Without reply and continuations, a task that returns runs once and its message is acknowledged."""
    scenario.send("return", 1)
    assert scenario.consume().counters["ran"] == 1
    assert scenario.seen == []
    assert scenario.empty()
    assert scenario.buried()


@pytest.mark.parametrize("how", FAILURES)
def test_on_error_receives_the_id_and_error_text(scenario: Scenario, how: str) -> None:
    """on_error gets the dispatch id; status and callback_kwargs have the error text; the task runs once."""
    scenario.send(how, task_id="i" + scenario.queue, **scenario.callbacks_to(callback_kwargs={"run": 1}))
    consumer = scenario.consume()
    assert scenario.seen == [("err", ("i" + scenario.queue,), {"callback_kwargs": {"run": 1, "error": FAILURES[how]}})]
    assert scenario.status_is("i" + scenario.queue, "failed", error=FAILURES[how])
    assert consumer.counters["ran"] == 2
    assert scenario.empty()
    assert scenario.buried()


@requires("replies")
@pytest.mark.parametrize("how", FAILURES)
def test_a_failure_answers_the_awaited_reply(scenario: Scenario, how: str) -> None:
    """The reply is failed with the original error text; the task does not run again."""
    scenario.send(how, reply_key=scenario.queue)
    consumer = scenario.consume()
    assert scenario.kit.answered(scenario.transport, scenario.queue) == Reply(
        scenario.queue, "failed", error=FAILURES[how]
    )
    assert consumer.counters["ran"] == 1
    assert scenario.empty()
    assert scenario.buried()


@pytest.mark.parametrize("how", FAILURES)
def test_an_unawaited_failure_is_retried_then_buried(scenario: Scenario, how: str) -> None:
    """Without reply and continuations, a failed task is retried with backoff and dead-lettered after max_attempts."""
    scenario.send(how, task_id="i" + scenario.queue)
    assert scenario.consume(max_attempts=3).counters["ran"] == 3
    assert scenario.buried(FAILURES[how])
    assert scenario.status_is("i" + scenario.queue, "failed", error=FAILURES[how])
    assert scenario.empty()


def test_retry_later_repeats_until_max_attempts_then_fails(scenario: Scenario) -> None:
    """RetryLater repeats a task up to max_attempts; then it is a failure like any other."""
    scenario.send("later", task_id="i" + scenario.queue, **scenario.callbacks_to())
    assert scenario.consume(max_attempts=3).counters["ran"] == 4
    assert [name for name, _, _ in scenario.seen] == ["err"]
    assert scenario.status_is("i" + scenario.queue, "failed", error="RetryLater...")


@requires("replies")
def test_retry_later_answers_its_caller_at_the_end(scenario: Scenario) -> None:
    """The caller waits while the task is retried; then the reply is failed."""
    scenario.send("later", reply_key=scenario.queue)
    assert scenario.consume(max_attempts=3).counters["ran"] == 3
    assert scenario.kit.answered(scenario.transport, scenario.queue).status == "failed"


@pytest.mark.parametrize("how", ODD_RESULTS)
def test_a_result_outside_the_wire_is_normalised(scenario: Scenario, how: str) -> None:
    """on_success is sent also for a result that the wire does not allow, after lenient normalisation."""
    scenario.send(how, **scenario.callbacks_to())
    consumer = scenario.consume()
    ((name, (result,), _),) = scenario.seen
    assert name == "ok"
    assert re.fullmatch(ODD_RESULTS[how], json.dumps(result, sort_keys=True))
    assert consumer.counters["replaced"] == 1


def test_one_warning_lists_every_replaced_result_value(scenario: Scenario, caplog: pytest.LogCaptureFixture) -> None:
    """One WARNING per task lists the path of each replaced value, without its content; each one is counted."""
    scenario.send("three that do not fit", task_id="w" + scenario.queue, **scenario.callbacks_to())
    scenario.send("return", {"fits": 1})
    with caplog.at_level(logging.INFO):
        consumer = scenario.consume()
    (record,) = [one for one in caplog.records if vars(one).get("wire.event") == "result_made_to_fit"]
    fields = vars(record)
    assert record.levelno == logging.WARNING
    assert (fields["wire.paths"], fields["wire.count"]) == ("$.ratio, $.pages[1], $.scan", 3)
    assert fields["wire.task_id"] == "w" + scenario.queue
    assert "secret" not in caplog.text
    assert consumer.counters["replaced"] == 3


def test_an_unknown_task_notifies_sender_and_is_buried(scenario: Scenario) -> None:
    """on_error gets an UnknownTask error, the message is dead-lettered, and other messages are run."""
    scenario.send(task="nobody", task_id="u" + scenario.queue, **scenario.callbacks_to(callback_kwargs={}))
    scenario.send("return", 1, **scenario.callbacks_to())
    scenario.consume()
    assert sorted(name for name, _, _ in scenario.seen) == ["err", "ok"]
    (error,) = [kwargs["callback_kwargs"]["error"] for name, _, kwargs in scenario.seen if name == "err"]
    assert error.startswith("UnknownTask: ")
    assert scenario.status_is("u" + scenario.queue, "failed", error="UnknownTask...")
    assert scenario.buried("UnknownTask")


@requires("replies")
def test_an_unknown_task_answers_its_caller(scenario: Scenario) -> None:
    """The reply of an unknown task is failed at once, so that its caller does not wait for the timeout."""
    scenario.send(task="nobody", reply_key=scenario.queue)
    scenario.consume()
    assert scenario.kit.answered(scenario.transport, scenario.queue).error.startswith("UnknownTask: ")
    assert scenario.buried("UnknownTask")


@pytest.mark.parametrize(("how", "callback"), [("return", "ok"), ("raise", "err")])
def test_a_row_without_queue_runs_and_continues(scenario: Scenario, how: str, callback: str) -> None:
    """A row with null for queue, kwargs and callback kwargs is run, and its callback goes to the callback's queue."""
    continuations = {
        key: {"task_name": name, "kwargs": None, "queue": scenario.callbacks}
        for key, name in (("on_success", "ok"), ("on_error", "err"))
    }
    row = {
        "task_name": "behave",
        "args": [how, 1],
        "kwargs": None,
        "queue": None,
        "task_id": f"r{scenario.queue}",
        **continuations,
    }
    scenario.kit.inject(scenario.transport, scenario.queue, json.dumps(row))
    scenario.kit.drain(Consumer(scenario.transport, tasks, [scenario.queue]))
    (delivery,) = scenario.kit.remaining(scenario.transport, scenario.callbacks, count=1)
    assert delivery.payload is not None
    assert (delivery.payload.task_name, delivery.payload.queue) == (callback, scenario.callbacks)
    assert delivery.payload.args == ([1] if how == "return" else [f"r{scenario.queue}"])


def test_a_malformed_message_notifies_sender_and_is_buried(scenario: Scenario) -> None:
    """An unreadable message is dead-lettered; its on_error and status get the error if they can still be read."""
    queue = scenario.queue
    callback = {"task_name": "err", "kwargs": {}, "queue": scenario.callbacks}
    broken = {
        "task_name": "behave",
        "args": 7,
        "kwargs": {},
        "queue": queue,
        "task_id": f"m{queue}",
        "on_error": callback,
    }
    scenario.kit.inject(scenario.transport, queue, json.dumps(broken))
    scenario.kit.inject(scenario.transport, queue, "[1, 2]")
    scenario.send("return", 1, **scenario.callbacks_to())
    scenario.consume()
    assert sorted((name, args) for name, args, _ in scenario.seen) == [("err", (f"m{queue}",)), ("ok", (1,))]
    assert scenario.status_is(f"m{queue}", "failed", error="MalformedPayload...")
    assert scenario.buried("MalformedPayload", "MalformedPayload")
    assert scenario.empty()


@requires("replies")
def test_a_malformed_message_answers_its_caller(scenario: Scenario) -> None:
    """The reply names the path of the value that could not be read."""
    scenario.kit.inject(
        scenario.transport,
        scenario.queue,
        json.dumps({"task_name": "behave", "kwargs": "x", "reply_key": scenario.queue}),
    )
    scenario.consume()
    assert "$.kwargs" in scenario.kit.answered(scenario.transport, scenario.queue).error
    assert scenario.buried("MalformedPayload")


@requires("counts_crashes")
@pytest.mark.parametrize("awaited", ["continuations", "reply", "nothing"])
def test_a_message_beyond_max_attempts_is_buried_unrun(scenario: Scenario, awaited: str) -> None:
    """After max_attempts deliveries without a settlement, the sender gets the error and the task does not run again."""
    kit, queue = scenario.kit, scenario.queue
    if awaited == "reply" and not kit.capabilities.replies:
        skip_not_claimed("replies")
    match awaited:
        case "continuations":
            scenario.send("return", 1, task_id="k" + queue, **scenario.callbacks_to())
        case "reply":
            scenario.send("return", 1, reply_key="k" + queue)
        case _:
            scenario.send("return", 1, task_id="k" + queue)
    for _ in range(3):
        subscription = scenario.transport.subscribe([queue], lease=60)
        kit.take_one(subscription)
        subscription.close()
        kit.expire(scenario.transport, queue)
    consumer = scenario.consume(max_attempts=3)
    assert [name for name, _, _ in scenario.seen] == (["err"] if awaited == "continuations" else [])
    assert consumer.counters["ran"] == len(scenario.seen)
    assert scenario.buried("TooManyAttempts")
    if awaited == "reply":
        assert kit.answered(scenario.transport, "k" + queue).error.startswith("TooManyAttempts")
    else:
        assert scenario.status_is("k" + queue, "failed", error="TooManyAttempts...")


@pytest.mark.parametrize(("how", "given"), [("return", "on_error"), ("raise", "on_success")])
def test_an_outcome_without_callback_records_status_only(scenario: Scenario, how: str, given: str) -> None:
    """With only one of on_success and on_error, the other outcome is acknowledged with its status; nothing is sent."""
    callback: dict[str, Any] = {given: then("ok", scenario.callbacks)}
    scenario.send(how, task_id="s" + scenario.queue, **callback)
    consumer = scenario.consume()
    assert scenario.seen == []
    assert consumer.counters["ran"] == 1
    if how == "return":
        assert scenario.status_is("s" + scenario.queue, "completed")
    else:
        assert scenario.status_is("s" + scenario.queue, "failed", error=FAILURES[how])
    assert scenario.empty()


@requires("fencing")
@pytest.mark.parametrize("awaited", ["continuations", "reply", "nothing"])
@pytest.mark.parametrize("how", ["return", "raise"])
def test_a_consumer_that_lost_its_lease_writes_nothing(
    scenario: Scenario, how: str, awaited: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A task that ends after its lease was lost writes no reply, continuation or dead letter; one WARNING is logged."""
    kit, queue = scenario.kit, scenario.queue
    if awaited == "reply" and not kit.capabilities.replies:
        skip_not_claimed("replies")
    kept = scenario.transport.subscribe([queue], lease=60)

    def steal(*args: object) -> object:
        kit.expire(scenario.transport, queue)
        assert kept.receive(limit=1, wait=10)
        return tasks["behave"](*args)

    options = scenario.callbacks_to() if awaited == "continuations" else {}
    options |= {"reply_key": "l" + queue} if awaited == "reply" else {"task_id": "l" + queue}
    scenario.transport.send([message("steal", queue, how, **options)])
    consumer = Consumer(scenario.transport, {**tasks, "steal": steal}, [queue, scenario.callbacks], max_attempts=1)
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
        assert scenario.transport.reply("l" + queue) is None or not kit.capabilities.status
    assert scenario.buried()
    kept.close()
    assert [one.queue for one in kit.remaining(scenario.transport, queue, scenario.callbacks, count=1)] == [queue]


@requires("replies")
def test_call_returns_the_result_or_raises(scenario: Scenario) -> None:
    """`call` returns the result, raises TaskFailed with the task's error text, or ReplyTimeout without a worker."""
    dispatcher = Dispatcher(scenario.transport)
    with pytest.raises(ReplyTimeout, match=scenario.queue):
        dispatcher.call("behave", args=["return", 1], queue=scenario.queue, timeout=0.1)
    with scenario.kit.running(scenario.transport, tasks, scenario.queue):
        assert dispatcher.call("behave", args=["return", 5], queue=scenario.queue, timeout=40) == 5
        with pytest.raises(TaskFailed, match="ValueError: the real reason"):
            dispatcher.call("behave", args=["raise"], queue=scenario.queue, timeout=40)


def test_a_callback_inherits_organisation_fairness_and_priority(scenario: Scenario) -> None:
    """A callback has the organisation, fairness and priority of its parent, and an id derived from the parent's id."""
    fairness = FairnessKey("org-7", "api", 8)
    sent = message("behave", scenario.queue, "return", 1, org_id="org-7", priority=8, fairness=fairness, task_id="p")
    sent = attrs.evolve(sent, payload=attrs.evolve(sent.payload, **scenario.callbacks_to()))
    scenario.transport.send([sent])
    scenario.kit.drain(Consumer(scenario.transport, tasks, [scenario.queue]))
    (delivery,) = scenario.kit.remaining(scenario.transport, scenario.callbacks, count=1)
    assert delivery.payload is not None
    assert (delivery.org_id, delivery.payload.fairness) == ("org-7", fairness)
    assert delivery.payload.task_id not in (None, "p")
    if scenario.kit.capabilities.priority:
        assert delivery.priority == 8


def test_a_callback_has_the_same_id_every_time(scenario: Scenario) -> None:
    """The task_id of a callback depends only on its parent's id, so that a callback can detect a repetition."""
    for _ in range(2):
        scenario.send("return", 1, task_id="same" + scenario.queue, **scenario.callbacks_to())
    scenario.kit.drain(Consumer(scenario.transport, tasks, [scenario.queue]))
    found = scenario.kit.remaining(scenario.transport, scenario.callbacks, count=2)
    assert len(found) == 2
    assert len({one.payload.task_id for one in found if one.payload}) == 1


def test_on_success_receives_a_returned_failure(scenario: Scenario) -> None:
    """A task that returns {"success": false} has returned: its on_success is called."""
    scenario.send("return", {"success": False, "error": "no text"}, **scenario.callbacks_to())
    scenario.consume()
    assert scenario.seen == [("ok", ({"success": False, "error": "no text"},), {})]


def test_callback_kwargs_arrive_unchanged(scenario: Scenario) -> None:
    """A continuation's kwargs are those of the dispatch, unchanged by the task."""
    kwargs = {"callback_kwargs": {"ids": [1, 2], "deep": {"x": None, "é": "\U0001f4dd"}, "error": None}, "n": 1.5}
    scenario.send("return", 1, **scenario.callbacks_to(**kwargs))
    scenario.consume()
    assert scenario.seen == [("ok", (1,), kwargs)]
