"""A transport for the tests of dispatch: it records each call and gives prepared answers. Nothing can be received."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from unstract_core import Capabilities, Message, NotSupported, Reply, Subscription, from_wire
from unstract_core.transport import write_message


@attrs.define
class Sent:
    """One message as it was sent; `written` is its encoded form."""

    message: Message
    written: Any
    within: object | None


@attrs.define
class RecordingTransport:
    """`answer` is the result of each `reply`; `failure`, if set, is raised by `send`."""

    capabilities: Capabilities = attrs.field(factory=Capabilities)
    answer: Reply | None = None
    failure: BaseException | None = None
    reply_failure: BaseException | None = None
    sent: list[Sent] = attrs.field(factory=list)
    sends: int = 0
    replies: list[dict[str, Any]] = attrs.field(factory=list)

    def send(self, messages: Sequence[Message], *, within: object | None = None) -> Sequence[str]:
        self.sends += 1
        if self.failure is not None:
            raise self.failure
        written = [Sent(message, write_message(message), within) for message in messages]
        self.sent += written
        return [f"row-{len(self.sent) - len(written) + number}" for number in range(1, len(written) + 1)]

    def reply(self, key: str, *, timeout: float = 0, consume: bool = False) -> Reply | None:
        self.replies.append({"key": key, "timeout": timeout, "consume": consume})
        if self.reply_failure is not None:
            raise self.reply_failure
        return None if self.answer is None else attrs.evolve(self.answer, key=key)

    def subscribe(self, queues: Sequence[str], *, lease: float) -> Subscription:
        raise NotSupported("nothing can be received from a recording transport")

    def close(self) -> None:
        """Do nothing: there is no connection."""

    def only(self) -> Sent:
        """Return the only message that was sent, after a check of its encoded form."""
        (sent,) = self.sent
        assert from_wire(sent.written).task_name == sent.message.payload.task_name
        assert sent.message.queue == sent.message.payload.queue
        return sent
