-- Every statement that runs in production, each one command and so one transaction. {messages}, {results} and {dead}
-- are the schema-qualified tables. No statement needs a search_path, session state, an advisory lock or a server-side
-- prepared statement: all of them work through PgBouncer in transaction mode.
--
-- Rows are joined to what was found by `msg_id = ANY (ARRAY[...])`: no plan can turn that round, and read the whole table
-- to join it to a handful of ids, as it would where the statistics are of a moment at which the table was empty.
--
-- A message is `ready`, or `claimed` until vt: under a lease, or waiting for its time (a delayed send or retry).
-- read_ct counts its deliveries. The fence of a delivery is (msg_id, read_ct) with enqueued_at, because ids come again
-- after a failover, a restore or TRUNCATE ... RESTART IDENTITY. enqueued_at is compared as the server's own eight bytes:
-- no time zone, DateStyle or year changes these on the way through a client.

-- name: send_one
-- The most frequent case, at its cheapest: one message, ready at once, that nobody has to be told of. Its parameters are
-- libpq's own, for libpq_exec.py.
INSERT INTO {messages} (queue_name, message, org_id, enqueued_at, vt, read_ct, priority, state)
VALUES ($1, $2::jsonb, $3, now(), now(), 0, $4, 'ready')
RETURNING msg_id;

-- name: send_many
-- All or none, with ids in the order of the arrays; tells the listeners of the queues in `wake` in the same commit.
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
-- send_many within a caller's transaction. Where half of the server's queue of notifications is in use, none is added:
-- the caller's commit would fail if it were full by then.
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
-- The first ready rows of some queues: their indexes are merged in order ({candidates}), and each row is locked as it
-- comes; rows that others are claiming are passed over.
WITH next AS MATERIALIZED (
    SELECT free.msg_id
    FROM (SELECT * FROM ({candidates}) AS ready ORDER BY priority DESC, msg_id) AS candidate
    CROSS JOIN LATERAL (
        SELECT msg_id FROM {messages} WHERE msg_id = candidate.msg_id AND {still_ready} FOR UPDATE SKIP LOCKED
    ) AS free
    LIMIT %(limit)s::bigint
), {claimed};

-- name: candidates
-- One queue's share of a claim: little more than could be taken, so that a long queue is not read to its end. Where
-- others hold all of these at the moment, requeue_expired says that there is more, and {bound} is left out.
(SELECT msg_id, priority FROM {messages}
 WHERE queue_name = {queue} AND {is_ready}
 ORDER BY priority DESC, msg_id {bound});

-- name: claim_frontier
-- A claim beyond one id for each queue and priority, the highest priority first: it does not walk over what is dead in
-- the index before, which stays there for as long as any session holds an old snapshot. claim_planner.py tells what it
-- misses. {columns} are the queues' ids, {arrays} the parameters that hold them.
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
-- One queue's share of claim_frontier.
(SELECT msg_id FROM {messages}
 WHERE queue_name = {queue} AND priority = taken.priority AND msg_id > taken.{column} AND {is_ready}
 ORDER BY msg_id {bound});

-- name: bound
LIMIT %(limit)s::bigint + 100;

-- name: is_ready
-- The second condition follows from the first: its subquery is never run. The planner drops it for the index of ready
-- rows, whose predicate proves it, and adds some 10,000 units of cost for each row that it would reach in another way.
-- So no statistics and no cost settings make another way look cheaper, such as the primary key for the rows beyond an id.
state = 'ready' AND (state = 'ready' OR {costly});

-- name: still_ready
-- For a row that is reached by its id. The planner cannot prove the predicate of the index of ready rows from it, all of
-- which it would read for the one id where the statistics say that there are none. The function is never called; a little
-- cost for each row keeps a small table from being read as a whole for each id.
state || '' = 'ready' AND (state || '' = 'ready' OR to_tsvector('pg_catalog.simple', state) IS NOT NULL);

-- name: is_claimed
-- The same as is_ready for the index of claimed rows.
state = 'claimed' AND (state = 'claimed' OR {costly});

-- name: is_claimed_there
-- The same for the index of the claimed rows of a queue. The conditions on the name are in its predicate alone, so that
-- no statistics make the other index of claimed rows look as cheap, which leads through the rows of all queues.
queue_name >= '' AND (queue_name >= '' OR {costly}) AND {is_claimed};

