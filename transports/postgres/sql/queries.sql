-- Every statement that runs in production, each one command and so one transaction. {messages}, {results} and {dead}
-- are the schema-qualified tables. No statement needs a search_path, session state, an advisory lock or a server-side
-- prepared statement: all of them work through PgBouncer in transaction mode.
--
-- A message is `ready`, or `claimed` until vt: under a lease, or waiting for its time (a delayed send or retry).
-- read_ct counts its deliveries; (msg_id, read_ct) is the fence of a delivery.

-- name: send_one
-- The most frequent case, at its cheapest: one message, ready at once, that nobody has to be told of. Its parameters are
-- libpq's own, for straight.py.
INSERT INTO {messages} (queue_name, message, org_id, enqueued_at, vt, read_ct, priority, state)
VALUES ($1, $2::jsonb, $3, now(), now(), 0, $4, 'ready')
RETURNING msg_id;

-- name: send_many
-- All or none, with ids in the order of the arrays; tells the listeners of the queues in `wake` in the same commit.
WITH sent AS (
    INSERT INTO {messages} (queue_name, message, org_id, enqueued_at, vt, read_ct, priority, state)
    SELECT m.queue, m.message::jsonb, m.org_id, clock_timestamp(), clock_timestamp() + m.delay * interval '1 second', 0,
           m.priority, CASE WHEN m.delay > 0 THEN 'claimed' ELSE 'ready' END
    FROM unnest(%(queues)s::text[], %(messages)s::text[], %(org_ids)s::text[], %(priorities)s::smallint[],
                %(delays)s::float8[]) WITH ORDINALITY AS m (queue, message, org_id, priority, delay, place)
    ORDER BY m.place
    RETURNING msg_id
)
SELECT msg_id, NULL FROM sent
UNION ALL
SELECT NULL, pg_notify(%(channel)s, w.queue)::text FROM unnest(%(wake)s::text[]) AS w (queue);

-- name: claim_one_queue
-- The first ready rows of one queue, in the order of its index; rows that others are claiming are passed over.
WITH next AS MATERIALIZED (
    SELECT msg_id FROM {messages}
    WHERE state = 'ready' AND queue_name = %(queue_0)s
    ORDER BY priority DESC, msg_id
    LIMIT %(limit)s::bigint
    FOR UPDATE SKIP LOCKED
), claimed AS (
    UPDATE {messages} AS m
    SET state = 'claimed', vt = now() + %(lease)s::float8 * interval '1 second', read_ct = least(m.read_ct, 2147483646) + 1
    FROM next WHERE m.msg_id = next.msg_id
    RETURNING m.msg_id, m.queue_name, m.read_ct, m.message, m.org_id, m.priority
)
SELECT msg_id, queue_name, read_ct, message::text, org_id, priority FROM claimed ORDER BY priority DESC, msg_id;

-- name: claim_many_queues
-- The same over several queues: their indexes are merged in order ({candidates}), and each row is locked as it comes.
WITH next AS MATERIALIZED (
    SELECT free.msg_id
    FROM ({candidates}) AS candidate
    CROSS JOIN LATERAL (
        SELECT msg_id FROM {messages} WHERE msg_id = candidate.msg_id AND state = 'ready' FOR UPDATE SKIP LOCKED
    ) AS free
    ORDER BY candidate.priority DESC, candidate.msg_id
    LIMIT %(limit)s::bigint
), claimed AS (
    UPDATE {messages} AS m
    SET state = 'claimed', vt = now() + %(lease)s::float8 * interval '1 second', read_ct = least(m.read_ct, 2147483646) + 1
    FROM next WHERE m.msg_id = next.msg_id
    RETURNING m.msg_id, m.queue_name, m.read_ct, m.message, m.org_id, m.priority
)
SELECT msg_id, queue_name, read_ct, message::text, org_id, priority FROM claimed ORDER BY priority DESC, msg_id;

