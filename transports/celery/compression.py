"""Decompressing the body of a message when it is read, within the size limit of the wire.

kombu decompresses a message when it arrives, without a limit: a few bytes can take all memory. This package keeps the
body compressed, so that the message can be sent again or dead-lettered unchanged. Reading it decompresses in pieces and
stops at the limit. The compressions and their libraries are kombu's.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import kombu
from kombu import compression

from unstract_core.values import limits

HEADER = "compression"
"""The header with kombu's name of the compression."""
_CHUNK = 64 * 1024
"""The bytes of the compressed body that are read at a time."""
_PIECE = 1024 * 1024
"""The highest number of bytes that are decompressed at a time."""
_MOST_STREAMS = 1000
"""The highest number of compressed streams in one body: an empty stream takes time and adds no bytes."""
_DECODER_MEMORY = 80 * 1024 * 1024
"""The bytes of memory for a decoder besides its output: the strongest presets of xz and zstd need 64 MiB."""
_ZSTD_WINDOW = 26
"""The same limit for zstd: the binary logarithm of its window in bytes."""


class NotDecompressed(Exception):
    """The body cannot be decompressed within the limit. The text has the reason, and no part of the body."""


def keep_compressed(channel: Any) -> Any:
    """Make a channel of kombu deliver messages with their bodies as they were sent; return the channel."""
    channel.Message = as_sent(channel.Message)
    return channel


def as_sent(kind: Any) -> Any:
    """Return a kombu message class that does not decompress."""
    if getattr(kind, "is_as_sent", False):
        return kind

    class AsSent(kind):  # type: ignore[misc]  # the class depends on the channel
        is_as_sent = True

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.errors = [None]  # kombu does not decompress a message that has an error
            super().__init__(*args, **kwargs)
            self.errors = []

        def serializable(self) -> Any:
            """Return the message for a queue that kombu stores itself, with the header that its body needs."""
            stored = super().serializable()
            if HEADER in self.headers:
                stored["headers"][HEADER] = self.headers[HEADER]
            return stored

    return AsSent


def is_compressed(message: kombu.Message) -> bool:
    """Return whether the body is still compressed, and kombu has not decompressed it."""
    return bool(message.headers.get(HEADER)) and (getattr(message, "is_as_sent", False) or bool(message.errors))


def bytes_of(message: kombu.Message) -> Any:
    """Return the body as it was sent; some transports of kombu have decoded it."""
    if not isinstance(message.body, str):
        return message.body
    try:
        return message.body.encode(message.content_encoding or "utf-8")
    except (LookupError, UnicodeError):
        return message.body.encode("utf-8", "surrogatepass")


def readable_body(message: kombu.Message) -> Any:
    """Return the body, decompressed if it is compressed.

    Raises:
        NotDecompressed: The compression is unknown, the body is malformed, or it is larger than `limits.MAX_SIZE`
            bytes. No more bytes are allocated, besides the memory of the decoder.
    """
    if not is_compressed(message):
        return message.body
    name = message.headers[HEADER]
    try:
        decoder = compression.get_decoder(name)
    except (KeyError, TypeError):
        known = ", ".join(sorted(compression.encoders()))
        raise NotDecompressed(
            f"the body cannot be decompressed: {str(name)[:64]!r} is not a known compression ({known}). "
            "Install the library that kombu needs for it, or choose one of these at the sender"
        ) from None
    limit = limits.MAX_SIZE
    pieces: list[bytes] = []
    size = 0
    try:
        for piece in _decompressed(decoder, bytes_of(message)):
            size += len(piece)
            if size > limit:
                break
            pieces.append(piece)
    except NotDecompressed:
        raise
    except Exception as exc:
        raise NotDecompressed(f"the body cannot be decompressed ({type(exc).__name__})") from exc
    if size > limit:
        pieces.clear()
        raise NotDecompressed(
            f"the decompressed body is larger than {limit} bytes. Store it elsewhere and send a reference"
        )
    return b"".join(pieces)


def _decompressed(decoder: Callable[[Any], Any], body: bytes) -> Iterator[bytes]:
    """Yield the output of a decoder in pieces; the output of a decoder of the application in one piece."""
    known = vars(compression)
    bz2, lzma, zstd, brotli = (known.get(name) for name in ("bz2", "lzma", "zstd", "brotli"))
    if decoder is zlib.decompress:
        return _zlib(body)
    if bz2 is not None and decoder is bz2.decompress:
        return _streams(bz2.BZ2Decompressor, body)
    if lzma is not None and decoder is lzma.decompress:
        return _streams(lambda: lzma.LZMADecompressor(memlimit=_DECODER_MEMORY), body)
    if brotli is not None and decoder is brotli.decompress:
        return _brotli(brotli, body)
    if zstd is not None and decoder is getattr(zstd, "decompress", None) and hasattr(zstd, "DecompressionParameter"):
        options = {zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW}
        return _streams(lambda: zstd.ZstdDecompressor(options=options), body)
    if zstd is not None and decoder is known.get("zstd_decompress"):  # kombu before 5.6, with another library
        reader = zstd.ZstdDecompressor(max_window_size=2**_ZSTD_WINDOW).stream_reader(io.BytesIO(body))
        return iter(lambda: reader.read(_PIECE), b"")
    return iter([decoder(body)])


def _chunks(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), _CHUNK):
        yield body[start : start + _CHUNK]


def _zlib(body: bytes) -> Iterator[bytes]:
    stream = zlib.decompressobj()
    for chunk in _chunks(body):
        rest = chunk
        while rest and not stream.eof:
            yield stream.decompress(rest, _PIECE)
            rest = stream.unconsumed_tail
    while not stream.eof:
        piece = stream.decompress(b"", _PIECE)
        if not piece:
            raise EOFError
        yield piece


def _streams(new: Callable[[], Any], body: bytes) -> Iterator[bytes]:
    """Decompress streams that follow each other, with a decompressor of bz2, lzma or zstd."""
    stream, number, begun = new(), 1, False
    for chunk in _chunks(body):
        rest = chunk
        while rest or not (stream.eof or stream.needs_input):
            if stream.eof:
                stream, number, begun = new(), number + 1, False
                if number > _MOST_STREAMS:
                    raise NotDecompressed(f"the body cannot be decompressed: more than {_MOST_STREAMS} streams in it")
            try:
                piece = stream.decompress(rest, _PIECE)
            except Exception:
                if number > 1 and not begun:  # bytes after the last stream: ignored, as by kombu
                    return
                raise
            begun = begun or bool(piece)
            yield piece
            rest = stream.unused_data if stream.eof else b""
    if not stream.eof:
        raise EOFError


def _brotli(brotli: Any, body: bytes) -> Iterator[bytes]:
    stream = brotli.Decompressor()
    if not hasattr(stream, "can_accept_more_data"):
        raise NotDecompressed("the body cannot be decompressed within a limit: install brotli 1.2 or newer")
    for chunk in _chunks(body):
        yield stream.process(chunk, output_buffer_limit=_PIECE)
        while not (stream.is_finished() or stream.can_accept_more_data()):
            yield stream.process(b"", output_buffer_limit=_PIECE)
    if not stream.is_finished():
        raise EOFError
