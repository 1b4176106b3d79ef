"""A private PgBouncer in front of a PostgreSQL server, with few server connections.

It has its own port, configuration and log, and does not affect Debian's service. In transaction mode, each transaction
uses the next server connection, so that code that depends on a session fails.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict
from servers import free_port, miss, wait_until_stopped

from contract_tests.kit import wait_until
from transports.postgres import PostgresTransport
from transports.postgres.harness import PostgresHarness

SERVER_CONNECTIONS = 3
"""The number of server connections that all clients of a pool share by default."""

_STARTS = 30.0
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
_UNPRIVILEGED = "nobody"  # it refuses to run as root


class PgBouncer:
    """One PgBouncer process. `settings` override the tests' pgbouncer.ini."""

    def __init__(self, directory: Path, server_url: str, **settings: object) -> None:
        server = conninfo_to_dict(server_url)
        self._user = str(server.get("user") or "postgres")
        self._address = f"host={server.get('host', '127.0.0.1')} port={server.get('port', 5432)}"
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self.database = str(server.get("dbname") or "postgres")
        self.url = f"postgresql://{self._user}@127.0.0.1:{self.port}/{self.database}"
        self._settings: dict[str, object] = {
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "trust",
            "auth_file": directory / "users.txt",
            "admin_users": self._user,
            "pool_mode": "transaction",
            "default_pool_size": SERVER_CONNECTIONS,
            "min_pool_size": SERVER_CONNECTIONS,
            "server_round_robin": 1,
            "max_client_conn": 500,
            "server_login_retry": 1,
        }
        (directory / "users.txt").write_text(f'"{self._user}" "{server.get("password") or ""}"\n')
        self.configure(**settings)

    def configure(self, **settings: object) -> None:
        """Write these settings, which apply after the next start."""
        self._settings |= settings
        lines = [f"{name} = {value}" for name, value in self._settings.items()]
        (self._directory / "pgbouncer.ini").write_text(
            "\n".join(["[databases]", f"* = {self._address}", "[pgbouncer]", *lines, ""])
        )

    def start(self) -> None:
        """Start, wait until connections are accepted, and open all server connections."""
        with (self._directory / "output").open("ab") as output:
            self._process = subprocess.Popen(
                [program() or "pgbouncer", str(self._directory / "pgbouncer.ini")],
                user=_UNPRIVILEGED if os.geteuid() == 0 else None,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        wait_until(self._started, timeout=_STARTS, what="PgBouncer to start")
        self.on_each()

    def kill(self) -> None:
        """Kill it, frozen or not, like a power failure; do nothing if it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(_STARTS)
            self._process = None

    def freeze(self) -> None:
        """Suspend it: connections are accepted, but not answered, until `thaw`."""
        self._signal(signal.SIGSTOP)
        if self._process is not None:
            wait_until_stopped([self._process.pid])

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def cut(self) -> None:
        """Close every connection to clients and to the server, also in the middle of a statement."""
        self.command(f'KILL "{self.database}"')
        self.command(f'RESUME "{self.database}"')

    def on_each(self, statement: str = "SELECT pg_backend_pid()") -> list[tuple[Any, ...]]:
        """Run a statement on every server connection, in parallel transactions; return all rows."""
        with contextlib.ExitStack() as held:
            connections = [held.enter_context(psycopg.connect(self.url)) for _ in range(self._size)]
            cursors = [connection.execute(statement.encode()) for connection in connections]
            return [row for cursor in cursors if cursor.description for row in cursor.fetchall()]

    def command(self, command: str) -> None:
        """Run a command of the admin console."""
        self._asked(command)

    def show(self, what: str) -> list[dict[str, Any]]:
        """Return the rows of a SHOW command of the admin console, such as "SERVERS"."""
        return self._asked(f"SHOW {what}")

    @property
    def _size(self) -> int:
        return int(str(self._settings["default_pool_size"]))

    def log(self) -> str:
        return (self._directory / "output").read_text(errors="replace")

    def _asked(self, command: str) -> list[dict[str, Any]]:
        console = psycopg.connect(self.url, dbname="pgbouncer", autocommit=True)
        with contextlib.closing(console), console.cursor(row_factory=psycopg.rows.dict_row) as cursor:
            cursor.execute(command.encode())
            return cursor.fetchall() if cursor.description else []

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def _started(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise AssertionError(f"PgBouncer exited: {self.log()[-2000:]}")
        try:
            psycopg.connect(self.url, dbname="pgbouncer", connect_timeout=3).close()
        except psycopg.OperationalError:
            return False
        return True


class PooledHarness(PostgresHarness):
    """Runs the kit over PostgreSQL through a PgBouncer, which also cuts the connections."""

    def __init__(self, pgbouncer: PgBouncer, *, polling: bool) -> None:
        super().__init__(pgbouncer.url + ("?listen=false" if polling else ""))
        self.name = f"pgbouncer-{'polling' if polling else 'detected'}"
        self._pgbouncer = pgbouncer

    def sever(self, transport: PostgresTransport) -> bool:
        self._pgbouncer.cut()
        return True


@contextlib.contextmanager
def private_pgbouncer(server_url: str, **settings: object) -> Iterator[PgBouncer]:
    """Start a PgBouncer for a server, and remove it afterwards; skip the test if it is not installed."""
    if program() is None:
        miss("PgBouncer is not installed: apt-get install pgbouncer (.ci/run does this)")
    directory = Path(tempfile.mkdtemp(prefix="wire-pgbouncer-"))
    try:
        pgbouncer = PgBouncer(directory, server_url, **settings)
        if os.geteuid() == 0:
            shutil.chown(directory, _UNPRIVILEGED)
        try:
            pgbouncer.start()
            yield pgbouncer
        finally:
            pgbouncer.kill()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def program() -> str | None:
    return shutil.which("pgbouncer", path=_PATH)
