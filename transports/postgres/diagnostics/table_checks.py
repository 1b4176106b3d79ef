"""Checks of the tables and of their rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from transports.postgres import migrate
from transports.postgres.diagnostics.probe import COMPARE, MIGRATE, Probe, join_first, queue_options, split_remedy
from transports.postgres.migrate import index_shape
from transports.postgres.preflight import check_row_security, check_tables
from transports.postgres.rows import message_columns
from unstract_core.errors import TransportError, TransportNotReady, TransportRefused
from unstract_core.observability.diagnostics import Finding, Level, kind_of_reason

_OFF = ("autovacuum_enabled=false", "autovacuum_enabled=off", "autovacuum_enabled=no", "autovacuum_enabled=0")

_EFFECTS: dict[str, tuple[Level, str]] = {
    "pg_queue_message_held": ("error", "counts, and scans for expired leases, read the claimed rows of all queues"),
    "pg_queue_message_strange": ("warning", "`queues` does not count messages in a state of another program"),
}
"""The level and effect of a missing index, unless the effect is a slow claim."""


def version(probe: Probe) -> Iterator[Finding]:
    """Compare the version of the schema with the version of this package."""
    ours = migrate.SCHEMA_VERSION
    theirs = migrate.schema_version(probe.run, probe.statements)
    detail = f"{probe.statements.schema} is " + (
        "not marked with a version" if theirs is None else f"of version {theirs}"
    )
    if theirs == ours:
        yield Finding("schema", "ok", detail)
    elif theirs is None or theirs < ours:
        yield Finding("schema", "warning", f"{detail}; this package is of {ours}", MIGRATE)
    else:
        remedy = "bring this package up to date; a newer one has migrated these tables"
        yield Finding("schema", "error", f"{detail}; this package is of {ours}", remedy)


def tables(probe: Probe) -> Iterator[Finding]:
    """Check that each table has all columns, and no trigger or sequence that rejects new rows."""
    missing = _missing(probe)
    for table, columns in missing.items():
        if columns is None:
            detail = f"there is no table {table} in schema {probe.statements.schema}"
            yield Finding("tables", "error", detail, f"{MIGRATE}, or name the right schema (?schema= in the URL)")
        else:
            yield Finding("tables", "error", f"{table} has no column {', '.join(columns)}", COMPARE)
    triggers = probe.ask_of_tables("triggers")
    for table, trigger in triggers:
        detail = f"trigger {trigger} runs before each row of {table} is written, and can keep it as it was"
        yield Finding("tables", "warning", detail, "let it return the row always, or drop it")
    names = {table: probe.statements.table(table) for table in ("messages", "dead")}
    behind = [] if missing else probe.ask("sequences_behind", **names)
    for sequence, highest in behind:
        detail = f"the sequence {sequence} is behind the id {highest}: it hands out ids that exist"
        yield Finding("tables", "warning", detail, f"SELECT setval('{sequence}', {highest})")
    if not missing and not triggers and not behind:
        yield Finding("tables", "ok", f"{', '.join(probe.tables)}")


def rights(probe: Probe) -> Iterator[Finding]:
    """Check the rights of this role: the statements of senders and workers are planned, and not run."""
    if _missing(probe):
        yield Finding("rights", "skipped", "correct the tables first")
        return
    hidden = _refusal(lambda: check_row_security(probe.run, probe.statements))
    if hidden is not None:
        detail, remedy = split_remedy(hidden)
        yield Finding("rights", "error", detail, remedy)
        return
    working = _refusal(lambda: check_tables(probe.run, probe.statements))
    if working is not None:
        detail, remedy = split_remedy(working)
        if _refusal(lambda: _plan_sending(probe)) is None:
            yield Finding("rights", "warning", f"may send, but not work: {detail}", f"if it is to work: {remedy}")
        else:
            yield Finding("rights", "error", detail, remedy)
    elif probe.ask("may_purge_replies", results=probe.statements.table("results")) == [(False,)]:
        detail = "may send and work, but not remove expired replies"
        yield Finding("rights", "warning", detail, "grant DELETE on pg_task_result")
    else:
        yield Finding("rights", "ok", "may send, work, and remove expired replies")


def indexes(probe: Probe) -> Iterator[Finding]:
    """Check that each index exists, under any name, and is valid."""
    wanted = {
        (next(table for table in probe.tables if name.startswith(table)), index_shape(text)): (name, text)
        for name, text in probe.definitions.items()
        if text.startswith("CREATE INDEX")
    }
    keys = {table: re.findall(r"^    (\w+) .*PRIMARY KEY", probe.definitions[table], re.M)[0] for table in probe.tables}
    wrong = False
    valid: set[tuple[str, str]] = set()
    unique: set[tuple[str, str]] = set()
    rows = probe.ask_of_tables("indexes")
    for table, name, definition, is_valid in rows:
        if not is_valid:
            wrong = True
            detail = f"{name} is not valid: its CREATE INDEX CONCURRENTLY failed or is still running"
            yield Finding("indexes", "error", detail, f"if it is not being created now: drop it, and {MIGRATE}")
            continue
        valid.add((table, index_shape(definition)))
        if table == "pg_queue_message" and re.search(r"\bvt\b", definition.rpartition(" USING ")[2]):
            wrong = True
            detail = f"{name} indexes vt, so that no renewal of a lease is a HOT update"
            remedy = (
                f"when no worker of an earlier version runs: DROP INDEX CONCURRENTLY {probe.statements.schema}.{name}"
            )
            yield Finding("indexes", "warning", detail, remedy)
        if definition.startswith("CREATE UNIQUE"):
            unique.add((table, index_shape(definition)))
    present = {table for table, _ in probe.ask_of_tables("columns")}
    for (table, looks), (name, text) in wanted.items():
        if table in present and (table, looks) not in valid:
            wrong = True
            by_hand = text.replace("CREATE INDEX", "CREATE INDEX CONCURRENTLY", 1)
            remedy = f"{MIGRATE}, or on a large live table: {by_hand}"
            level, effect = _EFFECTS.get(name, ("error", "every claim reads it all"))
            yield Finding("indexes", level, f"{table} has no index like {name}: {effect}", remedy)
    for table, column in keys.items():
        if table in present and (table, f"btree{column}") not in unique:
            wrong = True
            detail = f"{table} has no unique index on {column}"
            yield Finding("indexes", "error", detail, f"make {column} its primary key")
    if not wrong:
        level, detail = ("ok", f"{len(rows)}, all valid") if present else ("skipped", "there is no table")
        yield Finding("indexes", level, detail)


def autovacuum(probe: Probe) -> Iterator[Finding]:
    """Check that autovacuum removes dead rows, because a queue creates many of them."""
    any_found = False
    rows = probe.ask_of_tables("autovacuum")
    if any("off" in row[1:3] for row in rows):
        any_found = True
        detail = "is off for the whole server: dead rows stay, and claims slow down"
        yield Finding("autovacuum", "warning", detail, "set autovacuum = on and track_counts = on in its configuration")
    for table, _, _, options, live, dead, since in rows:
        name = f"{probe.statements.schema}.{table}"
        if set(_OFF).intersection(options or ()):
            any_found = True
            detail = f"is off for {table}: dead rows stay, and claims slow down"
            yield Finding("autovacuum", "warning", detail, f"ALTER TABLE {name} SET (autovacuum_enabled = true)")
        many = dead > probe.limits.dead_rows and dead > live / 5
        if many and (since is None or since > probe.limits.unvacuumed):
            any_found = True
            last = "never vacuumed" if since is None else f"last vacuumed {since:.0f} s ago"
            detail = f"{table} has {dead} dead rows to {live} live ones, and was {last}"
            yield Finding("autovacuum", "warning", detail, f"see `snapshots`; then VACUUM {name}")
    if not any_found:
        detail = "; ".join(f"{table}: {live} live, {dead} dead rows" for table, _, _, _, live, dead, _ in rows)
        yield Finding("autovacuum", "ok" if rows else "skipped", detail or "there is no table", _hint(probe, rows))


def leases(probe: Probe) -> Iterator[Finding]:
    """Find expired leases that no worker requeues, because no worker receives from the queue."""
    rows = probe.ask("stuck", seconds=probe.limits.overdue)
    if not rows:
        yield Finding("leases", "ok", "no expired lease is left")
        return
    parts = [f"{count} in {queue!r} (up to {_age(oldest)} ago)" for queue, count, oldest in rows]
    detail = f"leases or delays ended, and no worker requeued the messages: {join_first(parts, 'queues')}"
    remedy = f"no worker receives from these queues: start one with {queue_options(row[0] for row in rows)}"
    yield Finding("leases", "warning", detail, remedy)


def waiting(probe: Probe) -> Iterator[Finding]:
    """Find messages that have waited for a long time, or that no worker can claim."""
    rows = probe.ask("waiting", seconds=probe.limits.waiting)
    if odd := probe.ask("unknown_states"):
        parts = [f"{count} {state!r} in {queue!r}" for queue, state, count in odd]
        detail = (
            f"messages are in a state that this package does not know and never claims: {join_first(parts, 'queues')}"
        )
        yield Finding(
            "waiting", "warning", detail, "run the program that makes them ready, or a newer version of this one"
        )
    elif not rows:
        yield Finding("waiting", "ok", f"no message has been ready for more than {probe.limits.waiting:g} s")
    idle = [row for row in rows if not row[3]]
    busy = [row for row in rows if row[3]]
    if idle:
        parts = [f"{ready} in {queue!r} (for {_age(oldest)})" for queue, ready, oldest, _ in idle]
        remedy = f"start a worker with {queue_options(row[0] for row in idle)}"
        yield Finding(
            "waiting", "warning", f"messages wait, and no worker claims them: {join_first(parts, 'queues')}", remedy
        )
    if busy:
        parts = [f"{ready} in {queue!r} (for {_age(oldest)}; {held} at work)" for queue, ready, oldest, held in busy]
        remedy = "run more workers, or raise their --concurrency; messages of low priority wait for the others"
        yield Finding(
            "waiting",
            "warning",
            f"messages arrive faster than workers process them: {join_first(parts, 'queues')}",
            remedy,
        )


def dead_letters(probe: Probe) -> Iterator[Finding]:
    """Count the dead letters of each queue, with the error type of the newest."""
    rows = probe.ask("dead_by_queue")
    if not rows:
        yield Finding("dead letters", "ok", "none")
        return
    parts = [f"{count} in {queue!r} (the newest: {kind_of_reason(reason)})" for queue, count, reason in rows]
    remedy = f"unstract-wire dead list {queue_options([rows[0][0]])}; then `dead replay` or `dead purge`"
    yield Finding("dead letters", "warning", join_first(parts, "queues"), remedy)


def replies(probe: Probe) -> Iterator[Finding]:
    """Check that workers remove expired replies."""
    ((count, oldest),) = probe.ask("unpurged")
    detail = (
        "no expired reply is left" if not count else f"{count} expired replies are left, the oldest for {_age(oldest)}"
    )
    if not count or oldest <= probe.limits.unpurged:
        yield Finding("replies", "ok", detail)
    else:
        remedy = "run a worker, of any queue, whose role has DELETE on pg_task_result"
        yield Finding("replies", "warning", detail, remedy)


def _missing(probe: Probe) -> dict[str, list[str] | None]:
    """Return the tables that lack columns, with the names of these; None for a table that does not exist."""
    there = dict(probe.ask_of_tables("columns"))
    missing: dict[str, list[str] | None] = {}
    for table in probe.tables:
        wanted = re.findall(r"^    (\w+) ", probe.definitions[table], re.M)
        if table not in there:
            missing[table] = None
        elif lacks := [column for column in wanted if column not in there[table]]:
            missing[table] = lacks
    return missing


def _plan_sending(probe: Probe) -> None:
    parameters = {**message_columns([], []), "channel": "", "wake": []}
    probe.run("plan the statement send_many", probe.statements["send_many"].explained(), parameters)
    if closed := probe.ask("closed_to_senders", messages=probe.statements.table("messages")):
        raise TransportNotReady(f"this role lacks USAGE on {closed[0][0]}", remedy="grant this role the right")


def _refusal(plan: Callable[[], None]) -> TransportError | None:
    try:
        plan()
    except (TransportNotReady, TransportRefused) as exc:
        return exc
    return None


def _hint(probe: Probe, rows: list[tuple[Any, ...]]) -> str:
    """Return a remedy for a message table that was created without storage options."""
    if options := re.search(r"WITH (\(.*\))", probe.definitions["pg_queue_message"]):
        for table, _, _, given, _, _, _ in rows:
            if table == "pg_queue_message" and not given:
                return f"on a busy queue: ALTER TABLE {probe.statements.schema}.{table} SET {options[1]}"
    return ""


def _age(seconds: float | None) -> str:
    return "an unknown time" if seconds is None else f"{seconds:.0f} s"
