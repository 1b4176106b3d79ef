-- All statements of production. Each is one command, and so one transaction. {messages}, {results} and {dead} are the
-- schema-qualified tables. No statement needs a search_path, session state, an advisory lock or a server-side prepared
-- statement, so all of them work through PgBouncer in transaction mode.
--
-- Rows are joined by `msg_id = ANY (ARRAY[...])`. The planner cannot reverse that join and read the whole table for a
-- few ids, which it would do with statistics of an empty table.
--
-- A message is `ready`, or `claimed` until vt: under a lease, or delayed (by its send or a retry). read_ct counts its
-- deliveries. The fence of a delivery is (msg_id, read_ct) with enqueued_at, because ids repeat after a failover, a
-- restore or TRUNCATE ... RESTART IDENTITY. enqueued_at is compared as the server's eight bytes, because a client could
-- change its text form (time zone, DateStyle, year).

-- name: send_one
-- The most frequent send: one message, ready at once, without a notification. It has libpq's own parameters, for
-- libpq_exec.py.
INSERT INTO {messages} (queue_name, message, org_id, enqueued_at, vt, read_ct, priority, state)
VALUES ($1, $2::jsonb, $3, now(), now(), 0, $4, 'ready')
RETURNING msg_id;

-- name: send_many
-- All messages or none, with ids in the order of the arrays. The same commit notifies the queues in `wake`.
WITH sent AS (
    {inserted}
)
SELECT msg_id, NULL FROM sent
UNION ALL
SELECT NULL, pg_notify(%(channel)s, w.queue)::text FROM unnest(%(wake)s::text[]) AS w (queue);

-- name: inserted
-- The messages of one send.
INSERT INTO {messages} (queue_name, message, org_id, enqueued_at, vt, read_ct, priority, state)
SELECT m.queue, m.message::jsonb, m.org_id, clock_timestamp(), clock_timestamp() + m.delay * interval '1 second', 0,
       m.priority, CASE WHEN m.delay > 0 THEN 'claimed' ELSE 'ready' END
FROM unnest(%(queues)s::text[], %(messages)s::text[], %(org_ids)s::text[], %(priorities)s::smallint[],
            %(delays)s::float8[]) WITH ORDINALITY AS m (queue, message, org_id, priority, delay, place)
ORDER BY m.place
RETURNING msg_id;

-- name: send_within
-- send_many within a caller's transaction. If half of the server's queue of notifications is in use, no notification is
-- added: if the queue were full at the caller's commit, the commit would fail.
WITH sent AS (
    {inserted}
)
SELECT msg_id, NULL FROM sent
UNION ALL
SELECT NULL, pg_notify(%(channel)s, w.queue)::text FROM unnest(%(wake)s::text[]) AS w (queue)
WHERE pg_notification_queue_usage() < 0.5;

-- name: send_silently
-- send_many without a notification, so that the caller may prepare the transaction.
{inserted};

-- name: claim
-- The first ready rows of some queues: {candidates} are merged in order, and each row is locked in turn. Rows that
-- others have locked are skipped.
WITH next AS MATERIALIZED (
    SELECT free.msg_id
    FROM (SELECT * FROM ({candidates}) AS ready ORDER BY priority DESC, msg_id) AS candidate
    CROSS JOIN LATERAL (
        SELECT msg_id FROM {messages} WHERE msg_id = candidate.msg_id AND {still_ready} FOR UPDATE SKIP LOCKED
    ) AS free
    LIMIT %(limit)s::bigint
), {claimed};

-- name: candidates
-- The candidates of one queue: only a few more than can be claimed, so that a long queue is not read to its end. If
-- others have locked all of them, requeue_expired reports that there are more, and the next claim has no {bound}.
(SELECT msg_id, priority FROM {messages}
 WHERE queue_name = {queue} AND {is_ready}
 ORDER BY priority DESC, msg_id {bound});

