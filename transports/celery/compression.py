"""The body of a compressed message, decompressed within the limit of the wire, and only when it is read.

kombu decompresses a message when it arrives, without a limit: a few bytes can take all memory. Here the body stays as
it was sent, so that a message can be sent again or dead-lettered unchanged. Reading it decompresses in pieces and stops
at the limit. The names of compressions, and the libraries for them, are those that kombu knows.
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
"""The header in which kombu writes how a body is compressed."""
_CHUNK = 64 * 1024
"""Bytes of the compressed body that are read at once."""
_PIECE = 1024 * 1024
"""Bytes that are decompressed at once."""
_MOST_STREAMS = 1000
"""How many compressed streams may follow each other in one body: an empty one costs time, and adds nothing."""
_DECODER_MEMORY = 80 * 1024 * 1024
"""Bytes that a decoder may take beside its output: the strongest presets of xz and zstd ask for 64 MiB."""
_ZSTD_WINDOW = 26
"""The same for zstd: the binary logarithm of the bytes that it may look back."""


class NotDecompressed(Exception):
    """The body cannot be decompressed within the limit. The text says why, and holds nothing of the body."""


def keep_compressed(channel: Any) -> Any:
    """Let a channel of kombu's hand out messages with their bodies as they were sent; returns the channel."""
    channel.Message = as_sent(channel.Message)
    return channel


def as_sent(kind: Any) -> Any:
    """Return a kombu message class that does not decompress."""
    if getattr(kind, "is_as_sent", False):
        return kind

    class AsSent(kind):  # type: ignore[misc]  # which class it is, the channel says
        is_as_sent = True

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.errors = [None]  # kombu decompresses nothing of a message that has an error already
            super().__init__(*args, **kwargs)
            self.errors = []

        def serializable(self) -> Any:
            """Return the message for a queue that kombu keeps itself, with the header that its body needs."""
            stored = super().serializable()
            if HEADER in self.headers:
                stored["headers"][HEADER] = self.headers[HEADER]
            return stored

    return AsSent


def is_compressed(message: kombu.Message) -> bool:
    """Return whether the body is compressed as its header says, and not decompressed by kombu."""
    return bool(message.headers.get(HEADER)) and (getattr(message, "is_as_sent", False) or bool(message.errors))


def bytes_of(message: kombu.Message) -> Any:
    """Return the body as it was sent; some brokers of kombu's have decoded it already."""
    if not isinstance(message.body, str):
        return message.body
    try:
        return message.body.encode(message.content_encoding or "utf-8")
    except (LookupError, UnicodeError):
        return message.body.encode("utf-8", "surrogatepass")


def readable_body(message: kombu.Message) -> Any:
    """Return the body, decompressed where the message says that it is compressed.

    Raises:
        NotDecompressed: the compression is unknown here, the body is not what it says, or it is larger than the limit,
            `limits.MAX_SIZE` bytes. No more than that is allocated, beside what the decoder itself needs.
    """
    if not is_compressed(message):
        return message.body
    name = message.headers[HEADER]
    try:
        decoder = compression.get_decoder(name)
    except (KeyError, TypeError):
        known = ", ".join(sorted(compression.encoders()))
        raise NotDecompressed(
            f"the body cannot be decompressed: {str(name)[:64]!r} is no compression that is known here ({known}); "
            "install the library that kombu needs for it, or choose one of these at the sender"
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
            f"the body is larger than {limit} bytes when it is decompressed; store it elsewhere and send a reference"
        )
    return b"".join(pieces)


def _decompressed(decoder: Callable[[Any], Any], body: bytes) -> Iterator[bytes]:
    """Yield what the decoder would return, in pieces; of one that an application has registered, all at once."""
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
    """Decompress streams that follow each other, with the decompressors of bz2, lzma and zstd, which are alike."""
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
                if number > 1 and not begun:  # no stream at all, but something behind the last: left out, as kombu does
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
