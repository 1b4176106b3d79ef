"""Faults in waiting, waking and closing."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any

from kit.planting import Composed, ComposedHarness, fault

from transports.memory.store import Store
from transports.memory.subscription import MemorySubscription
from unstract_core.errors import TransportClosed, TransportUnavailable
from unstract_core.transport import Delivery, Message, Settlement, Verdict


@fault("test_a_sent_message_wakes_a_waiting_receive", "is in receive(limit=1, wait=30)")
class ChecksOnceAndThenSleeps(MemorySubscription):
    """A waiting `receive` checks for messages only at the start and at the end."""

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        if not (found := super().receive(limit=limit, wait=0)):
            time.sleep(wait)
            found = super().receive(limit=limit, wait=0)
        return found


@fault("test_a_retried_message_wakes_a_waiting_receive", "is in receive(limit=1, wait=30)")
class RetriesWithoutWaking(MemorySubscription):
    """RETRY makes a message ready without waking a waiting `receive`."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        store, quiet = self._store, threading.Condition()
        condition, store.changed = store.changed, quiet
        try:
            with condition:
                return super().settle(settlements)
        finally:
            store.changed = condition


@fault("test_a_due_message_wakes_a_waiting_receive", "is in receive(limit=1, wait=30)")
class OversleepsADelay(Store):
    """A waiting `receive` is not woken when a delayed message becomes due."""

    def requeue_due(self) -> float | None:
        super().requeue_due()
        return None


@fault("test_an_empty_receive_returns_after_its_wait", "assert 0.25 < ")
class DoesNotWait(MemorySubscription):
    """An empty `receive` returns at once, so that its worker would spin."""

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        return super().receive(limit=limit, wait=0)


@fault("test_a_receive_without_a_wait_returns_at_once", "is in receive(limit=1, wait=0)")
class AlwaysWaits(MemorySubscription):
    """`receive(wait=0)` waits for seconds."""

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        return super().receive(limit=limit, wait=max(wait, 5))


@fault("test_wake_ends_a_wait", "is in receive(limit=0, wait=30)")
class CannotBeWoken(MemorySubscription):
    """`wake` does nothing."""

    def wake(self) -> None:
        return


@fault("test_a_wake_before_the_wait_is_not_lost", "is in receive(limit=1, wait=30)")
class ForgetsAnEarlyWake(MemorySubscription):
    """`wake` ends only a current wait, not the next one."""

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        self._woken = False
        return super().receive(limit=limit, wait=wait)


@fault("test_many_wakes_end_one_wait", "assert elapsed() > 0.25")
class CountsItsWakes(MemorySubscription):
    """Each of several calls of `wake` ends a wait."""

    wakes = 0

    def wake(self) -> None:
        self.wakes += 1
        super().wake()

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        found = super().receive(limit=limit, wait=wait)
        self.wakes = max(0, self.wakes - 1)
        self._woken = self.wakes > 0
        return found


@fault("test_wake_affects_only_its_own_subscription", "assert elapsed() > 0.25")
class WakesEverySubscription(Composed):
    """`wake` ends the wait of every subscription of the transport."""

    def subscribe(self, queues: Sequence[str], *, lease: float) -> MemorySubscription:
        made = super().subscribe(queues, lease=lease)
        everybody: list[MemorySubscription] = vars(self).setdefault("everybody", [])
        everybody.append(made)

        def wake() -> None:
            for one in everybody:
                MemorySubscription.wake(one)

        made.wake = wake  # type: ignore[method-assign]  # of this one
        return made


@fault("test_a_signal_handler_may_wake", "is in wake()")
class DeadlocksInAHandler(MemorySubscription):
    """`wake` waits for a lock that the interrupted `receive` holds."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._busy = threading.Lock()

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        with self._busy:
            return super().receive(limit=limit, wait=wait)

    def wake(self) -> None:
        with self._busy:
            super().wake()


@fault("test_closing_twice_is_allowed", "closed already")
class RefusesASecondClose(Composed):
    """The second close() raises an error."""

    def close(self) -> None:
        if self._store.closed:
            raise TransportClosed("closed already")
        super().close()


@fault("test_a_closed_transport_raises_transport_closed", "DID NOT RAISE")
class SendsAfterItsClose(Composed):
    """A closed transport accepts messages and loses them."""

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        try:
            return super().send(messages, within=within)
        except TransportClosed:
            return [f"late-{n}" for n in range(len(messages))]


@fault("test_a_closed_subscription_raises_transport_closed", "memory transport was closed")
class ClosesItsTransportToo(MemorySubscription):
    """Closing a subscription closes its transport."""

    def close(self) -> None:
        super().close()
        with self._store.changed:
            self._store.closed = True


@fault("test_closing_a_transport_closes_its_subscriptions", "DID NOT RAISE")
class SettlesAfterTheClose(MemorySubscription):
    """`settle` on a closed transport returns False, as if the lease were lost."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        return [False] * len(settlements) if self._store.closed else super().settle(settlements)


class ClosesInSilence(Composed):
    """close() wakes no waiting thread."""

    def close(self) -> None:
        self._store.closed = True


@fault("test_a_waiting_receive_ends_with_transport_closed", "is in receive(limit=1, wait=30)")
class LetsAReceiveWaitOn(ClosesInSilence):
    """Closing the transport does not end a waiting `receive`."""


@fault("test_a_waiting_reply_ends_with_transport_closed", "is in reply(timeout=30")
class LetsACallerWaitOn(ClosesInSilence):
    """Closing the transport does not end a waiting `reply`."""


@fault("test_a_running_consumer_ends_with_transport_closed", "return ended(20) - closed")
class ReportsItsCloseAsAnOutage(MemorySubscription):
    """`receive` on a closed transport raises TransportUnavailable, so that its worker waits for a recovery."""

    def receive(self, *, limit: int, wait: float) -> Sequence[Delivery]:
        try:
            return super().receive(limit=limit, wait=wait)
        except TransportClosed as exc:
            raise TransportUnavailable("away") from exc


@fault("test_the_harness_closes_the_transport_that_it_opened", "DID NOT RAISE")
class LeavesItsTransportOpen(ComposedHarness):
    """The harness does not close its transports."""

    def transport(self) -> contextlib.closing[Any]:
        class Left(contextlib.closing[Any]):
            def __exit__(self, *raised: object) -> None:
                return

        return Left(Composed())


@fault("test_a_closed_transport_leaves_no_thread_behind", "wait_until(lambda: not left()")
class LeavesAThread(Composed):
    """A thread of a subscription still runs after everything was closed."""

    def subscribe(self, queues: Sequence[str], *, lease: float) -> MemorySubscription:
        threading.Thread(target=time.sleep, args=[40], daemon=True, name="left-behind").start()
        return super().subscribe(queues, lease=lease)


@fault("test_stop_finishes_running_tasks_and_releases_the_rest", "is in receive(limit=3, wait=5)")
class KeepsUnstartedMessages(MemorySubscription):
    """RETRY with counted=False does not release the message before its lease ends."""

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        kept = [one.verdict is Verdict.RETRY and not one.counted for one in settlements]
        rest = [one for one, keep in zip(settlements, kept, strict=True) if not keep]
        answers = iter(super().settle(rest))
        return [True if keep else next(answers) for keep in kept]