-- name: claim_frontier
-- A claim beyond one id for each queue and priority, the highest priority first. It does not read the dead entries of
-- the index below these ids, which exist while a session holds an old snapshot. claim_planner.py lists the rows that it
-- can miss. {columns} are the ids of the queues, {arrays} their parameters.
WITH next AS MATERIALIZED (
    SELECT free.msg_id
    FROM unnest(%(priorities)s::smallint[], {arrays}) AS taken (priority, {columns})
    CROSS JOIN LATERAL (
        SELECT unlocked.msg_id
        FROM (SELECT * FROM ({candidates}) AS ready ORDER BY msg_id) AS candidate
        CROSS JOIN LATERAL (
            SELECT msg_id FROM {messages} WHERE msg_id = candidate.msg_id AND {still_ready} FOR UPDATE SKIP LOCKED
        ) AS unlocked
        LIMIT %(limit)s::bigint
    ) AS free
    LIMIT %(limit)s::bigint
), {claimed};

-- name: candidates_frontier
-- The candidates of one queue for claim_frontier.
(SELECT msg_id FROM {messages}
 WHERE queue_name = {queue} AND priority = taken.priority AND msg_id > taken.{column} AND {is_ready}
 ORDER BY msg_id {bound});

-- name: bound
LIMIT %(limit)s::bigint + 100;

-- name: is_ready
-- The second condition follows from the first, so its subquery never runs. For the index of ready rows, the planner
-- drops it, because the index predicate proves it. For any other path it adds some 10,000 units of cost per row. So no
-- statistics and no cost settings make another path seem cheaper, such as the primary key for the rows beyond an id.
state = 'ready' AND (state = 'ready' OR {costly});

-- name: still_ready
-- For a row that is found by its id. The planner cannot prove the predicate of the index of ready rows from this
-- condition. Otherwise it would read that whole index for one id if the statistics say that it is empty. The function
-- is never called; its small cost per row prevents a full read of a small table for each id.
state || '' = 'ready' AND (state || '' = 'ready' OR to_tsvector('pg_catalog.simple', state) IS NOT NULL);

-- name: is_claimed
-- The same as is_ready for the index of claimed rows.
state = 'claimed' AND (state = 'claimed' OR {costly});

-- name: is_claimed_there
-- The same for the index of the claimed rows of a queue. Only its predicate has the conditions on the name. The other
-- index of claimed rows has the rows of all queues; with these conditions, no statistics make it seem as cheap.
queue_name >= '' AND (queue_name >= '' OR {costly}) AND {is_claimed};

-- name: still_claimed
-- The same as still_ready.
state || '' = 'claimed' AND (state || '' = 'claimed' OR to_tsvector('pg_catalog.simple', state) IS NOT NULL);

-- name: costly
-- The planner expects a million rows. If it ran, it would count at most 49.
(SELECT count(*) FROM generate_series(1, length(state)) AS a, generate_series(1, length(state)) AS b) IS NULL;

-- name: claimed
-- The last part of each claim.
claimed AS (
    UPDATE {messages} AS m
    SET state = 'claimed', vt = now() + %(lease)s::float8 * interval '1 second',
        read_ct = greatest(0, least(m.read_ct, 2147483646)) + 1
    FROM next WHERE m.msg_id = ANY (ARRAY[next.msg_id]) AND {still_ready}
    RETURNING m.msg_id, m.queue_name, m.read_ct, m.message, m.org_id, m.priority,
              timestamptz_send(m.enqueued_at) AS enqueued
)
SELECT c.msg_id, c.queue_name, c.read_ct, CASE WHEN octet_length(content.text) <= {largest} THEN content.text END,
       left(c.org_id, 65536), c.priority, c.enqueued
FROM claimed AS c CROSS JOIN LATERAL (SELECT c.message::text OFFSET 0) AS content (text)
ORDER BY c.priority DESC, c.msg_id;

-- name: largest
-- Bytes of a message's JSON text above which it is not fetched: four values of the largest size that writers allow.
268435456

-- name: contents
-- The content of messages that were claimed without it (unread.py).
SELECT h.msg_id, h.read_ct, h.enqueued, CASE WHEN octet_length(content.text) <= {largest} THEN content.text END
FROM unnest(%(ids)s::bigint[], %(attempts)s::int[], %(enqueued)s::bytea[]) AS h (msg_id, read_ct, enqueued)
CROSS JOIN LATERAL (
    SELECT message FROM {messages}
    WHERE msg_id = h.msg_id AND read_ct = h.read_ct AND timestamptz_send(enqueued_at) = h.enqueued LIMIT 1
) AS m
CROSS JOIN LATERAL (SELECT m.message::text OFFSET 0) AS content (text);

