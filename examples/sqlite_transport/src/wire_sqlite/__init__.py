"""A transport in one SQLite file: durable, for all threads and processes of one machine, without other packages.

A settlement is one transaction. SQLite does not notify other processes of a commit, so a waiting process queries the
file every `poll_interval` seconds; inside one transport, waiting threads are notified at once. Leases and delays use
the machine's wall clock, which all of its processes share and which survives a restart. Do not use a file on a network
file system, which SQLite does not lock reliably.
"""

from wire_sqlite.transport import SqliteTransport, from_url

__all__ = ["SqliteTransport", "from_url"]
