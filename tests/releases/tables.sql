-- The tables as the PostgreSQL transport created them before the first release. Deployed databases have them, so
-- every later release works on them as they are: they are never changed here. {schema}, {messages}, {results} and
-- {dead} are the schema's name and the tables' names with it.

CREATE SCHEMA {schema};

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
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);

CREATE TABLE {results} (
    task_id text PRIMARY KEY,
    status text NOT NULL CHECK (status IN ('completed', 'failed')),
    result jsonb,
    error text NOT NULL,
    created_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL
);

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
);

CREATE INDEX pg_queue_message_ready ON {messages} USING btree (queue_name, priority DESC, msg_id) WHERE (state = 'ready');

CREATE INDEX pg_queue_message_due ON {messages} USING btree (queue_name, vt) WHERE (state = 'claimed');

CREATE INDEX pg_task_result_expires ON {results} USING btree (expires_at);

CREATE INDEX pg_queue_dead_letter_queue ON {dead} USING btree (queue_name, dead_id);
