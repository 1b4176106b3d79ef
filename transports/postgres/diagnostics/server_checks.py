"""Checks of the server and of the connection to it."""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import select
import time
from collections.abc import Iterator

import psycopg
from psycopg import sql

from transports.postgres.connection import Connection
from transports.postgres.diagnostics.probe import Probe
from transports.postgres.error_mapping import mapped
from transports.postgres.errors import NotifyQueueFull
from unstract_core.errors import TransportUnavailable
from unstract_core.observability.diagnostics import Finding

_OLDEST = 120000
_FUTURE = 60.0


def connection(probe: Probe) -> Iterator[Finding]:
    """Check that the server can be reached, and that the connection is encrypted."""
    made = probe.connected()
    info = made.info
    detail = f"{info.dbname} at {info.host}:{info.port} as {info.user}"
    if made.pgconn.ssl_in_use:
        yield Finding(
            "connection", "ok", f"{detail}, over TLS (sslmode={info.get_parameters().get('sslmode', 'prefer')})"
        )
    elif _is_local(info):
        yield Finding("connection", "ok", f"{detail}, on this machine and without TLS")
    else:
        remedy = "add sslmode=verify-full (and sslrootcert) to the URL"
        yield Finding("connection", "warning", f"{detail}, without TLS: others on the network can read it", remedy)


def server(probe: Probe) -> Iterator[Finding]:
    """Check the server's version and encoding, that it accepts writes, and that its commits are durable."""
    ((version, number, role, encoding, standby, read_only, fsync, commit, _),) = probe.ask("server")
    if number < _OLDEST:
        yield Finding("server", "error", f"PostgreSQL {version} is too old", "use PostgreSQL 12 or newer")
    elif standby or read_only == "on":
        why = "is a standby" if standby else f"lets role {role} read only"
        remedy = "connect to the primary (target_session_attrs=read-write), or allow writing"
        yield Finding("server", "error", f"PostgreSQL {version} {why}", remedy)
    else:
        yield Finding("server", "ok", f"PostgreSQL {version}")
    if encoding == "UTF8":
        yield Finding("encoding", "ok", "UTF8")
    else:
        remedy = "move to a database that was created with ENCODING 'UTF8'"
        yield Finding("encoding", "error", f"{encoding}, which cannot store every text", remedy)
    replicated, sound = _replication(probe)
    if not sound:
        remedy = "start the standby, or take it out of synchronous_standby_names"
        yield Finding("durability", "warning", replicated, remedy)
    if fsync == "on" and commit != "off":
        if sound:
            yield Finding("durability", "ok", f"synchronous_commit = {commit}; {replicated}")
    else:
        setting = "fsync" if fsync != "on" else "synchronous_commit"
        detail = f"{setting} = off: a crash of the server loses its last commits"
        if setting == "synchronous_commit":
            detail += "; only this package's own connections set it to on, send(within=) uses its caller's"
        yield Finding(
            "durability", "warning", detail, f"set {setting} = on for the server, the database or role {role}"
        )


def _replication(probe: Probe) -> tuple[str, bool]:
    """Describe the replication of commits, and return whether it works as configured."""
    ((names, standbys, synchronous, unseen),) = probe.ask("replication")
    if not names:
        some = f"asynchronous, to {standbys} standbys: a failover may lose the last commits"
        return (some if standbys else "no standby is connected"), True
    if synchronous or unseen:
        seen = f"{synchronous} synchronous standbys are connected" if synchronous else "this role may not see which"
        return f"synchronous_standby_names = {names!r}: {seen}", True
    return (
        f"synchronous_standby_names = {names!r}, and no such standby is connected: each commit waits until its "
        "statement is cancelled, and a failover may lose it"
    ), False


def pooler(probe: Probe) -> Iterator[Finding]:
    """Detect a pooler: its process ids differ from the server's."""
    made = probe.connected()
    pid = probe.ask("server")[0][-1]
    if not made.pooled and pid == made.info.backend_pid:
        spare = "" if probe.listens else "; if this holds for all processes, listen=false is not needed"
        yield Finding("pooler", "ok", f"none: the server itself answers{spare}")
    elif probe.listens:
        detail = "there is one: nothing is prepared, and waiting is polling"
        yield Finding(
            "pooler", "warning", detail, "set listen=false in the URL, or connect workers to the server itself"
        )
    else:
        yield Finding("pooler", "ok", "there is one, and listen=false is set")


def listening(probe: Probe) -> Iterator[Finding]:
    """Check that a notification from one connection reaches another one that listens."""
    if not probe.listens:
        yield Finding("listen", "skipped", "listen=false: nothing listens, waiting is polling")
        return
    channel = f"unstract_wire_check_{secrets.token_hex(8)}"
    with contextlib.closing(probe.connect()) as listener:
        with mapped("listen for notifications"):
            listener.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))
        began = time.monotonic()
        try:
            probe.ask("notify_once", channel=channel)
        except NotifyQueueFull:
            detail = "the server takes no notification, because its queue of notifications is full: waiting is polling"
            yield Finding("listen", "warning", detail, "end the session that listens and is idle in transaction")
            return
        heard = _hears(listener, channel, began + probe.limits.notification)
        took = time.monotonic() - began
        with contextlib.suppress(psycopg.Error):  # a pooler keeps the connection to the server
            listener.execute(sql.SQL("UNLISTEN {}").format(sql.Identifier(channel)))
    if heard:
        yield Finding("listen", "ok", f"a notification came in {took * 1000:.1f} ms")
    else:
        detail = f"no notification came in {probe.limits.notification:g} s: messages are found by polling"
        remedy = "is there a pooler in transaction mode? If so, set listen=false in the URL"
        yield Finding("listen", "warning", detail, remedy)