-- name: digest
-- The small parts of a message that name its callback or caller, for a message whose text cannot be fetched.
SELECT {parts}
FROM unnest(%(ids)s::bigint[], %(attempts)s::int[], %(enqueued)s::bytea[]) AS h (msg_id, read_ct, enqueued)
CROSS JOIN LATERAL (
    SELECT message FROM {messages}
    WHERE msg_id = h.msg_id AND read_ct = h.read_ct AND timestamptz_send(enqueued_at) = h.enqueued LIMIT 1
) AS m;

-- name: parts
-- A number can take eight bytes in jsonb and 131,072 digits as text. A part with such a number is omitted.
(SELECT jsonb_object_agg(part.key, part.value)::text
 FROM (SELECT key, m.message -> key
       FROM unnest(ARRAY['task_name', 'task_id', 'reply_key', 'on_error', 'fairness', 'headers']) AS key
       OFFSET 0) AS part (key, value)
 WHERE CASE jsonb_typeof(part.value)
       WHEN 'string' THEN pg_column_size(part.value) <= 2048
       WHEN 'object' THEN pg_column_size(part.value) <= 65536 AND NOT jsonb_path_exists(part.value,
           '$.** ? (@.type() == "number" && (@ > 1e30 || @ < -1e30 || (@ != 0 && @ > -1e-30 && @ < 1e-30)))')
       ELSE false END)

-- name: requeue_expired
-- Makes messages ready again whose lease or delay has ended, at most `limit`. It reads at most `window` claimed rows
-- beyond some ids ({looked_at}), and the rows of `known`. No index has `vt`, so that the renewal of a lease is a HOT
-- update. rows.py (RequeueRow) describes the columns of the result.
WITH looked_at AS MATERIALIZED (
    {looked_at}
), ours AS MATERIALIZED (
    SELECT msg_id, vt FROM looked_at WHERE (queue_name::text IN (SELECT unnest(%(queues)s::text[]))) IS TRUE
    UNION ALL
    SELECT m.msg_id, m.vt FROM unnest(%(known)s::bigint[]) AS k (msg_id)
    CROSS JOIN LATERAL (SELECT msg_id, vt FROM {messages} WHERE msg_id = k.msg_id AND {still_claimed} LIMIT 1) AS m
), due AS MATERIALIZED (
    SELECT free.msg_id
    FROM (SELECT msg_id FROM ours WHERE vt <= now()) AS candidate
    CROSS JOIN LATERAL (
        SELECT msg_id FROM {messages}
        WHERE msg_id = candidate.msg_id AND {still_claimed} AND vt <= now()
        FOR UPDATE SKIP LOCKED
    ) AS free
    LIMIT %(limit)s::bigint
), back AS (
    UPDATE {messages} AS m SET state = 'ready' FROM due
    WHERE m.msg_id = ANY (ARRAY[due.msg_id]) AND {still_claimed}
    RETURNING m.queue_name, m.priority, m.msg_id
), lowest AS (
    SELECT queue_name, priority, min(msg_id) AS msg_id FROM back GROUP BY queue_name, priority
), soon AS (
    SELECT msg_id, vt FROM ours WHERE vt > now() AND vt < now() + %(ahead)s::float8 * interval '1 second'
    ORDER BY vt LIMIT 1000
)
SELECT (SELECT count(*) FROM back),
       (SELECT extract(epoch FROM min(vt) - now())::float8 FROM ours WHERE vt > now() AND vt < 'infinity'),
       {first_ready},
       (SELECT jsonb_agg(jsonb_build_array(queue_name, priority, msg_id)) FROM lowest),
       (SELECT jsonb_build_array(place, max(msg_id)) FROM looked_at GROUP BY place ORDER BY place DESC LIMIT 1),
       {newest},
       (SELECT count(*) FROM looked_at),
       (SELECT jsonb_agg(jsonb_build_array(msg_id, extract(epoch FROM vt - now())::float8)) FROM soon),
       (SELECT min(cut.last) FROM (SELECT max(msg_id) AS last FROM looked_at
                                   GROUP BY place HAVING count(*) >= %(share)s::bigint) AS cut);

-- name: looked_at
-- The claimed rows beyond an id of each queue in `walked`, one queue after the other, at most `share` of each.
SELECT q.place, held.msg_id, q.name AS queue_name, held.vt
FROM unnest(%(walked)s::text[], %(afters)s::bigint[]) WITH ORDINALITY AS q (name, after, place)
CROSS JOIN LATERAL (
    SELECT msg_id, vt FROM {messages}
    WHERE queue_name = q.name AND msg_id > q.after AND {is_claimed_there}
    ORDER BY msg_id LIMIT %(share)s::bigint
) AS held
ORDER BY q.place LIMIT %(window)s::bigint

