"""Children that are replaced at a limit: the next one is ready before the old one leaves."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
from hypothesis import given
from hypothesis import strategies as st
from supervised import Command, noted, worker

from contract_tests.kit import wait_until
from contract_tests.messages import message
from transports.postgres import PostgresTransport
from unstract_core.cli.child import Limits, Role

HTTP = ("--http", "127.0.0.1:0")


@pytest.fixture(name="database")
def database_(embedded_url: str) -> Iterator[tuple[str, PostgresTransport]]:
    with (
        servers.fresh_schema(embedded_url) as schema,
        contextlib.closing(PostgresTransport(embedded_url, schema)) as transport,
    ):
        transport.migrate()
        yield f"{embedded_url}?schema={schema}", transport


def spare(command: Command) -> int:
    """Wait until a child has prepared to follow another, and return its pid."""
    found: list[int] = []

    def is_ready() -> bool:
        found[:] = [child["pid"] for child in command.health()["children"] if child["state"] == "spare"]
        return bool(found)

    wait_until(is_ready, timeout=60, what="a child to be ready to follow")
    return found[0]


def test_a_child_is_ready_before_the_one_it_follows_leaves(
    database: tuple[str, PostgresTransport], tmp_path: Path
) -> None:
    """The next child has imported the app when the old one reaches its limit, and runs the very next task."""
    url, transport = database

    def run(count: int) -> list[int]:
        transport.send([message("mark", "q", str(tmp_path), "m")])
        wait_until(lambda: len(noted(tmp_path, "m")) == count, what="the task")
        return noted(tmp_path, "m")

    with worker("--max-tasks", "3", *HTTP, url=url, app="recycled:tasks", directory=tmp_path) as command:
        (old,) = command.children()
        run(1)
        first = spare(command)
        assert command.healthy()
        os.kill(first, signal.SIGKILL)
        command.event("child_died")
        assert run(2) == [old, old]
        follower = spare(command)
        assert noted(tmp_path, "importing") == [old, first, follower]
        assert run(3) == [old, old, old]
        assert command.event("child_recycled")["pid"] == str(old)
        assert run(4)[-1] == follower
        last = spare(command)
        os.kill(follower, signal.SIGKILL)
        wait_until(lambda: command.children(3)[-1] == last, what="the spare child to take over")
        assert run(5)[-1] == last
        spare(command)
        command.signal(signal.SIGTERM)
        assert command.ends() == 0
        assert command.events("child_killed") == []


def test_children_start_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All children import the app at the same time: none waits until another has started."""
    monkeypatch.setenv("RECYCLED_TOGETHER", "3")
    with worker("--processes", "3", url="memory://", app="recycled:tasks", directory=tmp_path) as command:
        assert len(set(command.children(3))) == 3
        command.signal(signal.SIGTERM)
        assert command.ends() == 0


@given(st.integers(1, 40), st.integers(1, 10_000))
def test_first_children_reach_their_limits_one_after_another(processes: int, limit: int) -> None:
    """Each first child has between half of its limit and all of it, and no two the same where there is room."""
    limits = [Limits(max_tasks=limit).for_share(number / processes).max_tasks for number in range(processes)]
    assert limits[0] == limit
    assert all(one is not None and limit / 2 <= one <= limit for one in limits)
    assert len(set(limits)) == processes or limit < 2 * processes


@given(st.booleans(), st.booleans(), st.booleans(), st.floats(0, 1))
def test_a_role_reaches_its_child_as_it_is(first: bool, silent: bool, spare: bool, share: float) -> None:
    """A child reads the role that its parent has written."""
    role = Role(first, silent, spare, share)
    assert Role.of(str(role)) == role
