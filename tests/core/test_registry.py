"""Tasks: a registry that is read as a mapping, and the functions that it rejects."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import pytest
import strategies as some
from hypothesis import given
from hypothesis import strategies as st

from unstract_core import ConfigurationError, Tasks
from unstract_core.worker.registry import runnable


@given(st.lists(some.names, unique=True, max_size=8), some.names)
def test_registry_is_a_mapping(names: list[str], other: str) -> None:
    """The registry has each registered name with its function, in order, and no other name."""
    tasks = Tasks()
    functions: dict[str, Callable[..., Any]] = {name: lambda name=name: name for name in names}
    for name, function in functions.items():
        assert tasks.register(name)(function) is function
    assert isinstance(tasks, Mapping)
    assert dict(tasks) == functions
    assert (list(tasks), len(tasks)) == (names, len(names))
    assert (other in tasks) == (other in names)
    assert all(tasks[name]() == name for name in names)
    assert all(name in repr(tasks) for name in names)


def test_registered_function_stays_callable() -> None:
    """The decorator returns the function, which can be called and registered under a second name."""
    tasks = Tasks()

    @tasks.register("double")
    @tasks.register("twice")
    def double(number: int) -> int:
        return 2 * number

    assert double(4) == tasks["double"](4) == tasks["twice"](4) == 8


@given(some.names)
def test_taken_name_is_rejected(name: str) -> None:
    """Another function under a taken name is rejected and changes nothing; the same function is accepted."""
    tasks = Tasks()
    first = tasks.register(name)(lambda: 1)
    with pytest.raises(ConfigurationError, match="already"):
        tasks.register(name)(lambda: 2)
    assert tasks.register(name)(first) is first
    assert dict(tasks) == {name: first}


@pytest.mark.parametrize("name", ["", None, 7, b"task", ["task"], print], ids=repr)
def test_registration_needs_a_name(name: Any) -> None:
    """An empty name, or the decorator without parentheses, is rejected with the correct form."""
    with pytest.raises(ConfigurationError, match="register"):
        Tasks().register(name)


async def coroutine() -> int:
    return 1


async def async_generator() -> AsyncIterator[int]:
    yield 1


class Worker:
    async def method(self) -> int:
        return 1

    def plain(self) -> int:
        return 1


class AsyncCallable:
    async def __call__(self) -> int:
        return 1


NO_TASKS: dict[str, Any] = {
    "not callable": 7,
    "None": None,
    "async def": coroutine,
    "async method": Worker().method,
    "partial of async def": functools.partial(coroutine),
    "callable with async __call__": AsyncCallable(),
    "async generator": async_generator,
}


@pytest.mark.parametrize("name", NO_TASKS)
def test_uncallable_or_async_task_is_rejected(name: str) -> None:
    """A task that is not callable or is async is rejected by its name."""
    with pytest.raises(ConfigurationError, match="'broken'"):
        Tasks().register("broken")(NO_TASKS[name])
    with pytest.raises(ConfigurationError, match="'broken'"):
        runnable("broken", NO_TASKS[name])


@pytest.mark.parametrize(
    "task",
    [len, Worker().plain, Worker, functools.partial(len, ()), lambda: 1],
    ids=["function", "method", "class", "partial", "lambda"],
)
def test_registry_accepts_any_callable(task: Callable[..., Any]) -> None:
    """Functions, methods, classes and partials are accepted."""
    assert runnable("fine", task) is task
    assert Tasks().register("fine")(task) is task
