"""A Django application that sends within its transactions: `python -m postgres.django_caller DRIVER URL SCHEMA QUEUE`.

Django uses psycopg 3 if it is installed, so for psycopg2 it is hidden until Django has chosen. The process prints its
results as one JSON object.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from urllib.parse import urlsplit

from transports.postgres.statement import Statement


def configure(driver: str, url: str) -> None:
    if driver == "psycopg2":
        sys.modules["psycopg"] = None  # type: ignore[assignment]
    from django.conf import settings

    given = urlsplit(url)
    database = {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": given.path[1:],
        "USER": given.username,
        "PASSWORD": given.password,
        "HOST": given.hostname,
        "PORT": given.port,
    }
    settings.configure(DATABASES={"default": database})
    import django

    django.setup()
    from django.db import connection

    connection.ensure_connection()
    chosen = type(connection.connection).__module__.split(".")[0]
    if chosen != driver:
        raise RuntimeError(f"Django chose {chosen}")
    if driver == "psycopg2":
        del sys.modules["psycopg"]


def main(driver: str, url: str, schema: str, queue: str) -> dict[str, Any]:
    configure(driver, url)
    from django.db import connection, transaction

    from contract_tests.messages import message
    from transports.postgres import PostgresTransport
    from unstract_core import ConfigurationError, TransportError, TransportNotReady

    transport = PostgresTransport(url, schema)
    sent: dict[str, Any] = {}

    with transaction.atomic(), connection.cursor() as cursor:
        sent["one"] = transport.send([message("t", queue, "one")], within=cursor)
        sent["many"] = transport.send([message("t", queue, "many", n) for n in range(3)], within=cursor)
        sent["seen before the commit"] = len(transport.queues([queue])) and transport.queues([queue])[0].ready

    class Undo(Exception):
        pass

    try:
        with transaction.atomic(), connection.cursor() as cursor:
            transport.send([message("t", queue, "undone")], within=cursor)
            raise Undo
    except Undo:
        pass

    with transaction.atomic(), connection.cursor() as cursor:
        sent["outer"] = transport.send([message("t", queue, "outer")], within=cursor)
        try:
            with transaction.atomic():
                transport.send([message("t", queue, "to the savepoint only")], within=cursor)
                raise Undo
        except Undo:
            pass

    for state in ("autocommit", "stale"):
        try:
            with connection.cursor() as cursor:
                if state == "stale":
                    connection.close()
                transport.send([message("t", queue, state)], within=cursor)
        except ConfigurationError as exc:
            sent[state] = [str(exc)]

    try:
        with transaction.atomic(), connection.cursor() as cursor:
            PostgresTransport(url, schema + "_absent").send([message("t", queue, "x")], within=cursor)
    except TransportNotReady as exc:
        sent["not ready"] = [type(exc.__cause__).__name__, type(exc.__cause__).__module__, str(exc)]

    try:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            (pid,) = cursor.fetchone()
            transport._pool.execute("end the other", Statement(b"SELECT pg_terminate_backend(%s, 5000)"), (pid,))
            try:
                transport.send([message("t", queue, "lost")], within=cursor)
            except TransportError as exc:
                sent["lost"] = [type(exc).__name__, getattr(exc, "fate_unknown", None), type(exc.__cause__).__module__]
                raise
    except Exception:
        connection.close()  # what Django makes of a lost connection on its way out is not our concern
    transport.close()
    return sent


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