-- name: candidates
-- One queue's share of claim_many_queues: no more than could be taken, so that a long queue is not read to its end.
-- Where others hold all of these at the moment, bring_back says that there is more, and {bound} is left out.
(SELECT msg_id, priority FROM {messages} WHERE state = 'ready' AND queue_name = {queue}
 ORDER BY priority DESC, msg_id {bound});

-- name: bring_back
-- Expired leases and delays become ready again, a bounded number at a time; also tells when the next one is due, and
-- whether anything is ready that a claim may have passed over.
WITH due AS MATERIALIZED (
    SELECT msg_id FROM {messages}
    WHERE state = 'claimed' AND queue_name = ANY (%(queues)s::text[]) AND vt <= now()
    ORDER BY vt
    LIMIT %(limit)s::bigint
    FOR UPDATE SKIP LOCKED
), back AS (
    UPDATE {messages} AS m SET state = 'ready' FROM due WHERE m.msg_id = due.msg_id RETURNING m.msg_id
)
SELECT (SELECT count(*) FROM back),
       (SELECT extract(epoch FROM min(soonest.vt) - now())::float8
        FROM unnest(%(queues)s::text[]) AS q (name)
        CROSS JOIN LATERAL (
            SELECT vt FROM {messages} WHERE state = 'claimed' AND queue_name = q.name AND vt > now() AND vt < 'infinity'
            ORDER BY vt LIMIT 1
        ) AS soonest),
       (SELECT count(*) FROM unnest(%(queues)s::text[]) AS q (name)
        WHERE EXISTS (SELECT 1 FROM {messages} WHERE state = 'ready' AND queue_name = q.name));

-- name: renew
-- Fenced: a row that was claimed again since is not touched. One that expired but was not claimed is taken back. One that
-- somebody has locked is passed over, and no other waits for it; it is still held, because nobody can claim it either.
WITH held AS MATERIALIZED (
    SELECT * FROM unnest(%(ids)s::bigint[], %(attempts)s::int[]) AS h (msg_id, read_ct)
), free AS MATERIALIZED (
    SELECT m.msg_id FROM {messages} AS m JOIN held AS h ON m.msg_id = h.msg_id AND m.read_ct = h.read_ct
    ORDER BY m.msg_id
    FOR UPDATE OF m SKIP LOCKED
), renewed AS (
    UPDATE {messages} AS m SET state = 'claimed', vt = now() + %(lease)s::float8 * interval '1 second'
    FROM free WHERE m.msg_id = free.msg_id
)
SELECT m.msg_id, m.read_ct FROM {messages} AS m JOIN held AS h ON m.msg_id = h.msg_id AND m.read_ct = h.read_ct;

