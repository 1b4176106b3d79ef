"""URLs and settings of a Celery transport: accepted ones, and those that are refused before the first message."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from transports.celery import CeleryTransport, from_url
from unstract_core import Capabilities, ConfigurationError, NotSupported, TransportNotReady, load_transport

SCHEMES = ["amqp", "amqps", "pyamqp", "redis", "rediss"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_broker_schemes_find_this_transport(scheme: str) -> None:
    """Every scheme of a broker is an entry point, and nothing is connected before it is needed."""
    transport = load_transport(f"{scheme}://user:secret@127.0.0.1:1/x")
    assert isinstance(transport, CeleryTransport)
    transport.close()


def test_kombus_memory_broker_has_its_own_scheme() -> None:
    """memory:// is the memory transport, and celery+memory:// is kombu's broker in the process."""
    transport = load_transport("celery+memory://a-name")
    assert isinstance(transport, CeleryTransport)
    assert transport._settings.url == "memory://a-name"


def test_a_url_has_three_kinds_of_options() -> None:
    """The transport's options and queue arguments are taken out of the query, and kombu gets the rest unchanged."""
    ours = "confirm_timeout=2.5&heartbeat=7&declare=no"
    transport = from_url(f"amqp://h//?{ours}&x-queue-type=quorum&x-max-priority=10&ssl=true")
    settings = transport._settings
    assert settings.url == "amqp://h//?ssl=true"
    assert (settings.confirm_timeout, settings.heartbeat, settings.declare) == (2.5, 7.0, False)
    assert settings.arguments_of("q") == {"x-queue-type": "quorum", "x-max-priority": 10}


@pytest.mark.parametrize("option", ["confirm_timeout=soon", "pool_size=1.5", "declare=perhaps", "confirm_timeout=-1"])
def test_a_bad_option_value_is_refused(option: str) -> None:
    """ConfigurationError names an option with a bad value before anything is connected."""
    with pytest.raises(ConfigurationError, match=option.partition("=")[0]):
        from_url(f"amqp://h//?{option}")


@pytest.mark.parametrize(
    "options",
    [
        {"confirm_timeout": 0},
        {"connect_timeout": float("inf")},
        {"heartbeat": -1},
        {"pool_size": 0},
        {"default_queue": ""},
        {"queue_arguments": ["x-queue-type"]},
    ],
    ids=str,
)
def test_unusable_settings_are_refused(options: dict[str, Any]) -> None:
    """ConfigurationError names the setting and the values that are allowed."""
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        CeleryTransport("amqp://h//", **options)


def test_a_text_that_is_no_url_is_refused() -> None:
    """ConfigurationError shows the form of a broker's URL and quotes nothing of the text, which may be a password."""
    with pytest.raises(ConfigurationError, match="amqp://user:password@host") as caught:
        CeleryTransport("secret")
    assert "secret" not in str(caught.value)


def test_an_unknown_scheme_is_refused() -> None:
    """A scheme that kombu does not know raises ConfigurationError before anything is connected."""
    with pytest.raises(ConfigurationError, match="nosuch"):
        CeleryTransport("nosuch://h")


def test_an_unknown_option_is_refused() -> None:
    """ConfigurationError names a misspelt option, which would otherwise look like an unavailable broker."""
    with pytest.raises(ConfigurationError, match="conect_timeout"):
        from_url("amqp://h//?conect_timeout=3")


def test_an_unparsable_url_is_refused_without_a_quote() -> None:
    """A password with a slash makes a URL unparsable, and the error quotes no part of it."""
    with pytest.raises(ConfigurationError, match="%2F") as caught:
        CeleryTransport("amqp://guest:sEc/ret@h:1//")
    assert "sEc" not in f"{caught.value}{caught.value.__cause__}"


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without redis-py a redis:// URL is refused with the package to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'kombu\[redis\]'"):
        CeleryTransport("redis://h")


def test_queue_arguments_of_a_url_are_typed() -> None:
    """Queue arguments of a URL become integers and booleans where they look like them, and otherwise stay text."""
    settings = from_url("amqp://h//?x-single-active-consumer=true&x-max-length=5&x-overflow=reject-publish")._settings
    assert settings.arguments_of("q") == {
        "x-single-active-consumer": True,
        "x-max-length": 5,
        "x-overflow": "reject-publish",
    }


def test_queue_arguments_may_be_for_one_queue() -> None:
    """A mapping under a queue's name is for that queue alone, and a dead letter queue gets only the queue type."""
    arguments = {"x-queue-type": "quorum", "x-max-length": 5, "one": {"x-max-priority": 10}}
    settings = CeleryTransport("amqp://h//", queue_arguments=arguments)._settings
    assert settings.arguments_of("one") == {"x-max-priority": 10}
    assert settings.arguments_of("two") == {"x-queue-type": "quorum", "x-max-length": 5}
    assert settings.arguments_of("two.dead") == {"x-queue-type": "quorum"}


@pytest.mark.parametrize(
    ("url", "ranks", "claimed"),
    [("amqp://h//", 10, True), ("amqp://h//", 9, False), ("amqp://h//", None, False), ("memory://h", 10, False)],
)
def test_priorities_are_claimed_where_queues_keep_them(url: str, ranks: int | None, claimed: bool) -> None:
    """Priorities are claimed for ten ranks on AMQP, and capabilities that AMQP does not have are never claimed."""
    transport = CeleryTransport(url, queue_arguments={"x-max-priority": ranks} if ranks else None)
    assert transport.capabilities == Capabilities(delay=True, priority=claimed, replies=True, dead_letters=True)


def test_unsupported_operations_raise_not_supported() -> None:
    """Transactions, statuses and lists of queues raise NotSupported, with an alternative in the text."""
    transport = CeleryTransport("memory://not-supported")
    for call in (
        lambda: transport.send([], within=object()),
        lambda: transport.reply("a status"),
        lambda: transport.dead.find(),
        lambda: transport.dead.replay(),
        lambda: transport.dead.purge(),
        lambda: transport.queues(),
    ):
        with pytest.raises(NotSupported):
            call()


def test_importing_the_transport_does_not_import_celery() -> None:
    """No import of this package imports celery."""
    program = (
        "import sys, transports.celery, transports.celery.app_dispatcher, transports.celery.app_tasks;"
        "sys.exit('celery' in sys.modules or 'celery.app' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_an_unknown_user_is_not_ready(rabbitmq_url: str) -> None:
    """Subscribing as an unknown user raises TransportNotReady, which names the URL and not the password."""
    address = rabbitmq_url.partition("@")[2]
    transport = CeleryTransport(f"amqp://nobody:secret-word@{address}", connect_timeout=3)
    with pytest.raises(TransportNotReady, match="user, password") as caught:
        transport.subscribe(["q"], lease=1)
    assert "secret-word" not in str(caught.value)


def test_a_process_without_poll_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without select.poll, which eventlet removes, a transport over AMQP is refused with that reason."""
    monkeypatch.delattr("select.poll")
    with pytest.raises(ConfigurationError, match="eventlet's monkey_patch removes it"):
        CeleryTransport("amqp://127.0.0.1//")
    CeleryTransport("memory://").close()
