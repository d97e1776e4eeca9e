"""Files of text as they lie about: plain, or packed by xz, gzip, bzip2 or zstd (told by the file's suffix)."""

import bz2
import gzip
import lzma
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fairway.base.errors import DataError


def read(path: Path) -> bytes:
    """The unpacked bytes of a file. DataError where it cannot be read, is damaged or is cut short."""
    opener = _OPENERS.get(path.suffix)
    try:
        if opener is None:
            return path.read_bytes()
        with opener(path) as file:
            content: bytes = file.read()
            return content
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; set data.path to a file or folder of text") from None
    except MemoryError:
        raise DataError(f"{path}: does not fit into memory; cut it into smaller files and name fewer of them") from None
    except Exception as error:
        if not isinstance(error, _DAMAGE) and type(error).__name__ != "ZstdError":
            raise
        if opener is None or (isinstance(error, OSError) and error.errno):
            raise DataError(
                f"{path}: {getattr(error, 'strerror', None) or error}; name a file that can be read"
            ) from error
        why = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise DataError(f"{path}: damaged or cut short ({why}); fetch or pack the file again") from error


def files_of(path: Path) -> list[Path]:
    """The files of a folder and its folders, by name in a fixed order, hidden ones left out; or the one file itself."""
    if path.is_dir():
        found = (file for file in path.rglob("*") if file.is_file())
        inside = ((file.relative_to(path).parts, file) for file in found)
        return [file for parts, file in sorted(inside) if not any(part.startswith(".") for part in parts)]
    return [path]


def _zstd() -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


_DAMAGE = (OSError, EOFError, lzma.LZMAError, zlib.error)  # and ZstdError, of a module that may not be there
_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".xz": lzma.LZMAFile,
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".zst": lambda path: _zstd().ZstdFile(path),
}
