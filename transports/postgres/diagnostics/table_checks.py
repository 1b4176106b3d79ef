"""The checks of the tables, and of what stands in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from transports.postgres import migrate
from transports.postgres.diagnostics.probe import COMPARE, MIGRATE, Probe, join_first, queue_options, split_remedy
from transports.postgres.migrate import _shape as shape
from transports.postgres.preflight import check_row_security, check_tables
from transports.postgres.rows import message_columns
from unstract_core.errors import TransportError, TransportNotReady, TransportRefused
from unstract_core.observability.diagnostics import Finding, Level, kind_of_reason

_OFF = ("autovacuum_enabled=false", "autovacuum_enabled=off", "autovacuum_enabled=no", "autovacuum_enabled=0")

_EFFECTS: dict[str, tuple[Level, str]] = {
    "pg_queue_message_held": ("error", "counts, and looks for expired leases, read the claimed rows of all queues"),
    "pg_queue_message_strange": ("warning", "`queues` does not count messages in a state of another program"),
}
"""What a missing index means, where that is something else than a slow claim."""


def version(probe: Probe) -> Iterator[Finding]:
    """The version that the schema is marked with, against this package's."""
    ours = migrate.SCHEMA_VERSION
    theirs = migrate.schema_version(probe.run, probe.statements)
    what = f"{probe.statements.schema} is " + (
        "not marked with a version" if theirs is None else f"of version {theirs}"
    )
    if theirs == ours:
        yield Finding("schema", "ok", what)
    elif theirs is None or theirs < ours:
        yield Finding("schema", "warning", f"{what}; this package is of {ours}", MIGRATE)
    else:
        remedy = "bring this package up to date; a newer one has migrated these tables"
        yield Finding("schema", "error", f"{what}; this package is of {ours}", remedy)


def tables(probe: Probe) -> Iterator[Finding]:
    """Whether every table is there, with every column, and nothing in it stands in the way of new rows."""
    missing = _missing(probe)
    for table, columns in missing.items():
        if columns is None:
            what = f"there is no table {table} in schema {probe.statements.schema}"
            yield Finding("tables", "error", what, f"{MIGRATE}, or name the right schema (?schema= in the URL)")
        else:
            yield Finding("tables", "error", f"{table} has no column {', '.join(columns)}", COMPARE)
    triggers = probe.ask_of_tables("triggers")
    for table, trigger in triggers:
        what = f"trigger {trigger} runs before each row of {table} is written, and can keep it as it was"
        yield Finding("tables", "warning", what, "let it return the row always, or drop it")
    names = {table: probe.statements.table(table) for table in ("messages", "dead")}
    behind = [] if missing else probe.ask("sequences_behind", **names)
    for sequence, highest in behind:
        what = f"the sequence {sequence} is behind the id {highest}: it hands out ids that exist"
        yield Finding("tables", "warning", what, f"SELECT setval('{sequence}', {highest})")
    if not missing and not triggers and not behind:
        yield Finding("tables", "ok", f"{', '.join(probe.tables)}")


def rights(probe: Probe) -> Iterator[Finding]:
    """What this role may do: the statements of a sender and of a worker are planned, and not run."""
    if _missing(probe):
        yield Finding("rights", "skipped", "the tables are to be mended first")
        return
    hidden = _refusal(lambda: check_row_security(probe.run, probe.statements))
    if hidden is not None:
        what, remedy = split_remedy(hidden)
        yield Finding("rights", "error", what, remedy)
        return
    working = _refusal(lambda: check_tables(probe.run, probe.statements))
    if working is not None:
        what, remedy = split_remedy(working)
        if _refusal(lambda: _plan_sending(probe)) is None:
            yield Finding("rights", "warning", f"may send, and not work: {what}", f"if it is to work: {remedy}")
        else:
            yield Finding("rights", "error", what, remedy)
    elif probe.ask("may_purge_replies", results=probe.statements.table("results")) == [(False,)]:
        what = "may send and work, and not remove replies that expired"
        yield Finding("rights", "warning", what, "grant DELETE on pg_task_result")
    else:
        yield Finding("rights", "ok", "may send, work, and remove replies that expired")


