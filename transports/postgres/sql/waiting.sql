-- What waits in a queue, for `unstract-wire worker --strict`. {messages} is the schema-qualified table.

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
