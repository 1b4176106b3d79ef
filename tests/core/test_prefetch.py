"""Prefetch: as many messages as the threads run in some 50 ms, and at least one for each; on virtual time."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtual_clock import VirtualClock

from unstract_core.worker.prefetch import LARGEST, WINDOW, AdaptivePrefetch, FixedPrefetch

concurrencies = st.integers(1, 64) | st.sampled_from([999, 1000, 1001, 5000])
events = st.lists(
    st.tuples(st.floats(0, 120) | st.floats(0, 0.01), st.integers(0, 3000), st.floats(0, 1e6)), max_size=30
)


def limits_after(concurrency: int, history: list[tuple[float, int, float]]) -> list[int]:
    """Return the limits after each (pause in seconds, tasks that ended in it, their seconds in all)."""
    clock = VirtualClock()
    prefetch = AdaptivePrefetch(concurrency, clock)
    limits = [prefetch.limit()]
    for pause, count, seconds in history:
        clock.advance(pause)
        prefetch.ran(count, seconds)
        limits.append(prefetch.limit())
    return limits


def limit_after(
    prefetch: AdaptivePrefetch, clock: VirtualClock, task: float, latency: float, concurrency: int, number: int
) -> int:
    """Run all messages in flight, `number` times, with this length of a task and of a round trip; return the limit."""
    for _ in range(number):
        in_flight = prefetch.limit()
        clock.advance(latency + in_flight * task / concurrency)
        prefetch.ran(in_flight, in_flight * task)
    return prefetch.limit()


@given(concurrencies, events)
def test_the_limit_stays_between_concurrency_and_maximum(
    concurrency: int, history: list[tuple[float, int, float]]
) -> None:
    """After any history the limit is at least the concurrency and at most the maximum."""
    for limit in limits_after(concurrency, history):
        assert concurrency <= limit <= max(LARGEST, concurrency)


@given(st.integers(1, 64), st.floats(WINDOW, 600), st.floats(0, 1), st.integers(1, 30))
def test_slow_tasks_get_one_message_per_thread(concurrency: int, task: float, latency: float, number: int) -> None:
    """While each task takes at least a window, exactly one message per thread is in flight."""
    clock = VirtualClock()
    assert limit_after(AdaptivePrefetch(concurrency, clock), clock, task, latency, concurrency, number) == concurrency


@given(st.integers(1, 64), st.floats(0, 20))
def test_no_op_tasks_reach_the_maximum_soon(concurrency: int, latency: float) -> None:
    """No-op tasks raise the limit to a thousand within four round trips, and a slow network makes it no smaller."""
    clock = VirtualClock()
    assert limit_after(AdaptivePrefetch(concurrency, clock), clock, 1e-6, latency, concurrency, 4) == LARGEST == 1000


@given(st.integers(1, 64), st.lists(st.floats(0, 60), max_size=20))
def test_time_without_a_task_changes_no_limit(concurrency: int, pauses: list[float]) -> None:
    """Only time in tasks counts: a slow receive or settlement does not change the limit."""
    clock = VirtualClock()
    prefetch = AdaptivePrefetch(concurrency, clock)
    limit = limit_after(prefetch, clock, 1e-6, 0.0, concurrency, 10)
    for pause in pauses:
        clock.advance(pause)
        assert prefetch.limit() == limit


@given(st.integers(1, 64), st.floats(WINDOW, 3600))
def test_long_running_tasks_lower_the_limit(concurrency: int, running: float) -> None:
    """While every thread is in a task for longer than a window, the limit is one message for each thread."""
    clock = VirtualClock()
    prefetch = AdaptivePrefetch(concurrency, clock)
    limit_after(prefetch, clock, 0.0, 0.001, concurrency, 10)
    started = clock.monotonic()
    clock.advance(running * (1 + 1e-9) + 1e-6)
    assert prefetch.limit([started] * concurrency) == concurrency


@given(st.integers(1, 16), st.floats(0.0002, 0.02), st.floats(0, 0.2))
def test_the_limit_converges_to_one_window_of_tasks(concurrency: int, task: float, latency: float) -> None:
    """With tasks of a steady length, the limit converges to the number that runs in 50 ms."""
    clock = VirtualClock()
    fair = max(concurrency, min(LARGEST, WINDOW * concurrency / task))
    assert (
        fair - 1 <= limit_after(AdaptivePrefetch(concurrency, clock), clock, task, latency, concurrency, 30) <= fair + 1
    )


@given(st.integers(1, 64))
def test_one_slow_task_lowers_the_limit_at_once(concurrency: int) -> None:
    """After a burst of no-op tasks, one task of a minute lowers the limit to one message per thread."""
    clock = VirtualClock()
    prefetch = AdaptivePrefetch(concurrency, clock)
    assert limit_after(prefetch, clock, 0.0, 0.001, concurrency, 10) > concurrency
    clock.advance(60)
    prefetch.ran(1, 60)
    assert prefetch.limit() == concurrency


@given(st.integers(2, 64))
def test_a_free_thread_beside_long_tasks_raises_limit(concurrency: int) -> None:
    """Running tasks say nothing about the limit: the tasks that one free thread finishes decide it."""
    clock = VirtualClock()
    prefetch = AdaptivePrefetch(concurrency, clock)
    for _ in range(12):
        free = prefetch.limit() - (concurrency - 1)
        clock.advance(WINDOW)
        prefetch.ran(max(1, free), 1e-5 * max(1, free))
        prefetch.limit([1000.0] * (concurrency - 1))
    assert prefetch.limit() > concurrency


def test_fall_lowers_the_limit_at_once() -> None:
    """When every thread runs a long task, or the queues are empty, the limit is one message per thread."""
    clock = VirtualClock()
    prefetch = AdaptivePrefetch(2, clock)
    limit_after(prefetch, clock, 0.0, 0.001, 2, 10)
    prefetch.fall()
    assert prefetch.limit() == 2


def test_few_tasks_change_no_limit_within_a_window() -> None:
    """A window that has neither ended nor been filled changes nothing."""
    clock = VirtualClock()
    prefetch = AdaptivePrefetch(8, clock)
    for _ in range(7):
        clock.advance(0.005)
        prefetch.ran(1, 0.0)
        assert prefetch.limit() == 8


def test_the_same_history_gives_the_same_limits() -> None:
    """The limit depends only on the history and the given clock."""
    history = list(itertools.chain.from_iterable([(0.01, 3, 0.02), (0.02, 50, 0.01), (1.0, 1, 1.0)] for _ in range(5)))
    assert limits_after(4, history) == limits_after(4, history)


@pytest.mark.parametrize("limit", [1, 7, 5000])
def test_a_fixed_prefetch_stays_fixed(limit: int) -> None:
    """`prefetch=` sets the limit, for any number of finished tasks."""
    prefetch = FixedPrefetch(limit)
    for count in (0, 1, 10_000):
        prefetch.ran(count, 0.1)
        assert prefetch.limit() == limit
