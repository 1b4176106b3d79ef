"""Prefetch: what its threads run in some 50 ms, and at least one message for each; with a clock of its own."""

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


def after(concurrency: int, found: list[tuple[float, int, float]]) -> list[int]:
    """The limits after each of these pauses (seconds), in which so many tasks ended that took so long in all."""
    clock = VirtualClock()
    prefetch = AdaptivePrefetch(concurrency, clock)
    limits = [prefetch.limit()]
    for pause, count, seconds in found:
        clock.advance(pause)
        prefetch.ran(count, seconds)
        limits.append(prefetch.limit())
    return limits


def turns(
    prefetch: AdaptivePrefetch, clock: VirtualClock, task: float, latency: float, concurrency: int, number: int
) -> int:
    """Let everything held be run, turn by turn, with so long a task and a round trip; return the limit then."""
    for _ in range(number):
        held = prefetch.limit()
        clock.advance(latency + held * task / concurrency)
        prefetch.ran(held, held * task)
    return prefetch.limit()


@given(concurrencies, events)
def test_every_thread_always_has_room_for_a_message(concurrency: int, found: list[tuple[float, int, float]]) -> None:
    """Whatever happens, the limit is never below the concurrency and never above what is sensible."""
    for limit in after(concurrency, found):
        assert concurrency <= limit <= max(LARGEST, concurrency)


@given(st.integers(1, 64), st.floats(WINDOW, 600), st.floats(0, 1), st.integers(1, 30))
def test_slow_tasks_hold_one_message_per_thread(concurrency: int, task: float, latency: float, number: int) -> None:
    """While each task takes a window or a minute, exactly one message per thread is held."""
    clock = VirtualClock()
    assert turns(AdaptivePrefetch(concurrency, clock), clock, task, latency, concurrency, number) == concurrency


@given(st.integers(1, 64), st.floats(0, 20))
def test_no_op_tasks_come_in_hundreds_within_a_few_round_trips(concurrency: int, latency: float) -> None:
    """No-op tasks raise the limit to a thousand within four round trips, and a slow network makes it no smaller."""
    clock = VirtualClock()
    assert turns(AdaptivePrefetch(concurrency, clock), clock, 1e-6, latency, concurrency, 4) == LARGEST == 1000


@given(st.integers(1, 64), st.lists(st.floats(0, 60), max_size=20))
def test_time_without_a_task_changes_no_limit(concurrency: int, pauses: list[float]) -> None:
    """Only time in which a task runs counts: a receive or a settlement may take as long as it likes."""
    clock = VirtualClock()
    prefetch = AdaptivePrefetch(concurrency, clock)
    limit = turns(prefetch, clock, 1e-6, 0.0, concurrency, 10)
    for pause in pauses:
        clock.advance(pause)
        assert prefetch.limit() == limit


@given(st.integers(1, 64), st.floats(WINDOW, 3600))
def test_tasks_that_run_on_bring_the_limit_down(concurrency: int, running: float) -> None:
    """While every thread is in a task for longer than a window, the limit is one message for each thread."""
    clock = VirtualClock()
    prefetch = AdaptivePrefetch(concurrency, clock)
    turns(prefetch, clock, 0.0, 0.001, concurrency, 10)
    started = clock.monotonic()
    clock.advance(running * (1 + 1e-9) + 1e-6)
    assert prefetch.limit([started] * concurrency) == concurrency


@given(st.integers(1, 16), st.floats(0.0002, 0.02), st.floats(0, 0.2))
def test_the_limit_settles_at_what_is_run_in_one_window(concurrency: int, task: float, latency: float) -> None:
    """With tasks of a steady length, the limit comes to lie at the number that is run in 50 ms."""
    clock = VirtualClock()
    fair = max(concurrency, min(LARGEST, WINDOW * concurrency / task))
    assert fair - 1 <= turns(AdaptivePrefetch(concurrency, clock), clock, task, latency, concurrency, 30) <= fair + 1


@given(st.integers(1, 64))
def test_one_slow_task_brings_the_limit_down_at_once(concurrency: int) -> None:
    """After a burst of no-ops a single task of a minute gives everything back but one message per thread."""
    clock = VirtualClock()
    prefetch = AdaptivePrefetch(concurrency, clock)
    assert turns(prefetch, clock, 0.0, 0.001, concurrency, 10) > concurrency
    clock.advance(60)
    prefetch.ran(1, 60)
    assert prefetch.limit() == concurrency


@given(st.integers(2, 64))
def test_a_thread_that_is_free_beside_long_tasks_gets_its_hundreds(concurrency: int) -> None:
    """Tasks that do not end say nothing: what one free thread runs beside them decides."""
    clock = VirtualClock()
    prefetch = AdaptivePrefetch(concurrency, clock)
    for _ in range(12):
        free = prefetch.limit() - (concurrency - 1)
        clock.advance(WINDOW)
        prefetch.ran(max(1, free), 1e-5 * max(1, free))
        prefetch.limit([1000.0] * (concurrency - 1))
    assert prefetch.limit() > concurrency


def test_fall_brings_the_limit_down_at_once() -> None:
    """When all threads are in long tasks, or the queues are empty, the next messages come one for each thread."""
    clock = VirtualClock()
    prefetch = AdaptivePrefetch(2, clock)
    turns(prefetch, clock, 0.0, 0.001, 2, 10)
    prefetch.fall()
    assert prefetch.limit() == 2


def test_fewer_tasks_than_the_limit_change_nothing_within_a_window() -> None:
    """Nothing is learnt from a window that has not ended and has not been filled."""
    clock = VirtualClock()
    prefetch = AdaptivePrefetch(8, clock)
    for _ in range(7):
        clock.advance(0.005)
        prefetch.ran(1, 0.0)
        assert prefetch.limit() == 8


def test_the_same_history_gives_the_same_limits() -> None:
    """There is no chance in it, and no clock but the one that was given."""
    history = list(itertools.chain.from_iterable([(0.01, 3, 0.02), (0.02, 50, 0.01), (1.0, 1, 1.0)] for _ in range(5)))
    assert after(4, history) == after(4, history)


@pytest.mark.parametrize("limit", [1, 7, 5000])
def test_a_fixed_prefetch_stays_fixed(limit: int) -> None:
    """`prefetch=` means that number, whatever is run."""
    prefetch = FixedPrefetch(limit)
    for count in (0, 1, 10_000):
        prefetch.ran(count, 0.1)
        assert prefetch.limit() == limit
