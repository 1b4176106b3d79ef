"""The tasks of a worker, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from unstract_core.errors import ConfigurationError

Task = TypeVar("Task", bound=Callable[..., Any])


class Tasks(Mapping[str, Callable[..., Any]]):
    """A registry: `tasks = Tasks()`, then `@tasks.register("name")` above each function. Read it as a mapping."""

    def __init__(self) -> None:
        self._tasks: dict[str, Callable[..., Any]] = {}

    def register(self, name: str) -> Callable[[Task], Task]:
        """Return a decorator that registers a function and returns it unchanged.

        Args:
            name: The task name, as messages have it.

        Raises:
            ConfigurationError: The name is empty, another function has it, or the function is an `async def`.
        """
        if not isinstance(name, str) or not name:
            raise ConfigurationError('tasks are registered by name: @tasks.register("my_task")')

        def add(task: Task) -> Task:
            if self._tasks.get(name, task) is not task:
                raise ConfigurationError(f"task {name!r} is registered already")
            self._tasks[name] = runnable(name, task)
            return task

        return add

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self._tasks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def __repr__(self) -> str:
        return f"<Tasks {', '.join(self._tasks) or 'none'}>"


def runnable(name: str, task: Any) -> Callable[..., Any]:
    """Return `task` if a worker thread can call it; raise ConfigurationError if it cannot."""
    if not callable(task):
        raise ConfigurationError(f"task {name!r} is not callable")
    if _is_async(task) or _is_async(getattr(type(task), "__call__", None)):  # noqa: B004 - inspected, not called
        raise ConfigurationError(f"task {name!r} is an async function; tasks run on threads: wrap it in asyncio.run")
    return task  # type: ignore[no-any-return]  # callable() narrows Any to Callable[..., object]


def _is_async(function: object) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
