-- The statements of `unstract-wire doctor`, and of `top` for workers. They only read. {messages}, {results} and {dead}
-- are the schema-qualified tables.

-- name: server
SELECT current_setting('server_version'), current_setting('server_version_num')::int, current_user::text,
       current_setting('server_encoding'), pg_is_in_recovery(), current_setting('transaction_read_only'),
       current_setting('fsync'), (SELECT reset_val FROM pg_settings WHERE name = 'synchronous_commit'), pg_backend_pid();

-- name: replication
-- A role without pg_monitor sees the number of connected standbys, but not which of them are synchronous.
SELECT current_setting('synchronous_standby_names'), count(*),
       count(*) FILTER (WHERE sync_state IN ('sync', 'quorum')), count(*) FILTER (WHERE sync_state IS NULL)
FROM pg_stat_replication;

-- name: may_read
SELECT to_regclass(%(messages)s) IS NOT NULL AND has_table_privilege(to_regclass(%(messages)s), 'SELECT');

-- name: future
-- The number of the newest messages whose time of sending is in the future.
SELECT count(*) FILTER (WHERE enqueued_at > clock_timestamp() + %(seconds)s::float8 * interval '1 second'
                          AND isfinite(enqueued_at))
FROM (SELECT enqueued_at FROM {messages} ORDER BY msg_id DESC LIMIT 1000) AS newest;

-- name: columns
-- From the catalog, which every role can read without a right on the tables.
SELECT t.relname::text, array_agg(a.attname::text)
FROM pg_class AS t
JOIN pg_namespace AS n ON n.oid = t.relnamespace
JOIN pg_attribute AS a ON a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE n.nspname = %(schema)s AND t.relname = ANY (%(tables)s::text[]) AND t.relkind IN ('r', 'p')
GROUP BY t.relname;

-- name: triggers
-- Triggers that can suppress an insert, an update or a delete.
SELECT t.relname::text, g.tgname::text
FROM pg_trigger AS g
JOIN pg_class AS t ON t.oid = g.tgrelid
JOIN pg_namespace AS n ON n.oid = t.relnamespace
WHERE n.nspname = %(schema)s AND t.relname = ANY (%(tables)s::text[])
  AND NOT g.tgisinternal AND g.tgenabled <> 'D' AND g.tgtype & 3 = 3
ORDER BY 1, 2;

-- name: indexes
SELECT t.relname::text, x.relname::text, pg_get_indexdef(i.indexrelid), i.indisvalid AND i.indisready
FROM pg_index AS i
JOIN pg_class AS x ON x.oid = i.indexrelid
JOIN pg_class AS t ON t.oid = i.indrelid
JOIN pg_namespace AS n ON n.oid = t.relnamespace
WHERE n.nspname = %(schema)s AND t.relname = ANY (%(tables)s::text[])
ORDER BY 1, 2;

-- name: clock
SELECT extract(epoch FROM clock_timestamp())::float8;

-- name: autovacuum
SELECT t.relname::text, current_setting('autovacuum'), current_setting('track_counts'), t.reloptions,
       coalesce(s.n_live_tup, 0), coalesce(s.n_dead_tup, 0),
       extract(epoch FROM now() - greatest(s.last_autovacuum, s.last_vacuum))::float8
FROM pg_class AS t
JOIN pg_namespace AS n ON n.oid = t.relnamespace
LEFT JOIN pg_stat_all_tables AS s ON s.relid = t.oid
WHERE n.nspname = %(schema)s AND t.relname = ANY (%(tables)s::text[]) AND t.relkind IN ('r', 'p')
ORDER BY 1;

-- name: old_sessions
-- Sessions with an open transaction or an old snapshot, the oldest first. For a session that this role may not see, the
-- state and the time are NULL; the age of its snapshot is known.
SELECT pid, coalesce(nullif(application_name, ''), 'unnamed'), state, age(backend_xmin),
       extract(epoch FROM clock_timestamp() - xact_start)::float8
FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type IS DISTINCT FROM 'autovacuum worker'
  AND (xact_start <= clock_timestamp() - %(seconds)s::float8 * interval '1 second'
       OR (state IS NULL AND age(backend_xmin) >= %(transactions)s::bigint))
ORDER BY xact_start NULLS LAST, age(backend_xmin) DESC NULLS LAST
LIMIT 20;

-- name: other_holders
-- Holders of an old snapshot that are not sessions.
SELECT 'prepared transaction ' || gid, age(transaction)::bigint FROM pg_prepared_xacts
WHERE database = current_database() AND prepared <= now() - %(seconds)s::float8 * interval '1 second'
UNION ALL
SELECT 'standby ' || coalesce(nullif(application_name, ''), 'unnamed'), age(backend_xmin)::bigint
FROM pg_stat_replication WHERE age(backend_xmin) >= %(transactions)s::bigint
UNION ALL
SELECT 'replication slot ' || slot_name, age(xmin)::bigint FROM pg_replication_slots
WHERE xmin IS NOT NULL AND age(xmin) >= %(transactions)s::bigint
ORDER BY 2 DESC;

