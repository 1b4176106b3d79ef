"""Answers in the format of Celery's result backends, in both directions, and their time to live."""

from __future__ import annotations

import builtins
import json

import pytest
import strategies as some
from celery.backends.base import Backend
from celery_wire.letters import kit_over
from hypothesis import given
from hypothesis import strategies as st
from kombu.message import Message
from kombu.utils.json import dumps

from transports.celery.results import read_answer, write_answer
from unstract_core import NotSupported, Reply
from unstract_core.values import error_text

BUILTIN = [ValueError, KeyError, RuntimeError, ConnectionError, TimeoutError, ZeroDivisionError, LookupError]
replies = st.builds(lambda result: Reply("k", "completed", result=result), some.json_values) | st.builds(
    lambda name, text: Reply("k", "failed", error=f"{name}: {text}" if text else name),
    st.sampled_from(["ValueError", "KeyError", "TaskFailed", "Error_1", "OddOne"]),
    some.texts | st.builds(repr, some.texts | st.tuples(some.integers, some.texts)),
)


def failure(reply: Reply, kind: type[BaseException]) -> object:
    return write_answer(reply, task_id="t", correlation_id="k", reply_to="i", error_type=kind.__name__).body


def as_message(body: object) -> Message:
    return Message(body=dumps(body), content_type="application/json", content_encoding="utf-8")


@given(replies)
def test_an_answer_reads_back_as_written(reply: Reply) -> None:
    """A caller receives the result, or the type and text, that the worker has answered."""
    kind = reply.error.partition(":")[0]
    written = write_answer(reply, task_id="t", correlation_id="k", reply_to="inbox", error_type=kind)
    assert (written.queue, written.properties["correlation_id"], written.declared) == ("inbox", "k", False)
    answer = read_answer(as_message(written.body), "k")
    assert answer == Reply("k", reply.status, result=reply.result, error=reply.error)


@given(st.sampled_from(BUILTIN), some.texts)
def test_celery_raises_the_answered_exception(kind: type[Exception], text: str) -> None:
    """A client of Celery gets a failure of a builtin type as that type, with the text as its argument."""
    reply = Reply("k", "failed", error=error_text(kind(text)))
    body = json.loads(
        dumps(write_answer(reply, task_id="t", correlation_id="k", reply_to="i", error_type=kind.__name__).body)
    )
    exception = Backend.exception_to_python(Backend.__new__(Backend), body["result"])
    assert type(exception) is getattr(builtins, kind.__name__)
    assert str(exception) == str(kind(text))


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, BaseException])
def test_an_answered_system_exit_is_harmless(kind: type[BaseException]) -> None:
    """A SystemExit of a task reaches Celery's client as an ordinary exception of that name."""
    reply = Reply("k", "failed", error=error_text(kind(3)))
    body = json.loads(
        dumps(write_answer(reply, task_id="t", correlation_id="k", reply_to="i", error_type=kind.__name__).body)
    )
    exception = Backend.exception_to_python(Backend.__new__(Backend), body["result"])
    assert isinstance(exception, Exception)
    assert (type(exception).__name__, str(exception)) == (kind.__name__, "3")


@given(st.sampled_from(BUILTIN), st.lists(some.texts | some.integers, max_size=3))
def test_a_real_workers_failure_has_its_text(kind: type[Exception], arguments: list[str | int]) -> None:
    """A failure of a Celery worker reads as `Type: message`, with the exception's own text of its arguments."""
    exc = kind(*kind(*arguments).args)
    meta = {"exc_type": kind.__name__, "exc_message": list(exc.args), "exc_module": "builtins"}
    answer = read_answer(as_message({"status": "FAILURE", "result": meta}), "k")
    assert answer is not None
    assert answer.error == error_text(exc)


@given(st.sampled_from(["PENDING", "STARTED", "RETRY", "RECEIVED", "nonsense"]), some.json_values)
def test_intermediate_states_are_no_answer(status: str, result: object) -> None:
    """STARTED and RETRY of a task are no answer to its caller."""
    assert read_answer(as_message({"status": status, "result": result}), "k") is None


@given(some.json_values | st.just({"status": "SUCCESS"}))
def test_an_unreadable_answer_is_ignored(body: object) -> None:
    """An unreadable message in the reply queue is no answer and raises nothing."""
    assert read_answer(as_message(body), "k") is None
    assert read_answer(Message(body=b"\xff", content_type="application/x-python-serialize"), "k") is None


@pytest.mark.parametrize("broker", ["rabbitmq", "redis", "memory"])
def test_an_answer_expires(request: pytest.FixtureRequest, broker: str) -> None:
    """After its time to live a reply key is as unknown as one that was never used."""
    url = "celery+memory://answers" if broker == "memory" else request.getfixturevalue(f"{broker}_url")
    with kit_over(url) as kit, kit.open() as transport:
        key = kit.queue()
        kit.answer(transport, Reply(key, "completed", result=1))
        assert kit.answered(transport, key) == Reply(key, "completed", result=1)
        reply_queue = transport.unchecked._reply_queue
        with reply_queue._changed:
            reply_queue._awaited[key].until = 0.0
        with pytest.raises(NotSupported):
            transport.reply(key)
