"""The PostgreSQL transport: messages, replies and dead letters as rows, on psycopg 3.

It works on the product's own tables, beside its existing consumers. A settlement is one statement: whatever happens
to a process or a connection, a message is acknowledged together with everything that follows from it, or not at all.
The database's clock is the only one that counts.
"""

from transports.postgres.transport import PostgresTransport
from transports.postgres.url import from_url

__all__ = ["PostgresTransport", "from_url"]
