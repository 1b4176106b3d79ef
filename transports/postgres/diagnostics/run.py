"""Runs all checks of one schema, for `unstract-wire doctor`.

Each check is independent: if one fails, or this role lacks a right for it, the others continue. The checks only read,
on separate connections. No finding quotes a payload.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from transports.postgres.connector import Connector
from transports.postgres.diagnostics import server_checks, table_checks
from transports.postgres.diagnostics.probe import DiagnosticLimits, Probe, split_remedy
from transports.postgres.statements import Statements
from unstract_core.errors import ConfigurationError, ContractError, TransportNotReady
from unstract_core.observability.diagnostics import Finding

_CHECKS: dict[str, Callable[[Probe], Iterator[Finding]]] = {
    "server": server_checks.server,
    "pooler": server_checks.pooler,
    "listen": server_checks.listening,
    "clock": server_checks.clock,
    "connections": server_checks.room,
    "notifications": server_checks.notifications,
    "snapshots": server_checks.snapshots,
    "schema": table_checks.version,
    "tables": table_checks.tables,
    "rights": table_checks.rights,
    "indexes": table_checks.indexes,
    "autovacuum": table_checks.autovacuum,
    "leases": table_checks.leases,
    "waiting": table_checks.waiting,
    "dead letters": table_checks.dead_letters,
    "replies": table_checks.replies,
}


def check_up(
    connector: Connector, statements: Statements, *, listens: bool, limits: DiagnosticLimits
) -> Iterator[Finding]:
    """Yield the findings of each check, in order. A check that fails is a finding too, so this raises no error."""
    probe = Probe(connector, statements, listens=listens, limits=limits)
    try:
        try:
            yield from server_checks.connection(probe)
        except ContractError as exc:
            wrong = isinstance(exc, ConfigurationError)
            remedy = (
                "correct the URL" if wrong else "is the server running, and are host, port, user and password right?"
            )
            yield Finding("connection", "error", str(exc), remedy)
            yield from (Finding(name, "skipped", "there is no connection") for name in _CHECKS)
            return
        for name, check in _CHECKS.items():
            try:
                yield from check(probe)
            except TransportNotReady as exc:
                problem, remedy = split_remedy(exc)
                yield Finding(name, "skipped", f"could not be checked: {problem}", remedy)
            except ContractError as exc:
                yield Finding(name, "warning", f"could not be checked: {exc}", "look again later")
    finally:
        probe.close()
