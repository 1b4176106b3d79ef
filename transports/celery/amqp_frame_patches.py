"""Monkeypatches for the frames of an open connection of py-amqp: the reason of a block, and unreadable properties.

py-amqp drops the broker's reason when the broker blocks a connection; the patch passes it on.

py-amqp cannot read properties with a text that is not UTF-8, or with a time outside the range of datetime. Such a
message would break every connection that receives it, because it is redelivered each time. With the patch it arrives
without its properties, and with a content type that marks it. So it is dead-lettered like other malformed messages. A
routing key that is not UTF-8 is made readable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from amqp.serialization import decode_properties_basic

UNREADABLE = "unreadable-properties"

_METHOD = 1
_ADDRESSED: dict[bytes, Callable[[Any], int]] = {
    b"\x00\x3c\x00\x3c": lambda payload: 4 + 1 + payload[4] + 8 + 1,  # basic.deliver: after tag, number and a flag
    b"\x00\x3c\x00\x47": lambda payload: 4 + 8 + 1,  # basic.get-ok: after number and a flag
}
"""The methods that deliver a message, and the offset of the exchange and the routing key in them."""
_BLOCKED = b"\x00\x0a\x00\x3c"  # connection.blocked: a short text after the method
_UNBLOCKED = b"\x00\x0a\x00\x3d"
_HEADER = 2
"""The kind of frame that carries a message's properties, after 12 bytes about its body."""
_HEARTBEAT = 8
_BEFORE = 12
_INSTEAD = b"\x80\x00" + bytes([len(UNREADABLE)]) + UNREADABLE.encode()


def tolerate_unreadable_properties(connection: Any) -> None:
    """Make an open connection of py-amqp accept messages with unreadable properties."""
    handle = connection.on_inbound_frame

    def on_frame(frame: tuple[int, int, Any]) -> Any:
        kind, channel, payload = frame
        if kind == _METHOD and (before := _ADDRESSED.get(bytes(payload[:4]))) is not None:
            frame = (kind, channel, _with_readable_key(payload, before(payload)))
        try:
            return handle(frame)
        except Exception:
            if kind != _HEADER or _is_readable(payload):
                raise
            return handle((kind, channel, bytes(payload[:_BEFORE]) + _INSTEAD))

    connection.on_inbound_frame = on_frame


def note_blocks(connection: Any, note: Callable[[str | None], None]) -> None:
    """Call `note` with the broker's reason when it blocks an open connection, and with None when it unblocks it."""
    handle = connection.on_inbound_frame

    def on_frame(frame: tuple[int, int, Any]) -> Any:
        kind, channel, payload = frame
        if channel == 0 and kind == _METHOD:
            method = bytes(payload[:4])
            if method == _BLOCKED:
                note(bytes(payload[5 : 5 + payload[4]]).decode("utf-8", "replace"))
            elif method == _UNBLOCKED:
                note(None)
        return handle(frame)

    connection.on_inbound_frame = on_frame


def is_about_the_connection(frame: tuple[int, int, Any]) -> bool:
    """Whether a frame is a heartbeat, a block or an unblock, which need no answer."""
    kind, channel, payload = frame
    return kind == _HEARTBEAT or (channel == 0 and kind == _METHOD and bytes(payload[:4]) in (_BLOCKED, _UNBLOCKED))


def _with_readable_key(payload: Any, exchange_at: int) -> Any:
    key_at = exchange_at + 1 + payload[exchange_at]
    end = key_at + 1 + payload[key_at]
    key = bytes(payload[key_at + 1 : end])
    try:
        key.decode()
    except UnicodeDecodeError:
        key = key.decode("ascii", "replace").replace("\ufffd", "?").encode()
        return bytes(payload[: key_at + 1]) + key + bytes(payload[end:])
    return payload


def _is_readable(payload: Any) -> bool:
    try:
        decode_properties_basic(payload, _BEFORE)
    except Exception:
        return False
    return True
