"""Transactions: a message sent within the caller's transaction is committed or rolled back with it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract_tests.checking import CheckedTransport
from contract_tests.fixtures import Subscribe
from contract_tests.kit import Kit
from contract_tests.messages import first, message
from contract_tests.profiles import examples
from contract_tests.requires import requires
from unstract_core import ContractError, PayloadError


@requires("transactional_send")
def test_a_commit_sends_the_messages(kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe) -> None:
    """Messages are visible only after the caller's commit, under the ids that `send` returned."""
    subscription = subscribe(queue)
    with kit.caller(transport) as connection:
        ids = transport.send([message("t", queue, n) for n in range(3)], within=begun(connection))
        assert kit.nothing(subscription)
        connection.commit()
    received = kit.take(subscription, 3, limit=10)
    assert {one.id: first(one) for one in received} == dict(zip(ids, range(3), strict=True))


@requires("transactional_send")
def test_a_rollback_sends_nothing(kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe) -> None:
    """After a rollback no message is sent, and the connection can be used as before."""
    with kit.caller(transport) as connection:
        transport.send([message("t", queue, "rolled back")], within=begun(connection))
        connection.rollback()
        transport.send([message("t", queue, "committed")], within=begun(connection))
        connection.commit()
    assert list(map(first, kit.take(subscribe(queue), 1, limit=10))) == ["committed"]


@requires("transactional_send")
def test_a_refused_message_keeps_the_transaction_usable(
    kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe
) -> None:
    """PayloadError is raised before anything is sent: the caller can still commit its transaction."""
    with kit.caller(transport) as connection:
        cursor = begun(connection)
        transport.send([message("t", queue, 1)], within=cursor)
        with pytest.raises(PayloadError):
            transport.send([message("t", queue, 2), message("t", queue, object())], within=cursor)
        transport.send([message("t", queue, 3)], within=cursor)
        connection.commit()
    assert list(map(first, kit.take(subscribe(queue), 2, limit=10))) == [1, 3]


@requires("transactional_send")
def test_within_refuses_anything_but_a_cursor(kit: Kit, transport: CheckedTransport, queue: str) -> None:
    """`within` is a DB-API cursor: any other object raises an error, and nothing is sent."""
    for thing in (object(), "cursor", 7):
        with pytest.raises(ContractError, match="cursor"):
            transport.send([message("t", queue)], within=thing)
    assert not kit.remaining(transport, queue)


@requires("transactional_send")
def test_only_committed_transactions_send(kit: Kit) -> None:
    """Exactly the messages of committed transactions arrive, in order within each transaction."""
    with kit.open() as transport:

        @examples(10)
        @given(st.lists(st.tuples(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.booleans()), max_size=5))
        def property_(transactions: list[tuple[list[int], bool]]) -> None:
            queue, expected, number = kit.queue(), [], 0
            with kit.caller(transport) as connection:
                for sizes, commits in transactions:
                    cursor = begun(connection)
                    for size in sizes:
                        sent = list(range(number, number + size))
                        number += size
                        transport.send([message("t", queue, n) for n in sent], within=cursor)
                        expected += sent if commits else []
                    connection.commit() if commits else connection.rollback()
            received = kit.remaining(transport, queue, count=len(expected))
            assert list(map(first, received)) == expected

        property_()


def begun(connection: Any) -> Any:
    """Return a cursor in an open transaction. Some drivers begin it with the first statement."""
    cursor = connection.cursor()
    cursor.execute("SELECT 1")
    cursor.fetchall()
    return cursor