-- name: looked_at_of_any
-- The claimed rows of any queue beyond an id, for a subscription to too many queues to scan one by one.
SELECT 1::bigint AS place, msg_id, queue_name::text AS queue_name, vt FROM {messages}
WHERE msg_id > (%(afters)s::bigint[])[1] AND {is_claimed}
ORDER BY msg_id LIMIT %(window)s::bigint

-- name: first_ready
-- Also includes rows that others have locked, which a claim has skipped.
(SELECT coalesce(jsonb_object_agg(q.name, ready.priority), '{{}}')
 FROM unnest(%(queues)s::text[]) AS q (name)
 CROSS JOIN LATERAL (
     SELECT priority FROM {messages} WHERE queue_name = q.name AND {is_ready} ORDER BY priority DESC, msg_id LIMIT 1
 ) AS ready);

-- name: newest
(SELECT max(newest.msg_id) FROM unnest(%(queues)s::text[]) AS q (name)
 CROSS JOIN LATERAL (
     SELECT msg_id FROM {messages} WHERE queue_name = q.name AND {is_claimed_there} ORDER BY msg_id DESC LIMIT 1
 ) AS newest);

-- name: newest_of_any
(SELECT msg_id FROM {messages} WHERE msg_id > (%(afters)s::bigint[])[1] AND {is_claimed} ORDER BY msg_id DESC LIMIT 1);

-- name: queues_with_ready
-- The queues that have ready rows, ordered by their first rows. It jumps from queue to queue in the index. So its cost
-- depends on the number of queues with ready rows, and not on the number of queues of the worker.
WITH RECURSIVE first AS (
    (SELECT queue_name, priority, msg_id FROM {messages} WHERE queue_name >= '' AND {is_ready}
     ORDER BY queue_name, priority DESC, msg_id LIMIT 1)
    UNION ALL
    SELECT next.* FROM first CROSS JOIN LATERAL (
        SELECT queue_name, priority, msg_id FROM {messages} WHERE queue_name > first.queue_name AND {is_ready}
        ORDER BY queue_name, priority DESC, msg_id LIMIT 1
    ) AS next
)
SELECT queue_name, priority FROM first ORDER BY priority DESC, msg_id;

-- name: renew
-- The fence excludes a row that was claimed again since. An expired row that was not claimed again is renewed. A row
-- that another session has locked is skipped without waiting: no other worker can claim it meanwhile.
WITH held AS MATERIALIZED (
    SELECT * FROM unnest(%(ids)s::bigint[], %(attempts)s::int[], %(enqueued)s::bytea[]) AS h (msg_id, read_ct, enqueued)
), free AS MATERIALIZED (
    SELECT m.msg_id FROM (SELECT * FROM held ORDER BY msg_id) AS h
    CROSS JOIN LATERAL (
        SELECT msg_id FROM {messages}
        WHERE msg_id = h.msg_id AND read_ct = h.read_ct AND timestamptz_send(enqueued_at) = h.enqueued
        FOR UPDATE SKIP LOCKED
    ) AS m
), renewed AS (
    UPDATE {messages} AS m SET state = 'claimed', vt = now() + %(lease)s::float8 * interval '1 second'
    FROM free WHERE m.msg_id = ANY (ARRAY[free.msg_id])
    RETURNING m.msg_id
)
SELECT h.msg_id, h.read_ct, h.enqueued FROM held AS h
CROSS JOIN LATERAL (
    SELECT 1 FROM {messages}
    WHERE msg_id = h.msg_id AND read_ct = h.read_ct AND timestamptz_send(enqueued_at) = h.enqueued LIMIT 1
) AS m
WHERE h.msg_id NOT IN (SELECT msg_id FROM free) OR h.msg_id IN (SELECT msg_id FROM renewed);

