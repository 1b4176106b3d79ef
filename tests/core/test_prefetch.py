"""Prefetch: what its threads run in some 50 ms, and at least one message for each; with a clock of its own."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unstract_core.prefetch import LARGEST, WINDOW, AdaptivePrefetch, FixedPrefetch


class Clock:
    """Time in seconds that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


concurrencies = st.integers(1, 64) | st.sampled_from([999, 1000, 1001, 5000])
events = st.lists(st.tuples(st.floats(0, 120) | st.floats(0, 0.01), st.integers(1, 3000)), max_size=30)


def after(concurrency: int, found: list[tuple[float, int]]) -> list[int]:
    """The limits after each of these pauses (seconds) and numbers of tasks that ended then."""
    clock = Clock()
    prefetch = AdaptivePrefetch(concurrency, clock)
    limits = [prefetch.limit()]
    for pause, count in found:
        clock.now += pause
        prefetch.ran(count)
        limits.append(prefetch.limit())
    return limits


@given(concurrencies, events)
def test_every_thread_always_has_room_for_a_message(concurrency: int, found: list[tuple[float, int]]) -> None:
    """Whatever happens, the limit is never below the concurrency and never above what is sensible."""
    for limit in after(concurrency, found):
        assert concurrency <= limit <= max(LARGEST, concurrency)


@given(st.integers(1, 64), st.floats(1, 600), st.integers(1, 10))
def test_slow_tasks_hold_one_message_per_thread(concurrency: int, seconds: float, rounds: int) -> None:
    """While each task takes a second or a minute, exactly one message per thread is held."""
    assert set(after(concurrency, [(seconds / concurrency, 1)] * rounds * concurrency)) == {concurrency}


@given(st.integers(1, 64))
def test_no_op_tasks_come_in_hundreds_within_a_few_round_trips(concurrency: int) -> None:
    """Tasks that take no time double the limit with every round trip, up to a thousand."""
    clock = Clock()
    prefetch = AdaptivePrefetch(concurrency, clock)
    for _ in range(10):
        clock.now += 0.001
        prefetch.ran(prefetch.limit())
    assert prefetch.limit() == LARGEST == 1000


@given(st.integers(1, 16), st.floats(0.0002, 0.02))
def test_the_limit_settles_at_what_is_run_in_one_window(concurrency: int, seconds: float) -> None:
    """With tasks of a steady length, the limit comes to lie around the number that is run in 50 ms."""
    clock = Clock()
    prefetch = AdaptivePrefetch(concurrency, clock)
    limits = []
    for _ in range(2000):
        clock.now += seconds / concurrency
        prefetch.ran(1)
        limits.append(prefetch.limit())
    fair = max(concurrency, min(LARGEST, WINDOW * concurrency / seconds))
    assert all(fair / 2 - 2 <= limit <= 2 * fair + 2 for limit in limits[1000:])


@given(st.integers(1, 8), st.integers(9, 1000), st.integers(1, 100))
def test_a_longer_time_counts_by_what_was_run_in_one_window(concurrency: int, rate: int, windows: int) -> None:
    """What was run in many windows at once is divided among them."""
    clock = Clock()
    prefetch = AdaptivePrefetch(concurrency, clock)
    clock.now += windows * WINDOW + 1e-6
    prefetch.ran(windows * rate)
    assert rate - 1 <= prefetch.limit() <= rate


@given(st.integers(1, 64))
def test_one_slow_task_brings_the_limit_down_at_once(concurrency: int) -> None:
    """After a burst of no-ops a single task of a minute gives everything back but one message per thread."""
    clock = Clock()
    prefetch = AdaptivePrefetch(concurrency, clock)
    for _ in range(10):
        prefetch.ran(prefetch.limit())
    assert prefetch.limit() > concurrency
    clock.now += 60
    prefetch.ran(1)
    assert prefetch.limit() == concurrency


@given(st.integers(1, 64), st.floats(WINDOW, 3600))
def test_an_idle_time_brings_the_limit_down(concurrency: int, idle: float) -> None:
    """After a burst of no-ops and a pause, what comes next may be long: it is taken one for each thread."""
    clock = Clock()
    prefetch = AdaptivePrefetch(concurrency, clock)
    for _ in range(10):
        prefetch.ran(prefetch.limit())
    clock.now += idle + 1e-6
    prefetch.limit()
    clock.now += idle + 1e-6
    assert prefetch.limit() == concurrency


def test_a_standstill_brings_the_limit_down_at_once() -> None:
    """When all threads are at long tasks the limit falls without waiting for one of them."""
    prefetch = AdaptivePrefetch(2, Clock())
    for _ in range(10):
        prefetch.ran(prefetch.limit())
    prefetch.fall()
    assert prefetch.limit() == 2


def test_fewer_tasks_than_the_limit_change_nothing_within_a_window() -> None:
    """Nothing is learnt from a window that has not ended and has not been filled."""
    clock = Clock()
    prefetch = AdaptivePrefetch(8, clock)
    for _ in range(7):
        clock.now += 0.005
        prefetch.ran(1)
        assert prefetch.limit() == 8


def test_the_same_history_gives_the_same_limits() -> None:
    """There is no chance in it, and no clock but the one that was given."""
    history = list(itertools.chain.from_iterable([(0.01, 3), (0.02, 50), (1.0, 1)] for _ in range(5)))
    assert after(4, history) == after(4, history)


@pytest.mark.parametrize("limit", [1, 7, 5000])
def test_a_fixed_prefetch_stays_fixed(limit: int) -> None:
    """`prefetch=` means that number, whatever is run."""
    prefetch = FixedPrefetch(limit)
    for count in (0, 1, 10_000):
        prefetch.ran(count)
        assert prefetch.limit() == limit