def clock(probe: Probe) -> Iterator[Finding]:
    """Compare the clocks of the database and of this machine, by the quickest of three answers."""
    looks = []
    for _ in range(3):
        before = time.time()
        ((theirs,),) = probe.ask("clock")
        after = time.time()
        looks.append(((after - before) / 2, theirs - (before + after) / 2))
    uncertain, ahead = min(looks)
    which = "ahead of" if ahead > 0 else "behind"
    detail = f"the database's is {abs(ahead):.3f} s {which} this machine's (give or take {uncertain:.3f} s)"
    ((future,),) = probe.ask("future", seconds=_FUTURE) if _has_messages(probe) else ((0,),)
    if future:
        detail += f"; it was set back: {future} of the newest messages were sent later than it is now"
        yield Finding("clock", "warning", detail, "leases and delays from before end late by as much, by themselves")
    elif abs(ahead) - uncertain > probe.limits.clock:
        detail += "; where the database's is corrected by a step, all leases end at once, or late"
        yield Finding("clock", "warning", detail, "let NTP slew it, or stop the workers before it is set by a step")
    else:
        yield Finding("clock", "ok", detail)


def _has_messages(probe: Probe) -> bool:
    """Whether this role can read the table of messages."""
    return bool(probe.ask("may_read", messages=probe.statements.table("messages"))[0][0])


def notifications(probe: Probe) -> Iterator[Finding]:
    """Check the fill level of the notification queue, which the whole server shares."""
    ((used,),) = probe.ask("notification_queue")
    detail = f"{used:.1%} of the server's notification queue is in use"
    if used <= probe.limits.notification_queue:
        yield Finding("notifications", "ok", detail)
    else:
        remedy = "end the session that listens and is idle in transaction: SELECT pg_terminate_backend(pid)"
        yield Finding("notifications", "warning", detail, remedy)


def room(probe: Probe) -> Iterator[Finding]:
    """Check how many more connections the server, the database and this role allow."""
    ((server_most, server_now, database_most, database_now, role_most, role_now),) = probe.ask("room")
    limits = [("max_connections", server_most, server_now, "raise max_connections")]
    if database_most >= 0:
        limits.append(("the database's limit", database_most, database_now, "ALTER DATABASE ... CONNECTION LIMIT"))
    if role_most >= 0:
        limits.append(("the role's limit", role_most, role_now, "ALTER ROLE ... CONNECTION LIMIT"))
    name, most, now, remedy = min(limits, key=lambda limit: limit[1] - limit[2])
    detail = f"{now} of {most} connections are in use ({name})"
    if most - now >= probe.limits.room:
        yield Finding("connections", "ok", detail)
    else:
        yield Finding(
            "connections", "warning", detail, f"{remedy}, run fewer workers, lower pool_size, or use a pooler"
        )


def snapshots(probe: Probe) -> Iterator[Finding]:
    """Find sessions with old transactions, which hold locks or keep vacuum from removing dead rows."""
    limits = {"seconds": probe.limits.transaction, "transactions": probe.limits.transactions}
    any_found = False
    for pid, name, state, age, seconds in probe.ask("old_sessions", **limits):
        any_found = True
        for_long = "a time that this role may not see" if seconds is None else f"{seconds:.0f} s"
        detail = f"pid {pid} ({name}) has had a transaction open for {for_long}"
        detail += f", {state}" if state else ""
        detail += "" if age is None else f", and holds a snapshot {age} transactions old: no dead row since is removed"
        remedy = f"end it: SELECT pg_terminate_backend({pid}); and set idle_in_transaction_session_timeout"
        yield Finding("snapshots", "warning", detail, remedy)
    for detail, age in probe.ask("other_holders", **limits):
        any_found = True
        remedy = "finish it, or drop it if it is no longer needed"
        yield Finding("snapshots", "warning", f"{detail} holds rows back since {age} transactions", remedy)
    if not any_found:
        yield Finding("snapshots", "ok", f"no transaction is older than {probe.limits.transaction:g} s")


def _is_local(info: psycopg.ConnectionInfo) -> bool:
    if info.host.startswith(("/", "@")):
        return True
    try:
        return ipaddress.ip_address(info.hostaddr).is_loopback
    except ValueError:
        return False


def _hears(listener: Connection, channel: str, deadline: float) -> bool:
    try:
        while True:
            listener.pgconn.consume_input()
            while (heard := listener.pgconn.notifies()) is not None:
                if heard.relname.decode() == channel:
                    return True
            if (left := deadline - time.monotonic()) <= 0:
                return False
            listener.poll(select.POLLIN, left)
    except psycopg.Error as exc:
        raise TransportUnavailable("the connection that listens was lost") from exc