-- name: settle
-- A whole batch in one commit. Only settlements that pass the fence have an effect: everything depends on `fenced`.
-- Follow-ups and replies depend on `ended`, the rows that were removed or made ready. A trigger can keep a row that
-- would be deleted or changed; the result is then 'kept'. Follow-ups and replies refer to a settlement by its position
-- in the batch, because the batch may also contain a lost attempt of the same message.
WITH settlement AS MATERIALIZED (
    SELECT * FROM unnest(%(ids)s::bigint[], %(attempts)s::int[], %(verdicts)s::text[], %(delays)s::float8[],
                         %(counted)s::bool[], %(reasons)s::text[], %(results)s::text[], %(enqueued)s::bytea[])
        WITH ORDINALITY AS s (msg_id, read_ct, verdict, delay, counted, reason, result, enqueued, place)
), fenced AS MATERIALIZED (
    SELECT m.msg_id, s.place, s.verdict, s.delay, s.counted, s.reason, s.result
    FROM (SELECT * FROM settlement ORDER BY msg_id) AS s
    CROSS JOIN LATERAL (
        SELECT msg_id FROM {messages}
        WHERE msg_id = s.msg_id AND read_ct = s.read_ct AND timestamptz_send(enqueued_at) = s.enqueued
        FOR UPDATE
    ) AS m
), retried AS (
    UPDATE {messages} AS m
    SET state = CASE WHEN f.delay > 0 THEN 'claimed' ELSE 'ready' END, vt = now() + f.delay * interval '1 second',
        read_ct = m.read_ct - CASE WHEN f.counted THEN 0 ELSE 1 END
    FROM fenced AS f WHERE m.msg_id = ANY (ARRAY[f.msg_id]) AND f.verdict = 'retry'
    RETURNING f.place
), removed AS (
    DELETE FROM {messages} AS m USING fenced AS f WHERE m.msg_id = ANY (ARRAY[f.msg_id]) AND f.verdict <> 'retry'
    RETURNING m.msg_id, m.queue_name, m.message, m.org_id, m.priority, m.read_ct, m.enqueued_at,
              f.verdict, f.reason, f.result, f.place
), ended AS (
    SELECT place FROM retried UNION ALL SELECT place FROM removed
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
    JOIN ended ON ended.place = n.settlement
    ORDER BY n.place
), answered AS (
    INSERT INTO {results} AS known (task_id, status, result, error, created_at, expires_at)
    SELECT DISTINCT ON (r.key) r.key, r.status, r.result::jsonb, r.error, now(), now() + r.ttl * interval '1 second'
    FROM unnest(%(reply_of)s::bigint[], %(reply_keys)s::text[], %(reply_statuses)s::text[], %(reply_results)s::text[],
                %(reply_errors)s::text[], %(reply_ttls)s::float8[]) AS r (settlement, key, status, result, error, ttl)
    JOIN ended ON ended.place = r.settlement
    ORDER BY r.key, r.settlement
    ON CONFLICT (task_id) DO UPDATE
    SET status = excluded.status, result = excluded.result, error = excluded.error,
        created_at = excluded.created_at, expires_at = excluded.expires_at
    WHERE known.expires_at <= now()
)
SELECT place, NULL FROM ended
UNION ALL
SELECT place, 'kept' FROM fenced WHERE place NOT IN (SELECT place FROM ended)
UNION ALL
SELECT NULL, pg_notify(%(channel)s, w.queue)::text FROM unnest(%(wake)s::text[]) AS w (queue)
UNION ALL
SELECT NULL, pg_notify(%(reply_channel)s, '')::text WHERE %(wake_callers)s;

-- name: read_reply
SELECT status, result::text, error, extract(epoch FROM expires_at - created_at)::float8
FROM {results} WHERE task_id = %(key)s AND {unexpired};

-- name: clear_reply
-- Clears a reply after it was read. The row is kept until it expires, so that its key is not used again. Of several
-- readers, only the first one gets `true`. No row is returned if the reply no longer exists.
WITH found AS MATERIALIZED (
    SELECT task_id, result IS NOT NULL OR error <> '' AS whole FROM {results} WHERE task_id = %(key)s FOR UPDATE
), cleared AS (
    UPDATE {results} AS r SET result = NULL, error = '' FROM found WHERE r.task_id = found.task_id AND found.whole
)
SELECT whole FROM found;

-- name: answered
-- The keys, among those that callers wait for, that have a reply.
SELECT task_id FROM {results} WHERE task_id = ANY (%(keys)s::text[]) AND {unexpired};

