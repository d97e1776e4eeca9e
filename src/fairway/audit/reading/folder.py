"""The files of a submission's folder, and those that a script writes before it runs them; nothing outside is read."""

import posixpath
from pathlib import Path

from fairway.audit.reading import bounds


class Folder:
    """Files by their path relative to `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.written: dict[str, bytes] = {}  # what a script would have written, had it run
        self.touched: list[str] = []  # files that constants were read from, since the last text that was executed

    def find(self, path: str, beside: str = "") -> str | None:
        """The plain relative path of a file of the folder, or of a written one; `beside`: the script that names it."""
        for home in (posixpath.dirname(beside), ""):
            plain = posixpath.normpath(posixpath.join(home, path))
            if plain in self.written or self._inside(plain):
                return plain
        return None

    def read(self, plain: str) -> bytes | None:
        """A file's bytes, cut where nobody reads further."""
        if plain in self.written:
            return self.written[plain]
        try:
            with (self.root / plain).open("rb") as file:
                return file.read(bounds.FILE_BYTES + 1)
        except OSError:
            return None

    def _inside(self, plain: str) -> bool:
        try:
            real = (self.root / plain).resolve()
            return real.is_file() and real.is_relative_to(self.root)
        except (OSError, ValueError, RuntimeError):  # too long a name, a NUL in it, a circle of links
            return False
