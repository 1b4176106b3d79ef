"""The table of the answers of RabbitMQ and Redis: each answer is unavailable, not ready or refused."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import amqp.exceptions
import brokers
import pytest
import redis
from redis import exceptions

from contract_tests.messages import message
from transports.celery import CeleryTransport
from transports.celery.errors import ERROR_RULES, ErrorRule, rule_for, translate
from unstract_core import TransportError, TransportNotReady, TransportRefused, TransportUnavailable
from unstract_core.errors import Meaning

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
KINDS: dict[Meaning, type[TransportError]] = {
    Meaning.UNAVAILABLE: TransportUnavailable,
    Meaning.IN_DOUBT: TransportUnavailable,
    Meaning.NOT_READY: TransportNotReady,
    Meaning.REFUSED: TransportRefused,
}
KEYS = [(key, answer) for answer in ERROR_RULES for key in answer.keys]


def raised(kind: str, said: str) -> Exception:
    """Return the driver's error for an AMQP reply code or a kind of error."""
    if kind.isdigit():
        error: Exception = amqp.exceptions.ERROR_MAP[int(kind)](said)
        return error
    return ValueError(said) if kind == "ValueError" else getattr(exceptions, kind)(said)


def test_the_documented_table_equals_the_code() -> None:
    """docs/errors.md lists the same answers, causes and meanings, in the same order."""
    _, _, section = PAGE.read_text().partition("\n## RabbitMQ and Redis\n")
    rows = re.findall(r"^\| (`.+?) \| (.+?) \| (.+?) \|", section.partition("\n#")[0], re.M)
    assert rows == [
        (", ".join(f"`{key}`" for key in answer.keys), answer.cause, answer.meaning.value) for answer in ERROR_RULES
    ]


@pytest.mark.parametrize(("key", "answer"), KEYS, ids=[key for key, _ in KEYS])
def test_every_answer_has_its_rows_error(key: str, answer: ErrorRule) -> None:
    """The error has the meaning of its row and a remedy, and its fate is known unless the row is in doubt."""
    kind, _, words = key.partition(" ")
    assert issubclass(answer.kind, KINDS[answer.meaning])
    if (kind.isdigit() and kind != "312") or kind.endswith("Error"):
        error = translate(raised(kind, f"said {words} said"), "send", fate_unknown=True)
        assert type(error) is answer.kind
        assert not getattr(error, "fate_unknown", False)
        assert answer.says in str(error)
        assert answer.advice in str(error)


def test_an_unlisted_reply_code_is_in_doubt() -> None:
    """A reply code without a row counts as a lost connection."""
    listed = {key.partition(" ")[0] for key, _ in KEYS}
    for code, kind in amqp.exceptions.ERROR_MAP.items():
        if str(code) not in listed:
            assert rule_for([str(code)]).meaning is Meaning.IN_DOUBT
            error = translate(kind("said"), "send", fate_unknown=True)
            assert isinstance(error, TransportUnavailable)
            assert error.fate_unknown


@pytest.fixture(scope="module")
def server() -> Iterator[brokers.PrivateRedis]:
    with brokers.private_redis("--rename-command", "LPUSH", "") as server:
        yield server


REFUSED: dict[str, tuple[Callable[[Any], object], str, type[TransportError], str]] = {
    "right": (
        lambda client: client.acl_setuser("u", enabled=True, nopass=True, keys=["none"], commands=["+@all"]),
        "u:x@",
        TransportNotReady,
        "Give the user the right",
    ),
    "user": (lambda client: client.acl_deluser("u"), "u:x@", TransportNotReady, "Check the user and password"),
    "key": (lambda client: client.set("_kombu.binding.q", "x"), "", TransportNotReady, "no other program uses a key"),
    "command": (lambda client: client.flushall(), "", TransportNotReady, "Redis refused: unknown command"),
    "replica": (lambda client: client.replicaof("127.0.0.1", 1), "", TransportUnavailable, "Redis refused for now"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_of_redis_has_its_rows_meaning(server: brokers.PrivateRedis, case: str) -> None:
    """The error of a send that Redis refuses has the refusal and the remedy, and its fate is known."""
    prepare, user, kind, said = REFUSED[case]
    with contextlib.closing(redis.Redis(port=server.port)) as client:
        prepare(client)
        with (
            contextlib.closing(CeleryTransport(server.url.replace("127", f"{user}127"))) as transport,
            pytest.raises(kind, match=said) as caught,
        ):
            transport.send([message("t", "q")])
        assert not getattr(caught.value, "fate_unknown", False)
        client.replicaof("NO", "ONE")
        client.flushall()
