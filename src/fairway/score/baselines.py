"""What general compressors make of the same text: the yardstick beside every score.

`baselines` gives each the text alone; `baselines_with_train` gives the training text as well where the format has
room for it (zstd, as a raw prefix that the decoder is assumed to hold; xz and bzip2 have none, nor brotli in Python).
"""

import bz2
import importlib
import lzma
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fairway.base.errors import DataError
from fairway.base.journal import Run

_ZSTD_LOG = (10, 31)  # windows that zstd's 64-bit format allows: 2^10 to 2^31 bytes


def baselines(text: bytes, run: Run | None = None) -> dict[str, float | None]:
    """Bits per byte of xz -9e, zstd -22, brotli -11 and bzip2 -9 on `text` alone, their containers included. A
    compressor whose package is missing is null, with a fact in the journal."""
    return _bits_per_byte(
        text,
        {
            "xz": lambda: len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
            "zstd": lambda: len(_zstd(text, b"")),
            "brotli": lambda: len(importlib.import_module("brotli").compress(text, quality=11, lgwin=24)),
            "bzip2": lambda: len(bz2.compress(text, 9)),
        },
        run or Run(),
    )


def baselines_with_train(text: bytes, train: bytes, run: Run | None = None) -> dict[str, float | None]:
    """Bits per byte where the training text is known to the compressor: zstd -22 with it as a raw prefix."""
    return _bits_per_byte(text, {"zstd": lambda: len(_zstd(text, train))}, run or Run())


def _bits_per_byte(text: bytes, sizes: dict[str, Callable[[], int]], run: Run) -> dict[str, float | None]:
    if not text:
        raise DataError("baselines: an empty text has no bits per byte")
    with ThreadPoolExecutor(max_workers=2) as pool:  # all of them let go of the interpreter while they work
        pending = {name: pool.submit(size) for name, size in sizes.items()}
        found: dict[str, float | None] = {}
        for name, future in pending.items():
            try:
                found[name] = 8 * future.result() / len(text)
            except ModuleNotFoundError as error:
                found[name] = None
                run.fact(f"baseline_{name}", missing=error.name, remedy=f"pip install {error.name}")
    return found


def _zstd(text: bytes, prefix: bytes) -> bytes:
    """zstd --ultra -22, the window as long as prefix and text together."""
    zstd: Any = _zstd_module()
    reach = max(len(prefix) + len(text), 1).bit_length()
    options = {
        zstd.CompressionParameter.compression_level: 22,
        zstd.CompressionParameter.window_log: min(max(reach, _ZSTD_LOG[0]), _ZSTD_LOG[1]),
    }
    if not prefix:
        return bytes(zstd.compress(text, options=options))
    options[zstd.CompressionParameter.enable_long_distance_matching] = 1
    return bytes(zstd.compress(text, options=options, zstd_dict=zstd.ZstdDict(prefix, is_raw=True).as_prefix))


def _zstd_module() -> Any:
    try:
        return importlib.import_module("compression.zstd")
    except ModuleNotFoundError:
        return importlib.import_module("backports.zstd")
