"""A transport in one SQLite file: durable, for all threads and processes of one machine, on the standard library alone.

Everything that a settlement holds is one transaction. SQLite tells nobody what another process has committed, so
whoever waits looks again every `poll_interval` seconds; inside one transport it is told at once. Leases and delays are
measured by the machine's wall clock, the only one that all of its processes share and that survives a restart. Not for
a file on a network, which SQLite does not lock reliably.
"""

from wire_sqlite.transport import SqliteTransport, from_url

__all__ = ["SqliteTransport", "from_url"]
