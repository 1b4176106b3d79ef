"""Dead letters under any order of operations, among foreign messages."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
from celery_wire.letters import Put, bury_next, kit_over, put_letters, standing
from celery_wire.support import Pipe
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from queues import queue_name

from contract_tests.checking import CheckedTransport
from contract_tests.kit import Kit, wait_until
from contract_tests.messages import message
from transports.celery import CeleryTransport

UNSHRUNK = (Phase.explicit, Phase.reuse, Phase.generate)
"""A broker takes too long, and too many queues, to be asked for the smallest example."""


@pytest.fixture(scope="module")
def transport_for_all(rabbitmq_url: str) -> Iterator[CeleryTransport]:
    """One for all examples of a property."""
    with contextlib.closing(CeleryTransport(rabbitmq_url)) as transport:
        yield transport


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.datetimes(datetime.datetime(1970, 1, 2))
    | st.datetimes(timezones=st.timezones()).map(str),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
NAMES = ["id", "task", "retries", "eta", "compression", "x-delivery-count", "x-death", "x-fairness-key", "odd"]
NAMES += ["x-dead-id", "x-dead-at", "x-dead-reason", "x-dead-attempts", "x-dead-queue"]
strangers = st.tuples(
    st.binary(max_size=20)
    | st.text(max_size=20).map(lambda text: json.dumps([[text], {}, {"x-dead-result": text}]).encode()),
    st.dictionaries(st.sampled_from(NAMES), values, max_size=6),
    st.sampled_from(["application/json", "application/x-python-serialize"]),
)


@settings(max_examples=25, phases=UNSHRUNK)
@given(batch=st.lists(strangers, min_size=1, max_size=4))
def test_any_message_is_a_dead_letter(transport_for_all: CeleryTransport, pipe: Pipe, batch: list[Put]) -> None:
    """Any message in a dead letter queue has its own id, is shown, removed and replayed, and hides no other."""
    transport, queue = transport_for_all, pipe.declare(queue_name())
    pipe.declare(f"{queue}.dead")
    try:
        put_letters(pipe, queue, *batch)
        ids = [letter.id for letter in transport.dead.find(queue=queue)]
        assert len(set(ids)) == len(batch)
        for id in ids:
            (letter,) = transport.dead.get([id])
            assert letter.id == id
        assert transport.dead.purge(ids=ids[:1]) == 1
        assert sorted(transport.dead.replay(queue=queue)) == sorted(ids[1:])
        assert transport.dead.find(queue=queue) == []
        assert len(pipe.left(queue)) == len(batch) - 1
    finally:
        pipe.delete(queue)


numbers = st.lists(st.integers(0, 5), max_size=3)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(1, 3)),
        st.tuples(st.just("bury"), st.integers(1, 3)),
        st.tuples(st.just("find"), st.integers(1, 4)),
        st.tuples(st.sampled_from(["get", "replay", "purge"]), numbers),
        st.tuples(st.just("replay all"), st.none()),
    ),
    min_size=3,
    max_size=12,
)


@attrs.define
class Model:
    """The expected content of both queues, with numbered messages and the dead letters in order."""

    queue: list[int] = attrs.field(factory=list)
    dead: list[int] = attrs.field(factory=list)
    sent: int = 0

    def letters(self, chosen: list[int]) -> list[int]:
        """Return the letters at these places, in order; places where none is are of none."""
        return [self.dead[place] for place in sorted(set(chosen)) if place < len(self.dead)]


def check_against_the_model(kit: Kit, transport: CheckedTransport, url: str, steps: list[tuple[str, Any]]) -> None:
    queue, model, ids = kit.queue(), Model(), dict[int, str]()
    for step, number in steps:
        if step == "send":
            new = list(range(model.sent, model.sent + number))
            transport.send([message("t", queue, n) for n in new])
            model.queue, model.sent = model.queue + new, model.sent + number
        elif step == "bury":
            buried = [_number(held.raw) for held in bury_next(transport, queue, min(number, len(model.queue)))]
            model.queue, model.dead = [n for n in model.queue if n not in buried], model.dead + buried
        elif step == "find":
            letters = transport.dead.find(queue=queue, limit=number)
            assert [_number(letter.message) for letter in letters] == model.dead[::-1][:number]
        elif step == "replay all":
            assert list(transport.dead.replay(queue=queue)) == [ids[n] for n in model.dead]
            model.queue, model.dead = model.queue + model.dead, []
        else:
            chosen = model.letters(number)
            named = [ids[n] for n in chosen[::-1]]
            if step == "get":
                assert [_number(letter.message) for letter in transport.dead.get(named)] == chosen
            elif step == "replay":
                assert list(transport.dead.replay(named)) == named[::-1]
                model.queue += chosen
            else:
                assert transport.dead.purge(ids=named) == len(named)
            if step != "get":
                model.dead = [n for n in model.dead if n not in chosen]
        ids = {_number(letter.message): letter.id for letter in transport.dead.find(queue=queue)}
        assert list(ids)[::-1] == model.dead
    left: list[int] = []

    def all_are_there() -> bool:
        """Whether all messages are back, some of them a moment after their subscription was closed."""
        left.extend(raw.decode()[0][0] for raw in standing(url, queue))
        return len(left) >= len(model.queue)

    wait_until(all_are_there, what="the messages to be back in their queue")
    assert sorted(left) == sorted(model.queue)
    assert [raw.decode()[0][0] for raw in standing(url, f"{queue}.dead")] == model.dead


def _number(wire: Any) -> int:
    return int(wire["args"][0])


@settings(max_examples=100)
@given(steps=steps)
def test_every_message_exists_once(steps: list[tuple[str, Any]]) -> None:
    """After any sends, burials, reads, replays and purges each message exists once, with the dead letters in order."""
    with kit_over("celery+memory://model") as kit, kit.open() as transport:
        check_against_the_model(kit, transport, "memory://model", steps)


@pytest.mark.parametrize("query", ["", "?x-queue-type=quorum"], ids=["classic", "quorum"])
def test_every_message_exists_once_on_rabbitmq(rabbitmq_url: str, query: str) -> None:
    """The same holds on RabbitMQ, with fewer examples."""

    @settings(max_examples=8, phases=UNSHRUNK)
    @given(steps=steps)
    def check(steps: list[tuple[str, Any]]) -> None:
        with kit_over(rabbitmq_url + query) as kit, kit.open() as transport:
            check_against_the_model(kit, transport, rabbitmq_url, steps)

    check()
