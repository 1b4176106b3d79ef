"""`Sender`: stores messages, with its own commit or in the caller's transaction."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from transports.postgres.caller_transaction import ascii_json, cursor_beside
from transports.postgres.connection import Rows
from transports.postgres.error_mapping import mapped
from transports.postgres.execution import check_size
from transports.postgres.notifier import Notifier
from transports.postgres.pool import Pool
from transports.postgres.rows import message_columns, message_text, sent_ids_in
from transports.postgres.statements import Statements
from unstract_core.transport import Message

_SEND_WITHIN = "send within the caller's transaction"


class Sender:
    """The producer's side of a transport. Thread-safe.

    Args:
        pool: runs the statements.
        statements: the statements of the schema.
        notifier: decides which commits contain a NOTIFY.
        notify_within: whether a NOTIFY is added to a caller's transaction.
    """

    def __init__(self, pool: Pool, statements: Statements, notifier: Notifier, *, notify_within: bool) -> None:
        self._pool = pool
        self._statements = statements
        self._notifier = notifier
        self._notify_within = notify_within

    def send(self, messages: Sequence[Message]) -> list[str]:
        """Store all messages or none, in one commit, and return their ids in order."""
        texts = [message_text(message) for message in messages]
        rows = self._notifier.commit(_ready_queues(messages), partial(self._send, messages, texts))
        return sent_ids_in(rows)

    def send_within(self, cursor: Any, messages: Sequence[Message]) -> list[str]:
        """Store all messages in the transaction of the caller's cursor, and return their ids in order."""
        columns = message_columns(messages, [ascii_json(message_text(message)) for message in messages])
        with mapped(_SEND_WITHIN, committed_by_us=False), cursor_beside(cursor) as beside:
            if not messages:
                return []
            notify = self._notify_within and not self._notifier.paused
            wake = list(dict.fromkeys(_ready_queues(messages))) if notify else []
            parameters = self._parameters(columns, wake)
            check_size(_SEND_WITHIN, parameters)
            beside.execute(self._statements.portable("send_within" if wake else "send_silently"), parameters)
            return sent_ids_in(beside.fetchall())

    def _send(self, messages: Sequence[Message], texts: list[str], notified: Sequence[str | None]) -> Rows:
        if len(messages) == 1 and not messages[0].delay and not notified:
            (message,), (text,) = messages, texts
            single = (message.queue, text, message.org_id, str(message.priority))
            return self._pool.execute("send", self._statements["send_one"], single, durable=True)
        parameters = self._parameters(message_columns(messages, texts), notified)
        return self._pool.execute("send", self._statements["send_many"], parameters, durable=True)

    def _parameters(self, columns: dict[str, list[Any]], wake: Sequence[str | None]) -> dict[str, Any]:
        return {**columns, "channel": self._notifier.channels.queues, "wake": list(wake)}


def _ready_queues(messages: Sequence[Message]) -> list[str]:
    """Return the queues in which a message is ready at once."""
    return [message.queue for message in messages if not message.delay]