-- name: still_claimed
-- The same as still_ready.
state || '' = 'claimed' AND (state || '' = 'claimed' OR to_tsvector('pg_catalog.simple', state) IS NOT NULL);

-- name: costly
-- The planner expects a million rows of it; were it run, it would count at most 49.
(SELECT count(*) FROM generate_series(1, length(state)) AS a, generate_series(1, length(state)) AS b) IS NULL;

-- name: claimed
-- How each claim ends.
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
-- Of messages that were claimed without their content (unread.py).
SELECT h.msg_id, h.read_ct, h.enqueued, CASE WHEN octet_length(content.text) <= {largest} THEN content.text END
FROM unnest(%(ids)s::bigint[], %(attempts)s::int[], %(enqueued)s::bytea[]) AS h (msg_id, read_ct, enqueued)
CROSS JOIN LATERAL (
    SELECT message FROM {messages}
    WHERE msg_id = h.msg_id AND read_ct = h.read_ct AND timestamptz_send(enqueued_at) = h.enqueued LIMIT 1
) AS m
CROSS JOIN LATERAL (SELECT m.message::text OFFSET 0) AS content (text);

-- name: digest
-- The parts of a message that say who waits for it, where they are small, from one whose text cannot be fetched.
SELECT {parts}
FROM unnest(%(ids)s::bigint[], %(attempts)s::int[], %(enqueued)s::bytea[]) AS h (msg_id, read_ct, enqueued)
CROSS JOIN LATERAL (
    SELECT message FROM {messages}
    WHERE msg_id = h.msg_id AND read_ct = h.read_ct AND timestamptz_send(enqueued_at) = h.enqueued LIMIT 1
) AS m;

-- name: parts
-- A number can take eight bytes in jsonb and 131,072 digits as text: no part that holds such a one is written.
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
-- Expired leases and delays become ready again, at most `limit`. Reads at most `window` claimed rows beyond some ids
-- ({looked_at}), and those of `known`; no index has `vt`, so that the renewal of a lease is a HOT update. Also returns
-- when the next of these is due, the priority of the first ready row of each queue, the time, the lowest ids that are
-- back, by queue and priority, where it stopped reading (the place of the queue and the id), the newest id, the number of
-- rows that it read, the rows that are due soon, and the id up to which it read all where a queue had more.
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
-- Of the queues of `walked`, one after the other, the claimed rows beyond an id of each, and at most `share` of each.
SELECT q.place, held.msg_id, q.name AS queue_name, held.vt
FROM unnest(%(walked)s::text[], %(afters)s::bigint[]) WITH ORDINALITY AS q (name, after, place)
CROSS JOIN LATERAL (
    SELECT msg_id, vt FROM {messages}
    WHERE queue_name = q.name AND msg_id > q.after AND {is_claimed_there}
    ORDER BY msg_id LIMIT %(share)s::bigint
) AS held
ORDER BY q.place LIMIT %(window)s::bigint

-- name: looked_at_of_any
-- The claimed rows of any queue beyond an id, for a subscription to more queues than can be looked at one by one.
SELECT 1::bigint AS place, msg_id, queue_name::text AS queue_name, vt FROM {messages}
WHERE msg_id > (%(afters)s::bigint[])[1] AND {is_claimed}
ORDER BY msg_id LIMIT %(window)s::bigint

-- name: first_ready
-- Counts what others have locked, too: what a claim may have passed over.
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
-- The queues that have ready rows, that of the first row first. It jumps from queue to queue in the index, so that its
-- cost depends on the number of queues that are not empty, and not on how many a worker takes from.
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
-- Fenced: a row that was claimed again since is not touched. One that expired but was not claimed is taken back. One that
-- somebody has locked is passed over, and no other waits for it; it is still held, because nobody can claim it either.
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
-- A whole batch in one commit. Only what passes the fence has any effect: `fenced` is the root of everything below it.
-- Follow-ups and replies depend on `ended`, the rows that were really removed or made ready: a trigger can keep a row
-- that is to be deleted or changed, and the answer says so ('kept'). They refer to a settlement by its place in the
-- batch, which may hold a message's lost attempt too.
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
SELECT task_id FROM {results} WHERE task_id = ANY (%(keys)s::text[]) AND {unexpired};

