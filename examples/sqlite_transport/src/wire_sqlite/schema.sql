-- The tables. Their names begin with wire_, so that an application can have its own tables in the same file, and send
-- within its own transactions. Times are seconds since 1970.

BEGIN IMMEDIATE;

-- A message is `ready`, `held` under a lease until `due`, or `delayed` until `due`. (id, attempt, fence) identifies a
-- delivery. `fence` is random for each claim, because a restored copy of the file repeats ids and attempts.
-- AUTOINCREMENT: an id is never used twice, because the ids of follow-ups are derived from it.
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

-- Leases and delays by their end.
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