-- name: unexpired
-- Written so that the planner cannot use the index of expires_at. With statistics from a time when all replies had
-- expired, it would read all unexpired replies to find one.
(expires_at > now()) IS TRUE;

-- name: purge_replies
-- Replies that expired after `since` (seconds of the epoch), so that a batch does not read the rows removed before it.
WITH expired AS MATERIALIZED (
    SELECT task_id FROM {results} WHERE expires_at >= to_timestamp(%(since)s::float8) AND expires_at <= now()
    ORDER BY expires_at
    LIMIT %(limit)s::bigint
    FOR UPDATE SKIP LOCKED
)
DELETE FROM {results} AS r USING expired WHERE r.task_id = ANY (ARRAY[expired.task_id])
RETURNING extract(epoch FROM r.expires_at)::float8;

-- name: notify
SELECT pg_notify(w.channel, w.payload) FROM unnest(%(channels)s::text[], %(payloads)s::text[]) AS w (channel, payload);

-- name: check_tables
-- Fails if a table or column is missing or cannot be read. Reads no row.
SELECT m.msg_id, m.queue_name, m.message, m.org_id, m.enqueued_at, m.vt, m.read_ct, m.priority, m.state,
       r.task_id, r.status, r.result, r.error, r.created_at, r.expires_at,
       d.dead_id, d.msg_id, d.queue_name, d.message, d.org_id, d.priority, d.attempts, d.reason, d.result,
       d.enqueued_at, d.buried_at
FROM {messages} AS m, {results} AS r, {dead} AS d LIMIT 0;

-- name: closed_sequences
-- The sequences of ids that this role may not use; planning a statement does not check them. Sequences of identity
-- columns need no separate right.
SELECT id.sequence FROM (
    SELECT pg_get_serial_sequence(%(messages)s, 'msg_id') UNION ALL SELECT pg_get_serial_sequence(%(dead)s, 'dead_id')
) AS id (sequence)
WHERE id.sequence IS NOT NULL AND NOT has_sequence_privilege(id.sequence, 'USAGE')
  AND EXISTS (SELECT 1 FROM pg_depend WHERE objid = id.sequence::regclass AND deptype = 'a');

-- name: row_security
-- The tables in which row-level security hides rows from this role. No statement fails then; rows are missing.
SELECT t.relname::text FROM pg_class AS t JOIN pg_namespace AS n ON n.oid = t.relnamespace
WHERE n.nspname = %(schema)s AND t.relname = ANY (%(tables)s::text[]) AND row_security_active(t.oid)
ORDER BY 1;

-- name: queue_names
-- The queues that have a message or dead letter. It jumps from name to name in the indexes.
WITH RECURSIVE ready AS (
    (SELECT queue_name FROM {messages} WHERE queue_name >= '' AND {is_ready}
     ORDER BY queue_name, priority DESC, msg_id LIMIT 1)
    UNION ALL
    SELECT next.* FROM ready CROSS JOIN LATERAL (
        SELECT queue_name FROM {messages} WHERE queue_name > ready.queue_name AND {is_ready}
        ORDER BY queue_name, priority DESC, msg_id LIMIT 1
    ) AS next
), claimed AS (
    (SELECT queue_name FROM {messages} WHERE {is_claimed_there} ORDER BY queue_name, msg_id LIMIT 1)
    UNION ALL
    SELECT next.* FROM claimed CROSS JOIN LATERAL (
        SELECT queue_name FROM {messages} WHERE queue_name > claimed.queue_name AND {is_claimed_there}
        ORDER BY queue_name, msg_id LIMIT 1
    ) AS next
), dead AS (
    (SELECT queue_name FROM {dead} ORDER BY queue_name, dead_id LIMIT 1)
    UNION ALL
    SELECT next.* FROM dead CROSS JOIN LATERAL (
        SELECT queue_name FROM {dead} WHERE queue_name > dead.queue_name ORDER BY queue_name, dead_id LIMIT 1
    ) AS next
)
SELECT queue_name::text FROM ready
UNION SELECT queue_name::text FROM dead
UNION SELECT queue_name::text FROM claimed
UNION SELECT queue_name::text FROM (
    SELECT queue_name FROM {messages} WHERE queue_name >= '' AND {is_strange} LIMIT %(most)s::bigint
) AS strange;

