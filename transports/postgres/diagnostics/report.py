"""The check-up of one schema: everything that the transport stands on, and what to do about what is wrong.

Each check is made for itself: one that fails, or that this role has no right to, says so, and the others go on. It
reads, on connections of its own, and changes nothing; nothing that it says quotes a payload.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from transports.postgres.connections import Connector
from transports.postgres.diagnostics import server, tables
from transports.postgres.diagnostics.look import Limits, Look, told
from transports.postgres.statements import Statements
from unstract_core.errors import ConfigurationError, ContractError, TransportNotReady
from unstract_core.observability.diagnostics import Finding

_CHECKS: dict[str, Callable[[Look], Iterator[Finding]]] = {
    "server": server.server,
    "pooler": server.pooler,
    "listen": server.listening,
    "clock": server.clock,
    "connections": server.room,
    "notifications": server.notifications,
    "snapshots": server.snapshots,
    "schema": tables.version,
    "tables": tables.tables,
    "rights": tables.rights,
    "indexes": tables.indexes,
    "autovacuum": tables.autovacuum,
    "leases": tables.leases,
    "waiting": tables.waiting,
    "dead letters": tables.dead_letters,
    "replies": tables.replies,
}


def check_up(connector: Connector, statements: Statements, *, listens: bool, limits: Limits) -> Iterator[Finding]:
    """Yield what each check finds, in order. Raises nothing of its own."""
    look = Look(connector, statements, listens=listens, limits=limits)
    try:
        try:
            yield from server.connection(look)
        except ContractError as exc:
            wrong = isinstance(exc, ConfigurationError)
            remedy = "mend the URL" if wrong else "is the server running, and are host, port, user and password right?"
            yield Finding("connection", "error", str(exc), remedy)
            yield from (Finding(name, "skipped", "there is no connection") for name in _CHECKS)
            return
        for name, check in _CHECKS.items():
            try:
                yield from check(look)
            except TransportNotReady as exc:
                what, remedy = told(exc)
                yield Finding(name, "skipped", f"could not be checked: {what}", remedy)
            except ContractError as exc:
                yield Finding(name, "warning", f"could not be checked: {exc}", "look again later")
    finally:
        look.close()
