"""close(): connections and threads end, waiting callers get an error, and a second call does no harm."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from pg_tables import Tables
from postgres.support import LONG_POLL, in_background

from contract_tests.kit import wait_until
from contract_tests.messages import message
from contract_tests.test_closing import MORE_USES, USES
from transports.postgres import PostgresTransport
from unstract_core import Consumer, TransportClosed

Make = Callable[..., PostgresTransport]
Use = Callable[[Any, str], object]

EVERY_USE: dict[str, Use] = {
    **USES,
    **{name: use for name, (_, use) in MORE_USES.items()},
    "migrate": lambda transport, name: transport.migrate(),
}


def own_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("unstract-wire")}


def test_close_leaves_no_connection_and_no_thread(make_named: Make, tables: Tables, name: str, queue: str) -> None:
    """That holds after every kind of use: sends, bursts, waiting calls, a consumer, dead letters."""
    before = own_threads()
    transport = make_named()
    transport.send([message("t", queue, n) for n in range(3)])
    for n in range(20):
        transport.send([message("t", queue, n)])
    transport.reply("nobody", timeout=0.1)
    transport.queues()
    transport.dead.find()
    assert Consumer(transport, {"t": lambda n: n}, [queue]).drain(timeout=10) == 23
    assert tables.backends(name)
    transport.close()
    wait_until(lambda: not tables.backends(name), what="every connection to be gone")
    wait_until(lambda: own_threads() <= before, what="every thread to be gone")


def test_closed_subscription_leaves_no_connection(make_named: Make, tables: Tables, name: str, queue: str) -> None:
    """A subscription closes its connection, before and after its transport is closed."""
    transport = make_named()
    wait_until(lambda: not tables.backends(name), what="the migration's connection to be gone")
    first, second = transport.subscribe([queue], lease=5), transport.subscribe([queue], lease=5)
    first.close()
    first.close()
    wait_until(lambda: len(tables.backends(name)) == 1, what="the first subscription's connection to be gone")
    transport.close()
    second.close()
    wait_until(lambda: not tables.backends(name), what="every connection to be gone")


def test_waiting_call_ends_with_transport_closed(make_postgres: Make) -> None:
    """`close` ends every blocked `reply` of the process at once with TransportClosed."""
    transport = make_postgres(poll_interval=LONG_POLL)
    ended: list[str] = []

    def wait(key: str) -> None:
        with pytest.raises(TransportClosed):
            transport.reply(key, timeout=20)
        ended.append(key)

    with in_background(*[lambda key=key: wait(key) for key in "abc"]):
        wait_until(lambda: transport._waiter.waiting == 3, what="three callers to wait")
        closed = time.monotonic()
        transport.close()
        wait_until(lambda: len(ended) == 3, what="the callers to end")
    assert time.monotonic() - closed < 10


@pytest.mark.parametrize("use", EVERY_USE.values(), ids=EVERY_USE)
@pytest.mark.parametrize("used", [True, False], ids=["used before", "never used"])
def test_closed_transport_refuses_every_call(make_named: Make, tables: Tables, name: str, use: Use, used: bool) -> None:
    """Every method of a closed transport raises TransportClosed, and none connects again."""
    transport = make_named()
    if used:
        transport.send([message("t", "q")])
    transport.close()
    with pytest.raises(TransportClosed):
        use(transport, "q")
    wait_until(lambda: not tables.backends(name), what="no connection to be there")


def test_close_beside_busy_senders_leaves_no_connection(
    make_named: Make, tables: Tables, name: str, queue: str
) -> None:
    """Each busy sender ends with TransportClosed, and every message that it has an id for is in the table."""
    for _ in range(5):
        transport = make_named()
        sent: list[str] = []

        def send_on(transport: PostgresTransport = transport, sent: list[str] = sent) -> None:
            while True:
                try:
                    sent.extend(transport.send([message("t", queue)]))
                except TransportClosed:
                    return

        with in_background(*[send_on] * 4):
            time.sleep(0.05)
            transport.close()
        wait_until(lambda: not tables.backends(name), what="every connection to be gone")
        tables.execute("DELETE FROM {messages} WHERE msg_id = ANY (%s)", [int(id) for id in sent])
        assert tables.count(queue) == 0