def indexes(probe: Probe) -> Iterator[Finding]:
    """Whether every index is there and valid, whatever it is called."""
    wanted = {
        (next(table for table in probe.tables if name.startswith(table)), shape(text)): (name, text)
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
            what = f"{name} is not valid, as a CREATE INDEX CONCURRENTLY leaves it that failed or is still at work"
            yield Finding("indexes", "error", what, f"when nobody is making it: drop it, and {MIGRATE}")
            continue
        valid.add((table, shape(definition)))
        if table == "pg_queue_message" and re.search(r"\bvt\b", definition.rpartition(" USING ")[2]):
            wrong = True
            what = f"{name} indexes vt, so that no renewal of a lease is a HOT update"
            remedy = (
                f"when no worker of an earlier version runs: DROP INDEX CONCURRENTLY {probe.statements.schema}.{name}"
            )
            yield Finding("indexes", "warning", what, remedy)
        if definition.startswith("CREATE UNIQUE"):
            unique.add((table, shape(definition)))
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
            what = f"{table} has no unique index on {column}"
            yield Finding("indexes", "error", what, f"make {column} its primary key")
    if not wrong:
        level, what = ("ok", f"{len(rows)}, all valid") if present else ("skipped", "there is no table")
        yield Finding("indexes", level, what)


def autovacuum(probe: Probe) -> Iterator[Finding]:
    """Whether dead rows are removed; a queue makes many."""
    found = False
    rows = probe.ask_of_tables("autovacuum")
    if any("off" in row[1:3] for row in rows):
        found = True
        what = "is off for the whole server: dead rows stay, and claims slow down"
        yield Finding("autovacuum", "warning", what, "set autovacuum = on and track_counts = on in its configuration")
    for table, _, _, options, live, dead, since in rows:
        name = f"{probe.statements.schema}.{table}"
        if set(_OFF).intersection(options or ()):
            found = True
            what = f"is off for {table}: dead rows stay, and claims slow down"
            yield Finding("autovacuum", "warning", what, f"ALTER TABLE {name} SET (autovacuum_enabled = true)")
        many = dead > probe.limits.dead_rows and dead > live / 5
        if many and (since is None or since > probe.limits.unvacuumed):
            found = True
            last = "never vacuumed" if since is None else f"last vacuumed {since:.0f} s ago"
            what = f"{table} has {dead} dead rows to {live} live ones, and was {last}"
            yield Finding("autovacuum", "warning", what, f"see `snapshots`; then VACUUM {name}")
    if not found:
        what = "; ".join(f"{table}: {live} live, {dead} dead rows" for table, _, _, _, live, dead, _ in rows)
        yield Finding("autovacuum", "ok" if rows else "skipped", what or "there is no table", _hint(probe, rows))


def leases(probe: Probe) -> Iterator[Finding]:
    """Whether leases ended that nobody brings back, because nobody receives."""
    rows = probe.ask("stuck", seconds=probe.limits.overdue)
    if not rows:
        yield Finding("leases", "ok", "none ended and was left")
        return
    parts = [f"{count} in {queue!r} (up to {_age(oldest)} ago)" for queue, count, oldest in rows]
    what = f"leases or delays ended, and nobody brought the messages back: {join_first(parts, 'queues')}"
    remedy = f"nobody receives there: start a worker with {queue_options(row[0] for row in rows)}"
    yield Finding("leases", "warning", what, remedy)


def waiting(probe: Probe) -> Iterator[Finding]:
    """Whether messages wait for long, whether anybody works on their queue, and whether anybody can."""
    rows = probe.ask("waiting", seconds=probe.limits.waiting)
    if odd := probe.ask("unknown_states"):
        parts = [f"{count} {state!r} in {queue!r}" for queue, state, count in odd]
        what = (
            f"messages are in a state that this package does not know, and never takes: {join_first(parts, 'queues')}"
        )
        yield Finding(
            "waiting", "warning", what, "run the program that makes them ready, or a newer version of this one"
        )
    elif not rows:
        yield Finding("waiting", "ok", f"no message has been ready for more than {probe.limits.waiting:g} s")
    idle = [row for row in rows if not row[3]]
    busy = [row for row in rows if row[3]]
    if idle:
        parts = [f"{ready} in {queue!r} (for {_age(oldest)})" for queue, ready, oldest, _ in idle]
        remedy = f"start a worker with {queue_options(row[0] for row in idle)}"
        yield Finding("waiting", "warning", f"nobody works on what waits: {join_first(parts, 'queues')}", remedy)
    if busy:
        parts = [f"{ready} in {queue!r} (for {_age(oldest)}; {held} at work)" for queue, ready, oldest, held in busy]
        remedy = "run more workers, or raise their --concurrency; messages of low priority wait for the others"
        yield Finding("waiting", "warning", f"more comes than is worked off: {join_first(parts, 'queues')}", remedy)


def dead_letters(probe: Probe) -> Iterator[Finding]:
    """How many there are, and of which kind the newest is."""
    rows = probe.ask("dead_by_queue")
    if not rows:
        yield Finding("dead letters", "ok", "none")
        return
    parts = [f"{count} in {queue!r} (the newest: {kind_of_reason(reason)})" for queue, count, reason in rows]
    remedy = f"unstract-wire dead list {queue_options([rows[0][0]])}; then `dead replay` or `dead purge`"
    yield Finding("dead letters", "warning", join_first(parts, "queues"), remedy)


def replies(probe: Probe) -> Iterator[Finding]:
    """Whether replies that expired are removed, which any worker does."""
    ((count, oldest),) = probe.ask("unpurged")
    what = "none that expired is left" if not count else f"{count} that expired are left, the oldest for {_age(oldest)}"
    if not count or oldest <= probe.limits.unpurged:
        yield Finding("replies", "ok", what)
    else:
        remedy = "run a worker, of any queue, whose role has DELETE on pg_task_result"
        yield Finding("replies", "warning", what, remedy)


def _missing(probe: Probe) -> dict[str, list[str] | None]:
    """Return the tables that lack columns, with these; None where the table is not there at all."""
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
        raise TransportNotReady(f"this role lacks USAGE on {closed[0][0]}; grant this role the right")


def _refusal(plan: Callable[[], None]) -> TransportError | None:
    try:
        plan()
    except (TransportNotReady, TransportRefused) as exc:
        return exc
    return None


def _hint(probe: Probe, rows: list[tuple[Any, ...]]) -> str:
    """Say with which options a queue's table is best made, where it was made without."""
    if options := re.search(r"WITH (\(.*\))", probe.definitions["pg_queue_message"]):
        for table, _, _, given, _, _, _ in rows:
            if table == "pg_queue_message" and not given:
                return f"on a busy queue: ALTER TABLE {probe.statements.schema}.{table} SET {options[1]}"
    return ""


def _age(seconds: float | None) -> str:
    return "an unknown time" if seconds is None else f"{seconds:.0f} s"
