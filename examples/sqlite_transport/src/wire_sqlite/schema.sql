-- What a file holds. The names begin with wire_, so that an application can keep its own tables in the same file and
-- send within its own transactions. Times are seconds since 1970.

BEGIN IMMEDIATE;

-- A message is `ready`, or `held` under a lease or `delayed` until `due`. (id, attempt) is the fence of a delivery,
-- with `fence`, which is random for each claim: a copy of the file that is put back has the same ids and attempts again.
-- AUTOINCREMENT: an id is never given out twice, for the ids of what follows from a message are derived from it.
CREATE TABLE IF NOT EXISTS wire_message (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    queue TEXT NOT NULL,
    body TEXT NOT NULL,
    org_id TEXT NOT NULL DEFAULT '',
    priority INTEGER NOT NULL DEFAULT 5 CHECK (priority BETWEEN 1 AND 10),
    enqueued_at REAL NOT NULL,
    state TEXT NOT NULL DEFAULT 'ready' CHECK (state IN ('ready', 'held', 'delayed')),
    due REAL NOT NULL DEFAULT 0,
    attempt INTEGER NOT NULL DEFAULT 0,
    fence TEXT NOT NULL DEFAULT ''
) STRICT;

-- The order in which messages are claimed.
CREATE INDEX IF NOT EXISTS wire_message_ready ON wire_message (queue, priority DESC, id) WHERE state = 'ready';

-- Leases and delays by the time when they end.
CREATE INDEX IF NOT EXISTS wire_message_due ON wire_message (queue, due) WHERE state <> 'ready';

CREATE TABLE IF NOT EXISTS wire_reply (
    key TEXT PRIMARY KEY,
    status TEXT NOT NULL CHECK (status IN ('completed', 'failed')),
    result TEXT NOT NULL,
    error TEXT NOT NULL,
    ttl REAL NOT NULL,
    expires_at REAL NOT NULL
) STRICT;

CREATE INDEX IF NOT EXISTS wire_reply_expires ON wire_reply (expires_at);

CREATE TABLE IF NOT EXISTS wire_dead_letter (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    queue TEXT NOT NULL,
    body TEXT NOT NULL,
    reason TEXT NOT NULL,
    attempts INTEGER NOT NULL,
    result TEXT NOT NULL,
    org_id TEXT NOT NULL,
    priority INTEGER NOT NULL,
    enqueued_at REAL NOT NULL,
    buried_at REAL NOT NULL
) STRICT;

CREATE INDEX IF NOT EXISTS wire_dead_letter_queue ON wire_dead_letter (queue, id);

COMMIT;