-- name: settle
-- A whole batch in one commit. Only what passes the fence has any effect: `fenced` is the root of everything below it,
-- and follow-ups and replies refer to a settlement by its place in the batch, which may hold a message's lost attempt too.
WITH settlement AS MATERIALIZED (
    SELECT * FROM unnest(%(ids)s::bigint[], %(attempts)s::int[], %(verdicts)s::text[], %(delays)s::float8[],
                         %(counted)s::bool[], %(reasons)s::text[], %(results)s::text[]) WITH ORDINALITY
        AS s (msg_id, read_ct, verdict, delay, counted, reason, result, place)
), fenced AS MATERIALIZED (
    SELECT m.msg_id, s.place, s.verdict, s.delay, s.counted, s.reason, s.result
    FROM {messages} AS m JOIN settlement AS s ON m.msg_id = s.msg_id AND m.read_ct = s.read_ct
    ORDER BY m.msg_id
    FOR UPDATE OF m
), retried AS (
    UPDATE {messages} AS m
    SET state = CASE WHEN f.delay > 0 THEN 'claimed' ELSE 'ready' END, vt = now() + f.delay * interval '1 second',
        read_ct = m.read_ct - CASE WHEN f.counted THEN 0 ELSE 1 END
    FROM fenced AS f WHERE m.msg_id = f.msg_id AND f.verdict = 'retry'
), removed AS (
    DELETE FROM {messages} AS m USING fenced AS f WHERE m.msg_id = f.msg_id AND f.verdict <> 'retry'
    RETURNING m.msg_id, m.queue_name, m.message, m.org_id, m.priority, m.read_ct, m.enqueued_at,
              f.verdict, f.reason, f.result
), buried AS (
    INSERT INTO {dead} (msg_id, queue_name, message, org_id, priority, attempts, reason, result, enqueued_at, buried_at)
    SELECT msg_id, queue_name, message, org_id, priority, read_ct, reason, result::jsonb, enqueued_at, now()
    FROM removed WHERE verdict = 'bury'
    ORDER BY msg_id
), continued AS (
    INSERT INTO {messages} (queue_name, message, org_id, enqueued_at, vt, read_ct, priority, state)
    SELECT n.queue, n.message::jsonb, n.org_id, now(), now() + n.delay * interval '1 second', 0, n.priority,
           CASE WHEN n.delay > 0 THEN 'claimed' ELSE 'ready' END
    FROM unnest(%(next_of)s::bigint[], %(next_queues)s::text[], %(next_messages)s::text[], %(next_org_ids)s::text[],
                %(next_priorities)s::smallint[], %(next_delays)s::float8[]) WITH ORDINALITY
             AS n (settlement, queue, message, org_id, priority, delay, place)
    JOIN fenced AS f ON f.place = n.settlement
    ORDER BY n.place
), answered AS (
    INSERT INTO {results} AS known (task_id, status, result, error, created_at, expires_at)
    SELECT DISTINCT ON (r.key) r.key, r.status, r.result::jsonb, r.error, now(), now() + r.ttl * interval '1 second'
    FROM unnest(%(reply_of)s::bigint[], %(reply_keys)s::text[], %(reply_statuses)s::text[], %(reply_results)s::text[],
                %(reply_errors)s::text[], %(reply_ttls)s::float8[]) AS r (settlement, key, status, result, error, ttl)
    JOIN fenced AS f ON f.place = r.settlement
    ORDER BY r.key, r.settlement
    ON CONFLICT (task_id) DO UPDATE
    SET status = excluded.status, result = excluded.result, error = excluded.error,
        created_at = excluded.created_at, expires_at = excluded.expires_at
    WHERE known.expires_at <= now()
)
SELECT place, NULL FROM fenced
UNION ALL
SELECT NULL, pg_notify(%(channel)s, w.queue)::text FROM unnest(%(wake)s::text[]) AS w (queue)
UNION ALL
SELECT NULL, pg_notify(%(reply_channel)s, '')::text WHERE %(wake_callers)s;

-- name: read_reply
SELECT status, result::text, error, extract(epoch FROM expires_at - created_at)::float8
FROM {results} WHERE task_id = %(key)s AND expires_at > now();

-- name: clear_reply
-- After it was read: the row stays until it expires, because the key is answered for good. Tells of several readers the
-- one that found something to clear; nothing where the row has gone.
WITH found AS MATERIALIZED (
    SELECT task_id, result IS NOT NULL OR error <> '' AS whole FROM {results} WHERE task_id = %(key)s FOR UPDATE
), cleared AS (
    UPDATE {results} AS r SET result = NULL, error = '' FROM found WHERE r.task_id = found.task_id AND found.whole
)
SELECT whole FROM found;

-- name: answered
-- Which of the keys that callers wait for have been answered.
SELECT task_id FROM {results} WHERE task_id = ANY (%(keys)s::text[]) AND expires_at > now();

-- name: sweep_replies
DELETE FROM {results} WHERE task_id IN (
    SELECT task_id FROM {results} WHERE expires_at <= now()
    ORDER BY expires_at LIMIT %(limit)s::bigint FOR UPDATE SKIP LOCKED
) RETURNING 1;

-- name: notify
SELECT pg_notify(w.channel, w.payload) FROM unnest(%(channels)s::text[], %(payloads)s::text[]) AS w (channel, payload);