-- name: is_strange
-- A row in a state of another program. The condition is false unless the index of such rows exists, because the
-- statement would read the whole table without it.
state <> 'ready' AND state <> 'claimed'
    AND (SELECT EXISTS (SELECT FROM pg_catalog.pg_index WHERE indrelid = {strange_table}::regclass AND indisvalid
                        AND pg_catalog.pg_get_expr(indpred, indrelid) ~ '<> ''ready''.*<> ''claimed'''))

-- name: queues
-- Counts at most `most` rows of a queue in each state, so that its time does not grow with the queue. The age is of the
-- oldest of these rows, and of the first rows of each priority if there are more. The second last column is true if the
-- count of ready or claimed rows stopped at `most`. The last one counts rows in unknown states.
SELECT q.name, ready.rows, working.in_flight, working.delayed,
       extract(epoch FROM now() - least(ready.since, first.since))::float8,
       dead.rows, ready.rows >= %(most)s::bigint OR working.rows >= %(most)s::bigint, strange.rows
FROM unnest(%(names)s::text[]) AS q (name)
CROSS JOIN LATERAL (
    SELECT count(*) AS rows, min(least(now(), greatest(vt, enqueued_at)))
               FILTER (WHERE isfinite(vt) AND isfinite(enqueued_at)) AS since
    FROM (
        SELECT vt, enqueued_at FROM {messages} WHERE queue_name = q.name AND {is_ready}
        ORDER BY priority DESC, msg_id LIMIT %(most)s::bigint
    ) AS r
) AS ready
CROSS JOIN LATERAL (
    SELECT min(least(now(), greatest(vt, enqueued_at)))
               FILTER (WHERE isfinite(vt) AND isfinite(enqueued_at)) AS since
    FROM generate_series(1, CASE WHEN ready.rows >= %(most)s::bigint THEN 10 ELSE 0 END) AS p (priority)
    CROSS JOIN LATERAL (
        SELECT vt, enqueued_at FROM {messages}
        WHERE queue_name = q.name AND priority = p.priority::smallint AND {is_ready} ORDER BY msg_id LIMIT 100
    ) AS r
) AS first
CROSS JOIN LATERAL (
    SELECT count(*) AS rows, count(*) FILTER (WHERE read_ct > 0) AS in_flight,
           count(*) FILTER (WHERE read_ct = 0) AS delayed
    FROM (
        SELECT read_ct FROM {messages} WHERE queue_name = q.name AND {is_claimed_there}
        ORDER BY msg_id LIMIT %(most)s::bigint
    ) AS c
) AS working
CROSS JOIN LATERAL (
    SELECT count(*) AS rows FROM (
        SELECT FROM {messages} WHERE queue_name = q.name AND {is_strange} LIMIT %(most)s::bigint
    ) AS s
) AS strange
CROSS JOIN LATERAL (
    SELECT count(*) AS rows FROM (SELECT FROM {dead} WHERE queue_name = q.name LIMIT %(most)s::bigint) AS d
) AS dead
ORDER BY q.name;

-- name: ready_estimate
-- The planner's estimate of a queue's ready rows, without the conditions that choose an index.
EXPLAIN (FORMAT JSON) SELECT FROM {messages} WHERE queue_name = %(queue)s AND state = 'ready';

-- name: find_dead
-- The newest dead letters. At most `most` bytes of content are read in all.
WITH chosen AS MATERIALIZED (
    SELECT * FROM {dead} WHERE %(queue)s::text IS NULL OR queue_name = %(queue)s::text
    ORDER BY dead_id DESC LIMIT %(limit)s::bigint
), {letters} ORDER BY m.dead_id DESC;

-- name: get_dead
WITH chosen AS MATERIALIZED (
    SELECT * FROM {dead} WHERE dead_id = ANY (%(ids)s::bigint[])
), {letters} ORDER BY m.dead_id;

