"""A full disk on the server counts as unavailable: accepted messages and results are kept until there is space.

The tables of a private server are on a file system of some megabytes, which a file of the test fills.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
import servers
from consumers import running
from pg_tables import Tables
from postgres.support import transport_on
from queues import queue_name, receive_all

from contract_tests.kit import wait_until
from contract_tests.messages import message, then
from transports.postgres import PostgresTransport
from unstract_core import Consumer, TransportUnavailable

SIZE = 24
"""Megabytes of the file system."""


def large() -> str:
    """Return half a megabyte that nothing compresses."""
    return os.urandom(256 * 1024).hex()


@attrs.frozen
class Disk:
    """A small file system, and the file that fills it."""

    directory: Path

    def fill(self) -> None:
        with contextlib.suppress(OSError), (self.directory / "ballast").open("ab", buffering=0) as ballast:
            while True:
                ballast.write(bytes(4096))

    def free(self) -> None:
        (self.directory / "ballast").unlink()


@contextlib.contextmanager
def small_disk() -> Iterator[Disk]:
    """Mount a small file system, which only root may."""
    directory = Path(tempfile.mkdtemp(prefix="wire-disk-"))
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}m", "tmpfs", str(directory)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True) if shutil.which("mount") else None
        if mounted is None or mounted.returncode != 0:
            why = mounted.stderr.strip() if mounted else "there is no mount"
            pytest.skip(f"no small disk can be made ({why}): run this as root, with the capability SYS_ADMIN")
        try:
            yield Disk(directory)
        finally:
            subprocess.run(["umount", "-l", str(directory)], check=True)
    finally:
        directory.rmdir()


@pytest.fixture(scope="module")
def small() -> Iterator[tuple[Disk, str]]:
    """A server whose tables are made on a small disk, and its URL."""
    with small_disk() as disk, servers.private_server() as server:
        space = disk.directory / "tables"
        space.mkdir()
        if os.geteuid() == 0:
            shutil.chown(space, "pgserver")
        disk.directory.chmod(0o755)
        tables = Tables(server.url, "unstract")
        tables.execute(f"CREATE TABLESPACE small LOCATION '{space}'")
        tables.execute("ALTER ROLE postgres SET default_tablespace = small")
        yield disk, server.url


@pytest.fixture
def tables(small: tuple[Disk, str]) -> Iterator[Tables]:
    with servers.fresh_schema(small[1]) as schema:
        yield Tables(small[1], schema)


@pytest.fixture
def transport(tables: Tables) -> Iterator[PostgresTransport]:
    with transport_on(tables.url, tables.schema) as transport:
        transport.migrate()
        yield transport


@pytest.fixture
def disk(small: tuple[Disk, str]) -> Iterator[Disk]:
    yield small[0]
    with contextlib.suppress(FileNotFoundError):
        small[0].free()


def sends_until_full(transport: PostgresTransport, queue: str) -> tuple[list[str], TransportUnavailable]:
    accepted: list[str] = []
    while len(accepted) < 2 * SIZE:
        try:
            accepted += transport.send([message("t", queue, large())])
        except TransportUnavailable as exc:
            return accepted, exc
    raise AssertionError("the disk was never full")


def test_send_to_full_disk_is_unavailable(transport: PostgresTransport, tables: Tables, disk: Disk) -> None:
    """TransportUnavailable names the cause and has a known fate, so that the caller can send again."""
    queue = queue_name()
    disk.fill()
    accepted, full = sends_until_full(transport, queue)
    for refused in (message("t", queue, large()), message("t", queue, large(), delay=5)):
        with pytest.raises(TransportUnavailable) as caught:
            transport.send([message("t", queue), refused])
        for exc in (full, caught.value):
            assert not exc.fate_unknown
            assert "(SQLSTATE 53100); nothing took effect" in str(exc)
    ids = [str(id) for (id,) in tables.rows("SELECT msg_id FROM {messages} ORDER BY msg_id")]
    assert ids == accepted
    disk.free()
    accepted += transport.send([message("t", queue, large()), message("t", queue)])
    assert [delivery.id for delivery in receive_all(transport, queue)] == accepted


def test_result_waits_for_disk_space(
    transport: PostgresTransport, tables: Tables, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    """The consumer keeps running, runs nothing twice, dead-letters nothing, and sends each follow-up once."""
    queue, results = queue_name(), [large() for _ in range(3)]
    ran: list[int] = []
    arrived: list[str] = []
    full = threading.Event()

    def pay(number: int) -> str:
        ran.append(number)
        full.wait(120)
        return results[number]

    def away() -> bool:
        return any(record.__dict__.get("wire.event") == "transport_away" for record in caplog.records)

    transport.send([message("pay", queue, n, on_success=then("done", queue), task_id=f"{queue}-{n}") for n in range(3)])
    consumer = Consumer(transport, {"pay": pay, "done": arrived.append}, [queue], concurrency=3, lease=2)
    with caplog.at_level(logging.INFO), running(consumer):
        wait_until(lambda: len(ran) == 3, what="all to run")
        disk.fill()
        full.set()
        wait_until(away, timeout=60, what="the consumer to notice")
        assert transport.reply(f"{queue}-0") is None
        disk.free()
        wait_until(lambda: len(arrived) == 3 and tables.count(queue) == 0, timeout=120, what="every callback")
    assert sorted(ran) == [0, 1, 2]
    assert sorted(arrived) == sorted(results)
    assert transport.dead.find() == []
    (said,) = {record.__dict__["wire.error"] for record in caplog.records if "wire.error" in record.__dict__}
    assert "SQLSTATE 53100" in said
