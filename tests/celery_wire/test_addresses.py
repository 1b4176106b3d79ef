"""How a Celery transport is addressed and set up: what is taken, and what is refused before the first message."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from transports.celery import CeleryTransport, from_url
from unstract_core import Capabilities, ConfigurationError, NotSupported, TransportNotReady, load_transport

SCHEMES = ["amqp", "amqps", "pyamqp", "redis", "rediss"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_brokers_url_finds_this_transport(scheme: str) -> None:
    """Every scheme of a broker is an entry point; nothing is connected before it is needed."""
    transport = load_transport(f"{scheme}://user:secret@127.0.0.1:1/x")
    assert isinstance(transport, CeleryTransport)
    transport.close()


def test_kombus_broker_in_the_process_has_a_url_of_its_own() -> None:
    """memory:// stays the memory transport's; celery+memory:// is kombu's broker."""
    transport = load_transport("celery+memory://a-name")
    assert isinstance(transport, CeleryTransport)
    assert transport._settings.url == "memory://a-name"


def test_the_options_of_a_url_are_ours_the_queues_and_kombus() -> None:
    """Ours are taken out of the query, queue arguments too, and the rest is handed to kombu as it is."""
    ours = "confirm_timeout=2.5&heartbeat=7&declare=no"
    transport = from_url(f"amqp://h//?{ours}&x-queue-type=quorum&x-max-priority=10&ssl=true")
    settings = transport._settings
    assert settings.url == "amqp://h//?ssl=true"
    assert (settings.confirm_timeout, settings.heartbeat, settings.declare) == (2.5, 7.0, False)
    assert settings.arguments_of("q") == {"x-queue-type": "quorum", "x-max-priority": 10}


@pytest.mark.parametrize("option", ["confirm_timeout=soon", "pool_size=1.5", "declare=perhaps", "confirm_timeout=-1"])
def test_an_option_that_makes_no_sense_is_refused(option: str) -> None:
    """ConfigurationError names the option, before anything is connected."""
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
def test_settings_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    """ConfigurationError says which, and what would do."""
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        CeleryTransport("amqp://h//", **options)


def test_a_url_that_is_none_is_refused() -> None:
    """ConfigurationError shows what a broker's URL looks like, and not what was given: it may hold a password."""
    with pytest.raises(ConfigurationError, match="amqp://user:password@host") as caught:
        CeleryTransport("secret")
    assert "secret" not in str(caught.value)


def test_a_scheme_that_kombu_does_not_know_is_refused() -> None:
    """ConfigurationError, before anything is connected."""
    with pytest.raises(ConfigurationError, match="nosuch"):
        CeleryTransport("nosuch://h")


def test_an_option_that_nobody_knows_is_refused() -> None:
    """ConfigurationError names it: a misspelt one would otherwise be taken for a broker that is away."""
    with pytest.raises(ConfigurationError, match="conect_timeout"):
        from_url("amqp://h//?conect_timeout=3")


def test_a_url_that_cannot_be_parsed_is_refused_without_a_word_of_it() -> None:
    """A password with a slash ends up where a port is expected: the error quotes nothing."""
    with pytest.raises(ConfigurationError, match="%2F") as caught:
        CeleryTransport("amqp://guest:sEc/ret@h:1//")
    assert "sEc" not in f"{caught.value}{caught.value.__cause__}"


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """redis:// without redis says what to install, when the transport is made."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'kombu\[redis\]'"):
        CeleryTransport("redis://h")


def test_an_argument_of_a_queue_has_the_type_that_it_looks_like() -> None:
    """Numbers are ints, true and false bools, and all else is text."""
    settings = from_url("amqp://h//?x-single-active-consumer=true&x-max-length=5&x-overflow=reject-publish")._settings
    assert settings.arguments_of("q") == {
        "x-single-active-consumer": True,
        "x-max-length": 5,
        "x-overflow": "reject-publish",
    }


def test_queue_arguments_may_be_for_one_queue() -> None:
    """A mapping under a queue's name is that queue's alone; a dead letter queue has the type, and nothing else."""
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
    """Ten ranks on a real broker; what AMQP cannot do is never claimed."""
    transport = CeleryTransport(url, queue_arguments={"x-max-priority": ranks} if ranks else None)
    assert transport.capabilities == Capabilities(delay=True, priority=claimed, replies=True, dead_letters=True)


def test_what_a_broker_cannot_do_raises_not_supported() -> None:
    """No transaction to join, no status to read, no list of queues: each says what to do instead."""
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
    """kombu alone: `celery` is not among the modules, whatever of this package was imported."""
    program = (
        "import sys, transports.celery, transports.celery.app_dispatcher, transports.celery.app_tasks;"
        "sys.exit('celery' in sys.modules or 'celery.app' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_user_that_the_broker_does_not_know_is_told_to_look_at_the_url(rabbitmq_url: str) -> None:
    """TransportNotReady at subscribe, without the password."""
    address = rabbitmq_url.partition("@")[2]
    transport = CeleryTransport(f"amqp://nobody:secret-word@{address}", connect_timeout=3)
    with pytest.raises(TransportNotReady, match="user, password") as caught:
        transport.subscribe(["q"], lease=1)
    assert "secret-word" not in str(caught.value)


def test_eventlet_is_named_where_nothing_can_be_waited_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without select.poll, which eventlet removes, a transport over AMQP is refused with the reason when it is made."""
    monkeypatch.delattr("select.poll")
    with pytest.raises(ConfigurationError, match="eventlet's monkey_patch removes it"):
        CeleryTransport("amqp://127.0.0.1//")
    CeleryTransport("memory://").close()