-- name: letters
-- The content of a dead letter is read if it has at most `most` bytes: by itself (`each`), or together with all newer
-- ones. If its stored form is larger, it is not converted to text. Times are moved into the range that a client
-- supports. The last column is true if the content was read; if not, the message consists of its small parts.
sized AS MATERIALIZED (
    SELECT chosen.*, sum(pg_column_size(message)::bigint + coalesce(pg_column_size(result), 0)) OVER shared AS stored
    FROM chosen WINDOW shared AS (PARTITION BY CASE WHEN %(each)s::bool THEN dead_id END ORDER BY dead_id DESC)
), written AS MATERIALIZED (
    SELECT sized.*, CASE WHEN stored <= %(most)s::bigint THEN message::text END AS message_text,
           CASE WHEN stored <= %(most)s::bigint THEN result::text END AS result_text
    FROM sized
), measured AS (
    SELECT written.*, coalesce(sum(octet_length(message_text)::bigint + coalesce(octet_length(result_text), 0))
                               OVER shared <= %(most)s::bigint AND stored <= %(most)s::bigint, false) AS whole
    FROM written WINDOW shared AS (PARTITION BY CASE WHEN %(each)s::bool THEN dead_id END ORDER BY dead_id DESC)
)
SELECT m.dead_id, left(m.queue_name, 65536), CASE WHEN m.whole THEN m.message_text ELSE {parts} END,
       left(m.reason, 65536), m.attempts, CASE WHEN m.whole THEN m.result_text END, left(m.org_id, 65536), m.priority,
       least(greatest(m.enqueued_at, timestamptz '0001-01-02 00:00+00'), timestamptz '9999-12-30 00:00+00'),
       least(greatest(m.buried_at, timestamptz '0001-01-02 00:00+00'), timestamptz '9999-12-30 00:00+00'),
       m.whole
FROM measured AS m

-- name: last_dead
SELECT max(dead_id) FROM {dead};

-- name: replay_dead
-- A batch of the dead letters after one id and up to another, the oldest first. Each is sent as a new message: with a
-- new id and no attempts, at the end of its queue. If another session removes one meanwhile, it is not sent.
WITH chosen AS MATERIALIZED (
    SELECT dead_id FROM {dead}
    WHERE (%(ids)s::bigint[] IS NULL OR dead_id = ANY (%(ids)s::bigint[]))
      AND (%(queue)s::text IS NULL OR queue_name = %(queue)s::text)
      AND dead_id > %(after)s::bigint AND dead_id <= %(until)s::bigint
    ORDER BY dead_id LIMIT %(limit)s::bigint
), letter AS (
    DELETE FROM {dead} AS d USING chosen WHERE d.dead_id = ANY (ARRAY[chosen.dead_id])
    RETURNING d.dead_id, d.queue_name, d.message, d.org_id, d.priority
), sent AS (
    INSERT INTO {messages} (queue_name, message, org_id, enqueued_at, vt, read_ct, priority, state)
    SELECT queue_name, message, org_id, now(), now(), 0, priority, 'ready' FROM letter ORDER BY dead_id
)
SELECT c.dead_id, l.dead_id IS NOT NULL,
       CASE WHEN %(channel)s::text IS NOT NULL THEN pg_notify(%(channel)s::text, l.queue_name)::text END
FROM chosen AS c LEFT JOIN letter AS l ON l.dead_id = c.dead_id
ORDER BY c.dead_id;

-- name: purge_dead
-- A batch, as in replay_dead.
WITH chosen AS MATERIALIZED (
    SELECT dead_id FROM {dead}
    WHERE (%(ids)s::bigint[] IS NULL OR dead_id = ANY (%(ids)s::bigint[]))
      AND (%(queue)s::text IS NULL OR queue_name = %(queue)s::text)
      AND buried_at <= now() - %(older_than)s::float8 * interval '1 second'
      AND dead_id > %(after)s::bigint AND dead_id <= %(until)s::bigint
    ORDER BY dead_id LIMIT %(limit)s::bigint
), purged AS (
    DELETE FROM {dead} AS d USING chosen WHERE d.dead_id = ANY (ARRAY[chosen.dead_id]) RETURNING d.dead_id
)
SELECT c.dead_id, p.dead_id IS NOT NULL FROM chosen AS c LEFT JOIN purged AS p ON p.dead_id = c.dead_id
ORDER BY c.dead_id;

-- name: waiting_tasks
-- The tasks of the first ready rows, in the order of their index. A row that is not a valid message has no task.
SELECT first.message ->> 'task_name', count(*)
FROM (
    SELECT message FROM {messages}
    WHERE state = 'ready' AND queue_name = %(queue)s
    ORDER BY priority DESC, msg_id
    LIMIT %(limit)s::bigint
) AS first
WHERE jsonb_typeof(first.message -> 'task_name') = 'string' AND pg_column_size(first.message -> 'task_name') <= 2048
  AND first.message ->> 'task_name' <> ''
GROUP BY 1;
