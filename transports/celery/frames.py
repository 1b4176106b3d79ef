"""What py-amqp cannot read of a message: its properties, where a text is not UTF-8 or a moment beyond its calendar.

Such a message would break every connection that receives it, for ever, because it is delivered again. Here it arrives
without its properties instead, and with a content type that says so; then it is buried like any other bad one.
"""

from __future__ import annotations

from typing import Any

from amqp.serialization import decode_properties_basic

UNREADABLE = "unreadable-properties"

_HEADER = 2
"""The kind of frame that carries a message's properties, after 12 bytes about its body."""
_BEFORE = 12
_INSTEAD = b"\x80\x00" + bytes([len(UNREADABLE)]) + UNREADABLE.encode()


def tolerate_unreadable_properties(connection: Any) -> None:
    """Let an open connection of py-amqp live through them."""
    handle = connection.on_inbound_frame

    def on_frame(frame: tuple[int, int, Any]) -> Any:
        try:
            return handle(frame)
        except Exception:
            kind, channel, payload = frame
            if kind != _HEADER or _is_readable(payload):
                raise
            return handle((kind, channel, bytes(payload[:_BEFORE]) + _INSTEAD))

    connection.on_inbound_frame = on_frame


def _is_readable(payload: Any) -> bool:
    try:
        decode_properties_basic(payload, _BEFORE)
    except Exception:
        return False
    return True
