-- Every statement. Names and values are parameters; no statement is composed from strings.

-- name: is_ready
-- Whether the last object of schema.sql exists, and so all of them.
SELECT count(*) FROM main.sqlite_schema WHERE name = 'wire_dead_letter_queue';

-- name: send
INSERT INTO main.wire_message (queue, body, org_id, priority, enqueued_at, state, due)
VALUES (:queue, :body, :org_id, :priority, :now, iif(:delay > 0, 'delayed', 'ready'), :now + :delay);

-- name: next
-- Whether a message is ready in a queue, and the end of the next lease or delay. Takes no write lock.
SELECT EXISTS (SELECT 1 FROM wire_message WHERE queue = :queue AND state = 'ready'),
       (SELECT min(due) FROM wire_message WHERE queue = :queue AND state <> 'ready');

-- name: requeue_expired
-- Makes messages with expired leases or delays ready. The attempt stays, so the last holder may settle until a claim.
UPDATE wire_message SET state = 'ready' WHERE queue = :queue AND state <> 'ready' AND due <= :now;

-- name: first
-- The first messages of one queue; the limit avoids reading a long queue to its end.
SELECT -priority, id FROM wire_message WHERE queue = :queue AND state = 'ready'
ORDER BY priority DESC, id LIMIT :limit;

-- name: waiting
SELECT body FROM wire_message WHERE queue = :queue AND state = 'ready' ORDER BY priority DESC, id LIMIT :limit;

-- name: claim
UPDATE wire_message SET state = 'held', due = :due, attempt = attempt + 1, fence = :fence WHERE id = :id
RETURNING id, queue, attempt, body, org_id, priority, fence;

-- name: renew
-- Also renews an expired lease, as long as no other consumer has claimed the message.
UPDATE wire_message SET state = 'held', due = :due WHERE id = :id AND attempt = :attempt AND fence = :fence;

-- name: retry
UPDATE wire_message
SET state = iif(:delay > 0, 'delayed', 'ready'), due = :now + :delay, attempt = attempt - iif(:counted, 0, 1)
WHERE id = :id AND attempt = :attempt AND fence = :fence;

-- name: bury
INSERT INTO wire_dead_letter (queue, body, reason, attempts, result, org_id, priority, enqueued_at, buried_at)
SELECT queue, body, :reason, attempt, :result, org_id, priority, enqueued_at, :now
FROM wire_message WHERE id = :id AND attempt = :attempt AND fence = :fence;

-- name: remove
DELETE FROM wire_message WHERE id = :id AND attempt = :attempt AND fence = :fence;

-- name: answer
-- The first reply under a key wins until it expires.
INSERT INTO wire_reply (key, status, result, error, ttl, expires_at)
VALUES (:key, :status, :result, :error, :ttl, :now + :ttl)
ON CONFLICT (key) DO UPDATE
SET status = excluded.status, result = excluded.result, error = excluded.error, ttl = excluded.ttl,
    expires_at = excluded.expires_at
WHERE wire_reply.expires_at <= :now;

-- name: purge_replies
-- Removes some expired replies with each settlement that writes a reply: more than it adds, and within a short time.
DELETE FROM wire_reply WHERE key IN (
    SELECT key FROM wire_reply WHERE expires_at <= :now ORDER BY expires_at LIMIT 100
);

-- name: reply
SELECT status, result, error, ttl FROM wire_reply WHERE key = :key AND expires_at > :now;

-- name: clear
UPDATE wire_reply SET result = 'null', error = '' WHERE key = :key;

-- name: queue_names
SELECT queue FROM wire_message UNION SELECT queue FROM wire_dead_letter ORDER BY queue;

-- name: queue_state
SELECT count(*) FILTER (WHERE state = 'ready' OR due <= :now),
       count(*) FILTER (WHERE state = 'held' AND due > :now),
       count(*) FILTER (WHERE state = 'delayed' AND due > :now),
       max(0.0, :now - min(max(due, enqueued_at)) FILTER (WHERE state = 'ready' OR due <= :now)),
       (SELECT count(*) FROM wire_dead_letter WHERE queue = :queue)
FROM wire_message WHERE queue = :queue;

-- name: find_dead
SELECT id, queue, body, reason, attempts, result, org_id, priority, enqueued_at, buried_at
FROM wire_dead_letter WHERE :queue IS NULL OR queue = :queue ORDER BY id DESC LIMIT :limit;

-- name: get_dead
SELECT id, queue, body, reason, attempts, result, org_id, priority, enqueued_at, buried_at
FROM wire_dead_letter WHERE id = :id;

-- name: dead_ids
SELECT id FROM wire_dead_letter WHERE (:queue IS NULL OR queue = :queue) AND buried_at <= :until ORDER BY id;

-- name: replay_dead
INSERT INTO wire_message (queue, body, org_id, priority, enqueued_at)
SELECT queue, body, org_id, priority, :now FROM wire_dead_letter WHERE id = :id;

-- name: remove_dead
DELETE FROM wire_dead_letter WHERE id = :id;