-- name: stuck
-- Leases and delays that ended, and that no worker has requeued.
SELECT queue_name, count(*), extract(epoch FROM now() - min(greatest(vt, timestamptz 'epoch')))::float8
FROM {messages}
WHERE state = 'claimed' AND vt <= now() - %(seconds)s::float8 * interval '1 second'
GROUP BY queue_name
ORDER BY 2 DESC, 1;

-- name: unknown_states
-- Rows in a state of another program, which no statement of this package claims.
SELECT queue_name, state, count(*) FROM {messages} WHERE state NOT IN ('ready', 'claimed')
GROUP BY queue_name, state ORDER BY 3 DESC, 1, 2;

-- name: waiting
-- Queues whose first ready message has waited for a long time, with the number of their messages in flight.
SELECT q.name, q.ready, q.oldest,
       (SELECT count(*) FROM {messages} AS m
        WHERE m.queue_name = q.name AND m.state = 'claimed' AND m.read_ct > 0 AND m.vt > now())
FROM (
    SELECT queue_name AS name, count(*) AS ready,
           extract(epoch FROM now() - min(greatest(vt, enqueued_at))
                   FILTER (WHERE isfinite(vt) AND isfinite(enqueued_at)))::float8 AS oldest
    FROM {messages}
    WHERE state = 'ready'
    GROUP BY queue_name
) AS q
WHERE q.oldest >= %(seconds)s::float8
ORDER BY q.oldest DESC, q.name;

-- name: dead_by_queue
SELECT d.queue_name, count(*), (SELECT left(n.reason, 65536) FROM {dead} AS n WHERE n.dead_id = max(d.dead_id))
FROM {dead} AS d
GROUP BY d.queue_name
ORDER BY 2 DESC, 1;

-- name: unpurged
SELECT count(*), extract(epoch FROM now() - min(greatest(expires_at, timestamptz 'epoch')))::float8
FROM (SELECT expires_at FROM {results} WHERE expires_at <= now() ORDER BY expires_at LIMIT 100001) AS expired;

-- name: notification_queue
SELECT pg_notification_queue_usage();

-- name: room
-- The limit and the number of connections: of the server, of this database, and of this role (-1: no limit).
SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int,
       (SELECT coalesce(sum(numbackends), 0)::int FROM pg_stat_database WHERE datid <> 0),
       d.datconnlimit, (SELECT numbackends FROM pg_stat_database WHERE datid = d.oid),
       r.rolconnlimit, (SELECT count(*)::int FROM pg_stat_activity WHERE usesysid = r.oid)
FROM pg_database AS d, pg_roles AS r
WHERE d.datname = current_database() AND r.rolname = current_user;

-- name: notify_once
SELECT pg_notify(%(channel)s, '');

-- name: workers
-- The sessions of this package, and those with the application name of this session; never their statements.
SELECT application_name, coalesce(host(client_addr), ''), pid, state,
       extract(epoch FROM clock_timestamp() - state_change)::float8
FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
  AND (starts_with(application_name, 'unstract-wire') OR application_name = current_setting('application_name'))
ORDER BY application_name, pid;

-- name: closed_to_senders
-- The sequence of message ids, if this role may not use it. Planning a statement does not check sequences.
SELECT id.sequence FROM (SELECT pg_get_serial_sequence(%(messages)s, 'msg_id')) AS id (sequence)
WHERE id.sequence IS NOT NULL AND NOT has_sequence_privilege(id.sequence, 'USAGE')
  AND EXISTS (SELECT 1 FROM pg_depend WHERE objid = id.sequence::regclass AND deptype = 'a');

-- name: may_purge_replies
SELECT has_table_privilege(%(results)s, 'DELETE');

-- name: sequences_behind
-- Sequences whose next id may exist already, as after a restore of the rows alone, with the highest id.
SELECT id.sequence, id.highest
FROM (
    SELECT pg_get_serial_sequence(%(messages)s, 'msg_id'), (SELECT max(msg_id) FROM {messages})
    UNION ALL
    SELECT pg_get_serial_sequence(%(dead)s, 'dead_id'), (SELECT max(dead_id) FROM {dead})
) AS id (sequence, highest)
JOIN pg_sequences AS s ON format('%%I.%%I', s.schemaname, s.sequencename) = id.sequence
WHERE coalesce(s.last_value, 0) < id.highest;
