"""The PostgreSQL transport: messages, replies and dead letters are rows, accessed with psycopg 3.

It works on the product's own tables, together with the product's existing consumers. A settlement is one statement. If
the process or the connection fails, a message is acknowledged with its follow-up and reply, or not at all. All times
are those of the database's clock.
"""

from transports.postgres.transport import PostgresTransport
from transports.postgres.url import from_url

__all__ = ["PostgresTransport", "from_url"]
