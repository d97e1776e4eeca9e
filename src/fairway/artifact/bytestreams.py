"""Byte compressors with decompression that is bounded: never more than the announced number of bytes is produced.

lzma   raw LZMA2 without container or check (the artifact has its own); the dictionary follows from the size
brotli one stream (the bound needs brotli 1.2)

Zstandard stands in its coder, so that a decoder without that library opens all other files.
"""

import lzma
from typing import Any

import brotli


def lzma_pack(raw: bytes, preset: int = 9, context: int = 3) -> bytes:
    """preset: 0 … 9, always with lzma's `extreme` search; context: how many bits of a byte predict the next one."""
    return lzma.compress(raw, lzma.FORMAT_RAW, filters=[{**_lzma_filter(len(raw), preset), "lc": context}])


def lzma_unpack(blob: bytes, size: int) -> bytes:
    """The `size` bytes that were packed; ValueError for anything else."""
    stream = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[_lzma_filter(size, 0)])
    try:
        raw = stream.decompress(blob, max_length=size)
        if not stream.eof:  # the end marker stands behind the last byte
            raw += stream.decompress(b"", max_length=1)
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"lzma: {error}") from error
    return whole("lzma", raw, size, stream.eof and not stream.unused_data)


def brotli_pack(raw: bytes, quality: int = 11, window: int = 24) -> bytes:
    """quality: 0 … 11; window: log2 of its bytes, 10 … 24."""
    return bytes(brotli.compress(raw, quality=quality, lgwin=window))


def brotli_unpack(blob: bytes, size: int) -> bytes:
    """The `size` bytes that were packed; ValueError for anything else."""
    stream: Any = brotli.Decompressor()
    found: list[bytes] = []
    length, feed = 0, blob
    try:
        while length <= size and not stream.is_finished():
            piece = stream.process(feed, output_buffer_limit=min(size + 1 - length, 1 << 20))
            if not piece and stream.can_accept_more_data():
                break  # the stream ends before its end mark
            feed = b""
            found.append(piece)
            length += len(piece)
    except brotli.error as error:
        raise ValueError(f"brotli: {error}") from error
    return whole("brotli", b"".join(found), size, stream.is_finished())


def whole(name: str, raw: bytes, size: int, ended: bool) -> bytes:
    """raw, when it is all of the `size` bytes announced and its stream has ended; otherwise ValueError."""
    if len(raw) != size or not ended:
        raise ValueError(f"{name}: the stream does not hold exactly {size:,} bytes")
    return raw


def _lzma_filter(size: int, preset: int) -> dict[str, Any]:
    dictionary = min(max(1 << (size - 1).bit_length() if size > 1 else 1, 1 << 12), 1 << 26)
    return {"id": lzma.FILTER_LZMA2, "preset": preset | lzma.PRESET_EXTREME, "dict_size": dictionary}
