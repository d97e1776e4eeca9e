"""Decoders and decompressors that stop before a bomb goes off."""

import base64
import binascii
import bz2
import codecs
import lzma
import zlib
from collections.abc import Callable
from typing import Any

from fairway.audit.reading import bounds

_MEMORY = 300_000_000  # bytes an lzma dictionary may ask for; preset 9 asks for 64 MiB


class Refused(ValueError):
    """Larger than what is read."""


def limited(content: bytes, decompressor: Any) -> bytes:
    """The whole output of an incremental decompressor; Refused where it outgrows the bound."""
    out = decompressor.decompress(content, bounds.UNPACKED_BYTES + 1)
    if len(out) > bounds.UNPACKED_BYTES:
        raise Refused(f"unpacks to more than {bounds.UNPACKED_BYTES:,} bytes")
    return bytes(out)


def unlzma(data: bytes, format: int = lzma.FORMAT_AUTO, memlimit: Any = None, filters: Any = None) -> bytes:
    if filters and any(int(each.get("dict_size", 0)) > _MEMORY for each in filters):
        raise Refused("an lzma dictionary beyond every use")
    if format == lzma.FORMAT_RAW:
        return limited(data, lzma.LZMADecompressor(format=format, filters=filters))
    return limited(data, lzma.LZMADecompressor(format=format, memlimit=_MEMORY))


def unzlib(data: bytes, wbits: int = 15, bufsize: int = 0) -> bytes:
    return limited(data, zlib.decompressobj(wbits))


def ungzip(data: bytes) -> bytes:
    return unzlib(data, 31)


def unbz2(data: bytes) -> bytes:
    return limited(data, bz2.BZ2Decompressor())


def unbrotli(data: bytes) -> bytes:
    import brotli

    made = brotli.Decompressor()
    parts = [made.process(data, output_buffer_limit=bounds.UNPACKED_BYTES)]
    while not made.is_finished():
        parts.append(made.process(b"", output_buffer_limit=bounds.UNPACKED_BYTES))
        if not parts[-1] or sum(map(len, parts)) > bounds.UNPACKED_BYTES:
            raise Refused("cut short, or unpacks to more than is read")
    return b"".join(parts)


def unzstd(data: bytes, *_: Any, **__: Any) -> bytes:
    from backports import zstd

    return limited(data, zstd.ZstdDecompressor())


def uncodec(data: Any, encoding: str = "utf-8", errors: str = "strict") -> Any:
    """codecs.decode for the codecs that a packed script uses."""
    plain = encoding.lower().replace("_codec", "").replace("-", "").replace("_", "")
    if plain in ("zlib", "zip", "bz2"):
        return (unbz2 if plain == "bz2" else unzlib)(data)
    if plain in ("hex", "base64", "rot13", "uu", "quopri", "unicodeescape", "rawunicodeescape"):
        return codecs.decode(data, encoding)
    return bytes(data).decode(encoding, errors)


DECODERS: dict[str, Callable[..., Any]] = {
    "base64.b85decode": base64.b85decode,
    "base64.a85decode": base64.a85decode,
    "base64.b64decode": base64.b64decode,
    "base64.standard_b64decode": base64.standard_b64decode,
    "base64.urlsafe_b64decode": base64.urlsafe_b64decode,
    "base64.decodebytes": base64.decodebytes,
    "base64.b32decode": base64.b32decode,
    "base64.b16decode": base64.b16decode,
    "binascii.unhexlify": binascii.unhexlify,
    "binascii.a2b_hex": binascii.a2b_hex,
    "binascii.a2b_base64": binascii.a2b_base64,
    "bytes.fromhex": bytes.fromhex,
    "bytearray.fromhex": bytes.fromhex,
    "codecs.decode": uncodec,
    "lzma.decompress": unlzma,
    "zlib.decompress": unzlib,
    "gzip.decompress": ungzip,
    "bz2.decompress": unbz2,
    "brotli.decompress": unbrotli,
    "brotlicffi.decompress": unbrotli,
    "zstandard.decompress": unzstd,
    "zstd.decompress": unzstd,
    "pyzstd.decompress": unzstd,
}
"""Dotted name -> what it does to constant arguments."""

LZMA_NAMES = {name: getattr(lzma, name) for name in dir(lzma) if name.startswith(("FORMAT_", "FILTER_", "CHECK_"))}
"""The constants a raw lzma stream is described with."""
