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

from transports.celery.encode import Outgoing
from transports.celery.results import read_answer, write_answer
from unstract_core import NotSupported, Reply
from unstract_core.outcomes import Rejected
from unstract_core.values import error_parts, error_text, normalise

BUILTIN = [ValueError, KeyError, RuntimeError, ConnectionError, TimeoutError, ZeroDivisionError, LookupError]
ODD_NAMES = ["", "Überlauf", "not a name", "1st", "a.b"]
messages = some.texts | st.builds(repr, some.texts | st.tuples(some.integers, some.texts))


def written(reply: Reply, error_type: str = "", error_message: str = "") -> Outgoing:
    return write_answer(
        reply, task_id="t", correlation_id="k", reply_to="i", error_type=error_type, error_message=error_message
    )


def failed(error_type: str, error_message: str) -> Outgoing:
    """Return the answer of a failure, as a settlement of the core has it."""
    error = Rejected(error_type, error_message).error
    return written(Reply("k", "failed", error=error), error_type, error_message)


def as_message(body: object) -> Message:
    return Message(body=dumps(body), content_type="application/json", content_encoding="utf-8")


@given(some.json_values)
def test_an_answer_reads_back_as_written(result: object) -> None:
    """A caller receives the result that the worker has answered."""
    reply = Reply("k", "completed", result=normalise(result))
    answer = written(reply)
    assert (answer.queue, answer.properties["correlation_id"], answer.declared) == ("i", "k", False)
    assert read_answer(as_message(answer.body), "k") == reply


@given(st.sampled_from(["ValueError", "KeyError", "TaskFailed", "Error_1", "OddOne", *ODD_NAMES]), messages)
def test_a_failure_reads_back_as_written(name: str, message: str) -> None:
    """A caller receives the type and text of the failure that the worker has answered."""
    error = Rejected(name, message).error
    assert read_answer(as_message(failed(name, message).body), "k") == Reply("k", "failed", error=error)


@given(st.sampled_from(["OddOne", "Error_1", "ValueError"]), messages)
def test_an_answer_has_the_errors_message(name: str, message: str) -> None:
    """The answer of a failure has the error's type, and its message without the type as the only argument."""
    result = failed(name, message).body["result"]
    assert (result["exc_type"], result["exc_message"]) == (name, [message] if message else [])


@given(st.sampled_from(ODD_NAMES), messages)
def test_an_odd_type_name_is_sent_as_exception(name: str, message: str) -> None:
    """A type name that begins with another letter than an ASCII one is sent as Exception, with the whole error text."""
    result = failed(name, message).body["result"]
    error = Rejected(name, message).error
    assert (result["exc_type"], result["exc_module"]) == ("Exception", "builtins")
    assert result["exc_message"] == ([error] if error else [])


@given(st.sampled_from(BUILTIN), some.texts)
def test_celery_raises_the_answered_exception(kind: type[Exception], text: str) -> None:
    """A client of Celery gets a failure of a builtin type as that type, with the text as its argument."""
    body = json.loads(dumps(failed(*error_parts(kind(text))).body))
    exception = Backend.exception_to_python(Backend.__new__(Backend), body["result"])
    assert type(exception) is getattr(builtins, kind.__name__)
    assert str(exception) == str(kind(text))


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, BaseException])
def test_an_answered_system_exit_is_harmless(kind: type[BaseException]) -> None:
    """A SystemExit of a task reaches Celery's client as an ordinary exception of that name."""
    body = json.loads(dumps(failed(*error_parts(kind(3))).body))
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
