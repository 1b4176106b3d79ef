"""Error texts: for each cause the text names the problem and a remedy that works."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Callable
from typing import Any

import brokers
import kombu
import pytest
from hypothesis import given
from hypothesis import strategies as st
from queues import queue_name
from servers import free_port

from transports.celery import CeleryTransport
from transports.celery.transport import from_url
from unstract_core import (
    ConfigurationError,
    ContinuationSpec,
    ContractError,
    Dispatcher,
    Message,
    Settlement,
    TaskPayload,
    TransportNotReady,
    TransportRefused,
    TransportUnavailable,
    Verdict,
)
from unstract_core.continuation import settle
from unstract_core.outcomes import RetryPolicy, Returned

SECRET = "-".join(["S3", "CRET"])
QUICK: dict[str, Any] = {"connect_timeout": 2.0, "confirm_timeout": 5.0}


def refusal(url: str, queue: str, **options: Any) -> ContractError:
    """Return what sending a message to a queue raises."""
    with (
        pytest.raises(ContractError) as caught,
        contextlib.closing(CeleryTransport(url, **QUICK, **options)) as transport,
    ):
        Dispatcher(transport).send("t", queue=queue)
    return caught.value


@pytest.fixture
def there(rabbitmq_url: str, queue_of_none: str) -> Any:
    """A channel on which a test declares conflicting queues and exchanges, which are deleted afterwards."""
    with kombu.Connection(rabbitmq_url) as connection:
        yield connection.channel()
        for delete in ("exchange_delete", "queue_delete"):
            with contextlib.suppress(Exception):
                getattr(connection.channel(), delete)(queue_of_none)


@pytest.fixture
def queue_of_none() -> str:
    """The name of a queue that is not there."""
    return queue_name()


EXCHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"type": "fanout"}, "type is 'fanout' there, and 'direct' was asked for"),
    "durable": ({"durable": False}, "durable is 'false' there, and 'true' was asked for"),
    "auto_delete": ({"auto_delete": True}, "auto_delete is 'true' there, and 'false' was asked for"),
}


@pytest.mark.parametrize("case", EXCHANGES)
def test_a_different_exchange_is_named(rabbitmq_url: str, there: Any, queue_of_none: str, case: str) -> None:
    """The error names the exchange, and does not advise to delete the queue."""
    properties, said = EXCHANGES[case]
    kombu.Exchange(queue_of_none, channel=there, **properties).declare()
    error = refusal(rabbitmq_url, queue_of_none)
    assert isinstance(error, TransportNotReady)
    assert f"an exchange of the queue's name exists with other properties: {said}" in str(error)
    assert "delete the queue" not in str(error)
    assert "queue_arguments" not in str(error)


QUEUES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "durable": ({"durable": False}, {}, "durable is 'false' there.*declare=False to use the queue as it is"),
    "auto_delete": ({"auto_delete": True}, {}, "auto_delete is 'true' there.*declare=False to use the queue as it is"),
    "exclusive": ({"exclusive": True}, {}, "is exclusive to another connection. Use a queue of another name"),
    "argument": ({"queue_arguments": {"x-max-priority": 3}}, {}, r"pass queue_arguments= .*\?x-max-priority=3"),
    "other argument": (
        {"queue_arguments": {"x-max-priority": 3}},
        {"queue_arguments": {"x-max-priority": 10}},
        r"x-max-priority is '3' there, and '10' was asked for.*\?x-max-priority=3",
    ),
}


@pytest.mark.parametrize("case", QUEUES)
def test_a_different_queue_is_named(rabbitmq_url: str, there: Any, queue_of_none: str, case: str) -> None:
    """The error names the difference of the queue, and a remedy for that property."""
    properties, options, said = QUEUES[case]
    kombu.Queue(queue_of_none, channel=there, **properties).declare()
    error = refusal(rabbitmq_url, queue_of_none, **options)
    assert isinstance(error, TransportNotReady)
    assert re.search(said, str(error))
    assert "permissions" not in str(error)


INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "value": ({"queue_arguments": {"x-max-priority": 1000}}, "invalid arg 'x-max-priority'.*Correct queue_arguments"),
    "type": ({"queue_arguments": {"x-queue-type": "odd"}}, "invalid arg 'x-queue-type'.*Correct queue_arguments"),
    "no queue": ({"declare": False}, "no such queue exists; declare it, or set declare=True"),
}


@pytest.mark.parametrize("case", INVALID)
def test_an_impossible_queue_is_explained(rabbitmq_url: str, queue_of_none: str, case: str) -> None:
    """The error names the broker's refusal and the setting to correct."""
    options, said = INVALID[case]
    error = refusal(rabbitmq_url, queue_of_none, **options)
    assert isinstance(error, TransportNotReady)
    assert re.search(said, str(error))
    assert "permissions" not in str(error)


def test_a_reserved_name_is_explained(rabbitmq_url: str) -> None:
    """The error of a queue with the prefix amq. names the prefix and not the permissions."""
    error = refusal(rabbitmq_url, "amq.odd")
    assert str(error).endswith("Choose a name that does not begin with 'amq.'")


def test_a_missing_queue_is_explained(rabbitmq_url: str, queue_of_none: str) -> None:
    """A subscriber that declares nothing is advised to declare the queue."""
    said = r"no queue .*\. Declare the queue, or set declare=True"
    with contextlib.closing(CeleryTransport(rabbitmq_url, declare=False)) as transport:
        with pytest.raises(TransportNotReady) as caught:
            transport.subscribe([queue_of_none], lease=10)
        assert re.search(said, str(caught.value))


