"""The broker's confirms for published messages."""

from __future__ import annotations

from typing import Any

from transports.celery.encode import Outgoing


class PublisherConfirms:
    """The broker's answers by delivery tag: the number of a publish on its channel, which counts from 1.

    The answers of a batch are kept until the next batch begins. The answer to a message that is marked as unconfirmed
    is kept longer.

    Attributes:
        returned: The reason for each message of the batch that the broker returned, by the message's id and queue.
    """

    def __init__(self) -> None:
        self.returned: dict[tuple[str, str], str] = {}
        self._first = 1
        self._last = 0
        self._missing: set[int] = set()
        self._acked: set[int] = set()
        self._nacked: set[int] = set()
        self._keys: dict[int, tuple[str, str]] = {}
        self._unconfirmed: dict[int, bool | None] = {}

    def begin_batch(self) -> None:
        self._first = self._last + 1
        self._missing, self._acked, self._nacked = set(), set(), set()
        self._keys = {tag: key for tag, key in self._keys.items() if tag in self._unconfirmed}
        self.returned = {}

    def expect(self, message: Outgoing) -> None:
        """Record that a message is published next."""
        self._last += 1
        self._missing.add(self._last)
        self._keys[self._last] = (message.id, message.queue)

    def listen(self, channel: Any) -> None:
        """Record the answers that arrive on a channel of py-amqp."""
        channel.events["basic_ack"].add(lambda tag, multiple: self._note(True, tag, multiple))
        channel.events["basic_nack"].add(lambda tag, multiple: self._note(False, tag, multiple))
        channel.events["basic_return"].add(self._note_return)

    def confirm_all(self) -> None:
        self._note(True, self._last, True)

    @property
    def missing(self) -> bool:
        return bool(self._missing)

    def is_acked(self, number: int) -> bool:
        return self._first + number in self._acked

    def is_nacked(self, number: int) -> bool:
        return self._first + number in self._nacked

    def mark_unconfirmed(self, number: int) -> int:
        """Keep the answer to a message of this batch for later; return the tag for `confirmation_of`."""
        tag = self._first + number
        self._unconfirmed[tag] = None
        return tag

    def confirmation_of(self, tag: int) -> bool | None:
        """Return whether the broker accepted an unconfirmed message; None while it has not answered.

        An answer is returned once.
        """
        confirmed = self._unconfirmed.get(tag, False)
        if confirmed is not None:
            self._unconfirmed.pop(tag, None)
        return confirmed

    def _note(self, accepted: bool, tag: int, multiple: bool) -> None:
        answers = self._acked if accepted else self._nacked
        answered = {n for n in self._missing if n <= tag} if multiple else self._missing & {tag}
        self._missing -= answered
        answers |= answered
        for unconfirmed, answer in list(self._unconfirmed.items()) if self._unconfirmed else ():
            if answer is None and (unconfirmed <= tag if multiple else unconfirmed == tag):
                self._unconfirmed[unconfirmed] = accepted

    def _note_return(self, exc: Any, exchange: str, routing_key: str, message: Any) -> None:
        headers = message.properties.get("application_headers") or {}
        id = str(headers.get("id") or message.properties.get("correlation_id"))
        key = (id, routing_key)
        self.returned[key] = str(exc.reply_text)
        for tag in self._unconfirmed:
            if self._keys.get(tag) == key:
                self._unconfirmed[tag] = False
