"""Transports, tasks and faulty objects for the command, which imports them as `cli.shared:name`."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn
from urllib.parse import unquote, urlsplit

from queues import bury

from contract_tests.messages import message
from transports.memory import MemoryTransport
from unstract_core import Capabilities, ConfigurationError, NotSupported, Tasks

tasks = Tasks()
badly_named_tasks = {7: print}
not_a_mapping = [print]


@tasks.register("wait_for_line")
def wait_for_line() -> str:
    """Print a line, and run until the test writes a line to standard input."""
    print("running", flush=True)
    return sys.stdin.readline().strip()


@tasks.register("wait_in_a_pool")
def wait_in_a_pool() -> str:
    """Like `wait_for_line`, on a thread that Python waits for at exit."""
    return ThreadPoolExecutor(1).submit(wait_for_line).result()


plain_tasks = {"wait_for_line": wait_for_line}


@tasks.register("fail")
def fail(text: str) -> NoReturn:
    raise ValueError(text)


class Lasting(MemoryTransport):
    """A memory transport that commands cannot close, so the next command sees the same messages."""

    def close(self) -> None:
        pass


class Migrating(Lasting):
    """A transport whose first migration creates something."""

    def __init__(self) -> None:
        super().__init__()
        self._missing = ["schema s", "pg_queue_message"]

    def migrate(self) -> list[str]:
        created, self._missing = self._missing, []
        return created


class Claimless(Lasting):
    capabilities = Capabilities()


class Explaining(Claimless):
    """A transport without capabilities whose error names an alternative."""

    def queues(self, names: Sequence[str] | None = None) -> NoReturn:
        raise NotSupported("ask the broker's own tools")


current = Lasting()
seen_urls: list[str] = []


def transport() -> Lasting:
    return current


def busy() -> MemoryTransport:
    """A transport with two messages whose task waits for a line."""
    transport = MemoryTransport()
    transport.send([message("wait_for_line", "q"), message("wait_for_line", "q")])
    return transport


def crowded() -> MemoryTransport:
    """A transport with more dead letters than a pipe holds."""
    transport = MemoryTransport()
    transport.send([message("t", "q", n) for n in range(2000)])
    bury(transport, "q", "x" * 100)
    return transport


def product() -> MemoryTransport:
    """A transport with ids of seven digits, and the product's names in its queues and dead letters."""
    sum_is_wrong = "its 3 line items come to 1,184.00 GBP, but its subtotal says 1,284.00"
    transport = MemoryTransport()
    transport._store._ids = itertools.count(4_711_000)
    transport.send([message("execute_extraction", "celery_executor_legacy")])
    bury(transport, "celery_executor_legacy", f"ExtractionError: invoice MF-4471 does not add up: {sum_is_wrong}")
    transport.send([message("ide_prompt_complete", "ide_callback")])
    bury(transport, "ide_callback", "ValueError: 発票番号が見つかりません、もう一度お試しください")
    transport.send([message("execute_extraction", "celery_executor_legacy") for _ in range(1200)])
    return transport


def broken() -> NoReturn:
    raise KeyError("DATABASE_URL")


def not_a_transport() -> object:
    return object()


class Faulty(Lasting):
    """A transport with a bug in `queues`, whose error text contains payload content."""

    def queues(self, names: Sequence[str] | None = None) -> NoReturn:
        raise RuntimeError("payload content")


def faulty() -> Faulty:
    return Faulty()


def claimless() -> Claimless:
    return Claimless()


def explaining() -> Explaining:
    return Explaining()


def echoing(url: str) -> NoReturn:
    """The provider of echo://: a driver that repeats the URL in its error in several forms."""
    seen_urls.append(url)
    logging.getLogger("driver").warning("cannot connect to %s\nwill try again", url)
    password = unquote(urlsplit(url).password or "")
    raise ConfigurationError(f"bad URL {url} ({url!r}), password={password} user 'u', password '{password}'")


def crashing(url: str) -> NoReturn:
    """The provider of crash://: like echo://, with an error that is not of this package."""
    raise RuntimeError(f"bad URL {url!r}")
