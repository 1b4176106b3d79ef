-- The objects that `migrate` creates if they are missing. The first two tables have the columns of the product's
-- tables, which the product's other services read and write. An existing table is not changed.

-- name: schema
CREATE SCHEMA {schema}

-- name: pg_queue_message
CREATE TABLE {messages} (
    msg_id bigserial PRIMARY KEY,
    queue_name text NOT NULL,
    message jsonb NOT NULL,
    org_id text NOT NULL,
    enqueued_at timestamptz NOT NULL,
    vt timestamptz NOT NULL,
    read_ct integer NOT NULL,
    priority smallint NOT NULL CHECK (priority BETWEEN 1 AND 10),
    state text NOT NULL CHECK (state IN ('ready', 'claimed'))
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0)

-- name: pg_task_result
CREATE TABLE {results} (
    task_id text PRIMARY KEY,
    status text NOT NULL CHECK (status IN ('completed', 'failed')),
    result jsonb,
    error text NOT NULL,
    created_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL
)

-- name: pg_queue_dead_letter
CREATE TABLE {dead} (
    dead_id bigserial PRIMARY KEY,
    msg_id bigint NOT NULL,
    queue_name text NOT NULL,
    message jsonb NOT NULL,
    org_id text NOT NULL,
    priority smallint NOT NULL,
    attempts integer NOT NULL,
    reason text NOT NULL,
    result jsonb,
    enqueued_at timestamptz NOT NULL,
    buried_at timestamptz NOT NULL
)

-- name: pg_queue_message_ready
-- The order in which messages are claimed.
CREATE INDEX pg_queue_message_ready ON {messages} USING btree (queue_name, priority DESC, msg_id) WHERE (state = 'ready')

-- name: pg_queue_message_claimed
-- The claimed rows of all queues, which a worker of very many queues scans for expired leases. With `vt` in an index,
-- the renewal of a lease would not be a HOT update.
CREATE INDEX pg_queue_message_claimed ON {messages} USING btree (msg_id) WHERE (state = 'claimed')

-- name: pg_queue_message_held
-- The claimed rows of a queue, for the scans of all other workers and for counts.
CREATE INDEX pg_queue_message_held ON {messages} USING btree (queue_name, msg_id)
WHERE ((state = 'claimed') AND (queue_name >= ''))

-- name: pg_queue_message_strange
-- Rows in a state of another program. It has no entry for rows of this package.
CREATE INDEX pg_queue_message_strange ON {messages} USING btree (queue_name)
WHERE ((state <> 'ready') AND (state <> 'claimed'))

-- name: pg_task_result_expires
CREATE INDEX pg_task_result_expires ON {results} USING btree (expires_at)

-- name: pg_queue_dead_letter_queue
CREATE INDEX pg_queue_dead_letter_queue ON {dead} USING btree (queue_name, dead_id)
