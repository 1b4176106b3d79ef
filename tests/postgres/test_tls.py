"""TLS options of the URL reach libpq, for every connection of producers, consumers and waiting callers."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
from certificates import Certificates, make_certificates
from consumers import running
from pg_tables import Tables
from postgres.support import in_background
from queues import queue_name

from contract_tests.kit import wait_until
from contract_tests.messages import message
from transports.postgres.url import from_url
from unstract_core import Consumer, TransportUnavailable


def with_tls() -> Path:
    """Return where the programs of an installed PostgreSQL are: the embedded one was built without TLS."""
    directories = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if not directories:
        servers.miss("no PostgreSQL with TLS is installed to start a private one from: apt-get install postgresql")
    return directories[-1]


@pytest.fixture(scope="module")
def encrypted() -> Iterator[tuple[Tables, Certificates]]:
    """A private server with a certificate of its own, and what has signed it."""
    wheel, programs = servers._embedded_wheel(), with_tls()
    installed = types.SimpleNamespace(
        POSTGRES_VERSIONS={"": programs},
        TARGET_POSTGRES_VERSION="",
        ensure_user_exists=wheel.ensure_user_exists,
        ensure_prefix_permissions=lambda path: None,
    )
    directory = Path(tempfile.mkdtemp(prefix="wire-tls-"))
    directory.chmod(0o711)
    try:
        if os.geteuid() == 0:
            wheel.ensure_user_exists("pgserver")
        made = make_certificates(directory, owner="pgserver")
        options = f"-c ssl=on -c ssl_cert_file={made.server} -c ssl_key_file={made.key}"
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(servers, "_embedded_wheel", lambda: installed)
            with servers.private_server(options=options) as server:
                tables = Tables(server.url, "unstract")
                with contextlib.closing(from_url(server.url)) as transport:
                    transport.migrate()
                yield tables, made
    finally:
        shutil.rmtree(directory)


def encrypted_ones(tables: Tables, name: str) -> list[bool]:
    """Return of each connection of an application whether it is encrypted."""
    statement = "SELECT ssl FROM pg_stat_activity JOIN pg_stat_ssl USING (pid) WHERE application_name = %s"
    return [ssl for (ssl,) in tables.rows(statement, name)]


@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full", "disable"])
def test_every_connection_follows_the_url(encrypted: tuple[Tables, Certificates], mode: str) -> None:
    """The connections of pool, subscription, waiting caller and notifications are all encrypted, or none."""
    tables, made = encrypted
    name, queue = f"tls-{mode}", queue_name()
    url = f"{tables.url}?sslmode={mode}&sslrootcert={made.authority}&application_name={name}&poll_interval=0.2"
    with contextlib.closing(from_url(url)) as transport:
        consumer = Consumer(transport, {"t": lambda: "done"}, [queue])
        with running(consumer), in_background(lambda: transport.reply("never", timeout=3)):
            transport.send([message("t", queue, reply_key=f"{queue}-key")])
            wait_until(lambda: transport.reply(f"{queue}-key"), what="the answer")
            wait_until(lambda: len(tables.backends(name)) >= 3, what="pool, subscription and waiter")
            assert set(encrypted_ones(tables, name)) == {mode != "disable"}


@pytest.mark.parametrize("mode", ["verify-ca", "verify-full"])
def test_untrusted_certificate_is_refused(encrypted: tuple[Tables, Certificates], mode: str) -> None:
    """Every way to connect fails, and the error names the certificate as the reason."""
    tables, made = encrypted
    url = f"{tables.url}?sslmode={mode}&sslrootcert={made.stranger}"
    with contextlib.closing(from_url(url)) as transport:
        for act in (
            lambda: transport.send([message("t", "q")]),
            lambda: transport.subscribe(["q"], lease=1),
            lambda: transport.reply("key"),
            transport.migrate,
        ):
            with pytest.raises(TransportUnavailable, match="certificate verify failed"):
                act()


def test_wrong_host_name_is_refused(encrypted: tuple[Tables, Certificates]) -> None:
    """verify-full compares the host in the URL, verify-ca does not."""
    tables, made = encrypted
    other = tables.url.replace("127.0.0.1", "127.0.0.2") + f"?hostaddr=127.0.0.1&sslrootcert={made.authority}&sslmode="
    with contextlib.closing(from_url(f"{other}verify-ca")) as transport:
        assert transport.reply("key") is None
    with (
        contextlib.closing(from_url(f"{other}verify-full")) as transport,
        pytest.raises(TransportUnavailable, match=r"127\.0\.0\.2"),
    ):
        transport.reply("key")


def test_server_without_tls_is_refused(embedded_url: str) -> None:
    """sslmode=require never falls back to an unencrypted connection."""
    with (
        contextlib.closing(from_url(f"{embedded_url}?sslmode=require")) as transport,
        pytest.raises(TransportUnavailable, match="SSL"),
    ):
        transport.reply("key")


def test_command_passes_tls_options(encrypted: tuple[Tables, Certificates]) -> None:
    """`unstract-wire` works with the right authority; with a wrong one it prints one line."""
    tables, made = encrypted
    for authority, code, said in ((made.authority, 0, ""), (made.stranger, 2, "certificate verify failed")):
        url = f"{tables.url}?sslmode=verify-full&sslrootcert={authority}"
        command = [sys.executable, "-m", "unstract_core", "queues", "--json", "--url", url]
        ended = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
        assert (ended.returncode, len(ended.stderr.splitlines())) == (code, 1 if code else 0)
        assert said in ended.stderr
