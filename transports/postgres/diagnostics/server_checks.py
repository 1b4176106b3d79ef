"""The checks of the server, and of the way to it."""

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
    """Whether the server can be reached, and whether anybody can read along."""
    made = probe.connected()
    info = made.info
    what = f"{info.dbname} at {info.host}:{info.port} as {info.user}"
    if made.pgconn.ssl_in_use:
        yield Finding(
            "connection", "ok", f"{what}, over TLS (sslmode={info.get_parameters().get('sslmode', 'prefer')})"
        )
    elif _is_local(info):
        yield Finding("connection", "ok", f"{what}, on this machine and without TLS")
    else:
        remedy = "add sslmode=verify-full (and sslrootcert) to the URL"
        yield Finding("connection", "warning", f"{what}, without TLS: the network can read along", remedy)


def server(probe: Probe) -> Iterator[Finding]:
    """Its version, whether it takes writes, its encoding, and whether it keeps what it has acknowledged."""
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
        yield Finding("encoding", "error", f"{encoding}, in which not every text can be stored", remedy)
    replicated, sound = _replication(probe)
    if not sound:
        remedy = "start the standby, or take it out of synchronous_standby_names"
        yield Finding("durability", "warning", replicated, remedy)
    if fsync == "on" and commit != "off":
        if sound:
            yield Finding("durability", "ok", f"synchronous_commit = {commit}; {replicated}")
    else:
        setting = "fsync" if fsync != "on" else "synchronous_commit"
        what = f"{setting} = off: when the server crashes, what it acknowledged last is lost"
        if setting == "synchronous_commit":
            what += "; only this package's own connections set it to on, send(within=) uses its caller's"
        yield Finding("durability", "warning", what, f"set {setting} = on for the server, the database or role {role}")


def _replication(probe: Probe) -> tuple[str, bool]:
    """Say what a failover keeps of that which was acknowledged, and whether commits are replicated as they should."""
    ((names, standbys, synchronous, unseen),) = probe.ask("replication")
    if not names:
        some = f"asynchronous, to {standbys} standbys: a failover may lose what was acknowledged last"
        return (some if standbys else "no standby is connected"), True
    if synchronous or unseen:
        seen = f"{synchronous} synchronous standbys are connected" if synchronous else "this role may not see which"
        return f"synchronous_standby_names = {names!r}: {seen}", True
    return (
        f"synchronous_standby_names = {names!r}, and no such standby is connected: each commit waits until its "
        "statement is cancelled, and a failover may lose it"
    ), False


def pooler(probe: Probe) -> Iterator[Finding]:
    """Whether one stands before the server: it gives its clients process ids of its own making."""
    made = probe.connected()
    pid = probe.ask("server")[0][-1]
    if not made.pooled and pid == made.info.backend_pid:
        spare = "" if probe.listens else "; if it is so everywhere, listen=false is not needed"
        yield Finding("pooler", "ok", f"none, the server itself answers{spare}")
    elif probe.listens:
        what = "one stands before the server: nothing is prepared, and waiting is polling"
        yield Finding("pooler", "warning", what, "say listen=false in the URL, or connect workers to the server itself")
    else:
        yield Finding("pooler", "ok", "one stands before the server, and listen=false is said")


def listening(probe: Probe) -> Iterator[Finding]:
    """Whether a notification that one connection sends reaches another one that listens."""
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
            what = "the server takes no notification, because its queue of them is full: waiting is polling"
            yield Finding("listen", "warning", what, "end the session that listens and is idle in transaction")
            return
        heard = _hears(listener, channel, began + probe.limits.notification)
        took = time.monotonic() - began
        with contextlib.suppress(psycopg.Error):  # a pooler would keep the connection to the server as it is
            listener.execute(sql.SQL("UNLISTEN {}").format(sql.Identifier(channel)))
    if heard:
        yield Finding("listen", "ok", f"a notification came in {took * 1000:.1f} ms")
    else:
        what = f"no notification came in {probe.limits.notification:g} s: messages are found by polling"
        remedy = "is there a pooler in transaction mode? Then say listen=false in the URL"
        yield Finding("listen", "warning", what, remedy)


