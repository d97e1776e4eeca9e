"""Small sections (header, scales, float16 numbers, tokenizer): compressed as well as can be, bounded on the way back.

A squeezed section is one byte of method, four of the raw length (little-endian), and the payload. Methods: 0 as it is,
1 lzma, 2 brotli, 3 two-byte numbers by their neighbours (entropy/halves.py); 16 is added to the first three where even
and odd bytes stand apart (float16: exponents compress, mantissas do not).
"""

from fairway.artifact.bytestreams import brotli_pack, brotli_unpack, lzma_pack, lzma_unpack
from fairway.base import slots

NUMBERS, APART = 3, 16
PREFIX = 5  # bytes before the payload
MOST_NUMBERS = 1 << 15  # by method 3: one takes 75 µs, and a large file gains nothing by its scales


def squeeze(raw: bytes, pairs: bool = False, neighbours: bool = False) -> bytes:
    """The smallest of the methods' results. pairs: raw holds two-byte numbers; neighbours: method 3 is tried on them,
    which a script for a byte coder's file does not carry (1,190 bytes of it)."""
    found = []
    for flag, content in [(0, raw)] + ([(APART, raw[0::2] + raw[1::2])] if pairs else []):
        found += [(flag, content), (flag + 1, lzma_pack(content)), (flag + 2, brotli_pack(content))]
    if pairs and neighbours and len(raw) % 2 == 0 and len(raw) <= 2 * MOST_NUMBERS:
        found.append((NUMBERS, slots.optional("fairway.artifact.entropy.halves").pack(raw)))
    method, payload = min(found, key=lambda item: len(item[1]))
    return bytes([method]) + len(raw).to_bytes(4, "little") + payload


def unsqueeze(blob: bytes, most: int) -> bytes:
    """The raw bytes, at most `most` of them; ValueError for anything that `squeeze` did not write."""
    if len(blob) < PREFIX:
        raise ValueError("cut short")
    method, size, payload = blob[0], int.from_bytes(blob[1:PREFIX], "little"), blob[PREFIX:]
    if size > most:
        raise ValueError(f"announces {size:,} bytes where at most {most:,} are possible")
    if method == NUMBERS:
        return bytes(slots.optional("fairway.artifact.entropy.halves").unpack(payload, size))
    if method & ~APART not in (0, 1, 2):
        raise ValueError(f"method {method} is unknown")
    if method & ~APART == 0:
        if len(payload) != size:
            raise ValueError(f"holds {len(payload):,} bytes, not {size:,}")
        content = payload
    else:
        content = (lzma_unpack if method & ~APART == 1 else brotli_unpack)(payload, size)
    if not method & APART:
        return content
    apart = bytearray(size)
    apart[0::2], apart[1::2] = content[: -(-size // 2)], content[-(-size // 2) :]
    return bytes(apart)
