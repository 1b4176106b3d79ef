"""The in-memory transport: the reference sample for transport authors, and the test double for users.

Complete and small: one lock, a heap for each queue, JSON text as the stored form, so that everything goes through the
wire as it would elsewhere. It lives in one process and forgets everything with it; there is nothing transactional to
join, so `within` is refused.
"""

from transports.memory.transport import MemoryTransport, from_url

__all__ = ["MemoryTransport", "from_url"]