-- name: check_tables
-- Fails where a table or column is missing, or may not be read; touches no row.
SELECT m.msg_id, m.queue_name, m.message, m.org_id, m.enqueued_at, m.vt, m.read_ct, m.priority, m.state,
       r.task_id, r.status, r.result, r.error, r.created_at, r.expires_at,
       d.dead_id, d.msg_id, d.queue_name, d.message, d.org_id, d.priority, d.attempts, d.reason, d.result,
       d.enqueued_at, d.buried_at
FROM {messages} AS m, {results} AS r, {dead} AS d LIMIT 0;

-- name: closed_sequences
-- The sequences behind ids from which this role may take none; planning a statement does not look at them.
SELECT id.sequence FROM (
    SELECT pg_get_serial_sequence(%(messages)s, 'msg_id') UNION ALL SELECT pg_get_serial_sequence(%(dead)s, 'dead_id')
) AS id (sequence)
WHERE id.sequence IS NOT NULL AND NOT has_sequence_privilege(id.sequence, 'USAGE');

-- name: queues
SELECT q.name,
       count(m.msg_id) FILTER (WHERE m.state = 'ready'),
       count(m.msg_id) FILTER (WHERE m.state = 'claimed' AND m.read_ct > 0),
       count(m.msg_id) FILTER (WHERE m.state = 'claimed' AND m.read_ct = 0),
       extract(epoch FROM now() - min(m.enqueued_at) FILTER (WHERE m.state = 'ready' AND isfinite(m.enqueued_at)))::float8,
       (SELECT count(*) FROM {dead} AS d WHERE d.queue_name = q.name)
FROM (
    SELECT unnest(%(names)s::text[]) AS name
    UNION SELECT DISTINCT queue_name FROM {messages} WHERE %(all)s
    UNION SELECT DISTINCT queue_name FROM {dead} WHERE %(all)s
) AS q
LEFT JOIN {messages} AS m ON m.queue_name = q.name
GROUP BY q.name
ORDER BY q.name;

-- name: find_dead
SELECT dead_id, queue_name, message::text, reason, attempts, result::text, org_id, priority, enqueued_at, buried_at
FROM {dead} WHERE %(queue)s::text IS NULL OR queue_name = %(queue)s::text
ORDER BY dead_id DESC LIMIT %(limit)s::bigint;

-- name: get_dead
SELECT dead_id, queue_name, message::text, reason, attempts, result::text, org_id, priority, enqueued_at, buried_at
FROM {dead} WHERE dead_id = ANY (%(ids)s::bigint[]) ORDER BY dead_id;

-- name: replay_dead
-- Sent as new: a new id, no attempts, at the end of its queue, the oldest letter first.
WITH letter AS (
    DELETE FROM {dead}
    WHERE (%(ids)s::bigint[] IS NULL OR dead_id = ANY (%(ids)s::bigint[]))
      AND (%(queue)s::text IS NULL OR queue_name = %(queue)s::text)
    RETURNING dead_id, queue_name, message, org_id, priority
), sent AS (
    INSERT INTO {messages} (queue_name, message, org_id, enqueued_at, vt, read_ct, priority, state)
    SELECT queue_name, message, org_id, now(), now(), 0, priority, 'ready' FROM letter ORDER BY dead_id
)
SELECT dead_id, CASE WHEN %(channel)s::text IS NOT NULL THEN pg_notify(%(channel)s::text, queue_name)::text END
FROM letter ORDER BY dead_id;

-- name: purge_dead
WITH purged AS (
    DELETE FROM {dead}
    WHERE (%(ids)s::bigint[] IS NULL OR dead_id = ANY (%(ids)s::bigint[]))
      AND (%(queue)s::text IS NULL OR queue_name = %(queue)s::text)
      AND buried_at <= now() - %(older_than)s::float8 * interval '1 second'
    RETURNING 1
)
SELECT count(*) FROM purged;