-- name: unexpired
-- Written so that the index of expires_at cannot serve it: where the statistics are of a moment at which all replies had
-- expired, the planner would read all that have not for the one that is asked for.
(expires_at > now()) IS TRUE;

-- name: purge_replies
-- What expired from `since` on (seconds of the epoch): the next bite does not walk over what the last one removed.
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
-- Fails where a table or column is missing, or may not be read; touches no row.
SELECT m.msg_id, m.queue_name, m.message, m.org_id, m.enqueued_at, m.vt, m.read_ct, m.priority, m.state,
       r.task_id, r.status, r.result, r.error, r.created_at, r.expires_at,
       d.dead_id, d.msg_id, d.queue_name, d.message, d.org_id, d.priority, d.attempts, d.reason, d.result,
       d.enqueued_at, d.buried_at
FROM {messages} AS m, {results} AS r, {dead} AS d LIMIT 0;

-- name: closed_sequences
-- The sequences behind ids from which this role may take none; planning a statement does not look at them. Those of
-- identity columns take no right of their own.
SELECT id.sequence FROM (
    SELECT pg_get_serial_sequence(%(messages)s, 'msg_id') UNION ALL SELECT pg_get_serial_sequence(%(dead)s, 'dead_id')
) AS id (sequence)
WHERE id.sequence IS NOT NULL AND NOT has_sequence_privilege(id.sequence, 'USAGE')
  AND EXISTS (SELECT 1 FROM pg_depend WHERE objid = id.sequence::regclass AND deptype = 'a');

-- name: row_security
-- The tables of which row-level security shows this role a part only: it fails nothing, rows are just not there.
SELECT t.relname::text FROM pg_class AS t JOIN pg_namespace AS n ON n.oid = t.relnamespace
WHERE n.nspname = %(schema)s AND t.relname = ANY (%(tables)s::text[]) AND row_security_active(t.oid)
ORDER BY 1;

-- name: queue_names
-- The queues that hold anything. It jumps from name to name in the indexes.
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
-- A row that another program has put into a state of its own. They are looked for where an index leads to them alone:
-- without it, each look would read the whole table.
state <> 'ready' AND state <> 'claimed'
    AND (SELECT EXISTS (SELECT FROM pg_catalog.pg_index WHERE indrelid = {strange_table}::regclass AND indisvalid
                        AND pg_catalog.pg_get_expr(indpred, indrelid) ~ '<> ''ready''.*<> ''claimed'''))

-- name: queues
-- Counts at most `most` rows of a queue in each state, so that it takes no longer the more wait. `oldest` is of these,
-- and of the first of each priority where there are more. The last but one says whether it stopped among what is ready
-- or claimed; the last counts rows in a state that no statement of this package takes.
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
-- The planner's own estimate of a queue's ready rows, which no index condition of ours leads.
EXPLAIN (FORMAT JSON) SELECT FROM {messages} WHERE queue_name = %(queue)s AND state = 'ready';

-- name: find_dead
-- The newest letters. `most` bytes of content are read in all.
WITH chosen AS MATERIALIZED (
    SELECT * FROM {dead} WHERE %(queue)s::text IS NULL OR queue_name = %(queue)s::text
    ORDER BY dead_id DESC LIMIT %(limit)s::bigint
), {letters} ORDER BY m.dead_id DESC;

-- name: get_dead
WITH chosen AS MATERIALIZED (
    SELECT * FROM {dead} WHERE dead_id = ANY (%(ids)s::bigint[])
), {letters} ORDER BY m.dead_id;

-- name: letters
-- A letter's content is read if it has no more than `most` bytes: by itself, or with that of all newer ones (not `each`).
-- It is not even written as text where what is stored is larger. Times are moved into the range that a client can hold.
-- The last column says whether the content was read; if not, the message consists of its small parts.
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
-- A batch of those after one id and up to another. Sent as new: a new id, no attempts, at the end of its queue, the
-- oldest letter first. A letter that another session removes at the same time is among the chosen and not sent.
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
-- A batch, as of replay_dead.
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
-- The tasks that the first ready rows name, in the order of their index; what is no message of the wire names none.
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
