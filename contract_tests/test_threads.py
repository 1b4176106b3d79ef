"""Threads: `send` and `reply` are thread-safe; each subscription belongs to one thread."""

from __future__ import annotations

from functools import partial

from contract_tests.checking import CheckedTransport
from contract_tests.fixtures import Subscribe
from contract_tests.kit import Kit, retry_outages
from contract_tests.messages import first, make_settlement, message
from contract_tests.requires import requires
from contract_tests.time_limits import together
from unstract_core import Reply, Verdict


def test_many_threads_send_at_once(kit: Kit, transport: CheckedTransport, queue: str, subscribe: Subscribe) -> None:
    """Every accepted message arrives once, and each thread's messages arrive in its order.

    A send that failed with a known fate is repeated: a broker under load may refuse any message.
    """

    def send(number: int) -> list[str]:
        messages = [message("t", queue, number, n) for n in range(20)]
        return [id for one in messages for id in retry_outages(partial(transport.send, [one]), once=True)]

    sent = [id for ids in together(*(lambda n=n: send(n) for n in range(6))) for id in ids]
    received = kit.take(subscribe(queue), 120, limit=1000)
    assert sorted(delivery.id for delivery in received) == sorted(sent)
    for number in range(6):
        mine = [one.payload.args[1] for one in received if one.payload and first(one) == number]
        assert mine == list(range(20))


@requires("replies")
def test_many_threads_await_replies_at_once(kit: Kit, transport: CheckedTransport, queue: str) -> None:
    """Threads that send and wait for a reply each get their own reply, while a worker answers."""

    def ask(number: int) -> object:
        key = f"{queue}-{number}"
        transport.send([message("echo", queue, number, reply_key=key)])
        reply = transport.reply(key, timeout=40)
        return reply and reply.result

    with kit.running(transport, {"echo": lambda number: number}, queue, concurrency=2):
        assert together(*(lambda n=n: ask(n) for n in range(8))) == list(range(8))


def test_subscriptions_settle_in_parallel_threads(kit: Kit, transport: CheckedTransport, queue: str) -> None:
    """Threads that receive and settle on subscriptions of their own settle each message once."""
    elsewhere = kit.queue()
    transport.send([message("t", queue, n) for n in range(60)])
    ended: list[object] = []

    def work() -> None:
        subscription = transport.subscribe([queue], lease=60)
        while len(ended) < 60 and (batch := subscription.receive(limit=5, wait=max(0.2, kit.moment))):
            settled = subscription.settle(
                [make_settlement(one, Verdict.ACK, follow_up=message("f", elsewhere, first(one))) for one in batch]
            )
            assert all(settled)
            ended.extend(map(first, batch))
        subscription.close()

    together(work, work, work)
    assert sorted(map(first, kit.remaining(transport, queue, elsewhere, count=60))) == list(range(60))


@requires("replies")
def test_a_reply_is_read_while_others_send(kit: Kit, transport: CheckedTransport) -> None:
    """`reply` and `send` on different threads do not block each other."""
    key, queue = kit.queue(), kit.queue()
    kit.answer(transport, Reply(key, "completed", result=1))
    kit.answered(transport, key)

    def send() -> int:
        return len([transport.send([message("t", queue, n)]) for n in range(30)])

    def read() -> int:
        return sum(transport.reply(key) == Reply(key, "completed", result=1) for _ in range(30))

    assert together(send, read, send, read) == [30, 30, 30, 30]
    assert len(kit.remaining(transport, queue, count=60)) == 60