ADDRESSES: dict[str, tuple[Callable[[str], str], str]] = {
    "no port": (lambda url: f"amqp://127.0.0.1:{free_port()}//", "the broker cannot be reached; check host and port"),
    "no host": (lambda url: "amqp://no.such.host.invalid//", "the broker cannot be reached; check host and port"),
    "no Redis": (lambda url: f"redis://127.0.0.1:{free_port()}/0", "the broker cannot be reached; check host and port"),
    "no TLS": (lambda url: "amqps://" + url.partition("://")[2], "TLS failed; check that the port"),
}


@pytest.mark.parametrize("case", ADDRESSES)
def test_an_unreachable_broker_is_no_lost_connection(rabbitmq_url: str, case: str) -> None:
    """The error of a failed connect does not mention a lost connection."""
    address, said = ADDRESSES[case]
    error = refusal(address(rabbitmq_url), "q")
    assert isinstance(error, TransportUnavailable)
    assert said in str(error)
    assert "was lost" not in str(error)


@pytest.mark.parametrize("user", [":{pw}@", "me:{pw}@", ""], ids=["password", "user", "none"])
def test_a_refused_redis_password_is_named(user: str) -> None:
    """A missing or wrong password and an unknown user have their own errors, without the password."""
    with brokers.private_redis("--requirepass", "right") as server:
        error = refusal(server.url.replace("127", user.format(pw=SECRET) + "127"), "q")
    assert isinstance(error, TransportNotReady)
    assert "Redis refused: " in str(error)
    assert "Check the user and password in the URL" in str(error)
    assert SECRET not in str(error)


def test_a_refusal_of_redis_keeps_its_text() -> None:
    """A full memory and a missing database are reported with the text of Redis."""
    with brokers.private_redis("--maxmemory", "1", "--databases", "2") as server:
        assert "Redis refused for now: command not allowed when used memory" in str(refusal(server.url, "q"))
        other = server.url.removesuffix("/0")
        for name in ("7", "name"):
            error = refusal(f"{other}/{name}", "q")
            assert isinstance(error, TransportNotReady)
            assert "there is no such database: " in str(error)
            assert "End the URL with the number of a database" in str(error)


URLS = [
    f"amqp://a:pw@h//;amqp://b:{SECRET}@h:x//",
    f"amqp://a:pw@h//;amqp://b:{SECRET}/x@h//",
    f"amqp://a:pw@h//?heartbeat=10;amqp://b:{SECRET}@h//",
    f"amqps://a:pw@h//?ssl_cert_reqs=none;amqps://b:{SECRET}@h",
    f"amqp://a:x;{SECRET}@h//",
    f"amqp://a?pw={SECRET}@h",
    f"amqp://a:{SECRET}@h//?odd=1",
    f"redis://:{SECRET}@h:x/0",
]
parts = st.sampled_from(["amqp://a:pw@h//", f"amqp://b:{SECRET}@h//", f"redis://:{SECRET}@h/0", f"amqp://b:x{SECRET}"])
joints = st.sampled_from([";", "?heartbeat=1;", "?heartbeat=x&", "@", "#", "?", ":", "/", "?ssl_cert_reqs=", "[", " "])


@given(st.lists(st.tuples(parts, joints), min_size=1, max_size=3).map(lambda pairs: "".join(a + b for a, b in pairs)))
def test_no_error_quotes_a_password(url: str) -> None:
    """No error about a malformed URL quotes a password of one of its addresses."""
    problem = ""
    try:
        from_url(url).close()
    except ConfigurationError as exc:
        problem = str(exc)
    assert SECRET not in problem


@pytest.mark.parametrize("url", URLS)
def test_no_known_mistake_quotes_a_password(url: str) -> None:
    """Known mistakes in a URL are refused by the constructor without the password."""
    with pytest.raises(ConfigurationError) as caught:
        from_url(url)
    assert SECRET not in str(caught.value)


def test_a_missing_redis_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without redis-py the error names the package to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'kombu\[redis\]'"):
        CeleryTransport("redis://127.0.0.1:6379/0").subscribe(["q"], lease=60)


def test_a_refused_follow_up_keeps_effect_and_remedy(rabbitmq_url: str, queue: str, queue_of_none: str) -> None:
    """A settlement whose callback's queue is missing is refused with problem, effect and remedy as attributes."""
    payload = TaskPayload(
        task_name="t", queue=queue, on_success=ContinuationSpec(task_name="done", queue=queue_of_none)
    )
    with contextlib.closing(CeleryTransport(rabbitmq_url, declare=False, **QUICK)) as transport:
        transport.send([Message(payload, queue)])
        with contextlib.closing(transport.subscribe([queue], lease=60)) as subscription:
            (delivery,) = subscription.receive(limit=1, wait=10)
            with pytest.raises(TransportRefused) as caught:
                subscription.settle([settle(delivery, Returned(1), RetryPolicy())])
            subscription.settle([Settlement(delivery, Verdict.ACK)])
    cause = caught.value.__cause__
    assert isinstance(cause, TransportNotReady)
    assert cause.remedy == "declare it, or set declare=True"
    problem = (caught.value.problem, caught.value.effect, caught.value.remedy)
    assert problem == (cause.problem, cause.effect, cause.remedy)
