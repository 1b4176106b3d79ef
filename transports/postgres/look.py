"""Look at the tables before the first message: whether they are there, and whether our statements can work on them.

The statements of a consumer are planned and not run. That finds a missing column, a missing unique key under ON
CONFLICT and a missing right, whoever made the table; only sequences have to be asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from transports.postgres.settling import settle_parameters
from transports.postgres.statements import Statements
from unstract_core.errors import TransportNotReady, TransportRefused

_PLANNED: dict[str, dict[str, Any]] = {
    "claim_one_queue": {"queue_0": "", "limit": 1, "lease": 1.0},
    "bring_back": {"queues": [], "limit": 1},
    "settle": {**settle_parameters([]), "channel": "", "wake": [], "reply_channel": "", "wake_callers": False},
}


Execute: TypeAlias = Callable[[str, bytes, dict[str, Any]], list[tuple[Any, ...]]]
"""Runs a statement (what for, the statement, its parameters) and returns its rows; raises errors of ours."""


def look_at_tables(execute: Execute, statements: Statements) -> None:
    """Raise TransportNotReady where a table, a column, a key or a right is missing that a consumer needs."""
    execute("look at the tables", statements["check_tables"], {})
    for name, parameters in _PLANNED.items():
        try:
            execute(f"plan the statement {name}", b"EXPLAIN " + statements[name], parameters)
        except TransportRefused as exc:
            raise TransportNotReady(f"{exc}; compare the tables with transports/postgres/sql/schema.sql") from exc
    names = {"messages": statements.table("messages"), "dead": statements.table("dead")}
    if closed := execute("look at sequences", statements["closed_sequences"], names):
        sequences = ", ".join(str(sequence) for (sequence,) in closed)
        raise TransportNotReady(f"this role lacks USAGE on {sequences}; grant this role the right")