def clock(probe: Probe) -> Iterator[Finding]:
    """How far its clock is from ours, by the quickest of three answers."""
    looks = []
    for _ in range(3):
        before = time.time()
        ((theirs,),) = probe.ask("clock")
        after = time.time()
        looks.append(((after - before) / 2, theirs - (before + after) / 2))
    uncertain, ahead = min(looks)
    which = "ahead of" if ahead > 0 else "behind"
    what = f"the database's is {abs(ahead):.3f} s {which} this machine's (give or take {uncertain:.3f} s)"
    ((future,),) = probe.ask("future", seconds=_FUTURE) if _has_messages(probe) else ((0,),)
    if future:
        what += f"; it was set back: {future} of the newest messages were sent later than it is now"
        yield Finding("clock", "warning", what, "leases and delays from before end late by as much, by themselves")
    elif abs(ahead) - uncertain > probe.limits.clock:
        what += "; where the database's is corrected by a step, all leases end at once, or late"
        yield Finding("clock", "warning", what, "let NTP slew it, or stop the workers before it is set by a step")
    else:
        yield Finding("clock", "ok", what)


def _has_messages(probe: Probe) -> bool:
    """Whether there is a table of messages that this role may read."""
    return bool(probe.ask("may_read", messages=probe.statements.table("messages"))[0][0])


def notifications(probe: Probe) -> Iterator[Finding]:
    """How full the queue of notifications is: it is one for the whole server."""
    ((used,),) = probe.ask("notification_queue")
    what = f"{used:.1%} of the server's notification queue is in use"
    if used <= probe.limits.notification_queue:
        yield Finding("notifications", "ok", what)
    else:
        remedy = "end the session that listens and is idle in transaction: SELECT pg_terminate_backend(pid)"
        yield Finding("notifications", "warning", what, remedy)


def room(probe: Probe) -> Iterator[Finding]:
    """How many more connections the server, the database and this role allow."""
    ((server_most, server_now, database_most, database_now, role_most, role_now),) = probe.ask("room")
    limits = [("max_connections", server_most, server_now, "raise max_connections")]
    if database_most >= 0:
        limits.append(("the database's limit", database_most, database_now, "ALTER DATABASE ... CONNECTION LIMIT"))
    if role_most >= 0:
        limits.append(("the role's limit", role_most, role_now, "ALTER ROLE ... CONNECTION LIMIT"))
    name, most, now, remedy = min(limits, key=lambda limit: limit[1] - limit[2])
    what = f"{now} of {most} connections are in use ({name})"
    if most - now >= probe.limits.room:
        yield Finding("connections", "ok", what)
    else:
        yield Finding("connections", "warning", what, f"{remedy}, run fewer workers, lower pool_size, or use a pooler")


def snapshots(probe: Probe) -> Iterator[Finding]:
    """Who keeps dead rows from being removed, or holds locks, because a transaction of theirs does not end."""
    limits = {"seconds": probe.limits.transaction, "transactions": probe.limits.transactions}
    found = False
    for pid, name, state, age, seconds in probe.ask("old_sessions", **limits):
        found = True
        for_long = "a time that this role may not see" if seconds is None else f"{seconds:.0f} s"
        what = f"pid {pid} ({name}) has had a transaction open for {for_long}"
        what += f", {state}" if state else ""
        what += "" if age is None else f", and holds a snapshot {age} transactions old: no dead row since is removed"
        remedy = f"end it: SELECT pg_terminate_backend({pid}); and set idle_in_transaction_session_timeout"
        yield Finding("snapshots", "warning", what, remedy)
    for what, age in probe.ask("other_holders", **limits):
        found = True
        remedy = "finish it, or drop it where nobody needs it any more"
        yield Finding("snapshots", "warning", f"{what} holds rows back since {age} transactions", remedy)
    if not found:
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
